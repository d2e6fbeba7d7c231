"""The optimizer's state in a checkpoint: each rank saves and loads its own part, and nothing is gathered.

megatron-core's distributed optimizer gives each data-parallel rank ranges of the flattened parameters. A
checkpoint has AdamW's moments and the master weights as tensors of the parameters' shapes, under
megatron-core's names (its `fully_reshardable` form), so any layout can read it. To save them megatron-core
gathers whole tensors on every rank; to load them it reads whole tensors and cuts them. Here a range becomes
rectangles of the parameter, at most three for a matrix: the same tensors, stored in other pieces.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

FORM = "fully_reshardable"


@dataclass(frozen=True)
class OptimizerShards:
    """This rank's part of the optimizer's state.

    Make it for one save or one load: it refers to tensors of the optimizer, which a step may replace.
    """

    tensors: list[tuple[Any, Any, dict[str, Tensor]]]
    """For each of this rank's ranges: its part, the parameter, and the 1-D fp32 state by megatron-core's
    names. An average of the weights is not in it."""
    shards: list[ShardedTensor]
    """The same data as rectangles of tensors of the parameters' shapes. Loading fills it."""
    parts: list[Any]
    """megatron-core's distributed optimizers: one, and in some layouts a second one for experts, whose
    gradients are summed over other ranks."""

    def state(self) -> dict[str, Any]:
        """For megatron-core's `save` and `load`.

        Parameter groups are those of the first part, in every layout: the second part's are like them.
        """
        shards = {str(number): shard for number, shard in enumerate(self.shards)}
        first = self.parts[0].state_dict()
        return {**first, "param_state": shards, "param_state_sharding_type": FORM}

    @torch.no_grad()
    def restore(self, loaded: dict[str, Any]) -> None:
        """Takes over what `load` has given for `state()`."""
        for number, shard in enumerate(self.shards):
            assert shard.data is not None
            shard.data.copy_(loaded["param_state"][str(number)])
        for part in self.parts:
            groups = _groups_of(part, loaded["optimizer"])
            part.load_state_dict({"optimizer": {"param_groups": groups}})
        for part, parameter, tensors in self.tensors:
            others = part._get_main_param_and_optimizer_states(parameter)  # AdamW's step
            part._set_main_param_and_optimizer_states(parameter, {**others, **tensors})

    @torch.no_grad()
    def round_weights(self) -> None:
        """Makes the model's weights from the master weights, as a step does. Called by all ranks.

        A checkpoint has FP8 weights in bf16 and without their scales. Quantised from that they would be
        other numbers than those that the run was stopped with.
        """
        for part in self.parts:
            part._copy_main_params_to_model_params()
        for chunk in self.parts[0].model_chunks:
            # At once, where gathering overlaps forward, too: within `gathered_parameters` (a rollback) the
            # next forward would take the weights for gathered.
            chunk.start_param_sync(force_sync=True)


