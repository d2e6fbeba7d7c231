"""The optimizer's part of a run's configuration."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from megatron_ladder.config import Precision
from megatron_ladder.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the paper's values (arXiv 2501.06589, section 4.1); Muon for the layers' matrices."""

    optimizer: Literal["adam", "muon"] = "adam"
    """muon: the layers' matrices by Muon, all other parameters by AdamW, with one learning rate."""
    muon_momentum: float = 0.95
    """Muon's momentum, which is Nesterov's."""
    lr: float = 3e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10
    weight_decay: float = 0.1
    """Norm weights, biases and learned scales are not decayed; embeddings are."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 clips nothing."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Of Adam's two moments. bf16 takes 8 bytes a parameter of the optimizer's 12; it needs precision
    bf16 and Transformer Engine's FusedAdam."""
    z_loss_coeff: float = 0.0
    """z-loss: this times the mean of log^2 Z is added to what is trained, where Z is the sum of the
    exponentials of a token's logits. PaLM has 1e-4. 0: none."""
    ema_decay: float | None = None
    """Also keep an average of the weights: after each step ema = ema_decay * ema + (1 - ema_decay) *
    weights, in fp32. None: do not. `export --weights ema` writes it."""

    def __post_init__(self) -> None:
        for name in ("muon_momentum", "adam_beta1", "adam_beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"optimizer.{name} is {value}: it must be at least 0 and below 1")
        for name in ("adam_eps", "z_loss_coeff"):
            if not 0 <= (value := getattr(self, name)) <= 1e6:  # so written, it refuses NaN
                raise UserError(f"optimizer.{name} is {value}: it must be from 0 to 1,000,000")
        if self.optimizer == "muon" and self.moments != "fp32":
            raise UserError(
                f"optimizer.optimizer muon with optimizer.moments {self.moments} is not supported: leave "
                "out one of them"
            )
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


def refuse_together(
    optimizer: OptimizerConfig,
    *,
    experts: bool,
    side: bool,
    primary_weights: bool,
    distillation: bool,
) -> None:
    """Refuses what does not go with the optimizer, or with its loss.

    Raises:
        UserError: it names both.
    """
    muon = optimizer.optimizer == "muon"
    refused = {
        # Then the optimizer alone has the master weights, and a start cannot quantise from them.
        "fp8.primary_weights with optimizer.moments bf16": primary_weights
        and optimizer.moments == "bf16",
        "fp8.primary_weights with optimizer.optimizer muon": primary_weights and muon,
        "optimizer.optimizer muon with experts": experts and muon,
        "optimizer.optimizer muon with a side network": side and muon,
        "optimizer.z_loss_coeff with adapt.distillation_weight": distillation
        and optimizer.z_loss_coeff > 0,
    }
    for both, holds in refused.items():
        if holds:
            raise UserError(f"{both} is not supported: leave out one of them")


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
