"""Opens the files of a folder that a stranger may have made."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from megatron_ladder.errors import UserError


class NotData(UserError):
    """A file of a checkpoint holds something else than the data that is written there."""


def open_plain(folder: Path, name: str) -> tuple[BufferedReader, int]:
    """Opens a file for reading; returns it and its size in bytes.

    A pipe or a device could make a reader wait or read for ever. A link out of the folder could bring a
    private file of the user's into what is exported.

    Raises:
        NotData: `name` is no plain name, or not a file of this folder.
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
    """
    path = _in_folder(folder, name)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise NotData(f"{name} is not a regular file")
    return os.fdopen(descriptor, "rb"), facts.st_size


def plain_size(folder: Path, name: str) -> int:
    """A file's size in bytes, without opening it. Raises as `open_plain`."""
    facts = _in_folder(folder, name).stat()
    if not stat.S_ISREG(facts.st_mode):
        raise NotData(f"{name} is not a regular file")
    return facts.st_size


def _in_folder(folder: Path, name: str) -> Path:
    if name in ("", ".", "..") or Path(name).name != name or not _can_be(name):
        raise NotData(f"{_shown(name)} is not the name of a file in the folder")
    path = folder / name
    if path.is_symlink() and _end(path).parent != _end(folder):
        raise NotData(
            f"{name} is a link to a file outside of the folder: copy the folder with `cp -rL`, if you know "
            "where the link leads"
        )
    return path


def _can_be(name: str) -> bool:
    """Whether a file may have this name: JSON may hold half of a character, or NUL."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _end(path: Path) -> Path:
    """Where links lead. (`Path.resolve` raises RuntimeError where they lead round in a circle.)"""
    return Path(os.path.realpath(path))


def _shown(name: str) -> str:
    return repr(name[:80])


def refuse_links(folder: Path, home: Path | None = None) -> None:
    """Refuses a folder whose files are to be copied, if a link in it leads out of it, or it has a pipe.

    The copy could be a private file of the user's, which then is exported and published. In the cache of
    Hugging Face's hub, links lead to `blobs`, beside the folder.

    Args:
        home: the folder that this one is a part of, and not only a link in.

    Raises:
        NotData: there is such a link, or such a file.
    """
    whole = _end(folder)
    if home is not None and not whole.is_relative_to(_end(home)):
        raise NotData(
            f"{folder} is a link to a folder outside of {home}: put the folder itself there"
        )
    inside = [whole, *([whole.parents[1] / "blobs"] if whole.parent.name == "snapshots" else [])]
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" and path.is_file():
            continue  # read as tensors, and not copied: weights may lie on another disk
        if path.is_symlink() and not any(_end(path).is_relative_to(place) for place in inside):
            raise NotData(
                f"{path} is a link to a file outside of its folder: put the file itself there, or "
                "remove the link"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise NotData(f"{path} is not a regular file: remove it")
