"""Checkpoints: what is in them, in megatron-core's distributed format. saving.py writes them.

A checkpoint is a folder RUN/checkpoints/step_00000100.
Tensors are stored whole by name, with the layout's shards as ranges of them: any layout can read it.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import convert_cuda_rng_state
from torch import Tensor

from megatron_ladder import cpu_platform
from megatron_ladder.errors import UserError
from pretrain.model.torch_adam import loading_optimizer
from pretrain.run.checkpoint_files import damage, damaged_message, refuse_damaged, set_aside
from pretrain.run.folder import latest_checkpoint

logger = logging.getLogger(__name__)

# Optimizer state stored as tensors of the parameters' own shapes, readable at any TP and DP.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """Where training stands."""

    step: int
    consumed_samples: int
    recent_losses: tuple[float, ...] = ()
    """Of the last steps, for what is a spike after them (bad_steps.py)."""


def checkpoint_state(
    progress: Progress, model: list[Any], optimizer: Any, scheduler: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything a resumed run needs, as megatron-core saves it. Called by all ranks.

    Returns:
        The sharded state, and what loading has to know before it.
    """
    state = _state_dict(model, optimizer, scheduler, is_loading=False)
    state["rng"] = _rng_object(_rng_state())
    state["progress"] = asdict(progress)
    return state, {**_METADATA, "world_size": dist.get_world_size()}


def newest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files are those that were written; damaged ones are set aside.

    Called by all ranks, which share the reading; rank 0 decides.
    """
    while True:
        newest = [latest_checkpoint(run_dir)]
        dist.broadcast_object_list(newest)  # a shared disk may show ranks different things
        if (checkpoint := newest[0]) is None or not (what := _damage(checkpoint)):
            return checkpoint
        if dist.get_rank() == 0:
            logger.warning(
                "%s is damaged: %s. It is set aside as %s; the one before it is used",
                *(checkpoint, what, set_aside(checkpoint).name),
            )


def _damage(checkpoint: Path) -> str:
    """The same on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    mine = damage(checkpoint, read=True, part=dist.get_rank(), parts=dist.get_world_size())
    dist.all_gather_object(found, mine)
    return next(filter(None, found), "")


def load_checkpoint(path: Path, model: list[Any], optimizer: Any, scheduler: Any) -> Progress:
    """Restores a run, at this or another layout. Called by all ranks."""
    saved = dist_checkpointing.load_content_metadata(str(path))
    # Random states belong to ranks: at another world size there is nothing to match them to, and
    # dropout, the only thing that draws from them while training, goes on from the seed's.
    same_ranks = saved["world_size"] == dist.get_world_size()
    with loading_optimizer(optimizer):
        state = _state_dict(model, optimizer, scheduler, is_loading=True)
        if same_ranks:
            state["rng"] = _rng_object(None)
        loaded = dist_checkpointing.load(state, str(path))
        optimizer.load_state_dict(loaded["optimizer"])
    for name, chunk in model_chunks(model).items():
        chunk.load_state_dict(loaded[name])
    scheduler.num_steps = 0  # loading adds to it, and a run may go back in the middle
    scheduler.load_state_dict(loaded["scheduler"])
    if same_ranks:
        _restore_rng(loaded["rng"])
    return Progress(**loaded["progress"])


def load_initial_weights(checkpoint: Path, chunks: dict[str, Any]) -> None:
    """Weights alone, of an imported model or of another run, at this or another layout.

    Args:
        chunks: a rank's models by name; `model_chunks` gives them.
    """
    if what := _damage(checkpoint):
        raise UserError(damaged_message(checkpoint, what))
    state = {name: _sharded_weights(chunk) for name, chunk in chunks.items()}
    loaded = dist_checkpointing.load(state, str(checkpoint))
    for name, chunk in chunks.items():
        missing, unknown = chunk.load_state_dict(loaded[name], strict=False)
        assert not unknown and all(key.endswith("_extra_state") for key in missing), missing


def checkpoint_names(chunk: Any) -> dict[str, str]:
    """A model's tensors by their names in it, and what checkpoints call them: a stack of all layers'."""
    return {name: tensor.key for name, tensor in _sharded_weights(chunk).items()}


def _sharded_weights(chunk: Any) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(True)}
    return {
        name: value
        for name, value in chunk.sharded_state_dict(metadata=metadata).items()
        if not isinstance(value, ShardedObject)  # FP8's scales, which begin anew
    }


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, whole, by megatron-core's names; layers stacked on axis 0.

    Needs no model and no GPU, whatever layout wrote it. The optimizer's state is not read.
    """
    refuse_damaged(checkpoint, read=True)
    cpu_platform.enable()
    alone = not dist.is_initialized()
    if alone:  # reading asks for a process group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        entries = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        weights = {k: v for k, v in entries.items() if not k.startswith("optimizer.")}
        # Copied: loading empties the names it was given.
        loaded = dist_checkpointing.load(
            dict(weights), str(checkpoint), validate_access_integrity=False
        )
        return {name: loaded[name] for name in weights}
    finally:
        if alone:
            dist.destroy_process_group()


def model_chunks(model: list[Any]) -> dict[str, Any]:
    """A rank's chunks by Megatron's names for them; the tensors in them are named globally."""
    if len(model) == 1:
        return {"model": model[0].module}
    return {f"model{i}": chunk.module for i, chunk in enumerate(model)}


def _state_dict(
    model: list[Any], optimizer: Any, scheduler: Any, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(True)}
    weights = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in model_chunks(model).items()
    }
    return {
        **weights,
        "optimizer": optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        ),
        "scheduler": scheduler.state_dict(),
    }


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "tracker": {
            name: convert_cuda_rng_state(state)
            for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    tracker = get_cuda_rng_tracker()
    if tracker.use_cudagraphable_rng:  # generators, which a graph knows: they stay
        for name, generator in tracker.get_states().items():
            generator.set_state(state["tracker"][name])
    else:
        tracker.set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _rng_object(state: dict[str, Any] | None) -> ShardedObject:
    """One rank's random states, as one of world-size many."""
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))
