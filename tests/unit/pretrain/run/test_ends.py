"""What ranks that fail leave for their launcher, and which of them speaks."""

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.errors import UserError
from pretrain.commands import users
from pretrain.commands.users import failed, for_users
from pretrain.config.presets import PRESETS
from pretrain.run import ends
from pretrain.run.ends import ENDS, leave, left
from pretrain.run.status import Status, read_status


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """Commands set the level of all logs."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of one start, as a launcher names it: it is not made."""
    monkeypatch.setenv(ENDS, str(tmp_path / "ends" / "0.1"))
    return tmp_path / "ends" / "0.1"


def become(monkeypatch: pytest.MonkeyPatch, rank: int, size: int = 4096) -> None:
    whole = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "here", "MASTER_PORT": 29500}
    for name, value in {**whole, "LOCAL_RANK": rank % 8}.items():
        monkeypatch.setenv(name, str(value))


def fails(error: Exception) -> int:
    """The exit status of a rank that ends so."""

    def train(_: list[str]) -> int:
        raise error

    return for_users(train)([])


def test_of_many_that_fail_alike_one_speaks(folder: Path, monkeypatch, capfd) -> None:
    for rank in (37, 4095, 0, 8):
        become(monkeypatch, rank)
        assert fails(UserError(f"/data/part{rank}.bin does not exist")) == 2
    said = capfd.readouterr().err
    host = os.uname().nodename
    assert said == f"megatron-ladder train: rank 37 on {host}: /data/part37.bin does not exist\n"
    (end,) = left()
    assert (end.status, end.rank, end.host) == (2, 37, host)
    assert [p.name.partition(".")[0] for p in folder.iterdir()] == ["2"]
    # Another sentence is another kind.
    assert fails(UserError("the layout does not fit")) == 2
    assert "rank 8 on" in capfd.readouterr().err
    assert [end.rank for end in left()] == [37, 8]


def test_a_crash_is_said_once_with_its_traceback(folder: Path, monkeypatch, capfd) -> None:
    for rank in (5, 6, 7):
        become(monkeypatch, rank)
        assert fails(RuntimeError(f"connection closed by peer [10.0.0.{rank}]:4{rank}")) == 1
    said = capfd.readouterr().err
    assert said.count("Traceback") == 1 and said.count("rank 5 on") == 1
    assert "rank 6" not in said
    assert next(folder.iterdir()).name.startswith("1.")


def _race(rank: int, start) -> None:
    os.environ["RANK"] = str(rank)
    start.wait()
    users.failed("train", UserError(f"rank {rank} sees no data"))


