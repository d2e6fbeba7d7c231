"""A GEMM of Transformer Engine that torch does not have. Imported only where it is installed."""

from torch import Tensor
from transformer_engine.pytorch.cpp_extensions import general_gemm


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a^T b, with bf16 operands and an fp32 sum.

    Args:
        a: bf16 [t, m].
        b: bf16 [t, n].
        out: fp32 [m, n].
    """
    a, b = a.contiguous(), b.contiguous()  # the GEMM ignores strides, without an error
    general_gemm(b, a, out_dtype=out.dtype, layout="NT", grad=True, accumulate=True, out=out)
