"""CPU stand-ins for what Transformer Engine does in FP8 with scales of blocks: blockwise and mxfp8.

Data and scales lie as the CUDA kernels lay them, so that TE's own Python can read them: it takes blockwise
tensors apart in `dequantize`, which is used here. Of scales some are padding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.te_stand_in import refusals

SQUARE, GROUP = 128, 32  # numbers of a block: of blockwise (128 or 128 x 128), of mxfp8
BIAS = 127  # of mxfp8's scales, which are exponents


def fp8_dtype(te_dtype: Any) -> torch.dtype:
    import transformer_engine_torch as tex

    is_e5m2 = int(te_dtype) == int(tex.DType.kFloat8E5M2)
    return torch.float8_e5m2 if is_e5m2 else torch.float8_e4m3fn


def is_of_blocks(x: Any) -> bool:
    """A tensor, or a quantizer."""
    from transformer_engine.pytorch import Float8BlockQuantizer, MXFP8Quantizer

    return isinstance(getattr(x, "_quantizer", x), Float8BlockQuantizer | MXFP8Quantizer)


def scales_of(amax: Tensor, largest: float, power_of_2: bool) -> Tensor:
    """What numbers of these maxima are multiplied by; 1 where all are zero, as TE has it."""
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    if power_of_2:  # the next below
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where(amax == 0, 1.0, scale)


def block_maxima(x: Tensor, rows: int, columns: int) -> Tensor:
    """[m, n] -> [blocks of rows, blocks of columns]."""
    m, n = x.shape
    x = F.pad(x.abs(), (0, -n % columns, 0, -m % rows))
    return x.view(x.shape[0] // rows, rows, -1, columns).amax((1, 3))


def spread(scales: Tensor, rows: int, columns: int, like: Tensor) -> Tensor:
    """Of each number its block's scale."""
    m, n = like.shape
    return scales.repeat_interleave(rows, 0)[:m].repeat_interleave(columns, 1)[:, :n]


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)


def _fill(out: Tensor, values: Tensor) -> None:
    """The rest is padding, which no kernel may read as numbers."""
    out.fill_(float("nan") if out.is_floating_point() else 255)  # 255 is NaN of exponents too
    out[: values.shape[0], : values.shape[1]] = values


