"""How ranks fail: a rank leaves its exit status and a sentence, for the launcher and for people.

srun has one exit status for all ranks. When one rank has failed it kills the others, and their 137
(SIGKILL) hides the first one's 2. So a launcher names a folder in the environment (ENDS), a new one for
each start, and a rank that fails leaves a file there, before it ends:

    ENDS/2.1f0c9a3e.json      the exit status, and a hash of the sentence

Ranks that fail alike leave one file together: the rank that makes it prints the sentence, and the others
are silent. 4,096 ranks that end well leave nothing, not even the folder. Nor does a rank that is killed.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.ranks import RankError, launched_rank, local_rank

ENDS = "MEGATRON_LADDER_ENDS"
"""The environment variable with the folder of this start."""
WAIT_S = 10.0
"""A rank waits so long for the file system. Then it prints its sentence in any case."""


class Crash(Exception):
    """A failure in words that a new start may mend, such as one of a disk: exit status 1."""


@dataclass(frozen=True)
class End:
    """How a rank failed."""

    status: int
    """Its exit status."""
    rank: int
    host: str
    message: str
    """A sentence, or a traceback's last line. "": there is nothing to say."""
    unix_time: float

    def in_words(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.message or f'exit status {self.status}'}"


def leave(status: int, message: str) -> bool:
    """Leaves this rank's exit status and sentence; call it before the rank ends with a failure.

    Returns:
        Whether this rank shall print the sentence: it is the first of those that fail alike, or the folder
        cannot be written. Without a folder the first rank of each machine prints.
    """
    folder = os.environ.get(ENDS)
    if not folder:
        return not _is_one_of_several() or local_rank() == 0
    end = End(status, _number(), socket.gethostname(), message, time.time())
    is_first = [True]

    def write() -> None:
        is_first[0] = _made(Path(folder), end)

    # In a thread, as the file system may be what has failed: a call may hang for minutes.
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    return is_first[0]


def left(folder: str | None = None) -> list[End]:
    """What ranks of a start have left so far, the first one first.

    Args:
        folder: of that start. None: of the start that this process belongs to.
    """
    folder = folder or os.environ.get(ENDS)
    found = []
    with contextlib.suppress(OSError):
        for path in Path(folder).glob("*.json") if folder else []:
            with contextlib.suppress(OSError, ValueError, TypeError):  # it is being written
                found.append(End(**json.loads(path.read_text())))
    return sorted(found, key=lambda end: end.unix_time)


def first_cause(otherwise: str) -> str:
    """What the rank says that failed first: others may only have lost their connection to it.

    Args:
        otherwise: a sentence, where no rank has left anything.
    """
    return next((end.in_words() for end in left()), otherwise)


def here(message: str) -> str:
    """The sentence of this rank, with its number and its machine where there are several ranks."""
    if not _is_one_of_several():
        return message
    return f"rank {_number()} on {socket.gethostname()}: {message}"


def is_watched() -> bool:
    """Whether a launcher waits for what this rank leaves."""
    return bool(os.environ.get(ENDS))


def _is_one_of_several() -> bool:
    try:
        rank = launched_rank()
    except RankError:
        return False
    return rank is not None and rank.world_size > 1


def _number() -> int:
    try:
        rank = launched_rank()
    except RankError:
        return 0
    return rank.number if rank else 0


def _made(folder: Path, end: End) -> bool:
    """Makes the file of a kind of failure. False: another rank has made it."""
    # Words with digits differ between ranks: ranks, hosts, addresses, ports, steps.
    kind = re.sub(r"\S*\d\S*", "#", end.message)
    path = folder / f"{end.status}.{hashlib.sha256(kind.encode()).hexdigest()[:8]}.json"
    try:
        # Not the folders above: where a disk is not mounted, they would be made under its mount point.
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    except OSError:
        return True
    with contextlib.suppress(OSError):  # a full disk: the name says the status
        os.write(file, json.dumps(asdict(end)).encode() + b"\n")
        os.close(file)
    return True
