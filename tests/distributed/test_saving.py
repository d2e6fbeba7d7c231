"""Checkpoints of real runs: written in the background, on disks that fail, damaged afterwards."""

import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import FileSystemWriter

from megatron_ladder import mcore_checkpoints
from megatron_ladder.errors import UserError
from pretrain.convert.export import export_run
from pretrain.loop import saving
from pretrain.loop import step as step_of_loop
from pretrain.loop import train as loop
from pretrain.run.checkpoint_files import damage
from pretrain.run.folder import checkpoints
from tests.data_sets import write_data_set
from tests.distributed.disturbed import assert_same, run_disturbed, steps_of
from tests.distributed.test_training import (
    STEPS,
    TIMEOUT_S,
    command,
    metrics,
    tensor_parallel,
    train,
)
from tests.runs import run_train

ONE_RANK = ("--data.num-workers", "0", "--no-tensorboard")

# A run that takes long to write a checkpoint.
SLOW_DISK = """
import functools, sys, time
from megatron.core.dist_checkpointing.strategies import filesystem_async
from pretrain.cli import main

write_item = filesystem_async._write_item

@functools.wraps(write_item)
def slow(*args, **kwargs):
    if any("step_00000010" in str(getattr(a, "name", "")) for a in args):
        time.sleep(60)
    return write_item(*args, **kwargs)

filesystem_async._write_item = slow
sys.exit(main(sys.argv[1:]))
"""


def failing_disk() -> None:
    """It does not take some of the checkpoints, in each of the places where files are written."""

    def fail_at(step: int, function: Any, where: Callable[[Any], str]) -> Any:
        @functools.wraps(function)
        def failing(*args: Any, **kwargs: Any) -> Any:
            if f"step_{step:08d}" in where(args):
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return failing

    def stream(args: Any) -> str:
        return next(a.name for a in args if hasattr(a, "fileno"))

    filesystem_async._write_item = fail_at(4, filesystem_async._write_item, stream)
    finish = FileSystemWriter.finish
    FileSystemWriter.finish = fail_at(12, finish, lambda args: str(args[0].path))  # type: ignore[method-assign]
    saving.write_manifest = fail_at(16, saving.write_manifest, lambda args: str(args[0]))


def never_begins() -> None:
    """One writing process hangs since it was forked, and another is killed (out of memory)."""
    write, sums = mcore_checkpoints._write, saving.sums

    def hanging(*args: Any) -> None:
        if any("step_00000008" in str(path) for path, *_ in args[4]):
            time.sleep(10_000)
        write(*args)

    def killed(paths: Any) -> Any:
        if any("step_00000016" in str(path) for path in paths):
            os.kill(os.getpid(), signal.SIGKILL)
        return sums(paths)

    saving.sums = killed
    mcore_checkpoints._write, mcore_checkpoints.START_S = hanging, 2.0