def test_ranks_that_fail_at_the_same_time_leave_one_file(folder: Path, monkeypatch, capfd) -> None:
    become(monkeypatch, 0)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(16)
    ranks = [context.Process(target=_race, args=(rank, start)) for rank in range(16)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(list(folder.iterdir())) == 1
    assert capfd.readouterr().err.count("sees no data") == 1


def test_a_run_that_ends_well_leaves_nothing(folder: Path, monkeypatch) -> None:
    become(monkeypatch, 3)
    assert for_users(lambda _: 0)([]) == 0
    assert not folder.parent.exists()


def test_failures_of_a_server_may_pass_and_mistakes_do_not(folder: Path, monkeypatch) -> None:
    become(monkeypatch, 3)
    assert fails(OSError(5, "Input/output error", "/data")) == 1
    assert fails(OSError(116, "Stale file handle", "/data")) == 1
    assert fails(FileNotFoundError(2, "No such file or directory", "/data")) == 2
    assert fails(ends.Crash("the disk failed")) == 1
    monkeypatch.delenv(ENDS)
    with pytest.raises(ConnectionError):  # to another rank; nobody waits for a file
        fails(ConnectionResetError("peer"))


def test_options_that_do_not_exist_are_left_too(folder: Path, monkeypatch) -> None:
    become(monkeypatch, 9)

    def train(_: list[str]) -> int:
        raise SystemExit(2)  # tyro's

    with pytest.raises(SystemExit):
        for_users(train)([])
    assert [end.status for end in left()] == [2]


def test_where_the_folder_cannot_be_made_a_rank_speaks(tmp_path: Path, monkeypatch, capfd) -> None:
    """The disk that is not mounted may be the run's. Nothing is made under its mount point."""
    monkeypatch.setenv(ENDS, str(tmp_path / "not mounted" / "run" / "slurm" / "1" / "ends" / "0.1"))
    for rank in (8, 9):
        become(monkeypatch, rank)
        assert fails(UserError("no data")) == 2
    said = capfd.readouterr().err
    assert "rank 8 on" in said and "rank 9 on" in said
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_does_not_answer_holds_no_sentence_back(
    folder: Path, monkeypatch, capfd
) -> None:
    become(monkeypatch, 8)
    monkeypatch.setattr(ends, "WAIT_S", 0.05)
    monkeypatch.setattr(ends, "_made", lambda *_: time.sleep(1))
    assert fails(UserError("no data")) == 2
    assert "rank 8 on" in capfd.readouterr().err


def test_without_a_launcher_one_rank_of_a_machine_speaks(monkeypatch, capfd) -> None:
    monkeypatch.delenv(ENDS, raising=False)
    for rank in (0, 1, 8, 9):
        become(monkeypatch, rank)
        assert fails(UserError("no data")) == 2
    said = capfd.readouterr().err
    assert [f"rank {rank} on" in said for rank in (0, 1, 8, 9)] == [True, False, True, False]


def test_status_says_it_whichever_rank_is_first(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Rank 5 fails before rank 0 has written that it starts, and after."""
    config = replace(PRESETS["debug"](), output_dir=tmp_path / "run")
    run = tmp_path / "run"
    run.mkdir()
    become(monkeypatch, 5)
    failed("train", UserError("no data here"), run_dir=run)
    assert read_status(run) is None
    become(monkeypatch, 0)
    with Status(config):
        pass
    said = read_status(run)
    assert said and said["state"] == "failed"
    assert said["reason"] == f"rank 5 on {os.uname().nodename}: no data here"

    monkeypatch.setenv(ENDS, str(tmp_path / "ends" / "0.2"))
    with Status(config) as status:  # of the next start; what failed before is over
        status.wait()
        said = read_status(run)
        assert said and said["state"] == "starting"
        become(monkeypatch, 6)
        failed("train", UserError("no data there"), run_dir=run)
    said = read_status(run)
    assert said and (said["state"], said["reason"][:9]) == ("failed", "rank 6 on")


def test_a_lost_connection_is_not_the_reason(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Rank 5 fails, and rank 0 learns of it by their connection, before or after rank 5 has spoken."""
    config = replace(PRESETS["debug"](), output_dir=tmp_path / "run")
    (tmp_path / "run").mkdir()
    become(monkeypatch, 0)

    def loses_its_connection() -> None:
        with Status(config) as status:
            status.wait()
            become(monkeypatch, 5)
            leave(1, "no data here")
            become(monkeypatch, 0)
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        loses_its_connection()
    said = read_status(tmp_path / "run")
    assert said and said["reason"] == f"rank 5 on {os.uname().nodename}: no data here"


def test_a_rank_of_another_start_changes_no_status(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """A second job in the same folder is refused: the first one's status stays."""
    config = replace(PRESETS["debug"](), output_dir=tmp_path / "run")
    (tmp_path / "run").mkdir()
    become(monkeypatch, 0)
    Status(config).wait()
    monkeypatch.setenv(ENDS, str(tmp_path / "other" / "0.1"))
    become(monkeypatch, 5)
    failed("train", UserError("another process trains here"), run_dir=tmp_path / "run")
    said = read_status(tmp_path / "run")
    assert said and said["state"] == "starting"


def test_a_file_that_was_cut_off_says_its_status_by_its_name(folder: Path, monkeypatch) -> None:
    become(monkeypatch, 1)
    failed("train", UserError("no data"))
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["message"] == "no data"
    file.write_text('{"sta')
    assert left() == []
