"""From a run's checkpoint to a Hugging Face folder."""

import logging
from pathlib import Path

import torch
from megatron_ladder.hf.export import export_folder

from megatron_ladder.errors import UserError
from megatron_ladder.hf.model_config import to_hf_config
from pretrain.checkpoint import load_weights
from pretrain.config import load_config
from pretrain.data import open_folder
from pretrain.run_folder import latest_checkpoint

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(run: Path, output_dir: Path, dtype: str | None, max_shard_size: str) -> Path:
    """Writes the newest checkpoint of a run (or the given one) as a Hugging Face folder.

    Args:
        run: the run's folder, or a checkpoint of it.
        output_dir: made; refused when it holds something.
        dtype: "fp32", "bf16" or "fp16"; None keeps the run's precision.
        max_shard_size: of one safetensors file, such as "5GB".

    Raises:
        UserError: no such run or checkpoint, its tokenizer is gone, or the output is in use.
    """
    checkpoint = _find_checkpoint(run)
    config = load_config(checkpoint / "config.json")
    data = open_folder(config.data.paths[0])
    return export_folder(
        load_weights(checkpoint),
        to_hf_config(config.model, data.tokenizer["eod_id"]),
        data.path / data.tokenizer["file"],
        output_dir,
        max_shard_size=max_shard_size,
        dtype=DTYPES[dtype or config.precision],
        model_card_facts=_facts(checkpoint, config),
    )


def _find_checkpoint(run: Path) -> Path:
    if not run.is_dir():
        raise UserError(f"run {run} does not exist")
    if run.parent.name == "checkpoints" and (run / "config.json").is_file():
        return run
    latest = latest_checkpoint(run)
    if latest is None:
        raise UserError(f"{run} has no checkpoint: is it a run of `megatron-ladder train`?")
    return latest
