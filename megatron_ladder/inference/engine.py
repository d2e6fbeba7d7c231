"""megatron-core's inference engines for this project's models, the same for all supported versions of it.

Every rank of a model makes an engine and calls its methods in the same order. All ranks get the same
tokens.
"""

import contextlib
import itertools
import logging
import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.inference import cpu
from megatron_ladder.inference.cache import (
    BLOCK_TOKENS,
    Cache,
    Part,
    check_batch,
    in_blocks,
    plan_cache,
)
from megatron_ladder.inference.controller import controller_of
from megatron_ladder.inference.requests import Output, Request, Sampling, check_prompt
from megatron_ladder.rope import softmax_scale

PROMPT_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of prompts in a step, by device. More would fill it no better, and requests that decode wait for
the step; a GPU needs more to be filled."""

logger = logging.getLogger(__name__)


class DynamicEngine:
    """Continuous batching: requests may start and end between any two steps.

    The key-value cache consists of blocks. A request starts when the cache has room for its longest
    possible output, so no request is ever evicted. A long prompt is read in chunks, one a step, while other
    requests decode. Every rank of the model makes an engine and calls its methods in the same order.

    Args:
        chunk: this rank's part of the model, from build_gpt_model.
        model: with vocab_size set.
        end_ids: the tokens that end a text. Empty: none does.
        max_requests: the most requests that run at once. Others wait.
        cache_tokens: the size of the key-value cache, in tokens. None: useful_tokens, or what the memory
            has room for.
        useful_tokens: the most tokens that requests can use at once. None: max_requests full contexts.
        prompt_tokens: how many tokens of prompts a step reads, about: the engine rounds. None: see
            PROMPT_TOKENS.
        seed: for sampling.

    Raises:
        UserError: the cache does not fit the memory, or is smaller than one block (16 tokens).
    """

    def __init__(
        self,
        chunk: Any,
        model: ModelConfig,
        *,
        end_ids: Sequence[int],
        max_requests: int = 8,
        cache_tokens: int | None = None,
        useful_tokens: int | None = None,
        prompt_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        cpu.enable()
        _check_attention(chunk, model)
        from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
        from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine

        _quiet()
        tp = chunk.decoder.config.tensor_model_parallel_size
        context_length = model.max_position_embeddings
        slots = math.ceil(max_requests / tp) * tp  # 0.19 needs a multiple of tp
        if prompt_tokens is None:
            prompt_tokens = PROMPT_TOKENS[next(chunk.parameters()).device.type]
        # Each request that decodes takes one token of a step.
        self._step_tokens: int = DynamicInferenceContext.round_up_tokens(
            min(prompt_tokens, context_length) + slots, tp
        )
        self.cache = plan_cache(
            chunk,
            model,
            step_tokens=self._step_tokens,
            requests=slots,
            useful_tokens=useful_tokens or max_requests * in_blocks(context_length),
            cache_tokens=cache_tokens,
        )
        logger.info("%s", self.cache)
        self._max_requests = max_requests
        self._model, self._end_ids = model, tuple(end_ids)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, tuple[Request, Any]] = {}
        context, options = _dynamic_context(chunk, model, slots, self._step_tokens, self.cache)
        self._controller = controller_of(
            chunk, model, context, end_ids, max_requests, seed, running=self._running
        )
        self._engine = DynamicInferenceEngine(self._controller, context, **options)
        self._seen: dict[int, int] = {}
        self._cancelled: set[int] = set()

    @property
    def free_blocks(self) -> int:
        """The number of cache blocks that no running request can need."""
        return self.cache.blocks - sum(_blocks_of(request) for request, _ in self._running.values())

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
        check_prompt(request, self._model)
        if _blocks_of(request) > self.cache.blocks:
            more = ", or start with a larger one (--cache-tokens)"
            if self.cache.is_cut:
                more = ". The memory has no room for a larger one"
            raise UserError(
                f"a prompt of {len(request.prompt_ids)} tokens and {request.sampling.max_new_tokens} new "
                f"ones exceed the cache of {self.cache.tokens} tokens: ask for fewer{more}"
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
            theirs = self._running[request_id][1]
            # The engine ends no request whose prompt it is reading: let it read one token more, the last.
            theirs.remaining_prompt_tokens = theirs.remaining_prompt_tokens[:1]
            # The engine treats this like a stop word: the next step frees the request's blocks.
            self._engine.stop_word_finished_request_ids.add(request_id)
            self._cancelled.add(request_id)

    def has_work(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._waiting or self._running)

    def step(self) -> list[Output]:
        """Runs one forward pass: one token of each request whose prompt has been read, and as much of the
        prompts of others, in their order, as a step may hold.

        Returns:
            The new tokens, one item for each running request that has any or is over, unless it was
            cancelled.
        """
        self._begin_waiting()
        if not self._running:
            return []
        self._engine.step_modern()
        return [output for id in list(self._running) if (output := self._output(id))]

    def _begin_waiting(self) -> None:
        # Requests whose prompt this step would not reach stay here, where `cancel` ends them at once. So at
        # most one prompt has been read in part.
        unread = sum(len(theirs.remaining_prompt_tokens) for _, theirs in self._running.values())
        while (
            self._waiting
            and len(self._running) < self._max_requests
            and unread + len(self._running) < self._step_tokens
        ):
            if _blocks_of(self._waiting[0]) > self.free_blocks:
                return  # requests start in order, so that shorter ones cannot delay a long one for ever
            request = self._waiting.popleft()
            params = _sampling_params(request.sampling, self._end_ids, self._model)
            self._engine.add_request(request.id, list(request.prompt_ids), params)
            self._running[request.id] = (request, self._engine.get_request(request.id))
            self._seen[request.id] = 0
            unread += len(request.prompt_ids)

    def _output(self, request_id: int) -> Output | None:
        request, theirs = self._running[request_id]
        new = tuple(int(token) for token in theirs.generated_tokens[self._seen[request_id] :])
        is_over = theirs.status is not None and theirs.status.name == "COMPLETED"
        assert theirs.status is None or theirs.status.name != "FAILED", theirs
        self._seen[request_id] += len(new)
        if is_over:
            del self._running[request_id], self._seen[request_id]
        if request_id in self._cancelled:
            if is_over:
                self._cancelled.remove(request_id)
            return None
        if new and new[-1] in request.sampling.ends(self._end_ids):
            if not is_over:  # megatron-core knows one end token of a request; this is another
                self.cancel(request_id)
            return Output(request_id, new[:-1], "stop")
        if not new and not is_over:
            return None  # its prompt has not been read to the end
        return Output(request_id, new, "length" if is_over else None)


@torch.inference_mode()
def generate_static(
    chunk: Any,
    model: ModelConfig,
    requests: Sequence[Request],
    *,
    end_ids: Sequence[int],
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """Continues prompts as one batch, which runs until all of them are finished.

    Args:
        chunk: this rank's part of the model, from build_gpt_model.
        model: with vocab_size set.
        requests: the prompts. All must have the same `sampling`.
        end_ids: the tokens that end a text. Empty: none does.
        seed: for sampling.

    Raises:
        UserError: a prompt is empty, or it does not fit the context together with its new tokens, or the
            batch does not fit the memory.

    Returns:
        The new tokens of each prompt, without the token that ends the text.
    """
    if not requests:
        return []
    for request in requests:
        check_prompt(request, model)
        assert request.sampling == requests[0].sampling
    cpu.enable()
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine

    _quiet()
    length = max(request.most_tokens for request in requests)
    longest_prompt = max(len(request.prompt_ids) for request in requests)
    said = check_batch(
        Part.of_rank(chunk, model),
        prompts=len(requests),
        longest_prompt=longest_prompt,
        longest=length,
        instead="leave out --batching static, and prompts wait for each other; or give fewer",
    )
    logger.info("%s", said)
    context = StaticInferenceContext(len(requests), length)
    sampling = requests[0].sampling
    controller = controller_of(
        chunk, model, context, end_ids, len(requests), seed, shared_sampling=sampling
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that the dynamic engine will replace it
        engine = StaticInferenceEngine(controller, len(requests), seed or None, legacy=True)
    params = _sampling_params(sampling, end_ids, model)
    ids = [
        engine.scheduler.add_request("", list(request.prompt_ids), sampling_params=params)
        for request in requests
    ]
    engine.run_engine()
    done = engine.scheduler.completed_request_pool
    new = [tuple(int(token) for token in done[i].generated_tokens) for i in ids]
    ends = sampling.ends(end_ids)
    return [tuple(itertools.takewhile(lambda token: token not in ends, ids)) for ids in new]


def _check_attention(chunk: Any, model: ModelConfig) -> None:
    """Raises UserError for attention that megatron-core's engine for GPUs does not compute before 0.19."""
    if not next(chunk.parameters()).is_cuda or find_spec("megatron.core.inference.config"):
        return
    engine, lacks = "the engine of this megatron-core", ""
    if model.sliding_window is not None and model.sliding_window < model.max_position_embeddings:
        lacks = f"model.sliding_window is {model.sliding_window}: {engine} attends to all tokens"
    # It passes the scale for prompts, and not for new tokens.
    elif softmax_scale(model) is not None:
        lacks = (
            f"model.rope_scaling_type is yarn: {engine} does not scale new tokens' scores for it"
        )
    if lacks:
        raise UserError(
            f"{lacks}. Use megatron-core 0.19, which needs Python 3.12, or export the model and run it "
            "with transformers or vLLM"
        )


