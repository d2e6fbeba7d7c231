"""What one rank finds out for all. Before torch has process groups: by the store through which ranks meet.

A file system that a thousand nodes share answers one rank quickly, and four thousand that ask the same at
the same time slowly.
"""

import contextlib
import math
import pickle
import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_ladder.errors import UserError
from pretrain.ranks import Rank

Found = TypeVar("Found")

_HEARD_S = 60.0
_LONGEST_PAUSE_S = 1.0


def by_first_rank(store: Any, rank: Rank | None, name: str, find_out: Callable[[], Found]) -> Found:
    """Calls a function on rank 0 only. Called by every rank, with the same name.

    Args:
        store: where the ranks have met (`meet` in model/setup.py).
        rank: this process's; None: it is the only one.
        name: of what is found out; used once.

    Returns:
        What the function returned, on every rank.

    Raises:
        Exception: what the function raised, on every rank: a mistake, a failure of the disk, an exit. Where
            rank 0 raised anything else, it has said so, and the other ranks end with status 1.
    """
    if rank is None:
        return find_out()
    if rank.number > 0:
        answer, error = pickle.loads(zlib.decompress(_wait(store, name)))  # noqa: S301 (rank 0's own)
        if store.add(f"{name}/heard", 1) == rank.world_size - 1:
            store.set(f"{name}/heard by all", "")
        if error is not None:
            raise error
        return answer
    try:
        answer = find_out()
    except BaseException as raised:
        known = isinstance(raised, UserError | OSError | SystemExit)
        _tell(store, rank, name, (None, raised if known else SystemExit(1)))
        raise
    _tell(store, rank, name, (answer, None))
    return answer


def by_first_of_groups(find_out: Callable[[], Found]) -> Found:
    """Calls a function on rank 0 only, where torch has process groups. Called by every rank.

    Returns:
        What the function returned, on every rank.

    Raises:
        UserError: what the function raised, on every rank.
    """
    from torch.distributed import broadcast_object_list, get_rank

    found: list[Any] = [None]
    if get_rank() == 0:
        try:
            found = [find_out()]
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def first_words(store: Any, rank: Rank, name: str, mine: str) -> str:
    """The first text that is not "" of those that the ranks give, on every rank. Called by every rank."""
    store.set(f"{name}/{rank.number}", mine)

    def all_words() -> str:
        said = (_wait(store, f"{name}/{number}").decode() for number in range(rank.world_size))
        return next(filter(None, list(said)), "")

    return by_first_rank(store, rank, name, all_words)


def _tell(store: Any, rank: Rank, name: str, content: tuple[Any, BaseException | None]) -> None:
    # A thousand manifests are a megabyte, and each of four thousand ranks gets them from one machine.
    store.set(name, zlib.compress(pickle.dumps(content)))
    if rank.world_size > 1:
        # This process may be about to end, and the store ends with it. A rank that is gone hears nothing.
        with contextlib.suppress(TimeoutError):
            _wait(store, f"{name}/heard by all", _HEARD_S)


def _wait(store: Any, name: str, patience_s: float = math.inf) -> bytes:
    """What the store has under a name, as soon as it is there.

    For how long is left to the watchdog: reading and comparing a checkpoint of terabytes may take long. A
    dead first rank is noticed at once.

    It is asked for again and again: torch's own wait writes warnings when its time is over, and does not
    notice Ctrl-C before.
    """
    from torch.distributed import DistNetworkError

    began, pause_s = time.monotonic(), 0.01
    try:
        while not store.check([name]):
            if time.monotonic() - began > patience_s:
                raise TimeoutError
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return store.get(name)
    except DistNetworkError:  # the first rank, which holds the store, has ended, and has said why
        raise SystemExit(1) from None
