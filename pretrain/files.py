"""Writes files so that readers never see a half-written one; syncs files and computes checksums."""

import errno
import hashlib
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8): readers find the old file or the whole new one.

    The content goes into a temporary file in the same folder. That file is synced to disk, then renamed.
    A link in its place, which a stranger's folder may have, is not followed: OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", opener=_not_linked) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _not_linked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(path: Path) -> None:
    """Waits until the content of a file or a folder is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(file: Path, target: Path) -> None:
    """Gives a file a second name; where the file system has no hard links, copies it."""
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        logger.info("%s is copied: %s cannot link to it (%s)", file, target.parent, error.strerror)
        shutil.copyfile(file, target)
        sync(target)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. For small files: it reads the whole file at once."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