def _blocks_of(request: Request) -> int:
    return in_blocks(request.most_tokens) // BLOCK_TOKENS


def _sampling_params(sampling: Sampling, end_ids: Sequence[int], model: ModelConfig) -> Any:
    from megatron.core.inference.sampling_params import SamplingParams

    top_k, top_p = sampling.top_k or 0, sampling.top_p or 0.0
    if top_p:
        top_k = 0  # `keep_likeliest` has done it
        top_p = max(top_p, 1e-30)  # it becomes fp32, where less may be 0: no limit
    assert model.vocab_size is not None
    if top_k >= model.vocab_size:
        top_k = 0
    ends = sampling.ends(end_ids)
    return SamplingParams(
        temperature=1.0 if sampling.is_greedy else sampling.temperature,
        top_k=1 if sampling.is_greedy else top_k,
        top_p=0.0 if sampling.is_greedy else top_p,
        num_tokens_to_generate=sampling.max_new_tokens,
        termination_id=next((i for i in end_ids if i in ends), min(ends, default=-1)),
    )


def _dynamic_context(
    chunk: Any, model: ModelConfig, slots: int, step_tokens: int, cache: Cache
) -> tuple[Any, dict[str, Any]]:
    """The engine's context, which holds the cache, and the engine's options."""
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

    config = chunk.decoder.config
    # One more block, because the context keeps one for padding. And half a block, because the size is
    # given in GiB, which is not exact.
    size_gb = (cache.blocks + 1.5) * BLOCK_TOKENS * cache.token_bytes / 1024**3
    shared = {
        "block_size_tokens": BLOCK_TOKENS,
        "buffer_size_gb": size_gb,
        "max_requests": slots,
        "max_tokens": step_tokens,
        "max_sequence_length": model.max_position_embeddings,
        "use_flashinfer_fused_rope": False,
    }
    if find_spec("megatron.core.inference.config"):  # 0.19
        from megatron.core.inference.config import InferenceConfig

        inference = InferenceConfig(**shared, enable_chunked_prefill=True)
        # It would make buffers for its own exchange of tokens between ranks of experts, which need NVLink.
        # None are exchanged here (experts.py).
        config.inference_moe_token_dispatcher_type = None
        with _no_infos():
            return DynamicInferenceContext(config, inference), {}
    with _no_infos():
        context = DynamicInferenceContext(
            params_dtype=config.params_dtype,
            num_layers=len(chunk.decoder.layers),
            kv_channels=model.head_dim,
            num_attention_heads=model.kv_heads,
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            **shared,
        )
    options = {"random_seed": 0, "enable_cuda_graph": False, "enable_chunked_prefill": True}
    return context, options


@contextlib.contextmanager
def _no_infos() -> Iterator[None]:
    """The context logs its cache's size by the root logger. The engine has done so."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def _quiet() -> None:
    """Hides megatron-core's warnings about code that it will replace. A user need not act on them."""
    logging.getLogger("megatron.core.inference").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core\.inference.*")
