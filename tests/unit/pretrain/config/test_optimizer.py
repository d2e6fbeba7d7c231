import math

import pytest
import torch

from megatron_ladder.errors import UserError
from pretrain.config import optimizer
from pretrain.config.optimizer import OptimizerConfig, check_optimizer

IN_BF16 = OptimizerConfig(moments="bf16")


def test_moments_in_bf16_are_transformer_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="FusedAdam, which is not installed"):
        check_optimizer(IN_BF16, "bf16")
    with pytest.raises(UserError, match="needs precision bf16"):
        check_optimizer(IN_BF16, "fp32")
    check_optimizer(OptimizerConfig(), "fp32")


def test_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="FusedAdam, which needs a GPU"):
        check_optimizer(IN_BF16, "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_optimizer(IN_BF16, "bf16")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adam_beta1": -0.1}, "adam_beta1 is -0.1: it must be at least 0 and below 1"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0: it must be at least 0 and below 1"),
        ({"adam_beta2": math.nan}, "adam_beta2 is nan"),
        ({"muon_momentum": 1.0}, "muon_momentum is 1.0"),
        ({"adam_eps": -1e-8}, "adam_eps is -1e-08: it must be from 0"),
        ({"adam_eps": math.nan}, "adam_eps is nan"),
        ({"z_loss_coeff": -1.0}, "z_loss_coeff is -1.0"),
    ],
)
def test_values_that_no_optimizer_takes(fields: dict[str, float], said: str) -> None:
    OptimizerConfig(adam_beta1=0.0, adam_eps=0.0)
    with pytest.raises(UserError, match=f"optimizer.{said}"):
        OptimizerConfig(**fields)  # type: ignore[arg-type]
