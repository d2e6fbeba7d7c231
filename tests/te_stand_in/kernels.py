"""CPU stand-ins for the CUDA kernels that Transformer Engine 2.20's layers and optimizer call.

What is tested with them is what runs in Python: which module computes what in which precision, what is
kept for backward and when scales are found, under this project's layers. Not the kernels.

`install` changes torch and Transformer Engine for the whole process: call it in a rank of its own.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # scales of delayed scaling, in PyTorch

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.te_stand_in import block_kernels
from tests.te_stand_in.block_kernels import fp8_dtype

gemms: list[tuple[bool, bool]] = []
"""Of each GEMM, in order: whether it was of two FP8 operands, and whether in backward."""
norms: list[bool] = []
"""Of each norm, in order: whether it wrote FP8."""
gemm_weights: list[int] = []
"""Of each GEMM in backward that gave a weight's gradient: the `data_ptr` of what it wrote to, or 0."""
seconds = 0.0
"""Of this process in these kernels: benchmarks/python_overhead.py leaves them out."""


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Args: capability: of the GPU to pretend; mxfp8 asks for (10, 0), the rest is tested as Hopper's."""
    from megatron_ladder import cpu_platform, streams

    torch.compiler.set_stance("force_eager")  # compiling would look for a GPU
    cpu_platform.enable()
    _pretend_there_is_a_gpu(*capability)
    _use_te_in_optimizers()
    streams.moment = lambda: None  # one stream
    streams.rejoin = lambda *_: None

    import transformer_engine.pytorch as te
    import transformer_engine.pytorch.cpp_extensions.gemm as gemm
    import transformer_engine_torch as tex
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    _gather_one_by_one(param_and_grad_buffer)
    gemm.get_cublas_workspace = lambda *_: torch.empty(1, dtype=torch.uint8)
    te.distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    te.distributed._set_cuda_rng_state = lambda *_, **__: None
    TEDotProductAttention.forward = _timed(_attention)
    ours = {
        "generic_gemm": _gemm,
        "rmsnorm_fwd": _rmsnorm,
        "rmsnorm_bwd": _rmsnorm_backward,
        "quantize": _quantize,
        "bgrad_quantize": lambda grad, quantizer: (
            grad.reshape(-1, grad.shape[-1]).sum(0),
            _quantize(grad, quantizer),
        ),
        "fused_rope_forward": _rope,
        "fused_rope_backward": lambda grad, angles, *_: _rope(grad, -angles),
        "fp8_transpose": lambda data, *_, **__: data.movedim(-1, 0).contiguous(),
        "compute_amax": lambda x, amax: amax.copy_(x.abs().max()),
        "multi_tensor_compute_scale_and_scale_inv": _scales,
        "create_empty_quantized_tensor": _empty,
        "swap_first_dims": lambda x, out: out.copy_(x.transpose(0, 1)),
        "fp8_block_scaling_compute_partial_amax": block_kernels.partial_amax,
        "fp8_block_scaling_partial_cast": block_kernels.partial_cast,
        "dequantize": lambda x, dtype: plain(x).to(_torch_dtype(dtype)),
        "multi_tensor_adam": _adam,
        "multi_tensor_l2norm": _l2norm,
        "multi_tensor_scale": _scale,
        "multi_tensor_scale_tensor": _scale,
    }
    # What is timed of TE's GEMMs is timed of torch's, which bf16 has in their place (linear.py).
    torch.matmul = _timed(torch.matmul)
    torch.Tensor.matmul = _timed(torch.Tensor.matmul)  # type: ignore[method-assign]
    # The extension's functions are imported by name in many places.
    modules = [
        m for n, m in sys.modules.items() if n.startswith(("transformer_engine", "megatron"))
    ]
    for name, function in ours.items():
        real, function = getattr(tex, name), _timed(function)
        for module in [tex, *modules]:
            for alias, value in list(vars(module).items()):
                if value is real:
                    setattr(module, alias, function)


def _timed(kernel: Callable) -> Callable:
    """Adds what it takes to `seconds`; once, where one calls another."""

    @functools.wraps(kernel)
    def timed(*args: Any, **kwargs: Any) -> Any:
        global seconds
        before, begin = seconds, time.process_time()
        try:
            return kernel(*args, **kwargs)
        finally:
            seconds = before + time.process_time() - begin

    return timed


