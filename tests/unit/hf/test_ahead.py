"""What is read beside writing comes in order, and at most one ahead."""

import threading
from collections.abc import Iterator

import pytest

from megatron_ladder.hf.files.ahead import one_ahead


def test_order_and_distance() -> None:
    made: list[int] = []
    third = threading.Event()

    def make() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    items = one_ahead(make())
    assert next(items) == 0
    assert next(items) == 1
    assert third.wait(10)  # made while the second is used
    assert made == [0, 1, 2]
    assert list(items) == [2, 3, 4]


def test_errors_come_when_it_is_their_turn() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise KeyError("second")

    items = one_ahead(make())
    assert next(items) == 1
    with pytest.raises(KeyError, match="second"):
        next(items)


def test_nothing() -> None:
    assert list(one_ahead(iter(()))) == []
