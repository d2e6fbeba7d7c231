"""What Transformer Engine's C++ refuses of its callers on Hopper, for the stand-in kernels to refuse too.

After TE 2.20's sources, which are named with each; RuntimeError is its NVTE_CHECK. What cuBLAS refuses, and
what is not checked there but reads the wrong memory, is refused as well.
"""

from typing import Any

import torch
from torch import Tensor

OUTPUTS = {
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float32: (torch.float32,),
}
"""What cuBLAS writes of operands of a dtype."""


def check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def is_fp8(x: Any) -> bool:
    return hasattr(x, "_fp8_dtype")


def written_with_one_scale(rows: Tensor | None, columns: Tensor | None) -> None:
    """Args: the room there is for either (pytorch/csrc/quantizer.cpp, common/cast/dispatch)."""
    if rows is None and columns is not None:
        raise NotImplementedError(
            "Columnwise-only per-tensor FP8 quantization is not implemented; "
            "the cast-transpose kernel requires rowwise output storage."
        )
    check(rows is not None, "Either rowwise or columnwise output data need to be allocated.")


def source(x: Any) -> None:
    """Of a quantisation (common/cast/fp8/quantize_fp8.cuh)."""
    check(not is_fp8(x), "Input must be in higher precision.")
    check(x.dtype in OUTPUTS, f"dtype {x.dtype}")


def norm(x: Tensor, weight: Tensor, dtype: torch.dtype, fp8: torch.dtype | None) -> None:
    """Args: dtype: of the output; fp8: what the norm's own kernel makes of it, if it does
    (common/normalization/rmsnorm/rmsnorm_api.cpp, rmsnorm_fwd_cuda_kernel.cu)."""
    check(x.dim() == 2, "x must be 2D tensor.")
    check(weight.shape == x.shape[1:], "Gamma must have the same hidden size.")
    check(x.dtype == weight.dtype and dtype in (x.dtype, torch.bfloat16), "no such kernel")
    check(fp8 in (None, torch.float8_e4m3fn), "no kernel writes e5m2")
    check(x.is_contiguous() and weight.is_contiguous(), "strides are not read")


def norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> None:
    """common/normalization/rmsnorm/rmsnorm_api.cpp"""
    check(grad.dtype == weight.dtype and scale.dtype == torch.float32, "dtypes")
    check(x.dim() == 2 and grad.shape == x.shape and weight.shape == x.shape[1:], "shapes")
    check(scale.shape == x.shape[:1], "RSigma must be 1D tensor with shape (x.shape[0],).")


def gemm(  # type: ignore[no-untyped-def]
    a, b, sizes: tuple[int, int, int], out, dtype, bias, grad: bool, accumulate: bool, workspace_size: int
) -> None:  # fmt: skip
    """Args: sizes: of the outer dimensions of `a` and `b`, and the inner one
    (pytorch/csrc/extensions/gemm.cpp, common/gemm/cublaslt_gemm.cu)."""
    of_a, of_b, inner = sizes
    check(workspace_size > 0, "no workspace")
    check(not accumulate or out is not None, "nothing to accumulate into")
    if not is_fp8(a) or not is_fp8(b):
        check(not is_fp8(a) and not is_fp8(b), "Unable to find suitable cuBLAS GEMM algorithm")
        check(a.dtype == b.dtype and dtype in OUTPUTS[a.dtype], "no such dtypes in cuBLAS")
        check(a.is_contiguous() and b.is_contiguous(), "strides are not read")
        return
    check(dtype in (torch.bfloat16, torch.float16, torch.float32), "FP8 GEMM's output")
    # tests/pytorch/test_float8_blockwise_gemm_exact.py says so of all FP8.
    both_e5m2 = all(int(x._fp8_dtype) == _e5m2() for x in (a, b))
    check(not both_e5m2, "FP8 GEMM doesn't support both a and b types being e5m2")
    kinds = {hasattr(x, "_is_2D_scaled") or 2 * hasattr(x, "_rowwise_data") for x in (a, b)}
    check(len(kinds) == 1, "Inputs A and B to GEMM need to have compatible scaling modes")
    check(inner % 16 == 0, "Leading dimension requirement on A for FP8 GEMM. Caller must pad.")
    # cuBLAS: rows of the output, too, begin at multiples of 16 bytes.
    check(of_a * torch.empty((), dtype=dtype).element_size() % 16 == 0, f"{of_a} outputs")
    if bias is not None:  # TE's Python never asks for its gradient here
        check(not grad, "Epilogue requested outside of the available cuBLAS functionality")
        check(bias.dtype in (torch.bfloat16, torch.float16), "cuBLAS does not support FP32 bias")
    if not hasattr(a, "_is_2D_scaled"):
        return
    check(not (a._is_2D_scaled and b._is_2D_scaled), "but got 2D by 2D")
    check(of_a % 8 == 0, "Outer dimension requirement on A for NVTE_BLOCK_SCALING GEMM.")
    check(
        b._is_2D_scaled or of_b % 8 == 0,
        "Outer dimension requirement on B for NVTE_BLOCK_SCALING GEMM.",
    )


