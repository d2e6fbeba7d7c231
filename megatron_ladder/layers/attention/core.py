"""Core attention with torch's kernels."""

import contextlib
import copy
import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ladder.layers.attention.context import attend_over_ranks
from megatron_ladder.layers.attention.documents import Documents, each_by_itself
from megatron_ladder.layers.attention.window import (
    attend_in_window,
    bias_of_last,
    in_window,
    layer_window,
)

logger = logging.getLogger(__name__)


class UnfusedAttention(DotProductAttention):
    """megatron-core's attention module, which keeps scores in memory, and documents apart.

    With context parallelism it gathers keys and values of all ranks (context.py).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        divided = config.context_parallel_size > 1
        if divided:
            config = copy.copy(config)
            config.context_parallel_size = 1  # megatron-core's module refuses more
        super().__init__(config, *args, **kwargs)
        self._context_group = parallel_state.get_context_parallel_group() if divided else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: Documents | None = None,
    ) -> Tensor:
        """Core attention: scores, softmax, dropout, and the weighted sum of the values. It is causal.

        Args:
            query: [s, b, heads, channels]; with context parallelism this rank's tokens.
            key, value: [keys, b, key/value heads, channels].
            attention_mask: there is none.
            attn_mask_type: ignored. The type that the layer was built with is used, as in megatron-core.
            attention_bias: there is none.
            packed_seq_params: documents that do not attend to each other. None: each sequence is one.

        Returns:
            [s, b, heads x channels], of the query's dtype.
        """
        assert attention_mask is None and attention_bias is None, "attention is causal"
        if self._context_group is not None:
            group = self._context_group
            return attend_over_ranks(self.attend, group, packed_seq_params, query, key, value)
        if packed_seq_params is None:
            return self.attend(query, key, value)
        return each_by_itself(self.attend, packed_seq_params, query, key, value)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, most: tuple[int, int] | None = None
    ) -> Tensor:
        """Causal attention. The arguments and the result are those of `forward`.

        There may be more keys than queries: the queries are those of the last tokens.

        Args:
            most: the most queries, and the most keys before the first of them, of all calls that may share
                a mask. None: this call's.
        """
        mask = None
        if 1 < len(query) < len(key):
            mask = ~in_window(len(query), len(key), None, query.device)[None, None]
        return super().forward(query, key, value, mask)


class TorchAttention(UnfusedAttention):
    """megatron-core's attention module, computed by torch's `scaled_dot_product_attention`.

    Where torch has a kernel that does not keep the s x s scores in memory, they are not kept. The module
    works in local layers and in Transformer Engine's, on GPUs and CPUs, compiled or not. For options of
    megatron-core that torch's attention does not support (`unsupported`), megatron-core's own code runs.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._unsupported = unsupported(config)
        self._window = layer_window(config, self.layer_number)
        if self._unsupported and self.layer_number == 1:
            logger.warning(
                "attention is megatron-core's, which keeps scores in memory: torch's does not support %s",
                self._unsupported,
            )

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `UnfusedAttention.forward`."""
        apart = kwargs.get("packed_seq_params") is not None
        with _without_cudnn() if apart and query.is_cuda else contextlib.nullcontext():
            return super().forward(query, *args, **kwargs)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, most: tuple[int, int] | None = None
    ) -> Tensor:
        if self._unsupported:
            return super().attend(query, key, value)
        # Torch aligns its causal mask to the first key. That is right only when there are as many queries.
        # A single query, of the last token, attends to all keys. Others of the last tokens need a bias.
        assert len(query) <= len(key)
        causal, bias = False, None
        # A branch: traced for any length the condition is no bool.
        if len(query) == len(key) > 1:
            causal = True
        window = self._window if self._window and self._window < len(key) else None
        if window is None and 1 < len(query) < len(key):
            most = most or (len(query), len(key) - len(query))
            bias = bias_of_last(len(query), len(key), most, None, query.dtype, query.device)
        masked = window is not None or bias is not None
        groups = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        if keys_are_repeated(groups, query.device, query.dtype, masked=masked):
            key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
            groups = 1
        # The values are a view of the linear's output. If autograd saved the view for backward, the whole
        # output would stay in memory.
        value = value.contiguous()
        dropout = self.attention_dropout.p if self.training else 0.0
        # Dropout acts on the heads of one tensor-parallel rank, so it needs that rank's own random state
        # from megatron-core's tracker. With sequence parallelism the whole layer runs with that state.
        drops_alone = dropout > 0 and not self.config.sequence_parallel
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        attend = functools.partial(
            F.scaled_dot_product_attention,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=groups > 1,
        )
        with get_cuda_rng_tracker().fork() if drops_alone else contextlib.nullcontext():
            if window is None:
                attended = attend(query, key, value, bias, is_causal=causal)
            else:
                attended = attend_in_window(query, key, value, window, attend)
        return attended.permute(2, 0, 1, 3).flatten(2).contiguous()


def unsupported(config: TransformerConfig) -> str:
    """The options in `config` that torch's attention does not support, in megatron-core's words.

    Returns "" when it supports all of them.
    """
    asked = {
        f"softmax_type {config.softmax_type}": config.softmax_type != "vanilla",
        # Windows of this project's models end at the token itself.
        f"window_size {config.window_size}": bool(config.window_size)
        and config.window_size[1] != 0,
        "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        # Torch computes the softmax in fp32, for every dtype of its inputs.
        "softmax in lower precision than fp32": not config.attention_softmax_in_fp32
        and config.params_dtype != torch.float32,
        "maximum of the scores (qk_clip, log_max_attention_logit)": config.qk_clip
        or config.log_max_attention_logit,
        "batch_invariant_mode": config.batch_invariant_mode,
    }
    return ", ".join(name for name, holds in asked.items() if holds)


def _without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Keeps torch from cuDNN's attention, which makes a plan for each new length: documents have many."""
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def keys_are_repeated(
    groups: int, device: torch.device, dtype: torch.dtype, *, masked: bool
) -> bool:
    """Whether keys and values must be repeated for all heads of their group, before attention.

    On GPUs the kernel that supports masks and fp32, and keeps no scores, has no grouped-query attention. If
    grouped-query attention were requested there, torch would keep the s x s scores of each head.

    Args:
        groups: query heads per key/value head.
        device: the queries' device.
        dtype: the queries' dtype.
        masked: a mask is given: of a window, or of the last queries.
    """
    return groups > 1 and device.type == "cuda" and (masked or dtype == torch.float32)


