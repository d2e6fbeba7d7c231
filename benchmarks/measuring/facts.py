"""What benchmarks write beside their figures: command, device, versions, options, and of a GPU attention,
memory, clock and power."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pretrain.bench.machine import NO_MEMORY as NO_MEMORY
from pretrain.bench.machine import attention_of as attention_of
from pretrain.bench.machine import cuda_libraries, processor, without_folders
from pretrain.bench.machine import forget_peak as forget_peak
from pretrain.bench.machine import peak_memory as peak_memory
from pretrain.bench.machine import reason as reason
from pretrain.files import write_atomically
from pretrain.run.versions import versions

PATIENCE_S = 5.0
FILES = ("json", "picture", "timeline", "trace")  # options that name what is written
ROOT = Path(__file__).parents[2]


def header(device: str, args: argparse.Namespace, *packages: str) -> dict[str, Any]:
    """The first fields of a benchmark's JSON.

    Args:
        packages: whose versions count, beside those of torch and megatron-core.
    """
    libraries: dict[str, Any] = {name: version(name) for name in packages}
    if device != "cpu":
        libraries |= cuda_libraries()
    return {
        "command": command(),
        "device": device,
        "machine": processor(),
        "versions": {**versions(), **libraries},
        "options": {k: _without_folders(v) for k, v in vars(args).items() if k not in FILES},
        "threads": torch.get_num_threads(),
    }


def command() -> str:
    """What was typed, without this machine's folders."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", str(shown), *without_folders(sys.argv[1:])])


def _without_folders(option: Any) -> str:
    if isinstance(option, list | tuple):
        return str([x.name if isinstance(x, Path) else x for x in option])
    return option.name if isinstance(option, Path) else str(option)


def write(path: Path | None, facts: dict[str, Any]) -> None:
    """Writes, or replaces, the JSON. None: nothing was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(facts, indent=1) + "\n")


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; short rows are filled with empty cells."""
    cells = [titles, ["---"] * len(titles), *rows]
    full = [[*row, *[""] * (len(titles) - len(row))] for row in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in full)


def percent(value: float) -> str:
    return f"{value:.1%}"


def between(low: float, middle: float, high: float, digits: int = 2) -> str:
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table of rows; one that failed has its error behind its labels.

    Args:
        columns: title to format string, with the names of a row's fields. The cell is empty where the row
            has no such field, or None.
    """
    lines = []
    for row in rows:
        cells = [_cell(form, row) for form in columns.values()]
        if "error" in row:
            cells[cells.index("")] = row["error"]
        lines.append(cells)
    return markdown(list(columns), lines)


def _cell(form: str, row: dict[str, Any]) -> str:
    try:
        return form.format_map(row)
    except (KeyError, TypeError):
        return ""


def device_allocations() -> int:
    """How often torch has asked CUDA for memory or given it back so far. Kernels wait for each time."""
    if not torch.cuda.is_available():
        return 0
    counts = torch.cuda.memory_stats()
    return sum(counts.get(n, 0) for n in ("num_device_alloc", "num_device_free"))


def under_load(run: Callable[[], object]) -> dict[str, float]:
    """Clock of the SMs in MHz and power in W, under load: `run` is repeated until nvidia-smi has answered.

    These runs are not measured. Empty without a GPU or nvidia-smi. For one process only: several ones would
    not repeat `run` equally often.
    """
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    which = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else "0"
    query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.Popen(  # noqa: S603 (a list)
            ["nvidia-smi", "-i", which, *query],  # noqa: S607
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return {}
    end = time.monotonic() + PATIENCE_S
    try:
        while asked.poll() is None and time.monotonic() < end:
            run()
    finally:
        asked.kill()
        answer, _ = asked.communicate()
    return read_load(answer)


def read_load(answer: str) -> dict[str, float]:
    """Clock and power from nvidia-smi's line; empty if it is no such line."""
    try:
        clock, power = map(float, answer.split(","))
    except ValueError:  # "[N/A]", or an error
        return {}
    return {"sm_clock_mhz": clock, "power_w": power}


def in_words(found: dict[str, Any]) -> str:
    """Attention, memory, clock and power of a row, those that it has."""
    forms = (
        ("attention", "attention: {}"),
        ("peak_gib", "peak {:.2f} GiB"),
        ("peak_reserved_gib", "reserved {:.2f} GiB"),
        ("sm_clock_mhz", "{:.0f} MHz"),
        ("power_w", "{:.0f} W"),
    )
    return ", ".join(
        form.format(found[name]) for name, form in forms if found.get(name) is not None
    )
