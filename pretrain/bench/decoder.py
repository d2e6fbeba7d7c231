"""A decoder to measure: the layers of a model, without embedding, head and loss."""

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.config import Attention, ModelConfig, ParallelConfig, Precision, Recompute
from megatron_ladder.fp8 import Fp8Config
from megatron_ladder.mcore_compat import NO_FP8, build_gpt_model, transformer_config


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """All ranks enter together, so that times taken inside begin together."""
    gc.collect()  # before the pass: in the middle of one rank's pass the other ranks would wait for it
    gc.disable()
    torch.distributed.barrier(group=parallel_state.get_tensor_model_parallel_group())
    torch.cuda.synchronize()
    try:
        yield
    finally:
        gc.enable()


class Decoder:
    """The layers of `model` on this rank. megatron-core's groups must have been made.

    Args:
        micro_batch_size, seq_length: the shape of the states that go through the layers.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        micro_batch_size: int,
        seq_length: int,
        recompute: Recompute = "none",
        precision: Precision = "fp32",
        fp8: Fp8Config = NO_FP8,
        attention: Attention = "auto",
    ) -> None:
        assert parallel.pipeline_model_parallel_size == 1
        config = transformer_config(
            *(model, parallel),
            recompute=recompute,
            precision=precision,
            fp8=fp8,
            attention=attention,
            micro_batch_size=micro_batch_size,
            seq_length=seq_length,
        )
        self.core_attention = config.core_attention
        """The attention that the layers have chosen."""
        (gpt,) = build_gpt_model(model, config)
        self._gpt = gpt
        self.model = model
        self.block: Any = gpt.decoder
        self._rotary = gpt.rotary_pos_emb(seq_length)
        cut = parallel.tensor_model_parallel_size if config.sequence_parallel else 1
        length = seq_length // parallel.context_parallel_size
        shape = (length // cut, micro_batch_size, model.hidden_size)
        self.state_bytes = length * math.prod(shape[1:]) * config.params_dtype.itemsize
        """Bytes of the states of all tensor-parallel ranks together."""
        # Without sequence parallelism all ranks have the same states, as in training.
        generator = torch.Generator().manual_seed(1)
        states = torch.randn(shape, generator=generator).to(config.params_dtype)
        self._x = states.to(torch.cuda.current_device()).requires_grad_()
        self._grad = torch.ones_like(self._x) / self._x.numel()

    def forward(self) -> Tensor:
        """Runs the layers on this rank's states; returns their output, of the states' shape."""
        return self.block(hidden_states=self._x, attention_mask=None, rotary_pos_emb=self._rotary)

    def backward(self, output: Tensor) -> None:
        """Backward of `forward`'s output, from a constant gradient."""
        output.backward(self._grad)

    def clear(self) -> None:
        """Frees the gradients, and begins a new step for FP8."""
        self._x.grad = None
        self.block.zero_grad(set_to_none=True)
        self._gpt.set_is_first_microbatch()  # FP8 copies of weights are made once a step

    def step(self) -> tuple[float, float]:
        """Seconds of a forward and of a backward pass, which all ranks begin together."""
        with undisturbed():
            begin = time.perf_counter()
            output = self.forward()
            torch.cuda.synchronize()
            middle = time.perf_counter()
            self.backward(output)
            torch.cuda.synchronize()
            end = time.perf_counter()
        self.clear()  # other decoders need the memory of these gradients
        return middle - begin, end - middle
