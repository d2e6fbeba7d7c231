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

from tests import gpu_gloo
from tests.te_stand_in import block_kernels, grouped_kernels, refusals, ring
from tests.te_stand_in.block_kernels import fp8_dtype
from tests.te_stand_in.refusals import is_fp8

gemms: list[tuple[bool, bool]] = []
"""Of each GEMM, in order: whether it was of two FP8 operands, and whether in backward."""
precise: dict[tuple[bool, bool], set[bool]] = {}
"""Of FP8 GEMMs, by how their operands lie: whether they asked for a split accumulator."""
norms: list[bool] = []
"""Of each norm, in order: whether it wrote FP8."""
gemm_weights: list[int] = []
"""Of each GEMM in backward that gave a weight's gradient: the `data_ptr` of what it wrote to, or 0."""
attentions: list[str] = []
"""Of each call of TE's attention, in order: whether it was "fused" or "unfused"."""
cudnn_says = ""
"""Why it has no kernel, whatever it is asked; "": it has those of Hopper."""
seconds = 0.0
"""Of this process in these kernels: benchmarks/python_overhead.py leaves them out."""


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Args: capability: of the GPU to pretend; mxfp8 asks for (10, 0), the rest is tested as Hopper's."""
    from megatron_ladder import cpu_platform
    from megatron_ladder.collectives import streams

    torch.compiler.set_stance("force_eager")  # compiling would look for a GPU
    cpu_platform.enable()
    _pretend_there_is_a_gpu(*capability)
    _use_te_in_optimizers()
    _use_te_in_routers()
    streams.moment = lambda: None  # one stream
    streams.rejoin = lambda *_: None
    gpu_gloo.install("when waited for")

    import transformer_engine.pytorch as te
    import transformer_engine.pytorch.cpp_extensions.gemm as gemm
    import transformer_engine_torch as tex
    from megatron.core.distributed import param_and_grad_buffer
    from transformer_engine.pytorch.attention.dot_product_attention import backends

    ring.install()
    _gather_one_by_one(param_and_grad_buffer)
    _save_plain_tensors()
    workspace = torch.empty(1, dtype=torch.uint8)
    gemm.get_cublas_workspace = lambda *of: [workspace] if of[2:] == (True,) else workspace
    te.distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    te.distributed._set_cuda_rng_state = lambda *_, **__: None
    # Of attention the last calls alone: what is asked before them, and by them, is TE's own.
    backends.FusedAttention.forward = _timed(_fused_attention)
    backends.UnfusedDotProductAttention.forward = _timed(_unfused_attention)
    ours = {
        "get_fused_attn_backend": _fused_backend,
        "generic_gemm": _gemm,
        "te_general_grouped_gemm": grouped_kernels.gemms_of(_gemm),
        "split_quantize": grouped_kernels.quantised_parts(_quantize, _empty),
        "fused_multi_row_padding": grouped_kernels.pad,
        "fused_multi_row_unpadding": grouped_kernels.unpad,
        "rmsnorm_fwd": _rmsnorm,
        "rmsnorm_bwd": _rmsnorm_backward,
        "quantize": _quantize,
        "bgrad_quantize": lambda grad, quantizer: (
            grad.reshape(-1, grad.shape[-1]).sum(0),
            _quantize(grad, quantizer),
        ),
        "fused_rope_forward": _rope,
        "fused_rope_backward": lambda grad, angles, *_: _rope(grad, -angles),
        "fp8_transpose": _transpose,
        "compute_amax": _maximum,
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


def _use_te_in_routers() -> None:
    """As megatron-core does by itself, too."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = te.te_general_gemm


def _save_plain_tensors() -> None:
    """Of FP8 weights on a GPU, megatron-core's writer stores their values in bf16. On a CPU it would store
    Transformer Engine's class, which no checkpoint of a GPU has."""
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

    save = TorchDistSaveShardedStrategy.async_save

    def plain_first(self: Any, sharded_state_dict: Any, *given: Any, **named: Any) -> Any:
        force_all_tensors_to_non_fp8(sharded_state_dict)
        return save(self, sharded_state_dict, *given, **named)

    TorchDistSaveShardedStrategy.async_save = plain_first


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
    if is_fp8(a):
        precise.setdefault((transposed_a, transposed_b), set()).add(split)
    dtype = a.dtype if dtype is None else _torch_dtype(dtype)
    left, right = plain(b, not transposed_b).float(), plain(a, transposed_a).float()
    shape = left.shape
    left, right = left.reshape(-1, shape[-1]), right.reshape(-1, right.shape[-1])
    outer_a, inner = right.shape if transposed_a else right.shape[::-1]
    outer_b = shape[-1] if transposed_b else left.shape[0]
    sizes = outer_a, outer_b, inner
    refusals.gemm(a, b, sizes, out, dtype, bias, grad, accumulate, workspace_size)
    assert (left.shape[0] if transposed_b else left.shape[1]) == inner
    if transposed_b:
        gemm_weights.append(0 if out is None else out.data_ptr())
    result = (left.t() if transposed_b else left) @ (right.t() if transposed_a else right)
    if bias is not None and not grad:
        result += bias.float()
    bias_gradient = left.sum(0).to(_torch_dtype(bias_dtype)) if bias is not None and grad else None
    if not transposed_b:
        result = result.reshape(*shape[:-1], result.shape[-1])
    if out is None:
        return result.to(dtype), bias_gradient, None, None
    refusals.gemm_output(out, tuple(result.shape), dtype)
    result = result.to(dtype)
    out.add_(result) if accumulate else out.copy_(result)
    return out, bias_gradient, None, None


def _fused_backend(params: Any) -> tuple[Any, str]:
    """Which of cuDNN's kernels, and why none: the C++ part of TE's question."""
    from transformer_engine.pytorch.attention.dot_product_attention.utils import FusedAttnBackend

    channels = (params.head_dim_qk, params.head_dim_v)
    said = cudnn_says
    if any(size % 8 or size > 256 for size in channels):
        said = f"heads of {channels} channels"
    return FusedAttnBackend["No_Backend" if said else "F16_arbitrary_seqlen"], said


def _fused_attention(  # type: ignore[no-untyped-def]
    self, query: Tensor, key: Tensor, value: Tensor, **how
) -> Tensor:
    assert query.dtype == torch.bfloat16 and all(x.is_contiguous() for x in (query, key, value))
    attentions.append("fused")
    if how["cp_group"] is not None:
        return ring.attend_over_ranks(query, key, value, scale=self.softmax_scale, **how)
    dropout = self.attention_dropout if self.training else 0.0

    def attend(*qkv: Tensor, outside: Tensor) -> Tensor:
        with self.attention_dropout_ctx():
            out = F.scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in qkv),
                *(~outside, dropout),
                scale=self.softmax_scale,
                enable_gqa=True,
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    return _each_document(attend, query, key, value, **how)


