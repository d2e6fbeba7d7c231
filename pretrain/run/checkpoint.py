"""The content of checkpoints, and reading them. loop/saving.py writes them.

A checkpoint is a folder RUN/checkpoints/step_00000100 in megatron-core's distributed format. The format
stores each tensor under its global name; a rank's shard is a part of it. So any layout can read it.

Data-parallel ranks share the work. Each saves and loads its own part of the optimizer's state
(optim/shards.py). Of the weights, which they all have, each writes and reads a part.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from torch import Tensor

from megatron_ladder import cpu_platform
from megatron_ladder.errors import UserError
from megatron_ladder.mcore_checkpoints import load_in_parallel
from megatron_ladder.reading.in_megatron import says_what_is_wrong
from megatron_ladder.reading.index import check_files, read_index
from pretrain.optim.shards import FORM, optimizer_shards
from pretrain.optim.torch_adam import loading_optimizer
from pretrain.run import random_states
from pretrain.run.checkpoint_files import (
    NO_WEIGHTS,
    damage,
    damaged_message,
    refuse_damaged,
    set_aside,
)
from pretrain.run.folder import latest_checkpoint

logger = logging.getLogger(__name__)

_METADATA = {"distrib_optim_sharding_type": FORM}


@dataclass(frozen=True)
class Progress:
    """How far training has come."""

    step: int
    """Steps trained."""
    consumed_samples: int
    """Sequences trained on, by all ranks together."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last good steps; later losses are compared with them (loop/bad_steps.py)."""