def _use_te_in_optimizers() -> None:
    """As megatron-core does by itself; cpu_platform.py has put torch's in their place."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision
    from transformer_engine.pytorch import optimizers as te

    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = te.multi_tensor_applier
        module.multi_tensor_scale_impl = te.multi_tensor_scale
    clip_grads.l2_norm_impl = te.multi_tensor_l2norm
    clip_grads.multi_tensor_scale_tensor_impl = te.multi_tensor_scale_tensor
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = te.FusedAdam, False
    distrib_optimizer.Adam = te.FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def _gather_one_by_one(buffers: Any) -> None:
    """gloo cannot take several tensors as one message, as NCCL does: one after another, at once."""

    def at_once(collective: Any) -> Any:
        return lambda *args, async_op=False, **kwargs: collective(*args, **kwargs)

    done: Any = SimpleNamespace(wait=lambda: None)
    for module in (buffers, torch.distributed):
        module._coalescing_manager = lambda *_, **__: contextlib.nullcontext(done)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, at_once(getattr(buffers, name)))


def _pretend_there_is_a_gpu(major: int, minor: int) -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *_: (major, minor)
    cuda.get_device_name = lambda *_: "stand-in"
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        major=major, minor=minor, name="stand-in", multi_processor_count=1, total_memory=80e9
    )
    cuda.is_current_stream_capturing = lambda: False
    cuda.set_device = lambda *_: None
    cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_: None
    cuda.max_memory_allocated = lambda *_: 0
    cuda._lazy_init = lambda: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda *_: None
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]


# GEMMs. TE's are cuBLAS's, whose matrices are by column: out = B' A', by row.


def _gemm(  # type: ignore[no-untyped-def]
    a, transposed_a, b, transposed_b, out, quantizer, dtype, bias, bias_dtype, gelu, gelu_input, grad,
    workspace, workspace_size, accumulate, split, **_,
):  # fmt: skip
    assert quantizer is None and not gelu
    gemms.append((is_fp8(a) and is_fp8(b), grad))
    left, right = plain(b, not transposed_b).float(), plain(a, transposed_a).float()
    shape = left.shape
    left, right = left.reshape(-1, shape[-1]), right.reshape(-1, right.shape[-1])
    outer_a, inner = right.shape if transposed_a else right.shape[::-1]
    outer_b = shape[-1] if transposed_b else left.shape[0]
    block_kernels.check_gemm(a, b, (outer_a, outer_b, inner), bias is not None and grad)
    if transposed_b:
        gemm_weights.append(0 if out is None else out.data_ptr())
    result = (left.t() if transposed_b else left) @ (right.t() if transposed_a else right)
    if bias is not None and not grad:
        result += bias.float()
    bias_gradient = left.sum(0).to(_torch_dtype(bias_dtype)) if bias is not None and grad else None
    if not transposed_b:
        result = result.reshape(*shape[:-1], result.shape[-1])
    if out is None:
        return result.to(_torch_dtype(dtype)), bias_gradient, None, None
    result = result.reshape(out.shape).to(out.dtype)
    out.add_(result) if accumulate else out.copy_(result)
    return out, bias_gradient, None, None


def _attention(  # type: ignore[no-untyped-def]
    self, query: Tensor, key: Tensor, value: Tensor, attention_mask, *_, **__
) -> Tensor:
    s, b = query.shape[:2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).reshape(s, b, -1)


def _rope(x: Tensor, angles: Tensor, *_) -> Tensor:  # type: ignore[no-untyped-def]
    angles = angles[: x.shape[0]].float()  # [s, 1, 1, d], of [s, b, heads, d]
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * angles.cos() + turned * angles.sin()).to(x.dtype)


def _rmsnorm(x, weight, eps, out, quantizer, dtype, *_):  # type: ignore[no-untyped-def]
    scale = (x.float().pow(2).mean(-1) + eps).rsqrt()
    y = x.float() * scale[..., None] * weight.float()
    y = y.to(dtype if isinstance(dtype, torch.dtype) else _torch_dtype(dtype))
    norms.append(quantizer is not None)
    return (y if quantizer is None else quantizer(y)), None, scale


def _rmsnorm_backward(grad, x, scale, weight, *_):  # type: ignore[no-untyped-def]
    normalised = x.float() * scale[..., None]
    weighted = grad.float() * weight.float()
    mean = (weighted * normalised).mean(-1, keepdim=True)
    weight_gradient = (grad.float() * normalised).reshape(-1, x.shape[-1]).sum(0)
    return (scale[..., None] * (weighted - normalised * mean)).to(x.dtype), weight_gradient.to(
        weight.dtype
    )


# FP8 with one scale a tensor: tensorwise, which finds it in the tensor, and delayed, which has it.


def _torch_dtype(te_dtype: Any) -> torch.dtype:
    from transformer_engine.pytorch.cpp_extensions.gemm import TE_DType

    return {v: k for k, v in TE_DType.items()}[te_dtype]


def is_fp8(x: Any) -> bool:
    return hasattr(x, "_fp8_dtype")


def plain(x: Any, rowwise: bool | None = None) -> Tensor:
    """In fp32. Which data is taken, rowwise or not, matters to scales of blocks alone."""
    if not is_fp8(x):
        return x
    if block_kernels.is_of_blocks(x):
        return block_kernels.plain(x, rowwise)
    dtype = fp8_dtype(x._fp8_dtype)
    if x._data is not None:
        return x._data.view(dtype).float() * x._scale_inv
    return (x._transpose.view(dtype).float() * x._scale_inv).movedim(0, -1)


def _empty(quantizer: Any, shape: Any, dtype: torch.dtype, *_: Any) -> Any:
    from transformer_engine.pytorch import Float8Quantizer

    if isinstance(quantizer, Float8Quantizer):  # zeros raise no maximum
        return _quantize(torch.zeros(shape, dtype=dtype), quantizer)
    return block_kernels.empty(quantizer, shape, dtype)


def _quantize(source: Any, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Tensor,
    )
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if block_kernels.is_of_blocks(quantizer):
        return block_kernels.quantize(plain(source), quantizer, source.dtype, out)
    x = plain(source).detach().float()
    dtype = fp8_dtype(quantizer.dtype)
    largest, amax = torch.finfo(dtype).max, x.abs().max().reshape(1)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
        scale = largest / amax.clamp(min=1e-30)
    else:
        seen = quantizer.amax  # of all tensors since the scale was found last
        if seen.numel():
            seen.copy_(torch.maximum(seen, amax.reshape(seen.shape)))
        scale = quantizer.scale.reshape(1).clone()
    data = (x * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    transpose = data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None
    if out is not None:
        if out._data is not None:
            out._data.copy_(data)
        if transpose is not None:
            out._transpose, out._transpose_invalid = transpose, False
        out._scale_inv.copy_((1 / scale).reshape(out._scale_inv.shape))
        return out
    arguments: dict[str, Any] = {
        "fp8_scale_inv": 1 / scale,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": transpose,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        rows = data if quantizer.rowwise_usage else None
        return Float8TensorStorage(data=rows, fake_dtype=source.dtype, **arguments)
    return Float8Tensor(
        shape=data.shape, dtype=source.dtype, data=data, device=data.device, **arguments
    )


# The optimizer's, over lists of tensors.


def _adam(  # type: ignore[no-untyped-def]
    chunk, overflow, lists: Sequence[list[Tensor]], lr, beta1, beta2, eps, step, decoupled,
    bias_correction, weight_decay,
):  # fmt: skip
    assert decoupled and bias_correction
    for grad, parameter, mean, square, *master in zip(*lists, strict=True):
        g, p = grad.float(), (master[0] if master else parameter)
        m = mean.float().lerp_(g, 1 - beta1)
        v = square.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - lr * weight_decay)
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        p.addcdiv_(m / (1 - beta1**step), denominator, value=-lr)
        mean.copy_(m), square.copy_(v), parameter.copy_(p)


def _l2norm(chunk, overflow, lists, per_tensor=False):  # type: ignore[no-untyped-def]
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().reshape(1), norms


def _scales(chunk, overflow, lists, largest, power_of_2=False, *_):  # type: ignore[no-untyped-def]
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(block_kernels.scales_of(amax.clamp(min=1e-30), largest, power_of_2))
        inverse.copy_(1 / scale)


def _scale(chunk, overflow, lists, factor):  # type: ignore[no-untyped-def]
    for source, out in zip(*lists, strict=True):
        out.copy_(source * factor)
