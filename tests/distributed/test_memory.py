"""All ranks plan with the memory of the smallest card among theirs."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from pretrain.model.setup import smallest_card
from tests.ranks import run_ranks


def of_a_card_of_its_own() -> int:
    card = SimpleNamespace(total_memory=80_000_000_000 - dist.get_rank())
    torch.cuda.get_device_properties = lambda _: card
    return smallest_card()


def test_the_smallest_card(tmp_path: Path) -> None:
    assert run_ranks(2, of_a_card_of_its_own, tmp_path=tmp_path) == [79_999_999_999] * 2