def checkpoint_state(
    progress: Progress, model: list[Any], optimizer: Any, scheduler: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that a resumed run needs, in the form that megatron-core saves. Called by all ranks.

    Returns:
        The sharded state, and metadata that `load_checkpoint` reads first.
    """
    weights = _weights(model)
    averages = optimizer.ema.tensors() if optimizer.ema else None
    shards = optimizer_shards(optimizer, weights, is_loading=False, averages=averages)
    state = {
        **weights,
        "optimizer": shards.state(),
        "scheduler": scheduler.state_dict(),
        "rng": random_states.sharded_states(model[0].config),
        "progress": asdict(progress),
    }
    kinds = random_states.kinds(model[0].config)
    return state, {**_METADATA, "rng": kinds, "ema": averages is not None}


def newest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint that is not damaged; damaged ones are renamed. None when none is left.

    Called by all ranks. Each rank reads a part of the files. Rank 0 finds and renames checkpoints.
    """
    while True:
        newest = [latest_checkpoint(run_dir)]
        dist.broadcast_object_list(newest)  # on a shared disk, ranks may see different folders
        if (checkpoint := newest[0]) is None or not (what := _damage(checkpoint)):
            return checkpoint
        if dist.get_rank() == 0:
            logger.warning(
                "%s is damaged: %s. It is set aside as %s; the checkpoint before it is used",
                *(checkpoint, what, set_aside(checkpoint).name),
            )


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, "" when nothing is; the same on every rank. Called by all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    mine = damage(checkpoint, read=True, part=dist.get_rank(), parts=dist.get_world_size())
    dist.all_gather_object(found, mine)
    return next(filter(None, found), "")


@says_what_is_wrong
def load_checkpoint(path: Path, model: list[Any], optimizer: Any, scheduler: Any) -> Progress:
    """Restores model, optimizer, scheduler and random states from a checkpoint, in place.

    The checkpoint may have been written at another layout. Random states belong to a layout: at another
    one, or where the checkpoint does not say to which they belong, they are seeded anew. In training only
    dropout draws from them. Of optimizer and scheduler, what the configuration says stays: rates, decay. An
    average of the weights that the checkpoint does not have begins with its weights. Called by all ranks.
    """
    saved = dist_checkpointing.load_content_metadata(str(path))
    same_layout = saved.get("rng") == random_states.kinds(model[0].config)
    weights = {name: _without_states_of_norms(part) for name, part in _weights(model).items()}
    averages = optimizer.ema.tensors() if optimizer.ema and saved.get("ema") else None
    with loading_optimizer(optimizer):
        shards = optimizer_shards(optimizer, weights, is_loading=True, averages=averages)
        state = {**weights, "optimizer": shards.state()}
        if same_layout:
            state["rng"] = random_states.sharded_states(model[0].config)
        loaded = load_in_parallel(state, path)
        shards.restore(loaded["optimizer"])
    for name, chunk in model_chunks(model).items():
        missing, unknown = chunk.load_state_dict(loaded[name], strict=False)
        assert not unknown and all(map(_is_state_of_norm, missing)), missing
    shards.round_weights()
    if optimizer.ema and averages is None:
        optimizer.ema.begin()
    scheduler.num_steps = 0  # a step adds to it, and a rollback loads into a scheduler in use
    scheduler.step(increment=loaded["scheduler"]["num_steps"])
    progress = Progress(**loaded["progress"])
    if same_layout:
        random_states.restore(loaded["rng"])
    else:
        random_states.reseed(progress.step)
    return progress


def _without_states_of_norms(chunk: dict[str, Any]) -> dict[str, Any]:
    """Without the extra state of norms, which is empty. Transformer Engine's norms have it, but norms that
    are local, or fused with a linear, do not: the checkpoint may come from either."""
    return {name: value for name, value in chunk.items() if not _is_state_of_norm(name)}


def _is_state_of_norm(name: str) -> bool:
    return name.endswith("norm._extra_state")


@says_what_is_wrong
def load_initial_weights(checkpoint: Path, chunks: dict[str, Any]) -> None:
    """Loads only the weights of an imported model or another run, written at any layout.

    Called by all ranks.

    Args:
        chunks: this rank's chunks by name, from `model_chunks`.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if what := _damage(checkpoint):
        raise UserError(damaged_message(checkpoint, what))
    state = {name: _sharded_weights(chunk) for name, chunk in chunks.items()}
    loaded = load_in_parallel(state, checkpoint)
    for name, chunk in chunks.items():
        missing, unknown = chunk.load_state_dict(loaded[name], strict=False)
        assert not unknown and all(key.endswith("_extra_state") for key in missing), missing


def checkpoint_names(chunk: Any) -> dict[str, str]:
    """The names of a model's tensors, and for each the name in checkpoints.

    The layers' tensors have one name there, under which they are stacked.
    """
    return {name: tensor.key for name, tensor in _sharded_weights(chunk).items()}


def _sharded_weights(chunk: Any) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(True)}
    return {
        name: value
        for name, value in chunk.sharded_state_dict(metadata=metadata).items()
        if not isinstance(value, ShardedObject)  # FP8's scales, which start afresh
    }


@says_what_is_wrong
def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Reads a checkpoint's weights as whole tensors, by megatron-core's names.

    Works without a model and without a GPU, for checkpoints of any layout. The optimizer's state is not
    read.

    Returns:
        Tensors by name; those of layers are stacked along axis 0.

    Raises:
        UserError: the checkpoint is damaged.
    """
    refuse_damaged(checkpoint, read=True)
    check_files(read_index(checkpoint), checkpoint)  # whole tensors are made before they are read
    cpu_platform.enable()
    alone = not dist.is_initialized()
    if alone:  # megatron-core needs a process group to read
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        entries = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        weights = {k: v for k, v in entries.items() if not k.startswith(NO_WEIGHTS)}
        # A copy, because loading removes entries from the dictionary that it is given.
        loaded = dist_checkpointing.load(
            dict(weights), str(checkpoint), validate_access_integrity=False
        )
        return {name: loaded[name] for name in weights}
    finally:
        if alone:
            dist.destroy_process_group()


def model_chunks(model: list[Any]) -> dict[str, Any]:
    """This rank's chunks, without DDP, by the names that Megatron gives them.

    The names of the tensors in them are global: they do not depend on the layout.
    """
    if len(model) == 1:
        return {"model": model[0].module}
    return {f"model{i}": chunk.module for i, chunk in enumerate(model)}


def _weights(model: list[Any]) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(True)}
    return {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in model_chunks(model).items()
    }
