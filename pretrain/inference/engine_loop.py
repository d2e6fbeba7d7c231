"""The loop that drives the engine on all ranks. The first rank sends the requests it gets to the others."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_ladder.inference.engine import DynamicEngine, Output, Request

IDLE_S = 5.0
"""When there is no work, ranks exchange a message every so many seconds: a collective that waits longer
than its timeout fails."""


@dataclass(frozen=True)
class Cancel:
    """Ends a request."""

    id: int


class Stop:
    """Ends the loop, and all requests that are running."""


Command = Request | Cancel | Stop


def drive(
    engine: DynamicEngine,
    inbox: "queue.SimpleQueue[Command]",
    deliver: Callable[[list[Output]], None],
) -> None:
    """Runs the engine until a Stop comes. Every rank calls it.

    Args:
        engine: this rank's engine.
        inbox: requests and other commands from other threads; only the first rank's is read.
        deliver: called on the first rank after every step with the new outputs, also after a step without
            work, so that it can read the engine's figures.
    """
    is_first = dist.get_rank() == 0
    while True:
        commands: list[Any] = _drain(inbox, wait=not engine.has_work()) if is_first else []
        if dist.get_world_size() > 1:
            box = [commands]
            dist.broadcast_object_list(box)
            commands = box[0]
        for command in commands:
            if isinstance(command, Stop):
                return
            if isinstance(command, Cancel):
                engine.cancel(command.id)
            else:
                engine.add(command)
        outputs = engine.step()
        if is_first:
            deliver(outputs)


def _drain(inbox: "queue.SimpleQueue[Command]", *, wait: bool) -> list[Command]:
    """All commands in the inbox. With `wait` and an empty inbox, it waits up to IDLE_S for the first."""
    commands = []
    try:
        if wait:
            commands.append(inbox.get(timeout=IDLE_S))
        while True:
            commands.append(inbox.get_nowait())
    except queue.Empty:
        return commands
