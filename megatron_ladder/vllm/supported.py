"""What a model may not have for the plug-in."""

from typing import Any


def check_supported(config: Any) -> None:
    """Raises ValueError for what the plug-in's layers would leave out.

    Args:
        config: a `LadderConfig`.
    """
    if config.num_experts is not None:
        raise ValueError(
            "the model has experts: the plug-in's layers have none. Serve this model with "
            "`megatron-ladder serve` or with transformers"
        )
    if not config.layer_norms:
        raise ValueError(
            "layer_norms is false: the plug-in's layers have norms. Serve this model with "
            "`megatron-ladder serve` or with transformers"
        )
    if config.residual_scaling != "none":
        raise ValueError(
            f"residual_scaling is {config.residual_scaling}: the plug-in adds outputs as they are. Serve "
            "this model with `megatron-ladder serve` or with transformers. Where 1/n or 1/sqrt(n) is a "
            "power of two, `megatron-ladder export` writes it into the weights, for bf16 and fp32"
        )
