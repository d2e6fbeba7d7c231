"""`megatron-ladder merge`: the mean of several checkpoints of a run, as a run's folder with weights alone.

OUT/config.json, OUT/checkpoints/step_00000300    the mean; its step is that of the last of them
OUT/merged.json                                   of which checkpoints
OUT/data, OUT/imported                            as in the run's folder: export and eval need them
"""

import functools
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import Chunk
from megatron_ladder.hf.files.output import complete_or_absent
from megatron_ladder.hf.table import stacked_axes
from megatron_ladder.json_files import read_json
from megatron_ladder.reading.plain_files import refuse_links
from pretrain.config.places import found_from
from pretrain.config.train import load_config, save_config
from pretrain.convert.weights import CheckpointTensor, checkpoint_weights
from pretrain.convert.weights_only import write_checkpoint
from pretrain.files import write_atomically
from pretrain.run.checkpoint_files import MANIFEST, refuse_newer
from pretrain.run.folder import MERGED, checkpoint_at, checkpoint_step, checkpoints

logger = logging.getLogger(__name__)


def merge_run(
    run: Path, last: int | None, steps: Sequence[int] | None, output_dir: Path | None
) -> Path:
    """Writes the mean of checkpoints. A tensor, or a layer of it, is in memory at a time.

    Of a run in bf16 it is the mean of the fp32 master weights, rounded once.

    Args:
        run: the run's folder.
        last: that many of its newest checkpoints.
        steps: or those of these steps. Exactly one of the two is given.
        output_dir: the folder to make; None: one in RUN/merged. If it is this mean already, nothing is
            done.

    Returns:
        The folder.

    Raises:
        UserError: there are no such checkpoints, one is damaged, or the folder holds something else.
    """
    chosen = _chosen(run, last, steps)
    numbers = [checkpoint_step(path) for path in chosen]
    output_dir = output_dir or run / "merged" / f"{len(numbers)}-up-to-step-{numbers[-1]}"
    facts = {
        "run": run.resolve().name,
        "steps": numbers,
        "manifests": [_hash_of_manifest(path) for path in chosen],
    }
    if (output_dir / MERGED).is_file():
        if read_json(output_dir / MERGED, "what a mean is of") != facts:
            raise UserError(
                f"{output_dir} is the mean of other checkpoints: give another --output-dir, or remove it"
            )
        logger.info("%s is the mean of these checkpoints: nothing to do", output_dir)
        return output_dir
    with complete_or_absent(output_dir) as new:
        config = found_from(run, load_config(chosen[-1] / "config.json"))
        if config.side.is_on:
            raise UserError(f"{run} has a side network: means of such runs are not supported yet")
        config = replace(config, output_dir=output_dir.absolute())
        write_checkpoint(checkpoint_at(new, numbers[-1]), mean_of(chosen), config, "merging")
        save_config(config, new / "config.json")
        for name in (*(f"data/{n}" for n in range(len(config.data.paths))), "imported"):
            if (run / name).is_dir():
                refuse_links(run / name, home=run)
                shutil.copytree(run / name, new / name)
        write_atomically(new / MERGED, json.dumps(facts, indent=1) + "\n")
    return output_dir


def _chosen(run: Path, last: int | None, steps: Sequence[int] | None) -> list[Path]:
    """The checkpoints in the order of their steps."""
    if (last is None) == (steps is None):
        raise UserError("give either --last N or --steps A B C")
    there = checkpoints(run)
    has = f"{run} has checkpoints of steps {', '.join(str(checkpoint_step(p)) for p in there)}"
    if not there:
        raise UserError(f"{run} has no checkpoint: is it a run of `megatron-ladder train`?")
    if last is not None:
        if last < 2:
            raise UserError(f"--last {last}: give at least 2")
        if last > len(there):
            raise UserError(f"--last {last}: {has}. A run keeps --keep-last of them")
        chosen = there[-last:]
    else:
        assert steps is not None
        chosen = [checkpoint_at(run, step) for step in sorted(set(steps))]
        if missing := [checkpoint_step(path) for path in chosen if path not in there]:
            raise UserError(f"--steps {' '.join(map(str, missing))}: {has}")
        if len(chosen) < 2:
            raise UserError("--steps: give at least two different steps")
    for path in chosen:
        refuse_newer(path)
    return chosen


def _hash_of_manifest(checkpoint: Path) -> str | None:
    """Stands for all files of a checkpoint; None: an old one, without a manifest."""
    manifest = checkpoint / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def mean_of(folders: Sequence[Path]) -> list[Chunk]:
    """The tensors of the mean of checkpoints of one model, to be made one after another.

    They are summed up in fp32 in the order of `folders`, divided by their number, and rounded to the
    weights' dtype.
    """
    weights = [checkpoint_weights(folder, "master") for folder in folders]
    first, *others = (_kinds(some) for some in weights)
    if any(other != first for other in others):
        raise UserError(f"the checkpoints {', '.join(map(str, folders))} are not of one model")
    chunks = []
    for name, weight in weights[0].items():
        same = [some[name] for some in weights]
        for place in itertools.product(*map(range, weight.shape[: stacked_axes(name)])):
            make = functools.partial(_mean, same, place)
            chunks.append(Chunk(name, weight.shape, weight.dtype, place, make))
    return chunks


def _kinds(weights: dict[str, CheckpointTensor]) -> dict[str, Any]:
    return {name: (weight.shape, weight.dtype) for name, weight in weights.items()}


def _mean(same: list[CheckpointTensor], place: tuple[int, ...]) -> Tensor:
    """The mean of one part of a stacked tensor, or of a whole one."""
    which = place or slice(None)
    total = same[0].as_stored(which).float()
    for tensor in same[1:]:
        total += tensor.as_stored(which).float()
    return (total / len(same)).to(same[0].dtype)
