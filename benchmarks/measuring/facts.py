"""What benchmarks say beside their figures: device, versions, options; attention, memory, clock, power."""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.files import write_atomically
from pretrain.run.versions import versions

NO_MEMORY = "out of memory"
PATIENCE_S = 5.0
FILES = ("json", "picture", "trace")  # options that name what is written


def header(device: str, args: argparse.Namespace) -> dict[str, Any]:
    """The first fields of a benchmark's JSON."""
    if device != "cpu":
        libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        libraries = {}
    return {
        "device": device,
        "versions": {**versions(), **libraries},
        "options": {k: str(v) for k, v in vars(args).items() if k not in FILES},
        "threads": torch.get_num_threads(),
    }


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


def attention_of(model: nn.Module) -> str:
    """Which core attention the model's layers took in their last forward."""
    own: Any = next((m for n, m in model.named_modules() if n.endswith("core_attention")), None)
    if own is None:
        return "none"
    if type(own).__name__ != "TEDotProductAttention":
        return str(own.config.core_attention)
    te: Any = sys.modules["transformer_engine.pytorch.attention.dot_product_attention"]
    backends = te._attention_backends
    if backends["use_flash_attention"]:
        return f"Transformer Engine: FlashAttention {backends['flash_attention_backend']}"
    if backends["use_fused_attention"]:
        return f"Transformer Engine: cuDNN {backends['fused_attention_backend']}"
    if backends["use_unfused_attention"]:
        return "Transformer Engine: UNFUSED, scores in memory"
    return "Transformer Engine, not asked yet"


def forget_peak() -> None:
    """What was held at most is counted from here on. Nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """GiB, since `forget_peak`: of tensors, and of what torch has taken from CUDA. Empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def device_allocations() -> int:
    """How often torch has asked CUDA for memory or given it back so far, which holds kernels up."""
    if not torch.cuda.is_available():
        return 0
    counts = torch.cuda.memory_stats()
    return sum(counts.get(n, 0) for n in ("num_device_alloc", "num_device_free"))


def under_load(run: Callable[[], object]) -> dict[str, float]:
    """Clock of the SMs, MHz, and power, W, while `run` is repeated, as long as nvidia-smi takes to answer.

    These runs are not measured. Empty without a GPU or nvidia-smi. One process only: several would not
    repeat it equally often.
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
    """nvidia-smi's line of clock and power; empty when it says something else."""
    try:
        clock, power = map(float, answer.split(","))
    except ValueError:  # "[N/A]", or an error
        return {}
    return {"sm_clock_mhz": clock, "power_w": power}


def reason(error: Exception) -> str:
    """Why a row could not be measured, in short; the whole of it is printed, but for missing memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{NO_MEMORY}: {str(error).split('. ')[0]}"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def failed(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether one of them ended in an error other than missing memory."""
    return any("error" in row and not row["error"].startswith(NO_MEMORY) for row in rows)


def in_words(found: dict[str, Any]) -> str:
    """Attention, memory, clock and power of a row, as far as it has them."""
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
