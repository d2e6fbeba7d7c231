"""What ends a run before its schedule: a signal. The step under way is finished, or the one after it where
the signal came after backward, then a checkpoint.

A scheduler sends SIGUSR1 or SIGTERM some time before it kills; to one process, or to all that the job
has: loader processes and those that write checkpoints among them, which must not mind.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import TracebackType

import torch
import torch.distributed as dist

from pretrain.processes import STOP_SIGNALS, shield_forked_children

logger = logging.getLogger(__name__)

# A scheduler, its step daemon and a batch script may each pass the same signal on.
_SECOND_AFTER_S = 1.0


class StopSignals:
    """While entered, a stop signal is kept until `agreed` asks; a second one ends the process at once.

    SIGINT (Ctrl-C) stays what it was: the run ends where it is, and what helps it with it.
    """

    def __enter__(self) -> "StopSignals":
        shield_forked_children()
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

    def stop(self, why: str) -> None:
        """Acts as if SIGTERM had come. Does nothing when a signal has come before: it is no second one."""
        if not self._received:
            self._received, self._since = signal.SIGTERM, time.monotonic()
            logger.warning("%s: stopping after this step, with a checkpoint", why)

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


def _nothing(*_: object) -> None:
    """The handler of a signal that `_listen` reads of."""
