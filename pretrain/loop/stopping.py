"""What ends a run before its schedule: a signal. The step under way is finished, or the one after it where
the signal came after backward, then a checkpoint.

A scheduler sends SIGUSR1 or SIGTERM some time before it kills; to one process, or to all that the job
has: loader processes and those that write checkpoints among them, which must not mind.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import TracebackType

import torch
import torch.distributed as dist

from pretrain.launch import STOP_SIGNALS, die_with_parent

# A scheduler, its step daemon and a batch script may each pass the same signal on.
_SECOND_AFTER_S = 1.0
# A terminal sends Ctrl-C to all that a run has; the run's own processes alone answer it.
_NOT_FOR_CHILDREN = STOP_SIGNALS | {signal.SIGINT}


class StopSignals:
    """While entered, a stop signal is kept until `agreed` asks; a second one ends the process at once.

    SIGINT (Ctrl-C) stays what it was: the run ends where it is, and what helps it with it.
    """

    def __enter__(self) -> "StopSignals":
        _shield_forked_children()
        self._received = 0
        self._since = 0.0
        self._handlers = {n: signal.signal(n, _nothing) for n in STOP_SIGNALS}
        # Python runs handlers between two instructions of the main thread, which may be in a
        # collective whose other side is gone. The number of a signal is in this pipe at once.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by __main__.py
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher passes it on once more
            # A checkpoint that is being written would never become visible, and Python would wait for
            # its writer, which would no longer find the process that it reports to.
            for child in multiprocessing.active_children():
                child.kill()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is _nothing:  # not `ignore`d
                signal.signal(number, handler)
        os.write(
            self._write, bytes(1)
        )  # its end: closing would not do, as children have it open too
        self._listener.join()
        os.close(self._write)
        os.close(self._read)

    def agreed(self) -> str:
        """The name of a signal that some rank has got; "" when none has.

        Called by every rank at the same step, and the same on all.
        """
        number = torch.tensor([self._received], dtype=torch.int, device=torch.cuda.current_device())
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else ""

    def ignore(self) -> None:
        """All is saved: torchrun ends all ranks when one has ended, and shall not change their status."""
        if dist.get_world_size() > 1:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number not in STOP_SIGNALS:
                continue
            if not self._received:
                self._received, self._since = number, time.monotonic()
                name = signal.Signals(number).name
                print(f"{name}: stopping after this step, with a checkpoint", file=sys.stderr)
            elif time.monotonic() - self._since >= _SECOND_AFTER_S:
                os._exit(128 + number)


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
def _shield_forked_children() -> None:
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


def _nothing(*_: object) -> None:
    """The handler of a signal that `_listen` reads of."""
