"""Transformer Engine's layers on a GPU, in bf16 and every FP8 recipe it can do, against fp32.

Two tensor-parallel ranks share the one GPU and talk over gloo.
"""

import json
import multiprocessing
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from megatron_ladder.config import ParallelConfig
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe, missing
from tests.data_sets import write_data_set

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="no Transformer Engine"),
]
RECIPES = get_args(Fp8Recipe)
# The largest relative difference of a parameter's gradient, in norm. bf16 has 8 bits, e4m3 4, e5m2 3.
BOUNDS = {"bf16": 0.05, "fp8": 0.3}


def run_rank(rank: int, tp: int, kind: str, recipe: Fp8Recipe | None, folder: Path) -> None:
    """Writes the differences from local layers in fp32: of no and of full recomputation."""
    import torch.distributed as dist

    from megatron_ladder.mcore_compat import initialize_model_parallel
    from tests.te_run import LAYERS, Run, model_of

    torch.cuda.set_device(0)
    store = dist.FileStore(str(folder / "store"), tp)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=tp)
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    initialize_model_parallel(parallel, seed=0)
    local = Run(model_of(kind), parallel, impl="local")
    found: dict[str, Any] = {}
    for recompute in ("none", "full"):
        run = Run(
            *(model_of(kind), parallel),
            weights=local.weights,
            precision="bf16",
            fp8=Fp8Config(recipe=recipe),
            recompute=recompute,
            steps=2 + 4 * LAYERS if recipe == "delayed" else 1,  # each finds one more scale
        )
        found[recompute] = run.worst(local)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("kind", ["ladder", "parallel", "standard"])
def test_gradients_are_near_fp32s(
    kind: str, recipe: Fp8Recipe | None, tp: int, tmp_path: Path
) -> None:
    if recipe and (lacks := missing(recipe)):
        pytest.skip(f"{recipe} needs {lacks}")
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, tp, kind, recipe, tmp_path))
        for rank in range(tp)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        if rank.is_alive():
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * tp
    bound = BOUNDS["fp8" if recipe else "bf16"]
    for rank in range(tp):
        for recompute, worst in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert worst < bound, recompute
            assert worst > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_in_fp8_resumes_bitwise(recipe: Fp8Recipe, tmp_path: Path) -> None:
    if lacks := missing(recipe):
        pytest.skip(f"{recipe} needs {lacks}")
    data, run = write_data_set(tmp_path / "data"), tmp_path / "run"
    arguments = ["--preset", "debug", "--data.paths", str(data), "--output-dir", str(run)]
    arguments += ["--nproc-per-node", "1", "--schedule.train-steps", "6", "--save-interval", "3"]
    arguments += ["--precision", "bf16", "--fp8.recipe", recipe, "--deterministic"]
    command = [sys.executable, "-m", "pretrain.cli", "train", *arguments]

    def losses() -> list[float]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    whole = losses()
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    assert losses() == whole
