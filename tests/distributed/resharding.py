"""Every layout's checkpoint, opened at every layout: does it open, and are all values the same?

    python -m tests.distributed.resharding write FOLDER
    python -m tests.distributed.resharding read FOLDER --json FILE

`write` trains a small model one step on random gradients at each layout. It saves a checkpoint as the
project does, and another as earlier versions did ("gathered": megatron-core gathers the optimizer's state
and rank 0 writes it). `read` opens each at each layout, saves it there, and compares all tensors, bit by
bit. The two may run with different versions of megatron-core.
"""

import argparse
import itertools
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.distributed.checkpoint import load as dcp_load

from megatron_ladder.config import Precision
from megatron_ladder.mcore_checkpoints import BackgroundSave, SharedSaving
from pretrain.config.train import TrainConfig
from pretrain.optim.optimizer import gathered_parameters
from pretrain.run.checkpoint import Progress, checkpoint_state, load_checkpoint, model_chunks
from pretrain.run.checkpoint_files import sums
from tests.distributed.layouts import Layout, configuration, start
from tests.ranks import run_ranks

LAYOUTS = {
    "1 rank": Layout(),
    "TP 2": Layout(tp=2, sp=True),
    "PP 2": Layout(pp=2),
    "DP 2": Layout(dp=2),
    "DP 3": Layout(dp=3),
    "TP 4": Layout(tp=4, sp=True),
    "TP 2, PP 2": Layout(tp=2, pp=2),
    "TP 2, DP 2": Layout(tp=2, dp=2),
    "PP 2 in 2 chunks, DP 2": Layout(pp=2, vpp=2, dp=2),
    "DP 4": Layout(dp=4),
    "CP 2, DP 2": Layout(cp=2, dp=2),
}
OF_EXPERTS = {
    "experts on 1 rank": Layout(),
    "EP 2": Layout(dp=2, ep=2),
    "TP 2, EP 1": Layout(tp=2, sp=True),
    "DP 3, EP 1": Layout(dp=3),
    "TP 2, EP 2": Layout(tp=2, sp=True, ep=2),
    "PP 2 in 2 chunks, EP 2": Layout(pp=2, vpp=2, dp=2, ep=2),
    "EP 4": Layout(dp=4, ep=4),
    "DP 4, EP 2": Layout(dp=4, ep=2),
    "TP 2, DP 2, EP 2": Layout(tp=2, sp=True, dp=2, ep=2),
}
"""Of a model with experts, whose checkpoints only these open."""
EVERY_LAYOUT = LAYOUTS | OF_EXPERTS
FORMS = ("shards", "gathered")
EMA = "optimizer.state.ema."


def small(name: str, *, shared: bool = False) -> TrainConfig:
    """Row lengths that no data-parallel range ends at, so that ranges end within rows."""
    kind = "expert bias" if name in OF_EXPERTS else "ladder"
    config = configuration(kind, EVERY_LAYOUT[name])
    model = replace(
        config.model,
        num_layers=4,
        hidden_size=40,
        ffn_hidden_size=56,
        share_embeddings_and_output_weights=shared,
    )
    optimizer = replace(config.optimizer, ema_decay=0.9)
    precision: Precision = "fp32" if shared else "bf16"
    return replace(config, model=model, optimizer=optimizer, precision=precision)


def write_layout(name: str, folder: Path, shared: bool, forms: tuple[str, ...]) -> None:
    """A layout's checkpoints in all forms (FOLDER/form/name), and their tensors (FOLDER/name.pt)."""
    parts = start(small(name, shared=shared))
    step_at_random(*parts)
    for form in forms:
        if form == "shards":
            save_as_runs_do(parts, folder / form / name)
        else:
            save(parts, folder / form / name, gathered_state)
    if dist.get_rank() == 0:
        torch.save(whole(folder / forms[0] / name), folder / f"{name}.pt")
    dist.barrier()


def read_layout(
    name: str, folder: Path, shared: bool, forms: tuple[str, ...], sources: list[str]
) -> dict[str, dict[str, str]]:
    """By form and the layout that has written it: "bitwise", or what differs when `name` opens it."""
    parts = start(small(name, shared=shared))
    found: dict[str, dict[str, str]] = {form: {} for form in forms}
    for form, source in itertools.product(forms, sources):
        step_at_random(*parts)  # what is loaded must replace what is there
        load_checkpoint(folder / form / source, *parts)
        again = folder / "again" / form / source / name
        save(parts, again)
        if dist.get_rank() == 0:
            wrong = differences(expected(folder / f"{source}.pt", form), whole(again))
            found[form][source] = wrong or "bitwise"
            shutil.rmtree(again)
        dist.barrier()
    return found


