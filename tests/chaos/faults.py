"""What happens to a run: kinds of faults, and a plan of them from a seed."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.run.folder import checkpoints
from pretrain.run.status import read_starts
from tests.chaos.place import Place

Effect = Literal["crash", "stop", "none"]
"""crash: started again from the newest valid checkpoint. stop: with nothing lost. none: no new start."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault. What it does returns what there is to say of it."""

    effect: Effect
    strike: Callable[[Place, Path, random.Random], str]
    damage: Callable[[Path, random.Random], str] | None = None
    """Done before to a file of the newest checkpoint."""
    only_on: Literal["slurm", "local", "own disk", ""] = ""
    says: str = ""
    """A part of the line "rank N on HOST: ..." that the log must have once more when training goes on."""


@dataclass(frozen=True)
class Fault:
    kind: str
    step: int
    """After which it happens; a NaN in it."""


def plan(seed: int, faults: int, steps: int, names: list[str]) -> list[Fault]:
    """Faults in order, each in its own part of the run; each kind once before one comes again."""
    rng = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < faults:
        kinds += rng.sample(names, len(names))
    # The last part stays free: what happens after the last step is not a fault of training.
    length = (steps - 10) // faults
    assert length >= 5, "too few steps for so many faults"
    return [
        Fault(kind, 1 + i * length + rng.randrange(length)) for i, kind in enumerate(kinds[:faults])
    ]


def possible_kinds(place: Place) -> list[str]:
    has = {"", "slurm" if place.cluster else "local"} | (
        {"own disk"} if place.has_own_disk else set()
    )
    return [name for name, kind in KINDS.items() if kind.only_on in has]


def _kill_rank(place: Place, run: Path, rng: random.Random) -> str:
    number = rng.randrange(2)
    place.ranks(run)[number].kill()
    return f"rank {number}"


def _kill_launcher(place: Place, run: Path, rng: random.Random) -> str:
    """srun has a helper, which ends the ranks when srun has died: once it does, once it dies too."""
    first, *helpers = place.launchers(run)
    killed = [first, *helpers] if rng.randrange(2) else [first]
    for process in killed:
        process.suspend()
    for process in killed:
        process.kill()
    return "and of its helper" if len(killed) > 1 else ""


def _crash_node(place: Place, run: Path, rng: random.Random) -> str:
    node, away_s = rng.choice(place.nodes(run)), rng.randrange(1, 20)
    place.crash(node, away_s)
    return f"node{node}, back after {away_s} s"


def _signal_rank(number: signal.Signals) -> Callable[[Place, Path, random.Random], str]:
    def strike(place: Place, run: Path, rng: random.Random) -> str:
        rank = rng.randrange(2)
        place.ranks(run)[rank].send_signal(number)
        return f"rank {rank}"

    return strike


def _time_limit(place: Place, run: Path, _: random.Random) -> str:
    place.warn_of_time_limit(run)
    return ""


def _hang(place: Place, run: Path, rng: random.Random) -> str:
    number = rng.randrange(2)
    place.ranks(run)[number].suspend()
    return f"rank {number}"


def _fill_disk(place: Place, run: Path, _: random.Random) -> str:
    """Until a checkpoint could not be saved. What is small has room: this is about the checkpoint."""
    ranks = place.ranks(run)
    for rank in ranks:  # or a run near its end could be over before the disk is full
        rank.suspend()
    failures = _count(run, '"kind": "save_failed"')
    starts = len(read_starts(run))
    ballast = place.fill(left=256 << 10)
    for rank in ranks:
        rank.resume()
    end = time.monotonic() + 60
    while _count(run, '"kind": "save_failed"') == failures:
        assert len(read_starts(run)) == starts, "it was started again"
        assert time.monotonic() < end, "no save failed"
        ballast = place.fill(left=256 << 10)
        time.sleep(0.02)
    ballast.unlink()
    return "a save failed"


def _unmount(place: Place, run: Path, _: random.Random) -> str:
    """A rank is killed, and the next start finds no data on its node. A later start does."""
    before = place.sentences(run, "/data")
    with place.unmounted_data(place.nodes(run)[1]):
        place.ranks(run)[1].kill()
        end = time.monotonic() + 240
        while place.sentences(run, "/data") == before:
            assert time.monotonic() < end, "nobody has said that the data are missing"
            time.sleep(0.2)
    return "of rank 1"


