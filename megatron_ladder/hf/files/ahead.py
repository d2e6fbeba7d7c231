"""Makes the next item of an iterator in a thread, so that reading overlaps with writing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields the same items. While the caller uses one item, a thread makes the next one.

    When `items` raises an error, this raises the same error in place of that item.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_take, items)
        while found := coming.result():
            coming = thread.submit(_take, items)
            yield found.pop()


def _take(items: Iterator[T]) -> list[T]:
    """A list of the next item; an empty list at the end."""
    for item in items:
        return [item]
    return []
