"""Transformer Engine's layers on a GPU, in bf16 and every FP8 recipe it can do, against fp32.

Two tensor-parallel ranks share the one GPU and talk over gloo, whose collectives copy through the host:
NCCL refuses a GPU that has two ranks. Starting a rank takes longer than a case: those of a layout go all
through it, beside the other layouts' and the runs that are resumed.
"""

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from megatron_ladder.fp8 import Fp8Config, Fp8Recipe, missing
from tests.data_sets import write_data_set

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="no Transformer Engine"),
]
RECIPES: tuple[Fp8Recipe, ...] = get_args(Fp8Recipe)
# Each recipe, and with the weights in FP8 alone.
RUNS = [(r, False) for r in RECIPES] + [(r, True) for r in RECIPES if r != "mxfp8"]
# The largest relative difference of a parameter's gradient, in norm. bf16 has 8 bits, e4m3 4, e5m2 3.
BOUNDS = {"bf16": 0.05, "fp8": 0.3}
START_S, CASE_S = 120, 60
CASES: list[tuple[str, str, Fp8Recipe | None]] = [
    (layout, kind, recipe)
    for layout in ("1", "tp2", "tp2-sp")
    for kind in ("ladder", "parallel", "standard")
    for recipe in (None, *RECIPES)
]
# Those that read a layer's input late, and halves: two calls of each linear in a pass.
CASES += [
    (layout, kind, recipe)
    for layout in ("tp2", "tp2-sp")
    for kind in ("parallel-ladder", "standard in halves", "parallel in halves")
    for recipe in ((None, "tensorwise") if kind == "parallel in halves" else (None, *RECIPES))
]
# What else calls the kernels otherwise: biases' gradients; sums of each other sub-module, at once.
CASES += [("1", "qk-norm", recipe) for recipe in (None, *RECIPES)]
CASES += [("tp2", "desync", None), ("tp2", "desync", "tensorwise")]


def run_rank(rank: int, layout: str, cases: list[tuple[str, Fp8Recipe | None]], to: Path) -> None:
    """Writes of each case the differences from local layers in fp32, of no and of full recomputation."""
    import torch.distributed as dist
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_ladder.mcore_compat import initialize_model_parallel
    from tests.te_run import BATCH, LAYERS, LAYOUTS, Run, in_halves, layout_of, model_of

    parallel = LAYOUTS[layout]
    tp = parallel.tensor_model_parallel_size
    torch.cuda.set_device(0)
    store = dist.FileStore(str(to / "store"), tp)
    timeout = timedelta(seconds=CASE_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=tp, timeout=timeout)
    # FP8 of blocks is gathered as several tensors in one message, as NCCL can: here one after another.
    one_by_one = SimpleNamespace(wait=lambda: None)
    dist._coalescing_manager = lambda *_, **__: nullcontext(one_by_one)  # type: ignore[attr-defined]
    initialize_model_parallel(parallel, seed=0)

    def leave(name: str, found: Any) -> None:
        file = to / f"{name}-{rank}.json"
        file.with_suffix(".part").write_text(json.dumps(found))
        file.with_suffix(".part").rename(file)

    references: dict[str, Run] = {}
    for kind, recipe in cases:
        # Two ranks gather whole blocks of 128 tokens, of each half.
        batch = BATCH * (2 if layout == "tp2-sp" else 1) * (2 if in_halves(kind) else 1)
        run_of = partial(Run, parallel=layout_of(kind, layout), batch=batch)
        FP8GlobalStateManager.reset()  # it keeps the layers of the case before
        found: dict[str, Any] = {}
        try:
            if kind not in references:
                references[kind] = run_of(model_of(kind), impl="local")
            for recompute in ("none", "full"):
                run = run_of(
                    model_of(kind),
                    weights=references[kind].weights,
                    precision="bf16",
                    fp8=Fp8Config(recipe=recipe),
                    recompute=recompute,
                    steps=2 + 4 * LAYERS if recipe == "delayed" else 1,  # each finds one more scale
                )
                found[recompute] = run.worst(references[kind])
        except Exception:
            found["error"] = traceback.format_exc()
        leave(f"{kind}-{recipe}", found)
        if "error" in found and tp > 1:
            return  # the other rank may be elsewhere
    x, whole = torch.ones(4, device="cuda"), torch.empty(4 * tp, device="cuda")
    dist.all_reduce(x), dist.all_gather_into_tensor(whole, x)
    leave("versions", [x._version, whole._version])
    dist.destroy_process_group()