def _raise(place: Place, run: Path, rng: random.Random) -> str:
    number = rng.randrange(2)
    (place.faults / f"raise.{number}").touch()
    return f"rank {number}"


def _slow_fsync(place: Place, run: Path, _: random.Random) -> str:
    """Until a checkpoint was written so."""
    before, fault = newest(run), place.faults / "slow"
    fault.write_text("0.5")
    end = time.monotonic() + 120
    while newest(run) == before:
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.1)
    fault.unlink()
    return "0.5 s each"


def _stall(place: Place, run: Path, _: random.Random) -> str:
    (place.faults / "stalled").write_text("30")
    end = time.monotonic() + 60
    while not (place.faults / "has stalled").exists():
        assert time.monotonic() < end, "nothing was synced"
        time.sleep(0.1)
    (place.faults / "has stalled").unlink()
    return "one fsync of rank 0"


def _link_the_lock(place: Place, run: Path, _: random.Random) -> str:
    """The next start must refuse the link and leave its target alone. Then the link is removed by hand."""
    precious = place.folder / "precious"
    precious.write_text("of somebody else")
    (run / "lock").unlink()
    (run / "lock").symlink_to(precious)
    _kill_rank(place, run, random.Random(1))
    end = time.monotonic() + 240
    while place.state(run) != "FAILED":
        assert precious.read_text() == "of somebody else", "the link's target was changed"
        assert time.monotonic() < end, "the link was not refused"
        time.sleep(1)
    assert precious.read_text() == "of somebody else", "the link's target was changed"
    (run / "lock").unlink()
    place.submit_again()
    return "refused, submitted again"


def _nothing(*_: object) -> str:
    """rank.py does it."""
    return ""


def _truncate(path: Path, rng: random.Random) -> str:
    os.truncate(path, rng.randrange(path.stat().st_size))
    return f"{path.name} of {path.parent.name}"


def _flip_bit(path: Path, rng: random.Random) -> str:
    with path.open("r+b") as file:
        position = rng.randrange(path.stat().st_size)
        file.seek(position)
        byte = file.read(1)[0] ^ (1 << rng.randrange(8))
        file.seek(position)
        file.write(bytes([byte]))
    return f"byte {position} of {path.name} of {path.parent.name}"


def _delete(path: Path, _: random.Random) -> str:
    path.unlink()
    return f"{path.name} of {path.parent.name}"


def _count(run: Path, text: str) -> int:
    return (run / "metrics.jsonl").read_text().count(text)


def file_of(checkpoint: Path, rng: random.Random) -> Path:
    """Not the manifest: without one a checkpoint counts as one from before there were any."""
    return rng.choice(sorted(p for p in checkpoint.iterdir() if p.name != "manifest.json"))


def newest(run: Path) -> Path | None:
    found = checkpoints(run)
    return found[-1] if found else None


KINDS = {
    "SIGKILL of a rank": Kind("crash", _kill_rank),
    "SIGKILL of srun": Kind("crash", _kill_launcher, only_on="slurm"),
    "SIGKILL of torchrun": Kind("crash", _kill_launcher, only_on="local"),
    "a node dies": Kind("crash", _crash_node, only_on="slurm"),
    "SIGTERM to a rank": Kind("stop", _signal_rank(signal.SIGTERM)),
    "SIGUSR1 to a rank": Kind("stop", _signal_rank(signal.SIGUSR1)),
    "SIGUSR1 before the time limit": Kind("stop", _time_limit, only_on="slurm"),
    "a file truncated, SIGKILL": Kind("crash", _kill_rank, _truncate),
    "a bit flipped, SIGKILL": Kind("crash", _kill_rank, _flip_bit),
    "a file deleted, SIGKILL": Kind("crash", _kill_rank, _delete),
    "disk full": Kind("none", _fill_disk, only_on="own disk"),
    "NaN": Kind("none", _nothing),
    "a rank hangs": Kind("crash", _hang),
    "a mount missing on one node": Kind("crash", _unmount, only_on="slurm", says="/data"),
    "a rank fails by itself": Kind("crash", _raise, says="RuntimeError: a fault of chaos"),
    "slow fsync": Kind("none", _slow_fsync),
    # Needs a writer thread: training must not wait for the disk (hang_s is 6 s here).
    "a disk that answers after 30 s": Kind("none", _stall),
    # Needs a lock that does not follow links.
    "a link at the lock's path": Kind("crash", _link_the_lock),
}