def empty(quantizer: Any, shape: Any, dtype: torch.dtype) -> Any:
    """A tensor with the room that a quantizer asks for, by TE's own account of it."""
    tensors = quantizer.alloc_tensors(shape, device="cpu")
    context = quantizer.create_metadata(shape, dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    return context["cls"].__tensor_unflatten__(tensors, context, tuple(shape), stride)


def quantize(source: Tensor, quantizer: Any, dtype: torch.dtype, out: Any = None) -> Any:
    """Both directions from the source, each where the quantizer wants it.

    Args:
        dtype: that the tensor pretends to have.
    """
    x = source.detach()
    specs = quantizer.inner_tensor_specs(tuple(x.shape))
    if out is None:
        out = empty(quantizer, x.shape, dtype)
    flat = x.reshape(-1, x.shape[-1]).float()
    for direction in ("_rowwise", "_columnwise"):
        if f"{direction}_data" not in specs:
            setattr(out, f"{direction}_data", None)
            setattr(out, f"{direction}_scale_inv", None)
            continue
        parts = []
        for name in (f"{direction}_data", f"{direction}_scale_inv"):
            shape, kind = specs[name]
            if getattr(out, name) is None:
                setattr(out, name, torch.empty(shape, dtype=kind))
            parts.append(getattr(out, name))
            assert tuple(parts[-1].shape) == tuple(shape)
        one = _of_blocks if hasattr(quantizer, "block_len") else _of_groups
        number, scale = one(flat, quantizer, direction == "_rowwise")
        parts[0].copy_(number.reshape(parts[0].shape))
        _fill(parts[1], scale)
    return out


def _of_blocks(x: Tensor, quantizer: Any, rowwise: bool) -> tuple[Tensor, Tensor]:
    """blockwise: columnwise data is the transpose's. Scales [m, blocks] are kept transposed."""
    dtype, square = fp8_dtype(quantizer.dtype), quantizer.block_scaling_dim == 2
    rows = SQUARE if square else 1
    x = x if rowwise else x.t().contiguous()
    amax = block_maxima(x, rows, SQUARE).clamp(min=quantizer.amax_epsilon)
    scale = scales_of(amax, torch.finfo(dtype).max, quantizer.force_pow_2_scales)
    inverse = 1 / scale
    return _cast(x, spread(scale, rows, SQUARE, x), dtype), inverse if square else inverse.t()


def _of_groups(x: Tensor, quantizer: Any, rowwise: bool) -> tuple[Tensor, Tensor]:
    """mxfp8: columnwise data lies as rowwise does; its groups go down."""
    assert not quantizer.with_2d_quantization
    assert x.shape[0] % GROUP == 0 and x.shape[1] % GROUP == 0, "as TE's kernels ask"
    dtype = fp8_dtype(quantizer.dtype)
    block = (1, GROUP) if rowwise else (GROUP, 1)
    part = block_maxima(x, *block) / torch.finfo(dtype).max
    mantissa, exponent = torch.frexp(part)  # the next power of 2 above
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(part == 0, -BIAS, exponent).clamp(min=-BIAS)
    number = _cast(x, spread(torch.exp2(-exponent.float()), *block, x), dtype)
    return number, (exponent + BIAS).to(torch.uint8)


def plain(x: Any, rowwise: bool | None = None) -> Tensor:
    """In fp32, of the logical shape.

    Args:
        rowwise: which data to take; it must be there. None: whichever is.
    """
    from transformer_engine.pytorch import Float8BlockQuantizer

    if rowwise is None:
        rowwise = x._rowwise_data is not None
    data, scale_inv = (
        (x._rowwise_data, x._rowwise_scale_inv)
        if rowwise
        else (x._columnwise_data, x._columnwise_scale_inv)
    )
    assert data is not None, f"no {'row' if rowwise else 'column'}wise data, which the GEMM reads"
    if isinstance(x._quantizer, Float8BlockQuantizer):
        from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
            Float8BlockwiseQTensorStorage,
        )

        kept = (data, scale_inv, None, None) if rowwise else (None, None, data, scale_inv)
        one = Float8BlockwiseQTensorStorage(*kept, x._fp8_dtype, x._quantizer, x._is_2D_scaled)
        return one.dequantize(dtype=torch.float32)
    flat = data.view(-1, data.shape[-1])
    block = (1, GROUP) if rowwise else (GROUP, 1)
    m, n = flat.shape[0] // block[0], flat.shape[1] // block[1]
    scale = torch.exp2(scale_inv[:m, :n].float() - BIAS)
    number = flat.view(fp8_dtype(x._fp8_dtype)).float()
    return (number * spread(scale, *block, flat)).view(data.shape)


# The optimizer's, of primary weights: each rank has a piece of the flat weight.


def partial_amax(  # type: ignore[no-untyped-def]
    piece: Tensor, amax: Tensor, h: int, w: int, start: int, block: int
) -> None:
    refusals.piece_of_blocks(piece, amax, block)
    whole = torch.zeros(h * w)
    whole[start : start + piece.numel()] = piece.flatten().float()
    found = block_maxima(whole.view(h, w), block, block)
    amax[: found.shape[0], : found.shape[1]] = found


def partial_cast(  # type: ignore[no-untyped-def]
    piece: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start: int, block: int, te_dtype: Any
) -> None:
    refusals.piece_of_blocks(piece, scale, block, out)
    of_numbers = spread(scale, block, block, torch.empty(h, w)).flatten()
    of_piece = of_numbers[start : start + piece.numel()]
    out.copy_(_cast(piece.flatten().float(), of_piece, fp8_dtype(te_dtype)).view(out.shape))
