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
