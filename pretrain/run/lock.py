"""One process at a time trains in a run's folder: RUN/lock.

The system's lock (`flock`) ends with its process. Some shared file systems have none (Lustre without a
mount option), or one that other machines do not see (`localflock`); and the lock of a machine that died
stays until the file server gives it up. So the holder also writes into the file who it is, and a number
that grows. Another process can then tell a holder that lives from one that is gone. No clocks are compared.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_ladder.errors import UserError
from pretrain.ranks import why_several

logger = logging.getLogger(__name__)

BEAT_S = 5.0
"""Seconds after which the holder's number grows."""
SILENT_S = 90.0
"""A holder whose number has not grown for so long is gone; a disk may take half a minute to answer."""
NOT_SEEN_S = 20.0
"""So long a holder on another machine is watched although the system has given the lock to this process."""
GIVEN_UP_S = 600.0
"""The longest time to wait for a file server to give up the lock of a holder that is gone."""
CHILDREN_S = 30.0
"""The longest time to wait for the helper processes of a holder on this machine that has ended."""
_LOOK_S = 1.0
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Lock:
    """A lock that is held until `close`, or until this process ends. Usable in a `with`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._number = 0
        self._ending = threading.Event()
        _write(descriptor, self._number)
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock."""
        self._ending.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._ending.wait(BEAT_S):
            # A full disk, a server that is away: the next may succeed.
            with contextlib.suppress(OSError):
                if not self._is_mine():
                    logger.error("another process has taken this run's lock: end one of the two")
                    return
                self._number += 1
                _write(self._descriptor, self._number)

    def _is_mine(self) -> bool:
        holder = _holder(self._descriptor)
        return holder is None or {**holder, "number": ""} == {**_me(), "number": ""}


def lock(run_dir: Path) -> Lock:
    """Locks a run's folder, so that only this process trains in it.

    Where the holder is gone, but its lock is not, it waits until the file server has given the lock up.

    Raises:
        UserError: another process holds the lock, or RUN/lock is not a plain file.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock"
    descriptor = _open(path)
    try:
        _wait(path, descriptor)
        return Lock(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _open(path: Path) -> int:
    """Opens the file for reading and writing, as it is: it may be another's."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise UserError(_no_file(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(_no_file(path))
    return descriptor


def _no_file(path: Path) -> str:
    kind = "a link" if path.is_symlink() else "not a file"
    return f"{path} is {kind}: a run keeps a plain file there. Remove it, or choose another folder"


def _wait(path: Path, descriptor: int) -> None:
    """Returns when this process may hold the lock.

    Raises:
        UserError: another process holds it, or does not give it up.
    """
    first = holder = _holder(descriptor)
    began, said = time.monotonic(), False
    while True:
        locked = _flock(descriptor)
        gone = _is_gone(holder)
        waited = time.monotonic() - began
        if locked and (holder is None or gone or waited >= NOT_SEEN_S):
            return
        if locked is None and (holder is None or gone or waited >= SILENT_S):
            return _claim(path, descriptor)
        if locked is False and holder is None:  # an older version's, which writes nothing
            raise UserError(_held(path, holder))
        if gone is False and not locked:
            raise UserError(_held(path, holder))
        if waited > (CHILDREN_S if gone else GIVEN_UP_S):
            raise UserError(
                f"{_held(path, holder)}. It gives no sign of life: if it has ended, remove {path}"
            )
        if not said:
            logger.info("%s: waiting whether %s gives a sign of life", path, _words(holder))
            said = True
        time.sleep(_LOOK_S)
        holder = _holder(descriptor)
        if holder is not None and holder != first:  # its number grows, or another one has come
            raise UserError(_held(path, holder))


def _flock(descriptor: int) -> bool | None:
    """Whether the system's lock is this process's now; None: the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _claim(path: Path, descriptor: int) -> None:
    """Takes the lock without `flock`: of several that write at the same time, the last one has it."""
    logger.warning(
        "%s: the file system has no locks (for Lustre: the mount option flock): this file's content alone "
        "keeps two runs apart",
        path,
    )
    _write(descriptor, 0)
    time.sleep(2 * _LOOK_S)
    holder = _holder(descriptor)
    if holder is None or _is_gone(holder) is not False or holder["pid"] != os.getpid():
        raise UserError(_held(path, holder))


def _me() -> dict[str, Any]:
    return {**_place(), "pid": os.getpid(), "started": _started(os.getpid())}


def _write(descriptor: int, number: int) -> None:
    # One write of the same length each time: a reader finds the old content or the new one.
    content = json.dumps({**_me(), "number": f"{number:012d}"})
    os.pwrite(descriptor, content.encode() + b"\n", 0)


def _holder(descriptor: int) -> dict[str, Any] | None:
    """What the holder has written; None: there is none, or one of an older version."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0).split(b"\n")[0])
        return found if isinstance(found, dict) else None
    except ValueError:
        return None


def _is_gone(holder: dict[str, Any] | None) -> bool | None:
    """Whether the holder has ended; None: it was on another machine, and cannot be asked."""
    if holder is None or {key: holder.get(key) for key in _place()} != _place():
        return None
    pid = holder.get("pid")
    return not isinstance(pid, int) or _started(pid) != holder.get("started")


def _place() -> dict[str, str]:
    """This machine since it was switched on, and the container: where process ids mean the same."""
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id").strip(),
        "container": _link("/proc/self/ns/pid"),
    }


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine was switched on; "": there is no such process."""
    # The name, in brackets, may have spaces and brackets of its own. 20th after it: starttime of proc(5).
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""  # Z, X: has ended


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _held(path: Path, holder: dict[str, Any] | None) -> str:
    what = f"{path.parent}: {_words(holder)} is training in this folder"
    return f"{what}: wait until it ends, or end it{why_several()}"


def _words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"another process ({holder.get('pid')} on {holder.get('host')})"
