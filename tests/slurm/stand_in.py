"""Stands in for the interpreter of a profile: `stand_in.py -P -m pretrain ...` is a training that keeps the
contract of the real one (docs/guides/slurm.md) without its seconds of start-up.

Ranks meet at MASTER_ADDR:MASTER_PORT and wait for each other at every step. The loss is a hash of all
steps before, so that a step lost or done twice shows. STAND_IN (JSON) says what goes wrong.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

PLAN = json.loads(os.environ.get("STAND_IN", "{}"))
asked: list[int] = []


def main(argv: list[str]) -> int:
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    run = Path(options["--output-dir"])
    steps = PLAN.get("steps", 20)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, lambda number, _: asked.append(number))
    saved = sorted((run / "checkpoints").glob("step_*"))
    step, state = json.loads((saved[-1] / "state").read_text()) if saved else (0, "")
    print(f"rank {rank} of {world_size} on {os.uname().nodename} from step {step}", flush=True)
    ranks = meet(rank, world_size)
    while step < steps:
        time.sleep(PLAN.get("step_s", 0.1))
        if PLAN.get("crash_at") == step + 1 and rank == world_size - 1 and once(run, "crashed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if PLAN.get("always_crash_at") == step + 1:
            return 1
        if PLAN.get("alone"):  # one rank ends, and the others wait for it
            if rank < world_size - 1:
                time.sleep(600)
            return leave(PLAN["alone"])
        if PLAN.get("mistake"):
            print("a user's mistake", flush=True)
            return 2
        step += 1
        state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
        stop = agree(ranks, rank, bool(asked))
        if rank == 0:
            with (run / "losses").open("a") as losses:
                losses.write(f"{step} {state}\n")
        if stop or step % 5 == 0 or step == steps:
            if rank == 0:
                save(run, step, state)
            agree(ranks, rank, False)
        if stop and step < steps:
            return 75
    return 0


def meet(rank: int, world_size: int) -> list[socket.socket]:
    """Connections to the other ranks (rank 0), or to rank 0."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        server = socket.create_server(address)
        server.settimeout(30)
        return [server.accept()[0] for _ in range(world_size - 1)]
    end = time.monotonic() + 30
    while True:
        try:
            return [socket.create_connection(address)]
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def agree(ranks: list[socket.socket], rank: int, mine: bool) -> bool:
    """Whether any rank says so; every rank is told."""
    if rank:
        ranks[0].sendall(bytes([mine]))
        return any(receive(ranks[0]))
    stop = any([mine, *(any(receive(other)) for other in ranks)])
    for other in ranks:
        other.sendall(bytes([stop]))
    return stop


def leave(status: int) -> int:
    """As pretrain/run/ends.py."""
    place = Path(os.environ["MEGATRON_LADDER_ENDS"])
    place.mkdir(parents=True)
    (place / f"{status}.0123abcd.json").touch()
    return status


def receive(other: socket.socket) -> bytes:
    byte = other.recv(1)
    if not byte:
        sys.exit("a rank is gone")
    return byte


def save(run: Path, step: int, state: str) -> None:
    folder = run / "checkpoints" / f"step_{step:08d}"
    if folder.exists():
        return
    new = folder.with_name(folder.name + ".tmp")
    new.mkdir(parents=True, exist_ok=True)
    (new / "state").write_text(json.dumps([step, state]))
    new.rename(folder)


def once(run: Path, name: str) -> bool:
    try:
        (run / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    assert sys.argv[1:4] == ["-P", "-m", "pretrain"], sys.argv
    sys.exit(main(sys.argv[4:]))
