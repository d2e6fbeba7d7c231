"""megatron-core's inference engines for this project's models, the same for all supported versions of it.

Every rank of a model makes an engine and calls its methods in the same order. All ranks get the same
tokens.
"""

import logging
import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.inference import cpu

BLOCK_TOKENS = 16
"""Tokens in a block of the key-value cache."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many at most. Raises UserError when a value is out of range."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k is not None and self.top_p is not None:
            raise UserError("top_k and top_p: megatron-core's engines take one of them")


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    id: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens that the request may have: the prompt's, and max_new_tokens."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens


@dataclass(frozen=True)
class Output:
    """The tokens that one step has added to a request."""

    id: int
    new_ids: tuple[int, ...]
    """The new tokens, without the token that ends the text."""
    finish_reason: Literal["stop", "length"] | None = None
    """stop: the model has ended the text. length: max_new_tokens are generated. None: not finished."""


class DynamicEngine:
    """Continuous batching: requests may start and end between any two steps.

    The key-value cache consists of blocks. A request starts when the cache has room for its longest
    possible output, so no request is ever evicted. Every rank of the model makes an engine and calls its
    methods in the same order. Raises UserError when the cache is smaller than one block (16 tokens).

    Args:
        chunk: this rank's part of the model, from build_gpt_model.
        model: with vocab_size set.
        eod_id: the token that ends a text.
        max_requests: the most requests that run at once. Others wait.
        cache_tokens: the size of the key-value cache, in tokens. None: max_requests full contexts.
        seed: for sampling.
    """

    def __init__(
        self,
        chunk: Any,
        model: ModelConfig,
        *,
        eod_id: int,
        max_requests: int = 8,
        cache_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        cpu.enable()
        from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine

        _quiet()
        self._context_length = model.max_position_embeddings
        per_request = math.ceil(self._context_length / BLOCK_TOKENS)
        if cache_tokens is None:
            self._blocks = max_requests * per_request
        else:
            self._blocks = cache_tokens // BLOCK_TOKENS
        if self._blocks < 1:
            raise UserError(
                f"a cache of {cache_tokens} tokens is smaller than one block of {BLOCK_TOKENS}"
            )
        self._max_requests = max_requests
        self._eod_id = eod_id
        context, options = _dynamic_context(chunk, model, max_requests, self._blocks)
        self._controller = _controller(chunk, model, context, eod_id, max_requests, seed)
        self._engine = DynamicInferenceEngine(self._controller, context, **options)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, tuple[Request, Any]] = {}
        self._seen: dict[int, int] = {}
        self._cancelled: set[int] = set()

    @property
    def free_blocks(self) -> int:
        """The number of cache blocks that no running request can need."""
        return self._blocks - sum(_blocks_of(request) for request, _ in self._running.values())

    @property
    def num_waiting(self) -> int:
        """The number of requests that have not started."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """The number of requests that have started and not ended."""
        return len(self._running)

    def check(self, request: Request) -> None:
        """Raises UserError when a request can never run."""
        check_prompt(request, self._context_length)
        if _blocks_of(request) > self._blocks:
            raise UserError(
                f"a prompt of {len(request.prompt_ids)} tokens and {request.sampling.max_new_tokens} new "
                f"ones exceed the cache of {self._blocks * BLOCK_TOKENS} tokens: ask for fewer, or "
                "start with a larger one (--cache-tokens)"
            )

    def add(self, request: Request) -> None:
        """Queues a request. Raises UserError when it can never run."""
        self.check(request)
        assert request.id not in self._running
        self._waiting.append(request)

    def cancel(self, request_id: int) -> None:
        """Ends the request with this id, if there is one. `step` returns no more outputs of it."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        if request_id in self._running:
            # The engine treats this like a stop word: the next step frees the request's blocks.
            self._engine.stop_word_finished_request_ids.add(request_id)
            self._cancelled.add(request_id)

    def has_work(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._waiting or self._running)

    def step(self) -> list[Output]:
        """Runs one forward pass: the whole prompt of each new request, and one token of each other request.

        Returns:
            The new tokens, one item for each running request that was not cancelled.
        """
        self._begin_waiting()
        if not self._running:
            return []
        self._engine.step_modern()
        return [output for id in list(self._running) if (output := self._output(id))]

    def _begin_waiting(self) -> None:
        while self._waiting and len(self._running) < self._max_requests:
            if _blocks_of(self._waiting[0]) > self.free_blocks:
                return  # requests start in order, so that shorter ones cannot delay a long one for ever
            request = self._waiting.popleft()
            params = _sampling_params(request.sampling, self._eod_id)
            self._engine.add_request(request.id, list(request.prompt_ids), params)
            self._running[request.id] = (request, self._engine.get_request(request.id))
            self._seen[request.id] = 0

    def _output(self, request_id: int) -> Output | None:
        _, theirs = self._running[request_id]
        ids = tuple(int(token) for token in theirs.generated_tokens)
        new, is_over = (
            ids[self._seen[request_id] :],
            theirs.status is not None and (theirs.status.name == "COMPLETED"),
        )
        assert theirs.status is None or theirs.status.name != "FAILED", theirs
        self._seen[request_id] = len(ids)
        if is_over:
            del self._running[request_id], self._seen[request_id]
        if request_id in self._cancelled:
            if is_over:
                self._cancelled.remove(request_id)
            return None
        if is_over and ids and ids[-1] == self._eod_id:
            return Output(request_id, new[:-1], "stop")
        return Output(request_id, new, "length" if is_over else None)


