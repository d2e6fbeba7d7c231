"""The optimizer's part of a run's configuration."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from megatron_ladder.config import Precision
from megatron_ladder.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the paper's values (arXiv 2501.06589, section 4.1)."""

    lr: float = 3e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    weight_decay: float = 0.1
    """Norm weights are not decayed."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 clips nothing."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Of Adam's two moments. bf16 takes 8 bytes a parameter of the optimizer's 12; it needs precision
    bf16 and Transformer Engine's FusedAdam."""
    ema_decay: float | None = None
    """Also keep an average of the weights: after each step ema = ema_decay * ema + (1 - ema_decay) *
    weights, in fp32. None: do not. `export --weights ema` writes it."""

    def __post_init__(self) -> None:
        if self.ema_decay is None:
            return
        if not 0 < self.ema_decay < 1:
            raise UserError(
                f"optimizer.ema_decay is {self.ema_decay}: it must be above 0 and below 1, such as 0.999"
            )
        if self.moments != "fp32":
            raise UserError(
                f"optimizer.ema_decay with optimizer.moments {self.moments} is not supported: leave out "
                "one of them"
            )


def check_optimizer(optimizer: OptimizerConfig, precision: Precision) -> None:
    """Refuses optimizer.moments bf16 where no optimizer on this machine supports it.

    Raises:
        UserError: the precision is not bf16, Transformer Engine is not installed, or there is no GPU.
    """
    if optimizer.moments == "fp32":
        return
    if precision != "bf16":
        raise UserError(
            f"optimizer.moments {optimizer.moments} needs precision bf16 (it is {precision}): give "
            "--precision bf16, or leave the moments in fp32"
        )
    import torch  # imported here, because the command line starts without torch

    have_te = find_spec("transformer_engine") is not None
    if not have_te or not torch.cuda.is_available():
        missing = "needs a GPU: there is none" if have_te else "is not installed"
        raise UserError(
            f"optimizer.moments {optimizer.moments} needs Transformer Engine's FusedAdam, which {missing}: "
            "see `megatron-ladder doctor`, or leave the moments in fp32"
        )
