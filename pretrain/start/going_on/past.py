"""Checks of a resumed run or a branch: it keeps the data sets that it has been trained on so far.

Data sets are compared by their manifests. Their folders may have been moved, renamed or written otherwise.
"""

from dataclasses import replace
from pathlib import Path

from megatron_ladder.errors import UserError
from pretrain.config.train import load_config
from pretrain.data.folders import DataFolder, kept_facts, same_ids
from pretrain.run.folder import latest_checkpoint


def same_data(
    run_dir: Path, folders: list[DataFolder], trunk: Path | None = None
) -> list[DataFolder]:
    """Refuses to go on with other data sets than those that were trained on so far, or in another order.

    Args:
        run_dir: the run's folder.
        folders: of data.paths as they are given now.
        trunk: of a branch that is about to begin, the checkpoint that it begins with.

    Returns:
        `folders`, with the names that they had when the run began: sequences depend on them
        (fill-in-the-middle), and metrics go by them.

    Raises:
        UserError: a data set is missing, has moved to another place in the order, or holds other tokens.
    """
    saved = run_dir / "config.json"
    started = (run_dir / "data" / "0" / "manifest.json").is_file() or latest_checkpoint(run_dir)
    if trunk:
        run_dir = trunk.parents[1]
        paths = load_config(trunk / "config.json").data.paths
        kept = kept_facts(run_dir, paths)[: len(paths)]  # others may have joined later
    elif saved.is_file() and started:
        paths = load_config(saved).data.paths
        kept = kept_facts(run_dir, paths)
    else:
        return folders
    if not same_ids(kept[0], folders[0]):
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
    in_place = [is_same(*pair) for pair in zip(kept, folders, strict=False)]
    here = [any(is_same(before, now) for now in folders) for before in kept]
    if len(folders) < len(kept) or (all(here) and not all(in_place)):
        names = " ".join(map(str, paths or [before.name for before in kept]))
        raise UserError(
            f"{run_dir} has been trained on data.paths {names}: give these first and in this order, "
            "wherever they are now. You may add others after them. To stop using one, give it a weight of "
            "0 in a phase"
        )
    if not all(in_place):
        number = in_place.index(False)
        before, now = kept[number], folders[number]
        raise UserError(
            f"{now.path} holds other training text than {before.name}, which the run in {run_dir} began "
            f"with ({before.tokens('train'):,} tokens then, {now.tokens('train'):,} now), so a resumed run "
            "would read some of the text twice: use the data set that the run was started with"
        )
    first_names = [before.name for before in kept] + [""] * (len(folders) - len(kept))
    return [replace(now, first_name=name) for now, name in zip(folders, first_names, strict=True)]


def is_same(one: DataFolder, other: DataFolder) -> bool:
    """Whether two data sets have the same training tokens, with the same meaning."""
    return (
        same_ids(one, other)
        and one.manifest["dtype"] == other.manifest["dtype"]
        and one.manifest["splits"].get("train") == other.manifest["splits"].get("train")
    )
