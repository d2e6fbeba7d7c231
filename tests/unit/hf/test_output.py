"""An output folder is complete or absent, whatever happened before."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from megatron_ladder.errors import UserError
from megatron_ladder.hf.files.output import complete_or_absent, refuse_others


def write_and_wait(output_dir: Path, ready) -> None:
    with complete_or_absent(output_dir) as folder:
        (folder / "weights").write_bytes(bytes(100))
        with complete_or_absent(folder / "part") as part:  # as export_folder in export_run
            (part / "more").write_bytes(bytes(100))
            ready.set()
            signal.pause()


@pytest.fixture
def writer(tmp_path: Path):
    """A process that writes tmp_path/model, and has not finished."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=write_and_wait, args=(tmp_path / "model", ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def write(output_dir: Path) -> None:
    with complete_or_absent(output_dir) as folder:
        (folder / "weights").write_bytes(b"new")


def test_what_a_killed_process_left_is_removed(writer, tmp_path: Path) -> None:
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert [p.name.startswith(".model.tmp-") for p in tmp_path.iterdir()] == [True]
    write(tmp_path / "other")  # leaves it: it is another folder's
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["weights"]


def test_what_a_living_process_writes_stays(writer, tmp_path: Path) -> None:
    (unfinished,) = tmp_path.iterdir()
    write(tmp_path / "model")
    assert (unfinished / "model" / "weights").stat().st_size == 100
    assert sorted(p.name for p in tmp_path.iterdir()) == [unfinished.name, "model"]


def test_a_folder_of_a_similar_name_stays(tmp_path: Path) -> None:
    """Without the lock it is not known to be a leftover."""
    (tmp_path / ".model.tmp-mine").mkdir()
    (tmp_path / ".model2.tmp-1").mkdir()
    write(tmp_path / "model")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".model.tmp-mine", ".model2.tmp-1", "model"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with complete_or_absent(tmp_path / "model") as folder:
            (folder / "weights").write_bytes(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


def test_files_are_compared_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first second")
    (tmp_path / "b").write_bytes(b"other")
    parts = [("a", b"first "), ("b", b"other"), ("a", b"second")]
    refuse_others(tmp_path, parts)
    for wrong, said in (
        ([("a", b"first ")], "a holds more"),
        ([*parts, ("a", b"!")], "a holds something else"),
        ([("a", b"First ")], "a holds something else"),
        ([*parts, ("c", b"")], "c is missing"),
    ):
        with pytest.raises(UserError, match=said):
            refuse_others(tmp_path, wrong)
