"""What the CUDA operators ask of streams and events, in order; with stand-ins, as CI has no GPU."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_ladder.vllm import all_reduce
from tests.unit.vllm import stand_in


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        return f"event {self.events}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    entries: list[str] = []
    current = [Stream("main", entries)]
    side = Stream("side", entries)

    @contextmanager
    def stream(chosen: Stream):
        current.append(chosen)
        yield
        current.pop()

    def reduce(partial: Tensor) -> Tensor:
        entries.append(f"sum on {current[-1].name}")
        return partial * 2

    stand_in.install(monkeypatch, reduce, lambda: "breakable" in entries)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(all_reduce, "_side_stream", lambda: side)
    return entries


def test_a_sum_is_waited_for_by_itself(log: list[str]) -> None:
    """The next one is queued on the same stream by then: waiting for the stream would wait for both."""
    first, second = torch.ones(2), torch.ones(2) * 10
    totals = [all_reduce._start_cuda(partial, "") for partial in (first, second)]
    assert log == ["side waits for main", "sum on side"] * 2
    all_reduce._finish_cuda(torch.ones(2), totals[0], first)
    all_reduce._finish_cuda(torch.ones(2), totals[1], second)
    assert log[4:] == ["main waits for event 1", "main waits for event 2"]
    assert first.tolist() == [3, 3] and second.tolist() == [21, 21]
    assert not all_reduce._arrivals


def test_a_sum_that_was_not_started_is_an_error(log: list[str]) -> None:
    with pytest.raises(KeyError):
        all_reduce._finish_cuda(torch.ones(2), torch.ones(2), torch.ones(2))


def test_a_breakable_capture_keeps_to_its_stream(log: list[str]) -> None:
    log.append("breakable")
    partial = torch.ones(2)
    total = all_reduce._start_cuda(partial, "")
    all_reduce._finish_cuda(torch.ones(2), total, partial)
    assert log == ["breakable", "sum on main"] and partial.tolist() == [3, 3]
