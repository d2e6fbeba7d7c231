"""What a run with a side network cannot have, beside what its model cannot, and what it trains."""

from typing import Any

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fields.stages import layers_of_stages
from megatron_ladder.side.config import SideConfig, check_side


def check_side_run(config: Any) -> None:
    """Refuses what does not go with side-tuning.

    Args:
        config: a TrainConfig.

    Raises:
        UserError: the reason, and what to change.
    """
    check_side(config.side, config.model)
    if not config.side.is_on:
        return
    reasons = {
        "the backbone keeps no activations, so recompute would save nothing: leave it out": (
            config.recompute != "none"
        ),
        "the backbone in FP8 is not supported yet: leave fp8.recipe out": bool(config.fp8.recipe),
        "compiled layers are not supported: leave --compile out": config.compile,
        "context parallelism is not supported yet: set parallel.context_parallel_size to 1": (
            config.parallel.context_parallel_size > 1
        ),
        "an average of its weights is not supported yet: leave optimizer.ema_decay out": (
            config.optimizer.ema_decay is not None
        ),
        "branches of such a run are not supported yet: give --init-from, and begin anew": (
            config.branch_from is not None
        ),
        "CUDA graphs are not supported: leave --cuda-graph out": config.cuda_graph,
        "the backbone does not adapt: leave adapt.gradual_steps and adapt.distillation_weight out": bool(
            config.adapt.gradual_steps or config.adapt.distillation_weight
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"side-tuning (side.reduction): {reason}")


def check_side_layout(side: SideConfig, model: Any, parallel: ParallelConfig) -> None:
    """Checks that a layout can cut the side network, and that each part has a block of it.

    Args:
        model: with `vocab_size` set.

    Raises:
        UserError: what does not fit.
    """
    if not side.is_on:
        return
    tp, small = parallel.tensor_model_parallel_size, side.model(model)
    if small.ffn_hidden_size % tp:
        raise UserError(
            f"side.reduction {side.reduction} leaves an MLP of width {small.ffn_hidden_size}, which "
            f"parallel.tensor_model_parallel_size {tp} does not divide: change one of them"
        )
    kept, first, chunks = side.kept_layers(model.num_layers), 0, parallel.num_chunks
    for size in [n // chunks for n in layers_of_stages(model.num_layers, parallel)] * chunks:
        if not any(first <= layer < first + size for layer in kept):
            raise UserError(
                f"side.dropped_layers leaves no block of the side network beside layers {first} to "
                f"{first + size - 1}, a part of the model in this layout: keep one of them, or use fewer "
                "pipeline stages"
            )
        first += size


def trained_parameters(config: Any) -> int:
    """The number of parameters that a run trains: the model's, or its side network's.

    Args:
        config: a TrainConfig.
    """
    model, side = config.model, config.side
    count: int = side.num_parameters(model) if side.is_on else model.num_parameters()
    return count
