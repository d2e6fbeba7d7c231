"""The model in vLLM itself, on a CPU: vLLM's layers, groups, configuration and loading of weights.

A CUDA build of vLLM has no attention for a CPU: a plain one takes its place. Import this where vLLM is
installed; docs/guides/vllm.md says how.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # which vLLM reads when it is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import (
    CompilationConfig,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader import get_model

from megatron_ladder.vllm import register


class PlainAttention(nn.Module):
    """Causal attention over one sequence, with the interface of vLLM's. q, k, v: [tokens, width]."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        per_layer_sliding_window: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__()
        self.head_size, self.scale = head_size, scale
        self.window = per_layer_sliding_window

    def forward(self, *qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_size)).transpose(0, 1)[None] for x in qkv)
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


@contextmanager
def loaded(folder: Path, tp: int = 1, pp: int = 1) -> Iterator[nn.Module]:
    """This rank's model. torch.distributed is set up."""
    register()
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp),
        device_config=DeviceConfig("cpu"),
        load_config=LoadConfig(load_format="safetensors"),
        compilation_config=CompilationConfig(custom_ops=["none"]),
    )
    from megatron_ladder.vllm import model

    with (
        set_current_vllm_config(config),
        mock.patch.object(model, "Attention", PlainAttention),
        mock.patch.object(torch.accelerator, "empty_cache"),  # fails where there is no accelerator
    ):
        rank = dist.get_rank()
        parallel_state.init_distributed_environment(tp * pp, rank, "env://", rank, "gloo")
        parallel_state.initialize_model_parallel(tp, pp)
        try:
            yield get_model(vllm_config=config)
        finally:
            parallel_state.destroy_model_parallel()


@torch.inference_mode()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """[tokens, vocab] of one sequence."""
    hidden = model(ids, torch.arange(len(ids)))
    return model.compute_logits(hidden).clone()
