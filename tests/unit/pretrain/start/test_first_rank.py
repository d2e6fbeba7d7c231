"""One rank finds out for all: results, mistakes and crashes arrive at every rank, and are made once."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from megatron_ladder.errors import UserError
from pretrain.ranks import Rank
from pretrain.start import first_rank
from pretrain.start.first_rank import by_first_of_groups, by_first_rank, first_words
from tests.ranks import run_ranks

RANKS = 4


def on_ranks(function: Callable[[Any, Rank], Any]) -> list[Any]:
    """What each rank's call returned or raised. Threads, which share a store."""
    store, results = dist.HashStore(), [None] * RANKS

    def run(number: int) -> None:
        try:
            results[number] = function(store, Rank(number, RANKS, number))
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in reversed(range(RANKS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_result_is_found_out_once() -> None:
    calls = []

    def find_out() -> dict[str, int]:
        calls.append(threading.current_thread())
        return {"number": 3}

    assert on_ranks(lambda s, r: by_first_rank(s, r, "x", find_out)) == [{"number": 3}] * RANKS
    assert len(calls) == 1
    assert by_first_rank(None, None, "x", find_out) == {"number": 3}  # the only rank


def ask_groups() -> tuple[int, str]:
    """What the groups' rank 0 found out, and the message of its mistake."""

    def mistake() -> None:
        raise UserError(f"rank {dist.get_rank()}'s")

    with pytest.raises(UserError) as raised:
        by_first_of_groups(mistake)
    return by_first_of_groups(lambda: 3 + dist.get_rank()), str(raised.value)


def test_process_groups_pass_it_on_as_well(tmp_path: Path) -> None:
    assert run_ranks(2, ask_groups, tmp_path=tmp_path) == [(3, "rank 0's")] * 2


@pytest.mark.parametrize(
    ("raised", "elsewhere"),
    [
        (UserError("a mistake"), UserError("a mistake")),
        (
            FileNotFoundError(2, "No such file", "DATA"),
            FileNotFoundError(2, "No such file", "DATA"),
        ),
        (SystemExit(2), SystemExit(2)),  # what tyro does with an unknown option
        (KeyError("ours"), SystemExit(1)),
        (KeyboardInterrupt(), SystemExit(1)),
    ],
)
def test_what_it_raises_is_raised_by_all(raised: BaseException, elsewhere: BaseException) -> None:
    def find_out() -> None:
        raise raised

    first, *others = on_ranks(lambda s, r: by_first_rank(s, r, "x", find_out))
    assert first is raised
    for other in others:
        assert (type(other), other.args) == (type(elsewhere), elsewhere.args)
        assert getattr(other, "filename", None) == getattr(elsewhere, "filename", None)


def test_a_first_rank_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for: how long it may take is the watchdog's (faults.start_s), which ends with 1."""
    store, hours = dist.HashStore(), itertools.count()

    def hour_later() -> float:
        if (hour := next(hours)) == 3:
            threading.Thread(target=by_first_rank, args=(store, Rank(0, 2, 0), "x", int)).start()
        return 3601.0 * hour

    monkeypatch.setattr(first_rank, "time", Mock(monotonic=hour_later, sleep=time.sleep))
    assert by_first_rank(store, Rank(1, 2, 1), "x", int) == 0


def test_the_first_rank_waits_until_all_have_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the store, and may end after a mistake."""
    order, store = [], dist.HashStore()

    def first() -> None:
        by_first_rank(store, Rank(0, 3, 0), "x", lambda: 1)
        order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    by_first_rank(store, Rank(1, 3, 1), "x", lambda: 1)
    order.append("second")
    thread.join(0.1)
    by_first_rank(store, Rank(2, 3, 2), "x", lambda: 1)
    thread.join()
    assert order == ["second", "first"]
    # One that is gone is not waited for for ever.
    monkeypatch.setattr(first_rank, "_HEARD_S", 0.1)
    assert by_first_rank(store, Rank(0, 2, 0), "y", lambda: 1) == 1


@pytest.mark.parametrize(("said", "found"), [(["", "", "", ""], ""), (["", "b", "", "d"], "b")])
def test_the_first_word_of_all_ranks(said: list[str], found: str) -> None:
    assert on_ranks(lambda s, r: first_words(s, r, "x", said[r.number])) == [found] * RANKS


def test_a_first_rank_that_has_ended() -> None:
    store = Mock()
    store.check.side_effect = dist.DistNetworkError("Connection reset by peer")
    with pytest.raises(SystemExit, match="1"):
        by_first_rank(store, Rank(1, 2, 1), "x", lambda: None)
