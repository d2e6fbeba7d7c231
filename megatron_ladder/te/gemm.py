"""Transformer Engine's GEMM where torch's cannot do it. Imported only where Transformer Engine is."""

from torch import Tensor
from transformer_engine.pytorch.cpp_extensions import general_gemm


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a^T b: bf16 operands, an fp32 sum.

    Args:
        a: [t, m].
        b: [t, n].
        out: [m, n].
    """
    a, b = a.contiguous(), b.contiguous()  # strides it does not read, nor refuse
    general_gemm(b, a, out_dtype=out.dtype, layout="NT", grad=True, accumulate=True, out=out)
