"""Core attention by torch's own kernels."""

import contextlib
import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)


class TorchAttention(DotProductAttention):
    """megatron-core's attention, computed by `scaled_dot_product_attention`.

    Scores of s x s do not lie in memory where torch has a kernel that keeps them out of it. Of either
    kind of layers, on GPUs and CPUs, compiled or not. For options of megatron-core that torch's has not
    (`unsupported`) it is megatron-core's own.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._unsupported = unsupported(config)
        if self._unsupported and self.layer_number == 1:
            logger.warning(
                "attention is megatron-core's, with scores in memory: torch's has no %s",
                self._unsupported,
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Scores, softmax, dropout and their sum of values.

        Args:
            query: [s, b, heads, channels].
            key, value: [keys, b, key/value heads, channels].
            attention_mask: [b or 1, 1, s, keys]: bool, where True is masked out, or what is added to the
                scores, of the queries' dtype (`as_bias`). It says all; without one attention is causal.
            attn_mask_type: the layer's holds, as in megatron-core's own.

        Returns:
            [s, b, heads x channels]
        """
        if self._unsupported:
            return super().forward(
                *(query, key, value, attention_mask, attn_mask_type),
                *(attention_bias, packed_seq_params),
            )
        assert attention_bias is None, "there is no attention bias"
        assert packed_seq_params is None, "sequences are not packed"
        mask = attention_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # torch's True takes part
        assert mask is not None or self.attn_mask_type == AttnMaskType.causal, "there is no mask"
        causal = mask is None
        if len(query) == 1:  # the last one of a sequence: it sees all keys
            causal = False
        # Torch's causal mask begins at the first key.
        assert not causal or len(query) == len(key), "causal attention of some queries alone"
        groups = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        if keys_are_repeated(groups, query.device, query.dtype, masked=mask is not None):
            key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
            groups = 1
        # Kept for backward as a view, the values would keep all that the linear gives.
        value = value.contiguous()
        dropout = self.attention_dropout.p if self.training else 0.0
        # Each tensor-parallel rank drops of its heads: by megatron-core's states of its own, which
        # sequence parallelism has taken for the whole layer.
        drops_alone = dropout > 0 and not self.config.sequence_parallel
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with get_cuda_rng_tracker().fork() if drops_alone else contextlib.nullcontext():
            attended = F.scaled_dot_product_attention(
                *(query, key, value, mask, dropout, causal),
                scale=self.softmax_scale,
                enable_gqa=groups > 1,
            )
        return attended.permute(2, 0, 1, 3).flatten(2).contiguous()


def unsupported(config: TransformerConfig) -> str:
    """What `config` asks of attention that torch's has not, in megatron-core's words; "": nothing."""
    asked = {
        f"softmax_type {config.softmax_type}": config.softmax_type != "vanilla",
        f"window_size {config.window_size}": config.window_size is not None,
        "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        # Torch's softmax is in fp32, whatever its inputs are.
        "softmax in lower precision than fp32": not config.attention_softmax_in_fp32
        and config.params_dtype != torch.float32,
        "maximum of the scores (qk_clip, log_max_attention_logit)": config.qk_clip
        or config.log_max_attention_logit,
        "batch_invariant_mode": config.batch_invariant_mode,
    }
    return ", ".join(name for name, holds in asked.items() if holds)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, where True is masked out, as what is added to the scores.

    Torch's kernels make this of a bool mask, and keep it for backward: made before the layers, one is
    shared by all of them.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def keys_are_repeated(
    groups: int, device: torch.device, dtype: torch.dtype, *, masked: bool
) -> bool:
    """Whether keys and values are repeated for the heads of their group.

    The kernel on GPUs that takes masks, and fp32, and keeps no scores, has no grouped-query attention:
    asked for it, torch would keep s x s scores of each head.

    Args:
        groups: heads of a key/value head.
    """
    return groups > 1 and device.type == "cuda" and (masked or dtype == torch.float32)


def kernel_of_torch(
    shape: tuple[int, int, int, int],
    kv_heads: int,
    dtype: torch.dtype,
    *,
    masked: bool,
    dropout: float,
) -> str:
    """Which of its kernels torch will take in training, as torch itself says.

    Args:
        shape: of the queries, [b, heads, s, channels].

    Returns:
        "flash", "cudnn", "efficient", or "math", which keeps scores.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, heads, length, channels = shape
    if keys_are_repeated(heads // kv_heads, device, dtype, masked=masked):
        kv_heads = heads
    number = torch.empty(1, 1, 1, channels, dtype=dtype, device=device).requires_grad_()
    key = number.expand(batch, kv_heads, length, channels)  # of no memory
    row = torch.empty(1, 1, 1, length, dtype=dtype, device=device)
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
        logger.warning("torch's cuDNN attention does not run here and is left out: %s", error)
        torch.backends.cuda.enable_cudnn_sdp(False)  # or torch would still take it
        return kernel_of_torch(shape, kv_heads, dtype, masked=masked, dropout=dropout)
    return backend.name.removesuffix("_ATTENTION").lower()


@functools.cache
def _error_of_cudnn(channels: int, dtype: torch.dtype) -> str:
    """Why a small attention fails; "": it runs. Torch's choice does not look whether cuDNN is whole."""
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