def slow_fsync() -> None:
    """Each fsync takes several steps. Rank 0's training thread may not call it at all."""
    fsync, train_step, rank_0 = os.fsync, loop.train_step, os.getpid()
    steps, moved = 0, threading.Condition()

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        figures = train_step(*args, **kwargs)
        with moved:
            steps += 1
            moved.notify_all()
        return figures

    def slow(descriptor: int) -> None:
        if os.getpid() == rank_0 and 0 < steps < STEPS:
            if threading.current_thread() is threading.main_thread():
                os._exit(9)
            of_step = re.search(r"step_(\d+)", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            until = min(int(of_step[1]) + 3, STEPS) if of_step else 3
            with moved:
                moved.wait_for(lambda: steps >= until)
        fsync(descriptor)

    os.fsync, loop.train_step = slow, counted  # type: ignore[assignment]


def slow_validation(checkpoint: Path) -> None:
    """The run is killed in a validation, as soon as the checkpoint begun before it is complete."""
    run_schedule, validate = step_of_loop._run_schedule, loop.validate

    def slow(*args: Any, **options: Any) -> Any:
        if options["forward_only"]:
            time.sleep(0.05)
            if checkpoint.is_dir():
                os.kill(os.getpid(), signal.SIGKILL)
        return run_schedule(*args, **options)

    step_of_loop.PART, step_of_loop._run_schedule = 1, slow
    loop.validate = lambda model, batches, *rest: validate(model, list(batches) * 1000, *rest)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(data, run, *ONE_RANK)
    return run


def train_where(
    first: Callable[[], None], data: Path, run: Path, *options: str
) -> tuple[int | None, str]:
    """Its exit status, and what it printed; `first` changes what it meets."""
    argv = command(data, run, *ONE_RANK, *options)[4:]
    (code,), output = run_train(argv, run.with_name("log"), TIMEOUT_S, first=first)
    return code, output


def run_for_status(arguments: list[str]) -> tuple[int, str]:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_run_goes_on_where_a_disk_fails(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, output = train_where(failing_disk, data, run, "--save-interval", "4")
    assert status == 0, output
    assert [m["step"] for m in metrics(run, "save_failed")] == [4, 12, 16]
    assert all("B free)" in m["reason"] for m in metrics(run, "save_failed"))
    assert output.count("No space left on device") >= 3
    assert output.count("could not save a checkpoint of step") == 3
    assert "step 12: [Errno 28] No space left on device" in output
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step_00000008",
        "step_00000020",
    ]
    assert_same(run, undisturbed)


def test_a_writing_process_that_hangs_or_is_killed_fails_one_save(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, output = train_where(never_begins, data, run, "--save-interval", "4")
    assert status == 0, output
    hung, killed = metrics(run, "save_failed")
    assert (hung["step"], killed["step"]) == (8, 16)
    assert "a process that writes checkpoints did not begin" in hung["reason"]
    assert "a process that writes checkpoints has ended early" in killed["reason"]
    assert_same(run, undisturbed)


def test_training_goes_on_while_a_checkpoint_is_written(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """And a run that is killed meanwhile leaves no writer behind, and goes on from the one before."""
    run = tmp_path / "run"
    seen = []

    def kill(process: psutil.Process, _: list[psutil.Process]) -> None:
        seen.extend(p.name for p in (run / "checkpoints").iterdir())
        process.kill()

    arguments = command(data, run, *ONE_RANK)
    run_disturbed([arguments[0], "-c", SLOW_DISK, *arguments[3:]], run, 13, kill)
    assert sorted(seen) == ["step_00000005", "step_00000010.tmp"]
    assert steps_of(run) >= 13
    train(data, run, *ONE_RANK)
    assert [m["step"] for m in metrics(run, "start")] == [0, 5]
    assert not list(run.glob("checkpoints/*.tmp"))
    assert_same(run, undisturbed)


def test_steps_do_not_wait_for_a_slow_disk(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The checkpoint of step 5 is complete after step 8, and training has gone on."""
    run = tmp_path / "run"
    status, output = train_where(slow_fsync, data, run)
    assert status == 0, output
    for step in (5, 10, 15):
        later = output.index(f"saved checkpoint of step {step}\n")
        assert later > output.index(f"step {step + 2:>2}/{STEPS}"), output
    assert [c.name for c in checkpoints(run)] == ["step_00000015", "step_00000020"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        *("step_00000015", "step_00000020")
    ]
    assert all(damage(checkpoint, read=True) == "" for checkpoint in checkpoints(run))
    assert [m["dataset"] for m in metrics(run, "baseline")] == ["data"]
    assert_same(run, undisturbed)


@pytest.mark.parametrize(("step", "interval"), [(10, "10"), (STEPS, "0")])
def test_a_run_killed_in_a_validation_has_saved_before(
    step: int, interval: str, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """And the next start makes up for the validation: also where nothing else is left to do."""
    run = tmp_path / "run"
    first = functools.partial(slow_validation, run / f"checkpoints/step_{step:08d}")
    status, output = train_where(first, data, run, "--eval-interval", interval)
    assert status == -signal.SIGKILL, output
    assert not metrics(run, "validation")
    output = train(data, run, *ONE_RANK, "--eval-interval", interval)
    assert f"step {step} was saved, and not validated" in output
    assert [m["step"] for m in metrics(run, "start")] == [0, step]
    expected = {m["step"]: m["loss"] for m in metrics(undisturbed, "validation")}
    validated = [(m["step"], m["loss"]) for m in metrics(run, "validation")]
    assert validated == [(s, expected[s]) for s in (10, 20) if s >= step]
    assert_same(run, undisturbed)
    assert "nothing to do" in train(data, run, *ONE_RANK, "--eval-interval", interval)


def test_a_damaged_checkpoint_is_passed_over(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """By two ranks, one of which finds it; `export` refuses it."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    last = checkpoints(run)[-1]
    largest = max(last.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=f"{largest.name} is not what was written"):
        export_run(run, tmp_path / "model", dtype=None, max_shard_size="5GB")
    output = train(data, run, "--nproc-per-node", "2")
    assert output.count("is set aside as step_00000020.damaged") == 1
    assert [m["step"] for m in metrics(run, "start")] == [0, 15]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        *("step_00000015", "step_00000020", "step_00000020.damaged")
    ]
    assert all(damage(checkpoint, read=True) == "" for checkpoint in checkpoints(run))


@pytest.mark.slow
def test_waiting_for_checkpoints_changes_no_number(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    train(data, tmp_path / "run", *ONE_RANK, "--no-async-save")
    assert_same(tmp_path / "run", undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path, undisturbed: Path) -> Iterator[Path]:
    """A run's folder whose checkpoints are on a disk of their own with room for two and a half."""
    run = tmp_path / "run"
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    (run / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
    last = checkpoints(undisturbed)[-1]
    size = int(2.5 * sum(p.stat().st_size for p in last.iterdir()))
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield run
    subprocess.run(["umount", str(folder)], check=True)


def remount(run: Path, options: str) -> None:
    folder = str(run / "checkpoints")
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk: Path, data: Path, undisturbed: Path) -> None:
    """The third checkpoint does not fit beside the two that are kept: three trials, then status 1."""
    arguments = command(data, small_disk, *ONE_RANK, "--save-interval", "3")
    status, output = run_for_status(arguments)
    assert status == 1, output
    assert "3 checkpoints in a row could not be written" in output
    assert [m["step"] for m in metrics(small_disk, "save_failed")] == [9, 12, 15]
    assert [c.name for c in checkpoints(small_disk)] == ["step_00000003", "step_00000006"]
    assert all(damage(checkpoint, read=True) == "" for checkpoint in checkpoints(small_disk))
    assert not list(small_disk.glob("checkpoints/*.tmp"))
    remount(small_disk, "size=1g")
    train(data, small_disk, *ONE_RANK)
    assert metrics(small_disk, "start")[-1]["step"] == 6
    assert_same(small_disk, undisturbed)


@pytest.mark.slow
def test_a_full_disk_of_two_ranks(small_disk: Path, data: Path, undisturbed: Path) -> None:
    """Started again as after a crash, it makes no progress, and ends by itself."""
    status, output = run_for_status(
        command(data, small_disk, *tensor_parallel(2), "--save-interval", "3")
    )
    assert status == 1, output
    assert "3 crashes without a new checkpoint: giving up" in output
    assert [c.name for c in checkpoints(small_disk)] == ["step_00000003", "step_00000006"]


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(small_disk: Path, data: Path, undisturbed: Path) -> None:
    remount(small_disk, "size=1g")
    train(data, small_disk, *ONE_RANK, "--save-interval", "10")
    shutil.rmtree(small_disk / f"checkpoints/step_{STEPS:08d}")
    remount(small_disk, "ro")
    status, output = run_for_status(command(data, small_disk, *ONE_RANK, "--save-interval", "4"))
    assert status == 1, output
    assert [m["step"] for m in metrics(small_disk, "save_failed")] == [12, 16, 20]
    assert all("Read-only file system" in m["reason"] for m in metrics(small_disk, "save_failed"))
    remount(small_disk, "rw")
    train(data, small_disk, *ONE_RANK)
    assert_same(small_disk, undisturbed)
