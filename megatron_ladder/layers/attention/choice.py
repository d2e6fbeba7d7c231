"""Chooses the core attention of a model, once, from the kernels that the libraries say they would use."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_ladder.config import Attention, TransformerImpl
from megatron_ladder.errors import UserError
from megatron_ladder.layers.attention.core import kernel_of_torch

IN_MEMORY, CUDNN = "scores in memory", "cuDNN"
TORCH_KERNELS = {
    "flash": "flash attention",
    "cudnn": CUDNN,
    "efficient": "memory-efficient attention",
}


@dataclass(frozen=True)
class CoreAttention:
    """The module and the kernel that compute scores, softmax and the weighted sum of the values."""

    whose: Literal["te", "torch", "unfused"]
    """The module: Transformer Engine's, this project's (which calls torch's), or megatron-core's own."""
    kernel: str
    """The kernel's name. IN_MEMORY: the s x s scores of each head are in memory and kept for backward."""
    why: str = ""
    """Why a faster kernel is not used; empty when this is the fastest one known."""

    @property
    def keeps_scores(self) -> bool:
        return self.kernel == IN_MEMORY

    def __str__(self) -> str:
        whose = {"te": "Transformer Engine", "torch": "torch", "unfused": "megatron-core"}
        return f"{whose[self.whose]}: {self.kernel}"


def check_attention(
    asked: Attention, impl: TransformerImpl, *, documents_divided: bool = False
) -> None:
    """Checks that the layers have the attention that was asked for.

    Args:
        asked: the option.
        impl: the implementation of the layers, from `resolve_impl`.
        documents_divided: documents are apart, and context-parallel ranks divide them.

    Raises:
        UserError: they do not have it.
    """
    if asked == "te" and documents_divided:
        raise UserError(
            "attention te does not keep documents apart over context-parallel ranks: Transformer Engine "
            "needs documents of a multiple of 2 x parallel.context_parallel_size tokens. Take auto or torch"
        )
    if asked == "te" and impl != "transformer_engine":
        raise UserError(
            "attention te is Transformer Engine's, and the layers are megatron-core's local ones: take "
            "auto or torch, or --transformer-impl transformer_engine"
        )


def choose(
    config: Any, asked: Attention, *, micro_batch_size: int, seq_length: int
) -> CoreAttention:
    """Chooses the core attention for training.

    auto takes torch's attention when torch would use cuDNN's kernel: Transformer Engine (TE) has the same
    kernel, but needs more Python to call it. Else auto takes TE's attention, when the layers are TE's and
    TE would use a fused kernel. In all other cases auto takes torch's. With documents apart TE's kernel is
    called once; torch's is called for each document, and is not cuDNN's. TE's kernels know windows; torch's
    are called for blocks, with masks.

    With context parallelism auto takes TE's ring where TE would use a fused kernel, else torch's, which
    gathers keys and values (context.py). Documents apart are then torch's.

    Args:
        config: a `LadderConfig`.
        asked: the option.
        micro_batch_size: sequences in a micro-batch.
        seq_length: tokens in a sequence.

    Raises:
        UserError: the layers do not have the attention that was asked for.
    """
    windows = config.window_size is not None and config.window_size[0] + 1 < seq_length
    with_te = config.transformer_impl == "transformer_engine"
    divided = config.context_parallel_size > 1
    documents_divided = divided and config.documents_apart
    check_attention(asked, config.transformer_impl, documents_divided=documents_divided)
    if asked == "unfused":
        return CoreAttention("unfused", IN_MEMORY, "attention is unfused")
    shape = {"micro_batch_size": micro_batch_size, "seq_length": seq_length}
    torchs = _torchs(config, **shape, masked=windows or divided)
    if asked == "torch" or not with_te:
        return torchs
    if asked == "auto" and torchs.kernel == CUDNN and not windows and not divided:
        return torchs
    if documents_divided:
        why = "Transformer Engine does not keep documents apart over context-parallel ranks"
        return replace(torchs, why="; ".join(filter(None, (why, torchs.why))))
    from megatron_ladder.te.attention import ask

    kernel, why = ask(config, **shape, apart=config.documents_apart)
    if kernel:
        return CoreAttention("te", kernel)
    if asked == "te" and divided:
        raise UserError(
            f"attention te has no kernel here for parallel.context_parallel_size "
            f"{config.context_parallel_size}: {why}. Take auto or torch"
        )
    if asked == "te":
        return CoreAttention("te", IN_MEMORY, why)
    reasons = [f"Transformer Engine would keep scores: {why}", torchs.why]
    return replace(torchs, why="; ".join(filter(None, reasons)))


def _torchs(config: Any, *, micro_batch_size: int, seq_length: int, masked: bool) -> CoreAttention:
    tp, dtype = config.tensor_model_parallel_size, config.params_dtype
    heads, channels = config.num_attention_heads // tp, config.kv_channels
    kernel = kernel_of_torch(
        (micro_batch_size, heads, seq_length, channels),
        config.num_query_groups // tp,
        dtype,
        apart=config.documents_apart,
        masked=masked,
        dropout=config.attention_dropout,
    )
    if kernel in TORCH_KERNELS:
        return CoreAttention("torch", TORCH_KERNELS[kernel])
    of = [str(dtype).removeprefix("torch."), f"{channels} channels a head"]
    of += ["attention dropout"] * (config.attention_dropout > 0)
    of += ["a mask"] * masked
    return CoreAttention("torch", IN_MEMORY, f"torch has no other kernel for {', '.join(of)}")
