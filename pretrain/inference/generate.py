"""`megatron-ladder generate RUN`: continues prompts with a run's checkpoint, on one or more ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_ladder.config import AllReduce, ParallelConfig
from megatron_ladder.inference.cache import in_blocks
from megatron_ladder.inference.engine import DynamicEngine, generate_static
from megatron_ladder.inference.requests import Request, Sampling, check_prompt
from pretrain.inference.loaded import find, load
from pretrain.inference.text import TextStream


def generate_from_run(
    run: Path,
    prompts: Sequence[str],
    parallel: ParallelConfig,
    sampling: Sampling,
    *,
    batching: Literal["dynamic", "static"] = "dynamic",
    all_reduce: AllReduce = "exact",
    seed: int = 0,
) -> list[str]:
    """Each prompt followed by its continuation, which stops at any of the model's end tokens.

    Every rank calls it, and all get the same texts.

    Args:
        run: the run's folder, or a checkpoint of it.
        prompts: the texts to continue.
        parallel: the layout to run at.
        sampling: how tokens are chosen, and how many at most.
        batching: which of megatron-core's engines to use.
        all_reduce: how outputs are summed over the tensor-parallel ranks.
        seed: of the sampling.

    Raises:
        UserError: there is no such run, a prompt is empty or too long, for the model or for the memory, or
            the layout does not fit.
    """
    found = find(run, parallel, all_reduce)
    requests = [
        Request(i, tuple(found.text.prompt_ids(text)), sampling) for i, text in enumerate(prompts)
    ]
    for request in requests:
        check_prompt(request, found.model)
    chunk = load(found, parallel, seed, all_reduce)
    options: dict[str, Any] = {"end_ids": found.text.end_ids, "seed": seed}
    new: dict[int, list[int]] = {request.id: [] for request in requests}
    if batching == "static":
        static = generate_static(chunk, found.model, requests, **options)
        new = {i: list(ids) for i, ids in enumerate(static)}
    else:
        engine = DynamicEngine(
            chunk,
            found.model,
            max_requests=max(1, len(prompts)),
            useful_tokens=sum(in_blocks(request.most_tokens) for request in requests),
            **options,
        )
        for request in requests:
            engine.add(request)
        while engine.has_work():
            for output in engine.step():
                new[output.id] += output.new_ids
    dist.barrier()
    dist.destroy_process_group()
    return [
        text
        + TextStream(found.text.tokenizer, request.prompt_ids).push(new[request.id], is_last=True)
        for text, request in zip(prompts, requests, strict=True)
    ]
