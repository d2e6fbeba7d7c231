"""Layers with experts on one GPU: Transformer Engine's grouped experts against local ones in fp32, and
local ladder layers against plain PyTorch. One rank has all experts, so nothing is exchanged.
"""

import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_ladder.config import ParallelConfig
from megatron_ladder.fp8 import OF_EXPERTS, Fp8Config, Fp8Recipe, missing
from tests.distributed.layouts import (
    BATCH,
    Layout,
    batches,
    configuration,
    load_start,
    micro_batches,
    save_weights,
    start,
    train_step,
)
from tests.expert_oracle import Cut, Oracle
from tests.te_run import Run, model_with_experts, send_by_chance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOUNDS = {None: 0.05, **dict.fromkeys(get_args(Fp8Recipe), 0.3)}
"""The largest relative difference of a parameter's gradient, in norm; as in test_fp8.py."""


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="no Transformer Engine")
@pytest.mark.parametrize("kind", ["standard", "ladder", "parallel-ladder"])
def test_grouped_experts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe.router import TopKRouter
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_ladder.mcore_compat import initialize_model_parallel

    monkeypatch.setattr(TopKRouter, "routing", TopKRouter.routing)  # put back afterwards
    send_by_chance()
    initialize_model_parallel(ParallelConfig(), seed=0)
    run_of = partial(Run, model_with_experts(kind), ParallelConfig())
    local = run_of(impl="local")
    wrong = []
    for recipe in (None, *OF_EXPERTS):
        if recipe and missing(recipe):
            continue
        for recompute in ("none", "full"):
            FP8GlobalStateManager.reset()
            options = {"precision": "bf16", "fp8": Fp8Config(recipe=recipe)}
            try:
                run = run_of(weights=local.weights, recompute=recompute, **options)
                if (worst := run.worst(local)) > BOUNDS[recipe]:
                    wrong.append(f"{recipe}, {recompute}: {worst}")
            except Exception:
                wrong.append(f"{recipe}, {recompute}: {traceback.format_exc()}")
    assert not wrong


@pytest.mark.parametrize("kind", ["ladder, a shared expert", "ladder, capacity, padded"])
def test_ladder_layers_with_experts_train_as_the_oracle(kind: str, tmp_path: Path) -> None:
    """Three steps in fp32. With padding to a capacity the host waits for no numbers of tokens."""
    from pretrain.run.checkpoint import load_weights

    layout = Layout(accumulation=4)
    config = replace(configuration(kind, layout), transformer_impl="local")
    model, optimizer, scheduler = start(config)
    save_weights(model, tmp_path / "weights")
    load_start(model, tmp_path / "weights")
    oracle = Oracle(config, {n: w.cpu() for n, w in load_weights(tmp_path / "weights").items()})
    for tokens in batches()[:3]:
        expected, _ = oracle.step(tokens, Cut(BATCH // layout.accumulation))
        parts = [
            {name: x.cuda() for name, x in part.items()} for part in micro_batches(tokens, config)
        ]
        loss, *_ = train_step(model, optimizer, scheduler, iter(parts), config)
        assert loss == pytest.approx(expected, abs=1e-4)
