"""Checkpoints of real runs: written in the background, on disks that fail, damaged afterwards."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ladder.errors import UserError
from pretrain.convert.export import export_run
from pretrain.run.checkpoint_files import damage
from pretrain.run.folder import checkpoints
from tests.data_sets import write_data_set
from tests.distributed.disturbed import assert_same, run_disturbed, steps_of
from tests.distributed.test_training import STEPS, command, metrics, tensor_parallel, train

ONE_RANK = ("--data.num-workers", "0", "--no-tensorboard")

# A run whose disk does not take some of the checkpoints, in each of the places where files are written.
FAILING_DISK = """
import errno, functools, sys
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import FileSystemWriter
from pretrain.loop import saving
from pretrain.cli import main

def fail_at(step, function, where):
    @functools.wraps(function)
    def failing(*args, **kwargs):
        if f"step_{step:08d}" in where(args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)
    return failing

stream = lambda args: next(a.name for a in args if hasattr(a, "fileno"))
filesystem_async._write_item = fail_at(4, filesystem_async._write_item, stream)
FileSystemWriter.finish = fail_at(12, FileSystemWriter.finish, lambda args: str(args[0].path))
saving.write_manifest = fail_at(16, saving.write_manifest, lambda args: str(args[0]))
sys.exit(main(sys.argv[1:]))
"""

# A run one of whose writing processes hangs since it was forked, and another is killed (out of memory).
NEVER_BEGINS = """
import os, sys, time
from megatron_ladder import mcore_checkpoints
from pretrain.cli import main
from pretrain.loop import saving

write = mcore_checkpoints._write

def hanging(*args):
    if any("step_00000008" in str(path) for path, *_ in args[4]):
        time.sleep(10_000)
    write(*args)

sums = saving.sums

def killed(paths):
    if any("step_00000016" in str(path) for path in paths):
        os.kill(os.getpid(), 9)
    return sums(paths)

saving.sums = killed
mcore_checkpoints._write, mcore_checkpoints.START_S = hanging, 2.0
sys.exit(main(sys.argv[1:]))
"""

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

# A run each of whose fsyncs takes several steps. Rank 0's training thread may not call it at all.
SLOW_FSYNC = """
import os, re, sys, threading
from pretrain.loop import train as loop
from pretrain.cli import main

LAST = 20
fsync, train_step, rank_0, steps, moved = os.fsync, loop.train_step, os.getpid(), 0, threading.Condition()

def counted(*args, **kwargs):
    global steps
    figures = train_step(*args, **kwargs)
    with moved:
        steps += 1
        moved.notify_all()
    return figures

def slow(descriptor):
    if os.getpid() == rank_0 and 0 < steps < LAST:
        if threading.current_thread() is threading.main_thread():
            os._exit(9)
        of_step = re.search(r"step_(\\d+)", os.readlink(f"/proc/self/fd/{descriptor}"))
        until = min(int(of_step[1]) + 3, LAST) if of_step else 3
        with moved:
            moved.wait_for(lambda: steps >= until)
    fsync(descriptor)

os.fsync, loop.train_step = slow, counted
sys.exit(main(sys.argv[1:]))
"""

# A run that is killed in a validation, as soon as the checkpoint that was begun before it is complete.
SLOW_VALIDATION = """
import os, signal, sys, time
from pathlib import Path
from pretrain.cli import main
from pretrain.loop import step, train

checkpoint = Path(sys.argv.pop(1))
step.PART = 1
run_schedule, validate = step._run_schedule, train.validate

def slow(*args, **options):
    if options["forward_only"]:
        time.sleep(0.05)
        if checkpoint.is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
    return run_schedule(*args, **options)

step._run_schedule = slow
train.validate = lambda model, batches, *rest: validate(model, list(batches) * 1000, *rest)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(data, run, *ONE_RANK)
    return run


def patched(program: str, data: Path, run: Path, *options: str) -> list[str]:
    arguments = command(data, run, *ONE_RANK, *options)
    return [arguments[0], "-c", program, *arguments[3:]]


def run_for_status(arguments: list[str]) -> tuple[int, str]:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_run_goes_on_where_a_disk_fails(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, output = run_for_status(patched(FAILING_DISK, data, run, "--save-interval", "4"))
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
    status, output = run_for_status(patched(NEVER_BEGINS, data, run, "--save-interval", "4"))
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

    run_disturbed(patched(SLOW_DISK, data, run), run, 13, kill)
    assert sorted(seen) == ["step_00000005", "step_00000010.tmp"]
    assert steps_of(run) >= 13
    train(data, run, *ONE_RANK)
    assert [m["step"] for m in metrics(run, "start")] == [0, 5]
    assert not list(run.glob("checkpoints/*.tmp"))
    assert_same(run, undisturbed)


def test_steps_do_not_wait_for_a_slow_disk(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The checkpoint of step 5 is complete after step 8, and training has gone on."""
    run = tmp_path / "run"
    status, output = run_for_status(patched(SLOW_FSYNC, data, run))
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
    arguments = patched(SLOW_VALIDATION, data, run, "--eval-interval", interval)
    arguments.insert(3, str(run / f"checkpoints/step_{step:08d}"))
    status, output = run_for_status(arguments)
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
