"""What a benchmark says of the machine: cards, topology, versions, memory, the attention of layers."""

import multiprocessing
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_ladder.fp8 import missing

NO_MEMORY = "out of memory"
_ALSO_NO_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "Failed to CUDA calloc")
"""Words of NCCL, cuBLAS and cuDNN, whose own memory torch does not allocate."""
PATIENCE_S = 120.0
"""A machine is asked so long what it is."""


@dataclass(frozen=True)
class Machine:
    """The cards of this machine, and what is installed for them."""

    device: str
    """The first card's name; cpu where there is none."""
    cards: int
    """0 where there is none."""
    card_bytes: int
    """Memory of the smallest card; 0 where there is none."""
    libraries: dict[str, Any]
    """Versions of CUDA's libraries; empty without a card."""
    no_fp8: str
    """What FP8 with one scale for a tensor lacks here; "" for nothing."""


def look() -> Machine:
    """Looks at this machine, in a process of its own: the caller's keeps no memory of a card, and a card
    that admits one process alone stays free."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(_look).get(PATIENCE_S)


def _look() -> Machine:
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Machine(
        cards[0].name if cards else "cpu",
        len(cards),
        min((card.total_memory for card in cards), default=0),
        cuda_libraries() if cards else {},
        missing("tensorwise"),
    )


def processor() -> str:
    """The processor's architecture and its number of cores."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def topology() -> str | None:
    """The links between cards and NICs, as `nvidia-smi topo -m` prints them. None where it cannot say."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)  # it underlines its titles
    return plain.strip() if done.returncode == 0 else None


def cuda_libraries() -> dict[str, Any]:
    """Versions of CUDA, cuDNN and NCCL. On a machine with a GPU."""
    return {
        "cuda": torch.version.cuda,
        "cudnn": _version(torch.backends.cudnn.version),
        "nccl": _version(lambda: ".".join(map(str, torch.cuda.nccl.version()))),
    }


def _version(of: Any) -> Any:
    """It, or why torch cannot say: what was measured is kept all the same."""
    try:
        return of()
    except (RuntimeError, AttributeError, TypeError) as error:  # such as another cuDNN than torch's
        return str(error)


def without_folders(words: Iterable[str]) -> list[str]:
    """What was typed, without this machine's folders: --json=/tmp/x, too."""
    return [re.sub(r"[^=]*/(?=.)", "", word) for word in words]


def attention_of(model: nn.Module) -> str:
    """Which core attention the model's layers have used in their last forward."""
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
    """The peak of memory is counted from here on. Does nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Peaks since `forget_peak` in GiB: of tensors, and of memory that torch has reserved. Empty without a
    GPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def reason(error: Exception) -> str:
    """Why a row could not be measured, in short. The traceback is printed, unless memory was missing."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{NO_MEMORY}: {str(error).split('. ')[0]}"
    said = str(error).strip().splitlines() or [""]
    words = f"{type(error).__name__}: {said[0][:200]}"
    if isinstance(error, RuntimeError) and any(w in str(error) for w in _ALSO_NO_MEMORY):
        return f"{NO_MEMORY}: {words}"
    traceback.print_exception(error)
    return words
