"""Stop signals: how a run ends before the end of its schedule.

The run finishes the step that it is in, or the next one if the signal came after backward, and then saves
a checkpoint.

A scheduler sends SIGUSR1 or SIGTERM some time before it kills a job. It sends the signal to one process or
to all processes of the job. These include loader processes and those that write checkpoints, which must
go on.
"""

import contextlib
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

# A second signal within this time is taken for the first one: a scheduler, its step daemon and a batch
# script may each pass on the same signal.
_SECOND_AFTER_S = 1.0


class StopSignals:
    """Within the `with`, the first stop signal is kept for `agreed`; a second one ends the process at once.

    SIGINT (Ctrl-C) still interrupts the process where it is. Its child processes end with it.
    """

    def __enter__(self) -> "StopSignals":
        shield_forked_children()
        self._received = 0
        self._since = 0.0
        self._handlers = {n: signal.signal(n, _nothing) for n in STOP_SIGNALS}
        # Python runs a signal handler only between two instructions of the main thread, and that thread
        # may be stuck in a collective because another rank has ended. But the number of a signal is
        # written to this pipe at once, and a thread reads it.
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
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher may pass Ctrl-C on once more
            # At its exit Python would wait for the process that writes a checkpoint, and that process
            # could no longer report its result. The checkpoint would never become visible anyway.
            for child in multiprocessing.active_children():
                child.kill()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is _nothing:  # `ignore` has not been called
                signal.signal(number, handler)
        # 0 ends the thread. Closing the pipe would not end it: child processes have it open too.
        os.write(self._write, bytes(1))
        self._listener.join()
        os.close(self._write)
        os.close(self._read)

    def agreed(self) -> str:
        """The name of a stop signal that at least one rank has received; "" when no rank has.

        Every rank calls it at the same step, and all get the same answer.
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
        """Ignores stop signals from now on; call it when everything is saved.

        When one rank has ended, torchrun sends SIGTERM to the others. That must not change their exit
        status.
        """
        if dist.get_world_size() > 1:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        """Reads the numbers of signals from the pipe, in a thread, until it reads 0."""
        while number := os.read(self._read, 1)[0]:
            if number not in STOP_SIGNALS:
                continue
            if not self._received:
                self._received, self._since = number, time.monotonic()
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):  # nobody reads it: this thread must go on
                    print(f"{name}: stopping after this step, with a checkpoint", file=sys.stderr)
            elif time.monotonic() - self._since >= _SECOND_AFTER_S:
                os._exit(128 + number)


def _nothing(*_: object) -> None:
    """The handler of stop signals. It does nothing: `_listen` reads their numbers from the pipe."""
