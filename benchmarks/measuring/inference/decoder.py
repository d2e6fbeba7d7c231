"""A decoder to measure in inference: prefill and decode, with megatron-core's static KV cache."""

import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig, Precision
from pretrain.bench.decoder import Decoder, undisturbed


class InferenceDecoder(Decoder):
    """The layers of `model` on this rank, without embedding and head.

    Args:
        sequences: their number; they are generated at once.
        prompt_length, new_tokens: tokens of each sequence.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        sequences: int,
        prompt_length: int,
        new_tokens: int,
        precision: Precision = "fp32",
    ) -> None:
        longest = prompt_length + new_tokens
        super().__init__(
            model, parallel, micro_batch_size=sequences, seq_length=longest, precision=precision
        )
        self.block.eval()
        self._prompt_length = prompt_length
        self._middle = prompt_length + new_tokens // 2
        self._context: Any = StaticInferenceContext(sequences, longest)
        self._halves: list[Any] = []
        if sequences % 2 == 0:
            self._halves = [StaticInferenceContext(sequences // 2, longest) for _ in range(2)]

    def prefill(self) -> Tensor:
        """Reads all prompts into the empty cache. Returns [prompt, sequences, h]."""
        self._context.reset()
        return self._states_of(0, self._prompt_length)

    def generate_half(self) -> None:
        """Fills the cache to the middle of the generation, where the cache has its mean length."""
        self._context.reset()
        self._states_of(0, self._middle)
        if self._halves:
            self._reset_halves()
            self._states_in_halves(0, self._middle)

    def decode(self) -> Tensor:
        """One token of each sequence, always the one in the middle. Returns [1, sequences, h]."""
        self._context.enable_decode_mode()
        return self._states_of(self._middle, self._middle + 1)

    def prefill_in_halves(self) -> Tensor:
        """`prefill` in which one half of the sequences is a layer behind the other half: while one half
        computes, the sums of the other half run. For an even number of sequences and our own layers."""
        self._reset_halves()
        return self._states_in_halves(0, self._prompt_length)

    def decode_in_halves(self) -> Tensor:
        """`decode` in two halves, as `prefill_in_halves`."""
        for context in self._halves:
            context.enable_decode_mode()
        return self._states_in_halves(self._middle, self._middle + 1)

    def _reset_halves(self) -> None:
        for context in self._halves:
            context.reset()

    @torch.no_grad()
    def _states_in_halves(self, start: int, end: int) -> Tensor:
        pairs: list[tuple[Tensor, Tensor | None]] = [
            (x, None) for x in self._x[start:end].chunk(2, dim=1)
        ]
        for context in self._halves:
            context.sequence_len_offset = start
        for layer in self.block.layers:
            pairs = [
                layer(
                    hidden_states=y,
                    context=a,
                    attention_mask=None,
                    inference_context=context,
                    rotary_pos_emb=self._rotary,
                )
                for (y, a), context in zip(pairs, self._halves, strict=True)
            ]
        return self.block.final_layernorm(torch.cat([y for y, _ in pairs], dim=1))

    @torch.no_grad()
    def _states_of(self, start: int, end: int) -> Tensor:
        self._context.sequence_len_offset = start
        return self.block(
            hidden_states=self._x[start:end],
            attention_mask=None,
            inference_context=self._context,
            rotary_pos_emb=self._rotary,
        )


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The kernels of `run` as a CUDA graph. The function that is returned launches them again. The modelled
    link's kernels are among them, so a pass that is captured inside `wire.over` is replayed outside."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture needs a warm-up
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Callable[[], object]) -> tuple[float]:
    """Seconds of a pass, which all ranks begin together."""
    with undisturbed():
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin,)
