"""Checks of a resumed run: the data that it has been trained on so far may not change."""

from pathlib import Path

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig, load_config
from pretrain.data.blends import Blend, blends
from pretrain.data.folders import DataFolder, kept_facts
from pretrain.run.folder import checkpoint_step, latest_checkpoint


def check_past(config: TrainConfig, folders: list[DataFolder]) -> None:
    """Refuses to resume a run with data sets or blends other than those it has been trained on.

    Data sets may be added after the old ones, and a blend may change after the newest checkpoint's step.

    Raises:
        UserError: old data sets are missing or in another order, or an earlier blend has changed.
    """
    assert config.output_dir is not None
    saved = config.output_dir / "config.json"
    if not saved.is_file():
        return
    old = load_config(saved)
    paths = old.data.paths
    if config.data.paths[: len(paths)] != paths:
        raise UserError(
            f"{config.output_dir} has been trained on data.paths {' '.join(map(str, paths))}: give these "
            "first and in this order. You may add others after them. To stop using one, give it a weight "
            "of 0 in a phase"
        )
    latest = latest_checkpoint(config.output_dir)
    step = checkpoint_step(latest) if latest else 0
    past = [b for b in blends(old, folders[: len(paths)]) if b.first_step <= step]
    now = [b for b in blends(config, folders) if b.first_step <= step]
    joined = (0.0,) * (len(folders) - len(paths))
    if [(b.first_step, (*b.shares, *joined)) for b in past] != [
        (b.first_step, b.shares) for b in now
    ]:
        was = "; ".join(_words(Blend(b.first_step, (*b.weights, *joined))) for b in past)
        raise UserError(
            f"{config.output_dir} has been trained to step {step} ({step * config.tokens_per_step:,} "
            f"tokens) with the weights {was}, but data.weights and data.phases now say "
            f"{'; '.join(map(_words, now))}. A blend may change only after that step: undo the change, "
            "and add the new blend to data.phases"
        )


def _words(blend: Blend) -> str:
    return f"{' '.join(f'{w:.17g}' for w in blend.weights)} from step {blend.first_step} on"


def check_same_data(run_dir: Path, folders: list[DataFolder]) -> None:
    """Refuses to resume a run with data sets that were made again since the run began.

    Raises:
        UserError: the tokenizer or the training text of a data set is not what it was.
    """
    if not (run_dir / "data" / "0" / "manifest.json").is_file():
        return  # the run has not started yet
    kept = kept_facts(run_dir)
    if kept[0].tokenizer["sha256"] != folders[0].tokenizer["sha256"]:
        raise UserError(
            f"{folders[0].path} was tokenized with another tokenizer than the run in {run_dir} was "
            "started with, so the same ids stand for different tokens: use the data set that the run was "
            "started with"
        )
    if kept[0].tokenizer.get("bos_id") != folders[0].tokenizer.get("bos_id"):
        raise UserError(
            f"the run in {run_dir} was started with documents "
            f"{'with' if 'bos_id' in kept[0].tokenizer else 'without'} a BOS token at their beginning, "
            f"those of {folders[0].path} are otherwise: use the data set it was started with"
        )
    for before, now in zip(kept, folders, strict=False):
        if before.manifest["splits"].get("train") != now.manifest["splits"].get("train"):
            raise UserError(
                f"{now.path} holds other training text than when the run in {run_dir} began "
                f"({before.tokens('train'):,} tokens then, {now.tokens('train'):,} now), so a resumed run "
                "would read some of the text twice: use the data set that the run was started with"
            )
