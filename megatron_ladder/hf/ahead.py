"""Reading beside writing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made, in a thread, while one is used.

    Raises:
        What making an item raises, when it is that item's turn.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_take, items)
        while found := coming.result():
            coming = thread.submit(_take, items)
            yield found.pop()


def _take(items: Iterator[T]) -> list[T]:
    """One item, or none at the end."""
    for item in items:
        return [item]
    return []
