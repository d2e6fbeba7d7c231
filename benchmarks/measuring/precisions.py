"""The benchmarks' names of precisions: fp32, bf16, and FP8's recipes, which go with bf16."""

from typing import get_args

from megatron_ladder.config import Precision
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe

PRECISIONS: tuple[str, ...] = ("fp32", "bf16", *get_args(Fp8Recipe))


def precision_of(name: str) -> tuple[Precision, Fp8Config]:
    """The options of `train` that a name of PRECISIONS stands for."""
    assert name in PRECISIONS
    if name in ("fp32", "bf16"):
        return name, Fp8Config()  # type: ignore[return-value]
    return "bf16", Fp8Config(recipe=name)  # type: ignore[arg-type]
