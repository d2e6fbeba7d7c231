"""What keeps Python out of a GPU's way: few nodes of autograd, and a host that waits once a step."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.mcore_compat import initialize_model_parallel
from pretrain.bench.decoder import Decoder
from pretrain.loop import step
from pretrain.optim.optimizer import gradient_norm, update
from tests.distributed.layouts import Layout, batches, configuration, micro_batches, start
from tests.ranks import run_ranks

LAYERS = 4


def nodes_in_python(kind: Any, sequence_parallel: bool) -> Counter[str]:
    """The graph's nodes whose forward and backward are Python, by name."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        vocab_size=100,
        residual=kind,
    )
    decoder = Decoder(model, parallel, micro_batch_size=1, seq_length=16)
    seen, found, left = set(), Counter[str](), [decoder.forward().grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[type(node).__name__] += 1
        left += [n for n, _ in node.next_functions]
    return found


def count_nodes(sequence_parallel: bool) -> dict[str, Counter[str]]:
    return {
        kind: nodes_in_python(kind, sequence_parallel)
        for kind in ("standard", "parallel", "ladder", "parallel-ladder")
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_has_no_more_nodes_in_python_than_it_needs(
    sequence_parallel: bool, tmp_path: Path
) -> None:
    found = run_ranks(2, count_nodes, sequence_parallel, tmp_path=tmp_path)[0]
    standard, parallel, ladder, both = (sum(found[kind].values()) for kind in found)
    assert standard == 6 * LAYERS
    # With sequence parallelism the output's start and wait have each something to do in backward.
    per_submodule = 5 if sequence_parallel else 3
    assert ladder == 2 * per_submodule * LAYERS, found["ladder"]
    assert parallel == (2 + per_submodule) * LAYERS, found["parallel"]
    assert both == parallel, found["parallel-ladder"]


def take_steps(clip_grad: float) -> dict[str, list[Tensor]]:
    """Parameters after three steps: by megatron-core's `step`, by ours, by ours with another norm."""
    config = configuration("ladder")
    config = replace(config, optimizer=replace(config.optimizer, clip_grad=clip_grad))
    found = {}
    for by in ("megatron-core", "ours", "another norm"):
        model, optimizer, scheduler = start(config)

        def by_megatron_core(*_: Any, optimizer: Any = optimizer) -> bool:
            optimizer.step()
            return False  # it is done

        def by_another_norm(_: float, norm: float, *__: Any, optimizer: Any = optimizer) -> bool:
            update(optimizer, 2 * norm)
            return False

        judge = {"megatron-core": by_megatron_core, "another norm": by_another_norm}.get(by)
        for tokens in batches()[:3]:
            parts = iter(micro_batches(tokens, config))
            step.train_step(model, optimizer, scheduler, parts, config, is_good=judge)
        found[by] = [p.detach().clone() for p in model[0].parameters()]
    return found


@pytest.mark.parametrize("clip_grad", [0.01, 0.0])
def test_an_update_is_megatron_cores_step(clip_grad: float, tmp_path: Path) -> None:
    found = run_ranks(1, take_steps, clip_grad, tmp_path=tmp_path)[0]
    for a, b in zip(found["ours"], found["megatron-core"], strict=True):
        assert torch.equal(a, b)
    same = all(map(torch.equal, found["ours"], found["another norm"]))
    assert same == (clip_grad == 0.0)


def wait_for_the_device() -> list[str]:
    """In order, what a step does that a GPU would hold the host up for, after backward."""
    config = configuration("ladder", Layout(dp=2))
    model, optimizer, scheduler = start(config)
    parts = micro_batches(batches()[0], config)
    events: list[str] = []

    def watched(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return real(*args, **kwargs)

        return call

    run_schedule = step._run_schedule

    def run_and_forget(*args: Any, **kwargs: Any) -> Any:
        assert not events, events  # counting the trained tokens does not wait
        outputs = run_schedule(*args, **kwargs)
        events.clear()  # megatron-core's local attention compares random states, the host's
        return outputs

    step._run_schedule = run_and_forget
    step.update = watched("update", update)
    step.gradient_norm = watched("gradient norm", gradient_norm)
    Tensor.item = watched("item", Tensor.item)  # type: ignore[method-assign]
    Tensor.tolist = watched("tolist", Tensor.tolist)  # type: ignore[method-assign]
    step.train_step(model, optimizer, scheduler, iter(parts), config)
    return events


def test_the_host_waits_once_between_backward_and_update(tmp_path: Path) -> None:
    for events in run_ranks(2, wait_for_the_device, tmp_path=tmp_path):
        # The norm's and the loss's: the second finds the first one's wait done.
        assert events == ["gradient norm", "item", "tolist", "update"]
