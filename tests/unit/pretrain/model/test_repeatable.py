"""What --deterministic asks CUDA's libraries for."""

import os
from collections.abc import Iterator

import pytest
import torch

from megatron_ladder.errors import UserError
from pretrain.model.setup import make_repeatable


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_nccl_adds_in_an_order_of_its_own() -> None:
    make_repeatable()
    assert os.environ["NCCL_ALGO"] == "Ring,Tree"
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("given", ["Ring", "tree", "Tree, Ring", "^NVLS"])
def test_what_the_environment_asks_for_stays(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", given)
    make_repeatable()
    assert os.environ["NCCL_ALGO"] == given


@pytest.mark.parametrize("given", ["NVLS", "Ring,NVLS", "^Ring", "allreduce:nvls"])
def test_sums_in_the_order_of_arrival_are_refused(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_ALGO", given)
    with pytest.raises(UserError, match=r"NCCL_ALGO is .* Unset it, or give Ring or Tree"):
        make_repeatable()