class Ranks:
    """Those of one layout, on their way through its cases."""

    def __init__(self, layout: str, folder: Path) -> None:
        cases = [(k, r) for name, k, r in CASES if name == layout and not (r and missing(r))]
        self._folder = folder
        context = multiprocessing.get_context("spawn")
        self.processes = [
            context.Process(target=run_rank, args=(rank, layout, cases, folder))
            for rank in range(1 if layout == "1" else 2)
        ]
        for process in self.processes:
            process.start()

    def found(self, case: str) -> list[Any]:
        """Of each rank, when it has come to that."""
        files = [self._folder / f"{case}-{r}.json" for r in range(len(self.processes))]
        limit = CASE_S if any(self._folder.glob("*.json")) else START_S
        deadline = time.monotonic() + limit
        while not all(file.exists() for file in files):
            ended = [process.exitcode for process in self.processes]
            assert any(process.is_alive() for process in self.processes) or all(
                file.exists() for file in files
            ), f"the ranks have ended with {ended}"
            assert time.monotonic() < deadline, "the ranks hang"
            time.sleep(0.1)
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple, Future]]:
    """Of each recipe the losses of a run, and of the same resumed in its middle."""
    with ThreadPoolExecutor(len(RUNS)) as pool:
        yield {
            run: pool.submit(train_twice, *run, tmp_path_factory.mktemp(run[0]))
            for run in RUNS
            if not missing(run[0])
        }


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, resumed: dict[tuple, Future]
) -> Iterator[dict[str, Ranks]]:
    del resumed  # begun
    layouts = dict.fromkeys(layout for layout, *_ in CASES)
    started = {name: Ranks(name, tmp_path_factory.mktemp(name)) for name in layouts}
    yield started
    for of_layout in started.values():
        for process in of_layout.processes:
            process.kill()


@pytest.mark.parametrize(("layout", "kind", "recipe"), CASES)
def test_gradients_are_near_fp32s(
    layout: str, kind: str, recipe: Fp8Recipe | None, ranks: dict[str, Ranks]
) -> None:
    if recipe and (lacks := missing(recipe)):
        pytest.skip(f"{recipe} needs {lacks}")
    bound = BOUNDS["fp8" if recipe else "bf16"]
    for found in ranks[layout].found(f"{kind}-{recipe}"):
        assert "error" not in found, found["error"]
        for recompute, worst in found.items():
            assert 0 < worst < bound, recompute


def test_gloo_raises_versions_as_its_stand_in_does(ranks: dict[str, Ranks]) -> None:
    """tests/gpu_gloo.py"""
    for versions in ranks["tp2"].found("versions"):
        assert min(versions) > 0


def train_twice(
    recipe: Fp8Recipe, primary_weights: bool, folder: Path
) -> tuple[list[float], list[float]]:
    data, run = write_data_set(folder / "data"), folder / "run"
    arguments = ["--preset", "debug", "--data.paths", str(data), "--output-dir", str(run)]
    arguments += ["--nproc-per-node", "1", "--schedule.train-steps", "6", "--save-interval", "3"]
    arguments += ["--precision", "bf16", "--fp8.recipe", recipe, "--deterministic"]
    arguments += ["--fp8.primary-weights"] * primary_weights
    command = [sys.executable, "-m", "pretrain.cli", "train", *arguments]

    def losses() -> list[float]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    whole = losses()
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    return whole, losses()


@pytest.mark.parametrize(("recipe", "primary_weights"), RUNS)
def test_a_run_in_fp8_resumes_bitwise(
    recipe: Fp8Recipe, primary_weights: bool, resumed: dict[tuple, Future]
) -> None:
    if lacks := missing(recipe):
        pytest.skip(f"{recipe} needs {lacks}")
    whole, again = resumed[recipe, primary_weights].result()
    assert again == whole
    if primary_weights:
        beside, _ = resumed[recipe, False].result()
        assert whole == pytest.approx(beside, rel=0.01)