def _each_document(
    attend: Callable[..., Tensor],
    *qkv: Tensor,
    qkv_layout: str,
    attn_mask_type: str,
    attention_mask: Tensor | None,
    window_size: tuple[int, int],
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    **_: Any,
) -> Tensor:
    """Causal attention [s, b, heads, channels] of what TE was given: whole sequences, or documents."""
    assert attention_mask is None
    if qkv_layout == "sbhd_sbhd_sbhd":
        assert attn_mask_type == "causal"
        return attend(*qkv, outside=_outside(len(qkv[0]), window_size))
    assert (qkv_layout, attn_mask_type) == ("thd_thd_thd", "padding_causal")
    assert torch.equal(cu_seqlens_q, cu_seqlens_kv) and cu_seqlens_q[-1] == len(qkv[0])
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q and min(lengths) > 0
    parts = zip(*(x[:, None].split(lengths) for x in qkv), strict=True)
    masks = [_outside(length, window_size) for length in lengths]
    return torch.cat(
        [attend(*part, outside=mask)[:, 0] for part, mask in zip(parts, masks, strict=True)]
    )


def _outside(length: int, window_size: tuple[int, int]) -> Tensor:
    """What causal attention masks out: bool [length, length]."""
    before, behind = window_size
    assert behind == 0
    ones = torch.ones(length, length, dtype=torch.bool)
    return ones.triu(1) if before < 0 else ones.triu(1) | ones.tril(-before - 1)


def _unfused_attention(  # type: ignore[no-untyped-def]
    self, _, query: Tensor, key: Tensor, value: Tensor, **how
) -> Tensor:
    attentions.append("unfused")
    times = query.shape[-2] // key.shape[-2]
    key, value = (x.repeat_interleave(times, dim=-2) for x in (key, value))

    def attend(query: Tensor, key: Tensor, value: Tensor, outside: Tensor) -> Tensor:
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key).float() * self.softmax_scale
        scores = scores.masked_fill(outside, -10000.0).softmax(-1).to(value.dtype)
        with self.attention_dropout_ctx():
            scores = self.attention_dropout(scores)
        return torch.einsum("bhqk,kbhd->qbhd", scores, value).flatten(2)

    return _each_document(attend, query, key, value, **how)


def _rope(x: Tensor, angles: Tensor, *_) -> Tensor:  # type: ignore[no-untyped-def]
    refusals.rope(x, angles)
    angles = angles[: x.shape[0]]  # [s, 1, 1, d], of [s, b, heads, d]
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * angles.cos() + turned * angles.sin()).to(x.dtype)


