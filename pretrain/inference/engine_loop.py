"""The loop that drives the engine on all ranks: what comes in on the first one is told to the others."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_ladder.inference.engine import DynamicEngine
from megatron_ladder.inference.requests import Output, Request

IDLE_S = 5.0
"""Ranks without work hear of each other so often: a collective must not wait for ever."""


@dataclass(frozen=True)
class Cancel:
    """Ends a request."""

    id: int


class Stop:
    """Ends the loop, and all that runs."""


Command = Request | Cancel | Stop


def drive(
    engine: DynamicEngine,
    inbox: "queue.SimpleQueue[Command]",
    deliver: Callable[[list[Output]], None],
) -> None:
    """Runs until a Stop comes. Called by every rank; `inbox` and `deliver` are the first one's.

    Args:
        inbox: filled by other threads.
        deliver: called after every step, also an idle one: to look at the engine's figures.
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
    commands = []
    try:
        if wait:
            commands.append(inbox.get(timeout=IDLE_S))
        while True:
            commands.append(inbox.get_nowait())
    except queue.Empty:
        return commands
