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

    tensors: list[tuple[Any, dict[str, Tensor]]]
    """For each of this rank's ranges: the parameter, and its 1-D fp32 state by megatron-core's names. An
    average of the weights is not in it."""
    shards: list[ShardedTensor]
    """The same data as rectangles of tensors of the parameters' shapes. Loading fills it."""
    part: Any
    """megatron-core's distributed optimizer."""

    def state(self) -> dict[str, Any]:
        """For megatron-core's `save` and `load`."""
        shards = {str(number): shard for number, shard in enumerate(self.shards)}
        return {**self.part.state_dict(), "param_state": shards, "param_state_sharding_type": FORM}

    @torch.no_grad()
    def restore(self, loaded: dict[str, Any]) -> None:
        """Takes over what `load` has given for `state()`."""
        for number, shard in enumerate(self.shards):
            assert shard.data is not None
            shard.data.copy_(loaded["param_state"][str(number)])
        # Learning rates, weight decay and so on are those of the configuration. Adam's step is the
        # checkpoint's, where its groups have one.
        groups = self.part.state_dict()["optimizer"]["param_groups"]
        for saved in loaded["optimizer"]["param_groups"]:
            for group in groups if "step" in saved else ():
                group["step"] = saved["step"]
        self.part.load_state_dict({"optimizer": {"param_groups": groups}})
        for parameter, tensors in self.tensors:
            others = self.part._get_main_param_and_optimizer_states(parameter)  # AdamW's step
            self.part._set_main_param_and_optimizer_states(parameter, {**others, **tensors})

    @torch.no_grad()
    def round_weights(self) -> None:
        """Makes the model's weights from the master weights, as a step does. Called by all ranks.

        A checkpoint has FP8 weights in bf16 and without their scales. Quantised from that they would be
        other numbers than those that the run was stopped with.
        """
        self.part._copy_main_params_to_model_params()
        for chunk in self.part.model_chunks:
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
    (part,) = optimizer.chained_optimizers
    if is_loading:
        part.load_state_dict(part.state_dict())
    stored = {
        id(value.data): value
        for value in nested_values(weights)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    held = []
    shards: list[ShardedTensor] = []
    for parameter, start, end in own_ranges(part):
        states = part._get_main_param_and_optimizer_states(parameter)
        # AdamW's step is one number for all parameters, which state_dict has.
        tensors = {n: value.detach().float() for n, value in states.items() if n != "step"}
        held.append((parameter, tensors))
        pieces = _pieces(stored[id(parameter)], parameter.shape)
        more = {"ema": averages[parameter]} if averages else {}
        for name, tensor in (tensors | more).items():
            shards += _rectangles(tensor, start, end, pieces, f"optimizer.state.{name}.")
    return OptimizerShards(held, shards, part)


def own_ranges(part: Any) -> Iterator[tuple[Any, int, int]]:
    """This rank's parameters, with start and end of its range in each flattened parameter."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(stored: Any, shape: torch.Size) -> list[ShardedTensor]:
    """The tensors that a parameter is stored as, without data, in the order of its rows.

    It is one tensor, but for an MLP's first linear: its gate and its up projection are stored apart.
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
        pieces: from `_pieces`; each has one or two axes, beside those that stack layers.
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
