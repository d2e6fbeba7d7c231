"""How ranks and their helper processes handle signals and the end of their parent process.

A scheduler may send a stop signal to all processes of a job, also to the processes that load data or write
checkpoints. These must continue until the rank that started them ends them.
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
# A terminal sends Ctrl-C to all processes of a run. Only the ranks react to it.
_NOT_FOR_CHILDREN = STOP_SIGNALS | {signal.SIGINT}

_libc = ctypes.CDLL(None)  # loaded here, so that a forked child need not load it


def die_with_parent(parent: int | None = None) -> None:
    """Asks Linux to kill this process when its parent ends, for whatever reason the parent ends.

    Otherwise the ranks of a killed launcher would continue to write to the run's folder after the run was
    started again. Does nothing on other systems.

    Args:
        parent: the parent's process id, if known: this process exits at once when that parent has ended
            already.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def obey_parent_alone(_: int) -> None:
    """Makes a loader process end at a SIGTERM from its parent and ignore one from any other process.

    `_` is the worker's number, which DataLoader passes.
    """
    threading.Thread(target=_await_parents_sigterm, daemon=True).start()


def _await_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@functools.cache
def shield_forked_children() -> None:
    """Makes processes forked from now on ignore stop signals and Ctrl-C, and end when this process ends.

    Otherwise a process that writes checkpoints for a killed rank would continue, and would write into the
    checkpoints of the run after it was started again.
    """
    before = threading.local()  # several threads may fork at the same time

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
    """Holds back stop signals and Ctrl-C until the end of the block.

    A process that is started inside the block inherits the blocked signals and never receives them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)
    # When Python starts its resource tracker, it unblocks SIGINT and SIGTERM in this thread. So the
    # tracker is started first, and the signals are blocked again.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