def kernel_of_torch(
    shape: tuple[int, int, int, int],
    kv_heads: int,
    dtype: torch.dtype,
    *,
    apart: bool,
    masked: bool = False,
    dropout: float,
) -> str:
    """The attention kernel that torch itself says it will use in training.

    Args:
        shape: the queries' shape, [b, heads, s, channels].
        kv_heads: key/value heads.
        dtype: the queries' dtype.
        apart: documents do not attend to each other.
        masked: a mask is given (window.py): tokens attend to a window, or queries are those of the last
            tokens (context.py).
        dropout: the probability of attention dropout.

    Returns:
        "flash", "cudnn", "efficient", or "math". Only "math" keeps scores in memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, heads, length, channels = shape
    if keys_are_repeated(heads // kv_heads, device, dtype, masked=masked):
        kv_heads = heads
    number = torch.empty(1, 1, 1, channels, dtype=dtype, device=device).requires_grad_()
    key = number.expand(batch, kv_heads, length, channels)  # a view, which takes no memory
    row = torch.empty(1, 1, 1, length, dtype=dtype, device=device)
    with _without_cudnn() if apart and device.type == "cuda" else contextlib.nullcontext():
        choice = torch._fused_sdp_choice(
            number.expand(shape),
            *(key, key),
            attn_mask=row.expand(batch, 1, length, length) if masked else None,
            dropout_p=dropout,
            is_causal=not masked,
            enable_gqa=kv_heads != heads,
        )
    backend = SDPBackend(choice)
    if backend == SDPBackend.CUDNN_ATTENTION and (error := _error_of_cudnn(channels, dtype)):
        logger.warning(
            "torch's cuDNN attention fails on this machine, so it is not used: %s", error
        )
        torch.backends.cuda.enable_cudnn_sdp(False)  # otherwise torch would still use it
        return kernel_of_torch(shape, kv_heads, dtype, apart=apart, masked=masked, dropout=dropout)
    return backend.name.removesuffix("_ATTENTION").lower()


@functools.cache
def _error_of_cudnn(channels: int, dtype: torch.dtype) -> str:
    """The error of a small attention with cuDNN; "" when it runs.

    When torch chooses a kernel it does not check that all libraries of cuDNN are there.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        ):
            x = torch.zeros(1, 1, 64, channels, dtype=dtype, device="cuda", requires_grad=True)
            F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""
