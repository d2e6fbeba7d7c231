"""CUDA graphs of forward and backward train as steps that are launched from Python.

Each process tells its cases apart and goes on after one that fails.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ladder.fp8 import Fp8Config, Fp8Recipe, missing
from pretrain.config.train import TrainConfig
from tests.data_sets import write_data_set
from tests.graph_run import both, config
from tests.te_run import LAYOUTS, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="no Transformer Engine"),
]
LIMIT_S = 200
RECIPES: tuple[Fp8Recipe | None, ...] = (None, "tensorwise", "delayed", "blockwise")
CASES = [(kind, recipe) for kind in ("ladder", "standard") for recipe in RECIPES]


def case_config(kind: str, recipe: Fp8Recipe | None) -> TrainConfig:
    """With heads of 64 and a sequence that fused attention takes."""
    given = config(kind, precision="bf16", fp8=Fp8Config(recipe=recipe), deterministic=True)
    model = replace(given.model, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4)
    model = replace(model, num_query_groups=2)
    return replace(given, model=model, data=replace(given.data, seq_length=128))


def train_all(folder: Path) -> None:
    """Writes of each case what differs with a graph; the numbers of trained tokens vary."""
    from pretrain.model.setup import start_ranks

    start_ranks(replace(case_config("ladder", None), cuda_graph=True))
    for kind, recipe in CASES:
        if recipe is None or not missing(recipe):
            try:
                wrong = both({"": case_config(kind, recipe)})[""]
            except Exception:
                wrong = [traceback.format_exc()]
            (folder / f"{kind}-{recipe}.json").write_text(json.dumps(wrong))
    os._exit(0)  # no tidying up of what a failed capture has left


def capture_second_stream(folder: Path) -> None:
    """Sequence parallelism at a played TP=2: all streams must have joined where a capture ends."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from pretrain.bench.decoder import Decoder
    from pretrain.bench.ranks import join
    from pretrain.model.graphs import WARM_UP_STEPS, StepGraph, use_own_stream

    join(2, fake=True)
    use_own_stream()
    model_parallel_cuda_manual_seed(0, use_cudagraphable_rng=True, force_reset_rng=True)
    wrong = []
    try:
        layout = LAYOUTS["tp2-sp"]
        decoder = Decoder(
            model_of("ladder"), layout, micro_batch_size=2, seq_length=128, precision="bf16"
        )

        def forward_backward(_: list[Any]) -> list[Any]:
            decoder.backward(decoder.forward())
            return []

        graph = StepGraph([decoder.block])
        for _ in range(WARM_UP_STEPS + 2):
            graph.run(forward_backward, [])
            decoder.clear()
        torch.cuda.synchronize()
    except Exception:
        wrong = [traceback.format_exc()]
    (folder / "second-stream.json").write_text(json.dumps(wrong))
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("graphs")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=target, args=(folder,))
        for target in (train_all, capture_second_stream)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        process.kill()
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_replayed_steps_train_alike(
    kind: str, recipe: Fp8Recipe | None, found: dict[str, list[str]]
) -> None:
    if recipe and (lacks := missing(recipe)):
        pytest.skip(f"{recipe} needs {lacks}")
    wrong = found[f"{kind}-{recipe}"]
    assert not wrong, "\n".join(wrong)


def test_the_second_stream_is_captured(found: dict[str, list[str]]) -> None:
    wrong = found["second-stream"]
    assert not wrong, "\n".join(wrong)


def losses(run: Path, *options: str) -> list[float]:
    arguments = ["--preset", "debug", "--data.paths", str(run.parent / "data")]
    arguments += ["--output-dir", str(run), "--nproc-per-node", "1", "--precision", "bf16"]
    arguments += ["--schedule.train-steps", "12", "--save-interval", "6", "--eval-interval", "5"]
    command = [sys.executable, "-m", "pretrain.cli", "train", *arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_a_run_with_a_graph_trains_and_resumes_as_one_without(
    tmp_path: Path, background: ThreadPoolExecutor
) -> None:
    """With torch.compile's kernels and the fused ones, which are not deterministic."""
    write_data_set(tmp_path / "data")
    plain: Future = background.submit(losses, tmp_path / "plain")
    whole = losses(tmp_path / "run", "--cuda-graph")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    resumed = losses(tmp_path / "run", "--cuda-graph")
    assert whole == pytest.approx(plain.result(), rel=2e-3)
    assert resumed == pytest.approx(whole, rel=2e-3)
