import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.loop.stopping import StopSignals
from pretrain.processes import STOP_SIGNALS, obey_parent_alone
from pretrain.start.launch import STOPPED, _crash_status, _final_status

SECOND = """
import os, signal, time
from pretrain.loop.stopping import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGUSR1)  # the same one, passed on
    time.sleep(1)
    print("still here", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # this thread runs no handler
    os.kill(os.getpid(), signal.SIGTERM)
    os.read(os.pipe()[0], 1)  # for ever, as a collective whose other side is gone
"""


def test_a_second_signal_ends_a_process_whatever_it_waits_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout == "still here\n"
    assert "SIGUSR1: stopping after this step" in done.stderr


ASKED_TOO = """
import os, signal, time
from pretrain.loop.stopping import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1.2)
    signals.stop("asked")
    time.sleep(0.2)
    print(signals._received == signal.SIGUSR1, flush=True)
"""


def test_a_run_that_asks_to_stop_is_no_second_signal() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKED_TOO], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "asked" not in done.stderr


INTERRUPTED = """
import multiprocessing, os, sys, time
from multiprocessing.managers import SyncManager
from pretrain.loop.stopping import StopSignals
from pretrain.processes import no_stop_signals

def write(queue):
    time.sleep(60)
    queue.put("written")

if __name__ == "__main__":
    try:
        with StopSignals():
            with no_stop_signals():
                manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
                manager.start()
            writer = multiprocessing.get_context("fork").Process(target=write, args=(manager.Queue(),))
            writer.start()
            print("begun", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_ctrl_c_ends_what_writes_a_checkpoint_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    run = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, as a terminal's
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "begun\n"
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=90)
    assert (run.returncode, said) == (130, "")


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with StopSignals():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()  # has all files open
        assert signal.getsignal(signal.SIGUSR1) is not before[signal.SIGUSR1]
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    assert signal.set_wakeup_fd(-1) == -1
    child.kill()
    child.join()


def _child(pipe) -> None:
    obey_parent_alone(0)
    pipe.send(os.getpid())
    time.sleep(60)


def _middle(pipe) -> None:
    """Starts a child of its own and waits to be killed."""
    multiprocessing.get_context("fork").Process(target=_child, args=(pipe,)).start()
    time.sleep(60)


@pytest.mark.parametrize("number", sorted(STOP_SIGNALS))
def test_a_child_does_not_mind_the_signals_of_others(number: int) -> None:
    with StopSignals():
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_child, args=(theirs,))
        child.start()
        ours.recv()
        subprocess.run(["kill", f"-{number}", str(child.pid)], check=True)
        child.join(0.5)
        assert child.is_alive()
        child.terminate()  # as DataLoader does with a worker that does not end
        child.join(10)
        assert child.exitcode == 0


def is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != "zombie"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_first_process_that_an_interpreter_starts_does_not_mind_them_either() -> None:
    """Through which writers of checkpoints report: SLURM signals all of a step."""
    code = """
import multiprocessing
from multiprocessing.managers import SyncManager
from pathlib import Path
from pretrain.processes import no_stop_signals

if __name__ == "__main__":
    with no_stop_signals():
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start()
    for line in Path(f"/proc/{manager._process.pid}/status").read_text().splitlines():
        if line.startswith("SigBlk"):
            print(int(line.split()[1], 16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    blocked = int(done.stdout)
    for number in (*STOP_SIGNALS, signal.SIGINT):
        assert blocked & 1 << (number - 1), f"{number} in {blocked:x}"


def test_children_end_with_a_process_that_is_killed() -> None:
    with StopSignals():
        ours, theirs = multiprocessing.Pipe()
        middle = multiprocessing.get_context("fork").Process(target=_middle, args=(theirs,))
        middle.start()
        grandchild = ours.recv()
        middle.kill()
        middle.join()
        deadline = time.monotonic() + 10
        while is_alive(grandchild):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("ranks", "received", "status"),
    [
        ({-9}, 0, None),
        ({-9, 1}, 0, None),
        ({2, 1}, 0, 2),
        ({75}, 0, STOPPED),
        ({75, 1}, signal.SIGTERM, STOPPED),
        ({-15}, signal.SIGTERM, 128 + signal.SIGTERM),
        ({143}, signal.SIGTERM, 143),
        ({1}, signal.SIGUSR1, 128 + signal.SIGUSR1),
        ({130}, 0, 130),
    ],
)
def test_what_ranks_end_with_decides_whether_they_are_started_again(
    ranks, received, status
) -> None:
    assert _final_status(ranks, received) == status


def test_a_crash_has_the_status_of_a_crash() -> None:
    assert _crash_status({-9, 1}) == 137
    assert _crash_status({1, -15}) == 1