@torch.inference_mode()
def generate_static(
    chunk: Any, model: ModelConfig, requests: Sequence[Request], *, eod_id: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Continues prompts as one batch, which runs until all of them are finished.

    Args:
        chunk: this rank's part of the model, from build_gpt_model.
        model: with vocab_size set.
        requests: the prompts. All must have the same `sampling`.
        eod_id: the token that ends a text.
        seed: for sampling.

    Raises:
        UserError: a prompt is empty, or it does not fit the context together with its new tokens.

    Returns:
        The new tokens of each prompt, without the token that ends the text.
    """
    if not requests:
        return []
    for request in requests:
        check_prompt(request, model.max_position_embeddings)
        assert request.sampling == requests[0].sampling
    cpu.enable()
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine

    _quiet()
    length = max(request.most_tokens for request in requests)
    context = StaticInferenceContext(len(requests), length)
    controller = _controller(chunk, model, context, eod_id, len(requests), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that the dynamic engine will replace it
        engine = StaticInferenceEngine(controller, len(requests), seed or None, legacy=True)
    params = _sampling_params(requests[0].sampling, eod_id)
    ids = [
        engine.scheduler.add_request("", list(request.prompt_ids), sampling_params=params)
        for request in requests
    ]
    engine.run_engine()
    done = engine.scheduler.completed_request_pool
    new = [tuple(int(token) for token in done[i].generated_tokens) for i in ids]
    return [tokens[: tokens.index(eod_id)] if eod_id in tokens else tokens for tokens in new]


def check_prompt(request: Request, context_length: int) -> None:
    """Raises UserError when a prompt is empty, or does not fit the context together with its new tokens."""
    if not request.prompt_ids:
        raise UserError("a prompt is empty: give at least one token to continue")
    if request.most_tokens > context_length:
        raise UserError(
            f"a prompt of {len(request.prompt_ids)} tokens and {request.sampling.max_new_tokens} new "
            f"ones exceed the model's context of {context_length}: shorten the prompt or ask for "
            "fewer tokens"
        )


def _blocks_of(request: Request) -> int:
    return math.ceil(request.most_tokens / BLOCK_TOKENS)


def _sampling_params(sampling: Sampling, eod_id: int) -> Any:
    from megatron.core.inference.sampling_params import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature or 1.0,
        top_k=1 if sampling.temperature == 0 else sampling.top_k or 0,
        top_p=0.0 if sampling.temperature == 0 else sampling.top_p or 0.0,
        num_tokens_to_generate=sampling.max_new_tokens,
        termination_id=eod_id,
    )


def _dynamic_context(
    chunk: Any, model: ModelConfig, max_requests: int, blocks: int
) -> tuple[Any, dict[str, Any]]:
    """The engine's context, which holds the cache, and the engine's options."""
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

    config = chunk.decoder.config
    dtype = config.params_dtype
    tp = config.tensor_model_parallel_size
    layers = len(chunk.decoder.layers)
    heads = model.kv_heads // tp
    block_bytes = dtype.itemsize * 2 * layers * BLOCK_TOKENS * heads * model.head_dim
    # One more block, because the context keeps one for padding. And half a block, because the size is
    # given in GiB, which is not exact.
    size_gb = (blocks + 1.5) * block_bytes / 1024**3
    slots = math.ceil(max_requests / tp) * tp  # 0.19 needs a multiple of tp
    max_tokens = max(model.max_position_embeddings, slots)
    shared = {
        "block_size_tokens": BLOCK_TOKENS,
        "buffer_size_gb": size_gb,
        "max_requests": slots,
        "max_tokens": max_tokens,
        "max_sequence_length": model.max_position_embeddings,
        "use_flashinfer_fused_rope": False,
    }
    if find_spec("megatron.core.inference.config"):  # 0.19
        from megatron.core.inference.config import InferenceConfig

        inference = InferenceConfig(**shared, enable_chunked_prefill=False)
        return DynamicInferenceContext(config, inference), {}
    context = DynamicInferenceContext(
        params_dtype=dtype,
        num_layers=layers,
        kv_channels=model.head_dim,
        num_attention_heads=model.kv_heads,
        tensor_model_parallel_size=tp,
        **shared,
    )
    options = {"random_seed": 0, "enable_cuda_graph": False, "enable_chunked_prefill": False}
    return context, options


def _controller(
    chunk: Any, model: ModelConfig, context: Any, eod_id: int, max_requests: int, seed: int
) -> Any:
    """megatron-core's controller, which runs the model and samples."""
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    class Wrapper(GPTInferenceWrapper):
        """Sets the logits of the vocabulary's padding to -inf, so that it is never sampled."""

        def _forward(self, inference_input: dict[str, Any]) -> Tensor:
            output = super()._forward(inference_input)
            if parallel_state.is_pipeline_last_stage():
                output[..., model.vocab_size :] = -math.inf
            return output

    arguments: list[Any] = [chunk, context]
    if not find_spec("megatron.core.inference.config"):  # before 0.19
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
            InferenceWrapperConfig,
        )

        wrapper_config = InferenceWrapperConfig(
            hidden_size=chunk.config.hidden_size,  # the width of the tensors that pipeline stages send
            params_dtype=chunk.decoder.config.params_dtype,
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=model.padded_vocab_size,
            inference_max_requests=max_requests,
            inference_max_seq_length=model.max_position_embeddings,
        )
        arguments = [chunk, wrapper_config, context]
    controller = TextGenerationController(Wrapper(*arguments), _Ids(model, eod_id))
    controller.sampling_rng.manual_seed(seed)
    return controller


class _Ids:
    """A tokenizer for megatron-core that gives no text: prompts and outputs are ids."""

    bos = None

    def __init__(self, model: ModelConfig, eod_id: int) -> None:
        self.vocab_size, self.eod = model.vocab_size, eod_id

    def detokenize(self, *_: Any, **__: Any) -> str:
        return ""


def _quiet() -> None:
    """Hides megatron-core's warnings about code that it will replace. A user need not act on them."""
    logging.getLogger("megatron.core.inference").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core\.inference.*")
