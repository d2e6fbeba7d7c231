"""Compiled layers train as layers that are not: same losses and gradients, same names in checkpoints."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.mcore_compat import destroy_model_parallel, initialize_model_parallel
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.loop.step import train_step, validate
from pretrain.model import compiled
from pretrain.model.compiled import check_compile
from pretrain.model.setup import build
from tests.ranks import run_ranks

STEPS = 3


def config(residual: str = "ladder", residual_scaling: str = "none", **changes: Any) -> TrainConfig:
    debug = PRESETS["debug"]()
    options = {"ladder_layers": (2, 3)} if residual == "hybrid" else {"residual": residual}
    options |= {"residual_scaling": residual_scaling}
    model = replace(debug.model, vocab_size=128, num_layers=4, **options)
    return replace(debug, model=model, **changes)


def random_batches(config: TrainConfig) -> list[dict]:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    shape = (config.micro_batch_size, config.data.seq_length)
    batches = []
    for _ in range(2):
        tokens = torch.randint(0, 128, shape, generator=generator)
        batch = {
            "tokens": tokens,
            "labels": tokens.roll(-1, 1),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }
        batches.append(batch)
    return batches


def run(config: TrainConfig, backend: str) -> dict[str, Any]:
    """Some steps and a validation."""
    destroy_model_parallel()
    initialize_model_parallel(config.parallel, seed=0)
    torch._dynamo.reset()
    counters.clear()
    model, optimizer, scheduler = build(config)
    if config.compile and backend != "inductor":
        for layer in model[0].module.decoder.layers:
            layer.compile(fullgraph=True, backend=backend)
    batches = random_batches(config)
    losses, gradients = [], {}
    for step in range(STEPS):
        loss, norm, *_ = train_step(model, optimizer, scheduler, itertools.cycle(batches), config)
        losses.append((loss, norm))
        if step == 0:
            gradients = {n: p.main_grad.clone() for n, p in model[0].module.named_parameters()}
    return {
        "losses": losses,
        "gradients": gradients,
        "validation": validate(model, batches, config),
        "names": sorted(model[0].sharded_state_dict()),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def both(config: TrainConfig, backend: str) -> list[dict[str, Any]]:
    return [run(replace(config, compile=on), backend) for on in (False, True)]


CASES = {
    "inductor": (config(), "inductor", 1),
    "ladder": (config(), "aot_eager", 1),
    "standard": (config("standard"), "aot_eager", 1),
    "hybrid": (config("hybrid"), "aot_eager", 1),
    "parallel": (config("parallel"), "aot_eager", 1),
    "parallel-ladder": (config("parallel-ladder"), "aot_eager", 1),
    "scaled": (config(residual_scaling="1/sqrt-n"), "aot_eager", 1),
    "bf16": (config(precision="bf16"), "aot_eager", 1),
    "two data-parallel ranks": (config(micro_batch_size=2), "aot_eager", 2),
}


SLOW = ("parallel", "bf16", "inductor")  # of what the others show; and a compiler's half minute


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)
def test_compiled_layers_train_alike(case: str, tmp_path: Path) -> None:
    given, backend, ranks = CASES[case]
    for plain, compiled_ in run_ranks(ranks, both, given, backend, tmp_path=tmp_path):
        assert plain["graphs"] == 0
        # First, middle and last layer, in training and in validation, and what hybrid has of each kind.
        assert 2 <= compiled_["graphs"] <= 10
        assert compiled_["breaks"] == 0
        assert compiled_["names"] == plain["names"]
        tolerance = 2e-2 if case == "bf16" else 1e-5
        assert compiled_["losses"][0][0] == pytest.approx(plain["losses"][0][0], rel=tolerance / 10)
        for name, expected in plain["gradients"].items():
            difference = (compiled_["gradients"][name] - expected).norm() / expected.norm()
            assert difference < tolerance, name
        for before, after in zip(plain["losses"], compiled_["losses"], strict=True):
            assert after == pytest.approx(before, rel=tolerance)
        assert compiled_["validation"] == pytest.approx(plain["validation"], rel=tolerance)


def in_parallel(**sizes: Any) -> TrainConfig:
    return config(parallel=ParallelConfig(**sizes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (in_parallel(tensor_model_parallel_size=2), "use one tensor-parallel rank"),
        (in_parallel(pipeline_model_parallel_size=2), "pipeline stages are not compiled"),
        (in_parallel(context_parallel_size=2), "context-parallel ranks is not compiled"),
        (config(recompute="full"), "recompute full is not compiled: use none"),
        (
            config(data=replace(config().data, attend_across_documents=False)),
            "documents' lengths would be compiled in",
        ),
        (config(attention="unfused"), "attention unfused cannot be compiled: use auto"),
        (
            replace(config(), model=replace(config().model, hidden_dropout=0.1)),
            "dropout would draw other numbers",
        ),
    ],
)
def test_what_is_not_compiled_is_refused(given: TrainConfig, message: str) -> None:
    check_compile(given)
    with pytest.raises(UserError, match=f"--compile: .*{message}"):
        check_compile(replace(given, compile=True))


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compile(config(compile=True))
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--compile: torch\.compile needs .*, which was not found"):
        check_compile(config(compile=True))
