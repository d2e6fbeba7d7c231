"""megatron-core's controller for its engines: it runs the model, and samples from the logits."""

import math
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.config import ModelConfig
from megatron_ladder.inference.logits import adjust, is_needed, keep_likeliest
from megatron_ladder.inference.requests import Request, Sampling


def controller_of(
    chunk: Any,
    model: ModelConfig,
    context: Any,
    end_ids: Sequence[int],
    max_requests: int,
    seed: int,
    *,
    running: Mapping[int, tuple[Request, Any]] | None = None,
    shared_sampling: Sampling | None = None,
) -> Any:
    """megatron-core's controller, which runs the model and samples.

    Args:
        running: the dynamic engine's running requests, by id.
        shared_sampling: the static engine's sampling, which all its requests have.
    """
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    class Wrapper(GPTInferenceWrapper):
        """Sets the logits of the vocabulary's padding to -inf, so that it is never sampled, and adjusts
        the others."""

        def _forward(self, inference_input: dict[str, Any]) -> Tensor:
            output = super()._forward(inference_input)
            if parallel_state.is_pipeline_last_stage():
                output[..., model.vocab_size :] = -math.inf
                if shared_sampling is not None:
                    keep_likeliest(output, shared_sampling)
                elif running is not None:
                    _adjust_each(output, context, running, end_ids)
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
    controller = TextGenerationController(Wrapper(*arguments), _Ids(model, end_ids))
    controller.sampling_rng.manual_seed(seed)
    return controller


def _adjust_each(
    output: Tensor,
    context: Any,
    running: Mapping[int, tuple[Request, Any]],
    end_ids: Collection[int],
) -> None:
    """Of each request that a step works on, the logits of its next token: output is [1, requests, rows]."""
    if not any(is_needed(request.sampling) for request, _ in running.values()):
        return
    active = slice(context.paused_request_count, context.total_request_count)
    for row, request_id in enumerate(context.request_ids[active].tolist()):
        request, theirs = running[request_id]
        if is_needed(request.sampling):
            ends = request.sampling.ends(end_ids)
            adjust(output[0, row], request, theirs.generated_tokens, ends)


class _Ids:
    """A tokenizer for megatron-core that gives no text: prompts and outputs are ids."""

    bos = None

    def __init__(self, model: ModelConfig, end_ids: Sequence[int]) -> None:
        self.vocab_size, self.eod = model.vocab_size, end_ids[0] if end_ids else -1

    def detokenize(self, *_: Any, **__: Any) -> str:
        return ""
