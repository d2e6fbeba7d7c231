"""What the CUDA operators take from vLLM, where vLLM is not installed."""

import sys
import types
from collections.abc import Callable

import pytest
from torch import Tensor


def install(
    patch: pytest.MonkeyPatch,
    all_reduce: Callable[[Tensor], Tensor],
    in_breakable_capture: Callable[[], bool],
) -> None:
    modules = {
        name: types.ModuleType(name)
        for name in (
            "vllm",
            "vllm.compilation",
            "vllm.compilation.breakable_cudagraph",
            "vllm.distributed",
        )
    }
    capture = types.SimpleNamespace(is_active=in_breakable_capture)
    group = types.SimpleNamespace(_all_reduce_out_place=all_reduce)
    vars(modules["vllm.compilation.breakable_cudagraph"])["BreakableCUDAGraphCapture"] = capture
    vars(modules["vllm.distributed"])["get_tp_group"] = lambda: group
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
