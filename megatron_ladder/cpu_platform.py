"""Runs megatron-core on a CPU.

megatron-core calls torch with the device name "cuda". When there is no GPU, `enable` patches torch in this
process so that these calls use the CPU. Training then runs over gloo, with megatron-core's own tensor
parallelism, DDP and distributed optimizer.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.utils._device

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
_enabled = False


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def _on_cpu(function: Callable) -> Callable:
    """`function`, which gets the CPU as its device wherever it is called with a "cuda" device."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)  # it is pinned for copies to a GPU
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*(_CPU if _is_cuda(a) else a for a in args), **kwargs)

    return wrapper


class _NoStream:
    """Stands for a CUDA stream, on which megatron-core's experts copy numbers to the host; and for its
    event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record_event(self) -> Self:
        return self

    def synchronize(self) -> None: ...


def enable() -> bool:
    """Patches torch and megatron-core so that they run on the CPU, when there is no GPU.

    Call it first, before megatron-core's groups and models are made. A second call changes nothing.

    Returns:
        Whether the CPU is used. False when there is a GPU.
    """
    global _enabled
    if _enabled:
        return True
    if torch.cuda.is_available():
        return False

    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.tensor_parallel import random as mcore_random

    cuda: Any = torch.cuda
    tensor: Any = torch.Tensor
    cuda.current_device = lambda: _CPU
    cuda.current_stream = lambda *_: None  # a CPU has one stream, and nothing waits for it
    cuda.Stream, cuda.stream = _NoStream, lambda *_: contextlib.nullcontext()
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    tensor.cuda = lambda self, *_, **__: self

    # megatron-core's optimizers compare type strings such as "torch.cuda.FloatTensor".
    tensor_type = torch.Tensor.type

    def reported_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.")

    tensor.type = reported_type

    # We patch these functions and do not use a TorchFunctionMode: a mode is off inside backward, where
    # recomputation runs. `with torch.device(...)` acts on a cached list of functions. The call below fills
    # that list with the original functions, which the patched ones call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor.to = _on_cpu(torch.Tensor.to)
    # Reading a checkpoint calls it with "cuda", for what another rank has read. Its default factory is
    # torch's own, from before the patches.
    ShardedTensor.init_data = _on_cpu(ShardedTensor.init_data)
    _use_torch_in_optimizers()
    _use_torch_in_experts()
    _enabled = True
    logger.info("No GPU found: the CPU stands in for it (gloo, megatron-core's local layers).")
    return True


def _use_torch_in_optimizers() -> None:
    """Makes megatron-core's optimizers use torch instead of the kernels of Transformer Engine and apex.

    megatron-core uses these kernels where they are installed, but they need a GPU. This function replaces
    them by the functions that megatron-core uses when neither package is installed.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None  # 0.19's
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False


def _use_torch_in_experts() -> None:
    """Makes megatron-core's mixture of experts use torch instead of Transformer Engine's GEMM.

    The dispatcher turns numbers of tokens into a list where it copies them from a GPU, and needs one.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def on_the_host(numbers: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return numbers.numpy() if as_numpy and torch.is_tensor(numbers) else numbers

    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = on_the_host