def _rmsnorm(x, weight, eps, out, quantizer, dtype, *_):  # type: ignore[no-untyped-def]
    from transformer_engine.pytorch import Float8Quantizer

    assert out is None
    dtype = dtype if isinstance(dtype, torch.dtype) else _torch_dtype(dtype)
    # With scales that it need not find the norm's kernel writes FP8 itself.
    fp8 = fp8_dtype(quantizer.dtype) if isinstance(quantizer, Float8Quantizer) else None
    refusals.norm(x, weight, dtype, fp8)
    if fp8 is not None:
        rows, _ = _room(quantizer, x.shape)
        refusals.check(rows is not None, "Output tensor must have the same shape as x.")
    scale = (x.float().pow(2).mean(-1) + eps).rsqrt()
    y = (x.float() * scale[..., None] * weight.float()).to(dtype)
    norms.append(quantizer is not None)
    return (y if quantizer is None else _quantize(y, quantizer)), None, scale


def _rmsnorm_backward(grad, x, scale, weight, *_):  # type: ignore[no-untyped-def]
    refusals.norm_backward(grad, x, scale, weight)
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


def plain(x: Any, rowwise: bool | None = None) -> Tensor:
    """In fp32, of the logical shape.

    Args:
        rowwise: which data to take; it must be there. None: whichever is.
    """
    if not is_fp8(x):
        return x
    if block_kernels.is_of_blocks(x):
        return block_kernels.plain(x, rowwise)
    dtype = fp8_dtype(x._fp8_dtype)
    if rowwise is None:
        rowwise = x._data is not None
    if rowwise or not _keeps_transposes():
        refusals.check(x._data is not None, "Input is missing row-wise usage")
        return x._data.view(dtype).float() * x._scale_inv
    there = x._transpose is not None and not x._transpose_invalid
    refusals.check(there, "Input is missing column-wise usage")
    return (x._transpose.view(dtype).float() * x._scale_inv).movedim(0, -1)


def _keeps_transposes() -> bool:
    """As GPUs do whose FP8 GEMMs read operands one way alone."""
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    return not is_non_tn_fp8_gemm_supported()


def _transpose(data: Tensor, *_: Any, out: Tensor | None = None) -> Tensor:
    refusals.transposed(data)
    transpose = data.movedim(-1, 0).contiguous()
    return transpose if out is None else out.copy_(transpose)


def _maximum(x: Tensor, amax: Tensor) -> None:
    refusals.maximum(x, amax)
    amax.copy_(x.abs().max())


def _empty(quantizer: Any, shape: Any, dtype: torch.dtype, *_: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    if block_kernels.is_of_blocks(quantizer):
        return block_kernels.empty(quantizer, shape, dtype)
    rows, columns = _room(quantizer, shape)
    arguments: dict[str, Any] = {
        "data": rows,
        "fp8_scale_inv": torch.full((1,), torch.nan),
        "fp8_dtype": quantizer.dtype,
        "data_transpose": columns,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **arguments)
    return Float8Tensor(shape=shape, dtype=dtype, device=torch.device("cpu"), **arguments)


def _room(
    quantizer: Any, shape: Any, rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """For the data that a quantizer with one scale a tensor writes; of what is there it keeps that."""
    transposes = _keeps_transposes()
    if not quantizer.rowwise_usage and transposes:
        rows = None
    elif rows is None:
        rows = torch.full(tuple(shape), 255, dtype=torch.uint8)  # NaN
    if not quantizer.columnwise_usage or not transposes:
        columns = None
    elif columns is None:
        columns = torch.full((shape[-1], *shape[:-1]), 255, dtype=torch.uint8)
    return rows, columns


def _quantize(source: Any, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer

    refusals.source(source)
    if block_kernels.is_of_blocks(quantizer):
        return block_kernels.quantize(source, quantizer, source.dtype, out)
    if out is None:
        out = _empty(quantizer, source.shape, source.dtype)
    else:
        out._data, out._transpose = _room(quantizer, source.shape, out._data, out._transpose)
        out._transpose_invalid = out._transpose is None
    refusals.written_with_one_scale(out._data, out._transpose)
    x = source.detach().float()
    dtype = fp8_dtype(quantizer.dtype)
    largest, amax = torch.finfo(dtype).max, x.abs().max().reshape(1)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
        amax = amax.clamp(min=quantizer.amax_epsilon)
        scale = block_kernels.scales_of(amax, largest, quantizer.force_pow_2_scales)
    else:
        seen = quantizer.amax  # of all tensors since the scale was found last
        if seen.numel():
            seen.copy_(torch.maximum(seen, amax.reshape(seen.shape)))
        scale = quantizer.scale.reshape(1).clone()
    data = (x * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    out._data.copy_(data)
    if out._transpose is not None:
        out._transpose.copy_(data.movedim(-1, 0))
    out._scale_inv.copy_((1 / scale).reshape(out._scale_inv.shape))
    return out


# The optimizer's, over lists of tensors.


def _adam(  # type: ignore[no-untyped-def]
    chunk, overflow, lists: Sequence[list[Tensor]], lr, beta1, beta2, eps, step, decoupled,
    bias_correction, weight_decay,
):  # fmt: skip
    assert decoupled and bias_correction
    refusals.adam(lists)
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
