"""Asks Transformer Engine (TE) which attention kernel it will use, before it computes anything."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def ask(
    config: TransformerConfig, *, micro_batch_size: int, seq_length: int, apart: bool
) -> tuple[str, str]:
    """The kernel that TE's `DotProductAttention` will use in training.

    This function raises nothing: an error becomes the reason that it returns.

    Args:
        config: the layers' configuration. Their heads are divided over the tensor-parallel ranks.
        micro_batch_size: sequences in a micro-batch.
        seq_length: tokens in a sequence.
        apart: documents do not attend to each other.

    Returns:
        The name of the fused kernel ("" for none), and TE's reasons against the other kernels.
    """
    try:
        from transformer_engine.pytorch.attention.dot_product_attention import utils

        params = parameters(
            config, micro_batch_size=micro_batch_size, seq_length=seq_length, apart=apart
        )
        with _what_te_says() as said:
            flash, version, fused, *_ = utils.get_attention_backend(params)
    except Exception as error:  # from TE's Python or C++, or from the libraries of CUDA or cuDNN
        return "", f"it could not be asked: {type(error).__name__}: {_in_one_line(str(error))}"
    found = utils.FlashAttentionUtils
    if not (found.is_installed or found.v3_is_installed or found.v4_is_installed):
        said.append("flash-attn is not installed")
    kernel = f"FlashAttention {version}" if flash else "cuDNN" if fused else ""
    return kernel, "; ".join(said)


def parameters(  # type: ignore[no-untyped-def]
    config: TransformerConfig, *, micro_batch_size: int, seq_length: int, apart: bool
):
    """TE's `AttentionParams`, as `DotProductAttention.forward` makes them from megatron-core's tensors."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    tp = config.tensor_model_parallel_size
    assert config.num_query_groups is not None
    channels, mask_type = config.kv_channels, "padding_causal" if apart else "causal"
    assert channels is not None
    deterministic = (
        os.getenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"
        or torch.are_deterministic_algorithms_enabled()
    )
    tokens, divided = micro_batch_size * seq_length, config.context_parallel_size > 1
    return utils.AttentionParams(
        qkv_dtype=config.params_dtype,
        # RoPE makes new queries and keys. The values are a view of the linear's output, and TE copies them.
        qkv_layout="thd_thd_thd" if apart else "sbhd_sbhd_sbhd",
        # With documents apart it is their number, which is not known. Deterministic backward has a limit
        # for the number, so the highest one is asked for.
        batch_size=tokens if apart and deterministic else micro_batch_size,
        num_tokens_q=tokens if apart else 0,
        num_tokens_kv=tokens if apart else 0,
        num_heads=config.num_attention_heads // tp,
        num_gqa_groups=config.num_query_groups // tp,
        max_seqlen_q=seq_length,
        max_seqlen_kv=seq_length,
        head_dim_qk=channels,
        head_dim_v=channels,
        attn_mask_type=mask_type,
        # Layers without a window have at least the kernels that layers with one have.
        window_size=utils.check_set_window_size(mask_type, config.window_size),
        bottom_right_diagonal=False,
        core_attention_bias_requires_grad=False,
        attention_dropout=config.attention_dropout,
        context_parallel=divided,
        # megatron-core tells it with context parallelism alone.
        cp_comm_type=config.cp_comm_type if divided else "p2p",
        cp_size=config.context_parallel_size,
        deterministic=deterministic,
        softmax_scale=config.softmax_scale or 1 / math.sqrt(channels),
    )


@contextmanager
def _what_te_says() -> Iterator[list[str]]:
    """Collects TE's reasons for not using a kernel. TE writes them to its debug log only."""
    from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionLogging

    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words = _in_one_line(record.getMessage())
            if words.startswith("Disabling") and "Unfused" not in words and words not in said:
                said.append(words)

    log = logging.getLogger("DotProductAttention")
    level, handlers, propagate = AttentionLogging._log_level, log.handlers, log.propagate
    # Each time TE chooses a kernel, it sets the logger's level from this variable of its own.
    AttentionLogging._log_level = logging.DEBUG
    log.handlers, log.propagate = [Collect()], False
    try:
        yield said
    finally:
        AttentionLogging._log_level = level
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def _in_one_line(words: str) -> str:
    return " ".join(words.split())
