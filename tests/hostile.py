"""Makes a run's folder hostile: each kind would run a command when a library reads it in its usual way."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Command:
    """Its pickle runs a shell command, which makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def torch_saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def change_index(checkpoint: Path, change: Callable[[Any], None]) -> None:
    """Loads a checkpoint's own index as Python does, changes it, and writes it."""
    index = pickle.loads((checkpoint / ".metadata").read_bytes())  # noqa: S301 (the test's own)
    change(index)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def put_in_object(checkpoint: Path, name: str, content: bytes) -> None:
    """Replaces what is stored as the objects whose name contains `name`."""
    (checkpoint / "__9_0.distcp").write_bytes(content)

    def change(index: Any) -> None:
        found = [key for key in index.storage_data if name in key.fqn]
        assert found
        for key in found[:1]:
            place = type(index.storage_data[key])("__9_0.distcp", 0, len(content))
            index.storage_data[key] = place

    change_index(checkpoint, change)


def hostile_index(checkpoint: Path, marker: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Command(marker)))


def hostile_field(checkpoint: Path, marker: Path) -> None:
    """The index is right, but for a field that nothing uses."""

    def change(index: Any) -> None:
        index.planner_data = Command(marker)

    change_index(checkpoint, change)


def hostile_common(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "common.pt").write_bytes(torch_saved(Command(marker)))


def hostile_random_states(checkpoint: Path, marker: Path) -> None:
    put_in_object(checkpoint, "rng", torch_saved([Command(marker)]))


def hostile_extra_state(checkpoint: Path, marker: Path) -> None:
    put_in_object(checkpoint, "_extra_state/", torch_saved([Command(marker)]))


def hostile_tensor(checkpoint: Path, marker: Path) -> None:
    content = torch_saved(Command(marker))
    (checkpoint / "__9_0.distcp").write_bytes(content.ljust(2**20, b"\0"))

    def change(index: Any) -> None:
        for key in [k for k in index.storage_data if k.fqn == "decoder.final_layernorm.weight"]:
            place = type(index.storage_data[key])("__9_0.distcp", 0, len(content))
            index.storage_data[key] = place

    change_index(checkpoint, change)


KINDS = {
    "index": hostile_index,
    "field": hostile_field,
    "common": hostile_common,
    "random states": hostile_random_states,
    "extra state": hostile_extra_state,
    "tensor": hostile_tensor,
}
