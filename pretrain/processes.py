"""What processes do about signals and their parent's end: ranks, and the processes that help them.

A scheduler may send a stop signal to all processes of a job: to loader processes and to those that write
checkpoints too. These must go on until the rank that started them ends them.
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
# A terminal sends Ctrl-C to all that a run has; the run's own processes alone answer it.
_NOT_FOR_CHILDREN = STOP_SIGNALS | {signal.SIGINT}

_libc = ctypes.CDLL(None)  # loaded before any fork, not after one


def die_with_parent(parent: int | None = None) -> None:
    """Asks Linux to end this process when its parent ends, however that ends.

    A rank that outlived a killed launcher would go on writing to a run that has been started again.

    Args:
        parent: its process id, where it is known: it may be gone already.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def obey_parent_alone(_: int) -> None:
    """For a loader process: SIGTERM ends it when its parent sends it, and no one else.

    `_` is the worker's number, which DataLoader passes.
    """
    threading.Thread(target=_await_parents_sigterm, daemon=True).start()


def _await_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@functools.cache
def shield_forked_children() -> None:
    """Processes forked from now on do not get stop signals nor Ctrl-C, and end when this one does, however.

    A writer of checkpoints that outlived a killed rank would write into those of the run started again.
    """
    before = threading.local()  # forks of several threads do not share it

    def block() -> None:
        before.parent = os.getpid()
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)

    os.register_at_fork(
        before=block,
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before.mask),
        after_in_child=lambda: die_with_parent(before.parent),
    )


@contextlib.contextmanager
def no_stop_signals() -> Iterator[None]:
    """They and Ctrl-C wait for the end of the block; a process that is started in it never gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)
    # The first process of an interpreter starts Python's tracker too, which unblocks two of them here.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