def _e5m2() -> int:
    import transformer_engine_torch as tex

    return int(tex.DType.kFloat8E5M2)


def gemm_output(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """pytorch/csrc/extensions/gemm.cpp"""
    check(tuple(out.shape) == shape, f"GEMM output has invalid dims (expected {shape})")
    check(out.dtype == dtype, f"GEMM output has invalid dtype (expected {dtype})")


def adam(lists: Any) -> None:
    """common/multi_tensor/adam.cu"""
    check(len(lists) in (4, 5), f"Expected 4 or 5 tensor lists, but found {len(lists)}")
    for of_kind in lists[:2]:
        check(len({x.dtype for x in of_kind}) == 1, "gradients, and parameters, of one dtype")
    for moments in zip(*lists[2:4], strict=True):
        dtypes = {x.dtype for x in moments}
        check(
            dtypes in ({torch.float32}, {torch.bfloat16}),
            "First and second moment tensors must both be Float32 or both be BFloat16",
        )
    for master in lists[4] if len(lists) == 5 else ():
        check(master.dtype == torch.float32, "Master param tensor")
    for of_kind in lists:
        check(all(x.is_contiguous() for x in of_kind), "strides are not read")


def maximum(x: Tensor, amax: Tensor) -> None:
    """pytorch/csrc/extensions/recipe.cpp"""
    check(not is_fp8(x), "must be unquantized")
    check(amax.dtype == torch.float32 and amax.numel() == 1, "amax must be a float tensor of one")


def piece_of_blocks(
    piece: Tensor, of_blocks: Tensor, block: int, out: Tensor | None = None
) -> None:
    """Args: of_blocks: maxima, or scales (pytorch/csrc/extensions/fp8_partial_cast.cpp)."""
    check(block == 128, "Currently only block_len = 128 is supported")
    check(of_blocks.dim() == 2 and of_blocks.dtype == torch.float32, "must be a 2D float tensor")
    check(piece.dtype in (torch.float32, torch.bfloat16), "must be a float or bfloat16 tensor")
    check(out is None or out.dtype == torch.uint8, "output must be a uint8 tensor")
    check(piece.is_contiguous() and (out is None or out.is_contiguous()), "strides are not read")


def rope(x: Tensor, angles: Tensor) -> None:
    """pytorch/csrc/extensions/apply_rope.cpp"""
    check(x.dim() == 4 and angles.dim() == 4, "expected 4D tensor")
    check(angles.shape[1:3] == (1, 1), "expected the second and third dims of the freqs tensor 1")
    check(angles.dtype == torch.float32, "Dtype of the freqs tensor must be float")
    check(x.shape[0] <= angles.shape[0] and x.shape[3] >= angles.shape[3], "sizes")


def transposed(data: Tensor) -> None:
    """pytorch/csrc/extensions/transpose.cpp"""
    check(data.dtype == torch.uint8 and data.is_contiguous(), "strides are not read")
