"""A run's lock: links, file systems without locks, holders that are gone."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.errors import UserError
from pretrain.run import lock as module
from pretrain.run.lock import lock

ELSEWHERE = {"host": "node7", "boot": "another", "container": "pid:[1]", "pid": 1, "started": "5"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Time that passes only in `sleep`, which also calls these functions, one a second."""
    seconds = [0.0]
    events: list[Callable[[], None]] = []

    def sleep(more: float) -> None:
        seconds[0] += more
        if events:
            events.pop(0)()

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return events


@pytest.fixture(params=["flock", "no flock"])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":

        def missing(*_: Any) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", missing)
    return request.param


def held_by(run: Path, **facts: Any) -> Path:
    run.mkdir(exist_ok=True)
    (run / "lock").write_text(json.dumps({"number": "0" * 12, **facts}) + "\n")
    return run


def test_one_process_holds_it(flock: str, clock: list, tmp_path: Path) -> None:
    held = lock(tmp_path / "run")
    mine = (
        rf"another process \({os.getpid()} on .*\) is training in this folder: wait until it ends"
    )
    with pytest.raises(UserError, match=mine):
        lock(tmp_path / "run")
    held.close()
    with lock(tmp_path / "run"):
        pass


def test_a_process_that_has_ended_on_this_machine(flock: str, clock: list, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        lock(tmp_path / "run")
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == child
    lock(tmp_path / "run").close()


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / "lock", tmp_path / "valuable"
    if kind in ("link", "dangling"):
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    if kind == "link":
        target.write_text("content")
    with pytest.raises(UserError, match=r"lock is (a link|not a file): .* Remove it"):
        lock(tmp_path)
    assert target.exists() == (kind == "link")
    assert kind != "link" or target.read_text() == "content"


def test_a_holder_elsewhere_that_lives(flock: str, clock: list, tmp_path: Path) -> None:
    """Also where the system gives the lock to both: `localflock` of Lustre."""
    run = held_by(tmp_path / "run", **ELSEWHERE)
    clock += [lambda: None] * 6
    clock.append(lambda: held_by(run, **ELSEWHERE, number="000000000001") and None)
    with pytest.raises(UserError, match=r"another process \(1 on node7\) is training"):
        lock(run)
    assert json.loads((run / "lock").read_text())["host"] == "node7"


def test_a_holder_elsewhere_that_is_gone(flock: str, clock: list, tmp_path: Path) -> None:
    run = held_by(tmp_path / "run", **ELSEWHERE)
    with lock(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    waited = module.time.monotonic()
    assert waited >= (module.NOT_SEEN_S if flock == "flock" else module.SILENT_S)


@pytest.mark.parametrize("answers_after", [200, None])
def test_a_dead_machines_lock_is_waited_for(
    answers_after: int | None, clock: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = held_by(tmp_path / "run", **ELSEWHERE)

    def taken(*_: Any) -> None:
        if answers_after is None or module.time.monotonic() < answers_after:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", taken)
    if answers_after is None:
        with pytest.raises(UserError, match=r"no sign of life: if it has ended, remove .*lock"):
            lock(run)
        assert module.time.monotonic() >= module.GIVEN_UP_S
    else:
        lock(run).close()
        assert module.time.monotonic() == answers_after


def test_of_two_that_claim_it_the_last_has_it(
    clock: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(fcntl, "flock", missing)
    clock.append(lambda: held_by(tmp_path, **ELSEWHERE) and None)
    with pytest.raises(UserError, match="1 on node7"):
        lock(tmp_path)


def test_the_number_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import time

    monkeypatch.setattr(module, "BEAT_S", 0.01)
    with lock(tmp_path):
        first = (tmp_path / "lock").read_text()
        while (tmp_path / "lock").read_text() == first:
            time.sleep(0.01)
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_lock_of_an_older_version(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in this folder"):
            lock(tmp_path)
    lock(tmp_path).close()