def optimizer_shards(
    optimizer: Any,
    weights: dict[str, Any],
    *,
    is_loading: bool,
    averages: dict[Any, Tensor] | None = None,
) -> OptimizerShards:
    """Finds this rank's part of the optimizer's state.

    Args:
        optimizer: from `build_optimizer`.
        weights: the sharded state of the model's chunks.
        is_loading: first make the state's tensors, if no step has made them.
        averages: of the weights (ema.py), to be saved or loaded too.
    """
    parts = parts_of(optimizer)
    if is_loading:
        for part in parts:
            part.load_state_dict(part.state_dict())
        if optimizer.muon:
            optimizer.muon.keep_momentum_alone()
    stored = {
        id(value.data): value
        for value in nested_values(weights)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    held = []
    shards: list[ShardedTensor] = []
    for part, (parameter, start, end) in ((p, own) for p in parts for own in own_ranges(p)):
        states = part._get_main_param_and_optimizer_states(parameter)
        # AdamW's step is one number for all parameters, which state_dict has.
        tensors = {n: value.detach().float() for n, value in states.items() if n != "step"}
        held.append((part, parameter, tensors))
        pieces = _pieces(stored[id(parameter)], parameter.shape)
        more = {"ema": averages[parameter]} if averages else {}
        for name, tensor in (tensors | more).items():
            shards += _rectangles(tensor, start, end, pieces, f"optimizer.state.{name}.")
    return OptimizerShards(held, shards, parts)


def parts_of(optimizer: Any) -> list[Any]:
    """megatron-core's distributed optimizers that have parameters on this rank.

    A pipeline stage may have no experts; then the experts' part has none.
    """
    return [
        part
        for part in optimizer.chained_optimizers
        if any(group["params"] for group in part.optimizer.param_groups)
    ]


def _groups_of(part: Any, saved: dict[str, Any]) -> list[dict[str, Any]]:
    """This part's parameter groups, whose learning rates, weight decay and so on are the configuration's.
    Adam's step is the checkpoint's, where its groups have one."""
    groups = part.state_dict()["optimizer"]["param_groups"]
    steps = {group["step"] for group in saved["param_groups"] if "step" in group}
    if not steps:
        return groups
    (step,) = steps
    return [{**group, "step": step} for group in groups]


def own_ranges(part: Any) -> Iterator[tuple[Any, int, int]]:
    """This rank's parameters, with start and end of its range in each flattened parameter."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(stored: Any, shape: torch.Size) -> list[ShardedTensor]:
    """The tensors that a parameter is stored as, without data, in the order of its rows.

    It is one tensor, but for the first linear of an MLP or an expert: its gate and its up projection are
    stored apart.
    """
    if isinstance(stored, ShardedTensor):
        return [stored]
    built = replace(stored, data=torch.empty(shape, device="meta")).build()
    pieces = list(nested_values(built))
    assert sum(piece.local_shape[0] for piece in pieces) == shape[0], pieces
    return pieces


def _rectangles(
    tensor: Tensor, start: int, end: int, pieces: list[ShardedTensor], prefix: str
) -> Iterator[ShardedTensor]:
    """Cuts a range of a flattened parameter into rectangles of the tensors that it is stored as.

    Args:
        tensor: the range's values, [end - start].
        start, end: the range.
        pieces: from `_pieces`; each has one or two axes, beside those that stack layers and experts.
        prefix: of the stored tensors' names.
    """
    first = 0  # of the piece, in the flattened parameter
    for piece in pieces:
        size = math.prod(piece.local_shape)
        low, high = max(start, first), min(end, first + size)
        columns = piece.local_shape[-1]
        for begin, stop in _runs(low - first, high - first, columns):
            row, column = divmod(begin, columns)
            rows = max(1, (stop - begin) // columns)
            axes = slice(2 - len(piece.local_shape), 2)
            shape, offset = (rows, (stop - begin) // rows)[axes], (row, column)[axes]
            stacked = piece.prepend_axis_num
            ours = tuple(
                a + b for a, b in zip(piece.global_offset, (0,) * stacked + offset, strict=True)
            )
            values = tensor[first + begin - start : first + stop - start]
            yield ShardedTensor(
                key=prefix + piece.key,
                data=values.view((1,) * stacked + shape),
                dtype=tensor.dtype,
                local_shape=(1,) * stacked + shape,
                global_shape=piece.global_shape,
                global_offset=ours,
                axis_fragmentations=None,  # the pieces form no grid
                replica_id=(*piece.replica_id[:2], 0),  # no other data-parallel rank has this range
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )
        first += size


def _runs(begin: int, end: int, columns: int) -> Iterator[tuple[int, int]]:
    """Cuts a range of a flattened matrix into the rest of a row, whole rows, and the beginning of a row."""
    while begin < end:
        if begin % columns:
            stop = min(end, begin - begin % columns + columns)
        elif end - begin < columns:
            stop = end
        else:
            stop = end - end % columns
        yield begin, stop
        begin = stop
