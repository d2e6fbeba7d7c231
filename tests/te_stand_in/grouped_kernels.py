"""CPU stand-ins for what Transformer Engine's grouped linear calls: one GEMM for each expert.

After gemm.cpp, cast.cpp and padding.cpp in pytorch/csrc/extensions of TE 2.20. Each GEMM is of one expert,
so what one refuses is refused here: in FP8 also numbers of tokens that fill no whole 16 bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tests.te_stand_in import refusals

calls: list[tuple[int, ...]] = []
"""Of each grouped GEMM, in order: the tokens of each expert."""


def gemms_of(gemm: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """`te_general_grouped_gemm`, made of single GEMMs."""

    def grouped(  # type: ignore[no-untyped-def]
        a, transposed_a, b, transposed_b, out, dtype, splits, bias, bias_dtype, single_output,
        gelu_input, grad, workspaces, workspace_size, accumulate, split, *_,
    ) -> list[Tensor]:  # fmt: skip
        refusals.check(len(a) == len(b) == len(splits), "as many operands as splits")
        refusals.check(not any(x.numel() for x in bias), "biases of experts are not stood in for")
        calls.append(tuple(splits))
        outs = out[0].split(list(splits)) if single_output else out
        for left, right, one in zip(a, b, outs, strict=True):
            if 0 in (*left.size(), *right.size()):  # an expert without tokens
                if not accumulate:
                    one.zero_()
                continue
            gemm(
                *(left, transposed_a, right, transposed_b, one, None, dtype, None, bias_dtype),
                *(False, None, grad, workspaces[0], workspace_size, accumulate, split),
            )
        return list(bias)

    return grouped


def quantised_parts(quantize: Callable[..., Any], empty: Callable[..., Any]) -> Callable[..., Any]:
    """`split_quantize`, by quantising each part."""

    def split_quantize(
        x: Tensor,
        splits: Sequence[int],
        quantizers: Sequence[Any],
        disable_bulk_allocation: bool = False,
    ) -> list[Any]:
        refusals.check(x.dim() == 2 and sum(splits) == len(x), "splits do not add up to the rows")
        refusals.check(len(splits) == len(quantizers), "as many quantizers as splits")
        parts = zip(x.contiguous().split(list(splits)), quantizers, strict=True)
        return [
            quantize(part, quantizer) if len(part) else empty(quantizer, part.shape, part.dtype)
            for part, quantizer in parts
        ]

    return split_quantize


def pad(x: Tensor, out: Tensor, splits: Sequence[int], padded: Sequence[int]) -> None:
    """Each part of `x` begins a longer part of `out`; the rest is zero."""
    for part, to in zip(x.split(list(splits)), out.split(list(padded)), strict=True):
        to[: len(part)] = part
        to[len(part) :] = 0


def unpad(x: Tensor, out: Tensor, padded: Sequence[int], splits: Sequence[int]) -> None:
    for part, to in zip(x.split(list(padded)), out.split(list(splits)), strict=True):
        to.copy_(part[: len(to)])
