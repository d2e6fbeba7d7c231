"""The all-reduce that sums the sub-modules' outputs in inference: exact or int8."""

from typing import Any

from megatron_ladder.config import PARALLEL, STALE, AllReduce, ModelConfig, ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.layers.layer import LadderTransformerLayer


def check_all_reduce(all_reduce: AllReduce, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises UserError when the model or its layout does not allow int8 sums."""
    if all_reduce == "exact":
        return
    if parallel.tensor_model_parallel_size == 1:
        raise UserError(
            f"--all-reduce {all_reduce}: one tensor-parallel rank sums nothing; leave it out, or set "
            "--tensor-model-parallel-size"
        )
    if model.residual not in STALE | PARALLEL or model.is_standard:
        raise UserError(
            f"--all-reduce {all_reduce} is for ladder and parallel models: this one is "
            f"{'standard' if model.is_standard else model.residual}; leave it out"
        )


def set_all_reduce(decoder: Any, all_reduce: AllReduce) -> None:
    """Sets the all-reduce of all ladder layers of a model.

    Args:
        decoder: the decoder of a model that passes `check_all_reduce`. With int8 it must not be trained.
        all_reduce: exact or int8.
    """
    for layer in decoder.layers:
        if isinstance(layer, LadderTransformerLayer):
            layer.all_reduce = all_reduce
