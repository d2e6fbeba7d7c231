"""Whose core attention a model is built with: chosen once, of what the libraries say they would take."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_ladder.config import Attention, TransformerImpl
from megatron_ladder.errors import UserError
from megatron_ladder.layers.attention import kernel_of_torch

IN_MEMORY, CUDNN = "scores in memory", "cuDNN"
TORCH_KERNELS = {
    "flash": "flash attention",
    "cudnn": CUDNN,
    "efficient": "memory-efficient attention",
}


@dataclass(frozen=True)
class CoreAttention:
    """What scores, softmax and the sum of values are computed by."""

    whose: Literal["te", "torch", "unfused"]
    """Transformer Engine's module, ours that calls torch's, or megatron-core's own."""
    kernel: str
    """In words. IN_MEMORY: s x s scores of each head lie in memory, and are kept for backward."""
    why: str = ""
    """It is not another one; empty where it is the fastest known."""

    @property
    def keeps_scores(self) -> bool:
        return self.kernel == IN_MEMORY

    def __str__(self) -> str:
        whose = {"te": "Transformer Engine", "torch": "torch", "unfused": "megatron-core"}
        return f"{whose[self.whose]}: {self.kernel}"


def check_attention(asked: Attention, impl: TransformerImpl) -> None:
    """Refuses what these layers have not.

    Args:
        impl: whose layers, resolved.
    """
    if asked == "te" and impl != "transformer_engine":
        raise UserError(
            "attention te is Transformer Engine's, and the layers are megatron-core's local ones: take "
            "auto or torch, or --transformer-impl transformer_engine"
        )


def choose(
    config: Any, asked: Attention, *, micro_batch_size: int, seq_length: int
) -> CoreAttention:
    """The core attention for training with a `LadderConfig` on sequences of this length.

    auto is torch's where that is cuDNN's kernel: Transformer Engine has the same one, behind more Python.
    Then TE's, where the layers are TE's and it would take a fused one; torch's in all other cases.

    Raises:
        UserError: the layers have no such attention.
    """
    with_te = config.transformer_impl == "transformer_engine"
    check_attention(asked, config.transformer_impl)
    if asked == "unfused":
        return CoreAttention("unfused", IN_MEMORY, "attention is unfused")
    shape = {"micro_batch_size": micro_batch_size, "seq_length": seq_length}
    torchs = _torchs(config, **shape)
    if asked == "torch" or not with_te or (asked == "auto" and torchs.kernel == CUDNN):
        return torchs
    from megatron_ladder.te.attention import ask

    kernel, why = ask(config, **shape, masked=config.masks_given)
    if kernel:
        return CoreAttention("te", kernel)
    if asked == "te":
        return CoreAttention("te", IN_MEMORY, why)
    reasons = [f"Transformer Engine would keep scores: {why}", torchs.why]
    return replace(torchs, why="; ".join(filter(None, reasons)))


def _torchs(config: Any, *, micro_batch_size: int, seq_length: int) -> CoreAttention:
    tp, dtype = config.tensor_model_parallel_size, config.params_dtype
    heads, channels = config.num_attention_heads // tp, config.kv_channels
    kernel = kernel_of_torch(
        (micro_batch_size, heads, seq_length, channels),
        config.num_query_groups // tp,
        dtype,
        masked=config.masks_given,
        dropout=config.attention_dropout,
    )
    if kernel in TORCH_KERNELS:
        return CoreAttention("torch", TORCH_KERNELS[kernel])
    of = [str(dtype).removeprefix("torch."), f"{channels} channels a head"]
    of += ["attention dropout"] * (config.attention_dropout > 0)
    of += ["a mask"] * config.masks_given
    return CoreAttention("torch", IN_MEMORY, f"torch has no other kernel for {', '.join(of)}")
