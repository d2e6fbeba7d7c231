"""An import that is there already: whether a folder holds what would be written."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import Chunk
from megatron_ladder.hf.files.output import refuse_others
from megatron_ladder.hf.files.stored import bytes_of
from pretrain.config.train import TrainConfig, differences, load_config
from pretrain.convert.weights import checkpoint_weights
from pretrain.run.checkpoint_files import MANIFEST
from pretrain.run.folder import checkpoint_at


def refuse_other_imports(
    output_dir: Path, source: Path, chunks: Sequence[Chunk], config: TrainConfig, kept: Path
) -> None:
    """Compares a run's folder with an import, byte by byte.

    Args:
        source: the model's folder, for the message.
        chunks: the weights that the checkpoint should hold.
        config: the configuration that it should have; only `output_dir` may be written in another way.
        kept: a folder with the other files that it should have.

    Raises:
        UserError: something differs, or the checkpoint is damaged.
    """
    try:
        _compare(output_dir, chunks, config, kept)
    except UserError as error:
        raise UserError(
            f"{output_dir} is not empty and not the import of {source} with these options: {error}. Choose "
            "another output folder, or remove it"
        ) from error


def _compare(output_dir: Path, chunks: Sequence[Chunk], config: TrainConfig, kept: Path) -> None:
    checkpoint = checkpoint_at(output_dir, 0)
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{checkpoint / MANIFEST} is missing")
    changed = differences(load_config(output_dir / "config.json"), config).keys() - {"output_dir"}
    if changed:
        raise UserError(f"config.json differs in {', '.join(sorted(changed))}")
    files = sorted(path for path in kept.rglob("*") if path.is_file())
    refuse_others(output_dir, ((str(p.relative_to(kept)), p.read_bytes()) for p in files))
    weights = checkpoint_weights(checkpoint)
    for chunk in chunks:
        stored = weights.get(chunk.name)
        if stored is None or stored.dtype != chunk.dtype or stored.shape != chunk.shape:
            raise UserError(f"{chunk.name} has another shape or dtype")
        if bytes_of(stored[chunk.index].contiguous()) != bytes_of(chunk.make().contiguous()):
            raise UserError(f"{chunk.name} differs")
