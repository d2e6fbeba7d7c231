"""What CUDA's allocator is told: on a GPU memory that a collective reads must not be given out again."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.collectives import flight, names
from megatron_ladder.collectives.points import SubmoduleCollectives


class TwoRanks:
    def size(self) -> int:
        return 2


class Work:
    def wait(self) -> None:
        pass


def test_what_a_collective_reads_is_kept_by_the_stream_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL lets go of it when somebody waits, whichever stream made it."""
    read: list[Tensor] = []
    kept: list[Tensor] = []

    def collective(_: Tensor, x: Tensor, **__: Any) -> Work:
        read.append(x)
        return Work()

    def used_here(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    monkeypatch.setattr(dist, names.ALL_GATHER, collective)
    monkeypatch.setattr(dist, names.REDUCE_SCATTER, collective)
    monkeypatch.setattr(flight, "used_here", used_here)
    group: Any = TwoRanks()
    shard, whole = torch.ones(2, 1, 4), torch.ones(4, 1, 4)
    submodule = SubmoduleCollectives(group, sequence_parallel=True)
    results = [submodule.start_input(shard)]
    submodule.wait_input()
    assert submodule.gather_input_again()
    results.append(submodule.start_output(whole.clone()))
    submodule.wait_output()
    submodule.start_output_gradient(shard.clone())
    results.append(submodule.wait_output_gradient())
    results.append(submodule.wait_input_again())
    submodule.start_input_gradient(whole.transpose(0, 2))  # copied first
    results.append(submodule.wait_input_gradient())
    assert len(read) == 5
    for x in [*read, *results]:
        assert any(x is y for y in kept)


def test_the_sum_of_an_input_that_two_linears_read_starts_with_the_second_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summed: list[Tensor] = []

    def all_reduce(x: Tensor, **_: Any) -> Work:
        summed.append(x)
        return Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    own = SubmoduleCollectives(Mock(size=lambda: 2), sequence_parallel=False, readers=2)
    for _ in range(2):  # two passes
        own.start_input_gradient(torch.ones(2, 1, 4))
        assert not summed
        own.start_input_gradient(torch.full((2, 1, 4), 2.0))
        (x,) = summed
        assert x.eq(3).all() and own.wait_input_gradient().eq(3).all()
        summed.clear()


def test_a_second_reader_of_an_input_whose_sum_has_started_is_found() -> None:
    """Its gradient would take the place of the linear's, silently."""
    own = SubmoduleCollectives(Mock(size=lambda: 2), sequence_parallel=False)
    own._input_gradient = Mock()
    with pytest.raises(AssertionError, match="has started its sum"):
        own.start_input_gradient(torch.ones(1))
