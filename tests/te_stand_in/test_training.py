"""`megatron-ladder train` in FP8, or with Adam's moments in bf16: the optimizer, checkpoints, resuming."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.config.train import load_config
from tests.data_sets import write_data_set
from tests.oracle import plain_model
from tests.te_stand_in import MARKS

pytestmark = MARKS
EXPERTS = ["--model.experts.num-moe-experts", "4", "--model.experts.moe-ffn-hidden-size", "64"]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def train(data: Path, run: Path, *options: str) -> None:
    arguments = ["--preset", "debug", "--data.paths", str(data), "--output-dir", str(run)]
    arguments += ["--nproc-per-node", "1", "--schedule.train-steps", "6", "--save-interval", "3"]
    # A validation between the two saves: it must not change the scales that training goes on with.
    arguments += ["--precision", "bf16", "--eval-interval", "3", *options]
    command = [sys.executable, "-m", "tests.te_stand_in.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--fp8.recipe", "tensorwise"],
        ["--fp8.recipe", "delayed"],
        ["--fp8.recipe", "delayed", "--model.residual", "standard"],
        ["--fp8.recipe", "blockwise"],
        ["--fp8.recipe", "delayed", "--fp8.primary-weights"],
        ["--fp8.recipe", "tensorwise", "--fp8.primary-weights"],
        ["--fp8.recipe", "blockwise", "--fp8.primary-weights"],
        ["--optimizer.moments", "bf16"],
        EXPERTS,
        [*EXPERTS, "--fp8.recipe", "tensorwise"],
        [*EXPERTS, "--fp8.recipe", "blockwise", "--model.residual", "standard"],
    ],
    ids=" ".join,
)
def test_a_run_resumes_bitwise(options: list[str], tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")
    train(data, tmp_path / "run", *options)
    whole = losses(tmp_path / "run")
    assert whole[-1] < whole[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    train(data, tmp_path / "run", *options)
    assert losses(tmp_path / "run") == whole


def test_a_checkpoint_in_fp8_holds_the_weights_of_any_other(tmp_path: Path) -> None:
    data, run = write_data_set(tmp_path / "data"), tmp_path / "run"
    train(data, run, "--fp8.recipe", "delayed")
    model = load_config(run / "config.json").model
    plain = plain_model(model, run / "checkpoints" / "step_00000006")  # refuses other names
    tokens = torch.zeros(1, 8, dtype=torch.long)
    assert plain(tokens).logits.isfinite().all()


def test_layers_may_change_between_starts(tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")
    train(data, tmp_path / "run")
    whole = losses(tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (built,) = (line["choices"] for line in lines if line.get("kind") == "built")
    assert {"Transformer Engine: cuDNN"} == {
        choice["implementation"] for choice in built if choice["part"] == "attention"
    }
    for impl in ("local", "transformer_engine"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
        train(data, tmp_path / "run", "--transformer-impl", impl)
        assert losses(tmp_path / "run") == pytest.approx(whole, rel=2e-3)