def step_at_random(model: list[Any], optimizer: Any, _scheduler: Any) -> None:
    torch.manual_seed(dist.get_rank())
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_()
    optimizer.step()
    if optimizer.ema:
        optimizer.ema.update()


def save_as_runs_do(parts: tuple[Any, Any, Any], folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    with gathered_parameters(parts[0]):
        state, metadata = checkpoint_state(Progress(1, 8), *parts)
        saving = BackgroundSave(state, folder, metadata, sums, SharedSaving())
        saving.is_written(wait=True)
    error, _ = saving.result()
    assert not error, error
    if dist.get_rank() == 0:
        saving.write_index()
    dist.barrier()


def save(parts: tuple[Any, Any, Any], folder: Path, of: Any = checkpoint_state) -> None:
    """Waits for it, and needs no process beside the ranks."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    with gathered_parameters(parts[0]):
        state, metadata = of(Progress(1, 8), *parts)
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    dist.barrier()


def gathered_state(
    progress: Progress, model: list[Any], optimizer: Any, scheduler: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What earlier versions saved. megatron-core gathers the optimizer's state."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    group = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    weights = {
        name: chunk.sharded_state_dict(metadata={**metadata, **group})
        for name, chunk in model_chunks(model).items()
    }
    ranks, rank = dist.get_world_size(), dist.get_rank()
    state = {
        **weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata),
        "scheduler": scheduler.state_dict(),
        "rng": ShardedObject("rng", {"cpu": torch.get_rng_state()}, (ranks,), (rank,)),
        "progress": asdict(progress),
    }
    return state, {**metadata, "world_size": ranks}


def whole(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint but the random states, which belong to a layout."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("rng.")
    }
    dcp_load(dict(tensors), checkpoint_id=checkpoint, no_dist=True)
    return tensors


def expected(file: Path, form: str) -> dict[str, Tensor]:
    """Earlier versions kept no average of the weights. It begins with the master weights."""
    tensors = torch.load(file)
    if form == "gathered":
        for name in [name for name in tensors if name.startswith(EMA)]:
            tensors[name] = tensors[name.replace(EMA, "optimizer.state.param.")]
    return tensors


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    if one.keys() != other.keys():
        return f"not in both: {sorted(one.keys() ^ other.keys())}"
    return ", ".join(name for name in one if not torch.equal(one[name], other[name]))


def write(
    folder: Path, scratch: Path, names: list[str], *, shared: bool = False, forms: Any = FORMS
) -> None:
    for name in names:  # each in new processes: gloo keeps the threads of old groups
        ranks = EVERY_LAYOUT[name].ranks
        run_ranks(ranks, write_layout, name, folder, shared, forms, tmp_path=scratch)


def read(
    folder: Path,
    scratch: Path,
    sources: dict[str, list[str]],
    *,
    shared: bool = False,
    forms: Any = FORMS,
) -> dict[str, dict[str, dict[str, str]]]:
    """By form, the layout that opens and the layout that has written: "bitwise", or what differs.

    Args:
        sources: the layouts that open, and for each whose checkpoints.
    """
    found: dict[str, dict[str, dict[str, str]]] = {form: {} for form in forms}
    for name, written in sources.items():
        ranks = EVERY_LAYOUT[name].ranks
        first, *_ = run_ranks(
            ranks, read_layout, name, folder, shared, forms, written, tmp_path=scratch
        )
        for form, row in first.items():
            found[form][name] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    installed = version("megatron-core")
    with tempfile.TemporaryDirectory() as scratch:
        if options.what == "write":
            write(options.folder, Path(scratch), list(LAYOUTS))
            (options.folder / "version").write_text(installed)
            return
        found = read(options.folder, Path(scratch), {name: list(LAYOUTS) for name in LAYOUTS})
    report = {
        "written_by": (options.folder / "version").read_text(),
        "read_by": installed,
        "cells": found,
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    cells = [cell for rows in found.values() for row in rows.values() for cell in row.values()]
    print(f"{len(cells)} cells, {cells.count('bitwise')} bitwise the same")


if __name__ == "__main__":
    main()
