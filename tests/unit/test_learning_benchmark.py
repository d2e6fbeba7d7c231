"""benchmarks/learning.py: what it makes of runs' metrics. Training itself is tested elsewhere."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import learning
from pretrain.config import save_config
from pretrain.metrics import MetricsLog
from pretrain.presets import PRESETS
from tests.data_sets import write_data_set

LOSSES = {"standard": 5.0, "parallel": 5.25, "ladder": 5.125}


def write_run(path: Path, kind: str, seed: int) -> None:
    """Twenty steps; the loss falls by 0.1 a step, and seed 2 is 0.5 above seed 1."""
    path.mkdir(parents=True)
    log = MetricsLog(path, resume_step=0, train_steps=20, tensorboard=False, wandb=False, config={})
    log.start(
        step=0,
        world_size=1,
        residual=kind,
        versions={"torch": "2"},
        parameters=1000,
        tokens_per_step=100,
        device="cpu",
    )
    log.baseline(dataset="data", unigram_loss=6.0)
    for step in range(1, 21):
        at = {"step": step, "tokens": 100 * step, "time": float(step)}
        loss = LOSSES[kind] + 0.5 * (seed - 1) - step / 10
        log.train(
            **at,
            loss=loss,
            grad_norm=1.0,
            learning_rate=1e-3,
            tokens_per_second=100.0,
            tflops_per_gpu=0.1,
            mfu=None,
            memory_gib=1.0,
        )
        if step % 10 == 0:
            log.validation(**at, dataset="data", loss=loss + 1, perplexity=1.0)
    log.end(step=20, reason="finished")
    save_config(PRESETS["debug"](), path / "config.json")


def test_curves_are_columns_of_the_runs_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "ladder", 1)
    run = learning.read_run(tmp_path / "run", "ladder", 1)
    assert run["training"]["tokens"] == [100 * step for step in range(1, 21)]
    assert run["training"]["loss"][-1] == pytest.approx(3.125)
    assert run["validation"] == {
        "data": {"step": [10, 20], "tokens": [1000, 2000], "loss": [5.125, 4.125]}
    }
    assert run["unigram_loss"] == {"data": 6.0}
    assert learning.last_loss(run) == 4.125
    model = PRESETS["debug"]().model
    assert run["parameters_without_embeddings"] == model.num_parameters(embeddings=False)


def test_several_data_sets_count_by_their_mean() -> None:
    column = {"step": [1, 2], "tokens": [10, 20]}
    data_sets = {"a": {**column, "loss": [4.0, 3.0]}, "b": {**column, "loss": [5.0, 3.5]}}
    assert learning.validation({"validation": data_sets}) == {10: 4.5, 20: 3.25}


def test_mean_and_spread_are_of_the_points_that_all_seeds_have() -> None:
    curves = [{10: 1.0, 20: 2.0, 30: 3.0}, {10: 2.0, 30: 6.0}]
    assert learning.mean_and_spread(curves) == ([10, 30], [1.5, 4.5], [1.0, 3.0], [2.0, 6.0])


def test_smoothing_keeps_a_constant_and_takes_out_noise() -> None:
    tokens = list(range(100))
    flat = {"training": {"tokens": tokens, "loss": [3.0] * 100}}
    assert learning.smoothed(flat) == pytest.approx(dict.fromkeys(tokens, 3.0))
    noisy = {"training": {"tokens": tokens, "loss": [3.0 + (-1) ** i for i in tokens]}}
    assert all(abs(learning.smoothed(noisy)[i] - 3.0) < 0.25 for i in tokens[20:])


def test_the_command_holds_no_paths_of_the_machine() -> None:
    options = argparse.Namespace(
        **{"data": [Path("/home/me/text")], "preset": "tiny", "train_tokens": 5, "seeds": [1]},
        **{"kinds": ["ladder"], "target": "llama-3-8b", "device": "h100"},
    )
    command = learning.command(options, ["--config", "/home/me/more.json", "--precision", "bf16"])
    assert command.endswith("--config more.json --precision bf16")
    assert "/home" not in command


def test_results_of_runs_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but training, which is the fake's."""
    asked = []

    def fake_train(options, of_train, kind, seed, run_dir) -> int:
        asked.append((kind, seed, of_train))
        write_run(run_dir, kind, seed)
        return 0

    monkeypatch.setattr(learning, "train", fake_train)
    data = write_data_set(tmp_path / "data")
    files = [tmp_path / "out/result.json", tmp_path / "out/picture.png"]
    where = ["--data", str(data), "--work-dir", str(tmp_path / "work")]
    out = ["--json", str(files[0]), "--picture", str(files[1])]
    monkeypatch.setattr(sys, "argv", ["learning.py", *where, *out, "--precision", "bf16"])
    assert learning.main() == 0
    # Every kind has its first seed before any has its second.
    kinds = ["standard", "parallel", "ladder"]
    assert asked == [(kind, seed, ["--precision", "bf16"]) for seed in (1, 2) for kind in kinds]
    text = files[0].read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    rows = {row["kind"]: row for row in found["rows"]}
    assert rows["ladder"]["losses"] == [4.125, 4.625] and rows["ladder"]["mean"] == 4.375
    assert rows["parallel"]["less_the_firsts"] == [0.25, 0.25]
    assert rows["ladder"]["modelled_time"] < rows["parallel"]["modelled_time"] < 1
    assert found["modelled"]["kinds"]["standard"]["at_tp8"]["tp"] == 8
    assert len(found["runs"]) == 6
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "| ladder | 1,000 | 4.1250, 4.6250 | 4.3750 | +0.1250, +0.1250 |" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seed", "3"], "--seed is not to be given"),
        (["--schedule.train_steps=3"], "is not to be given"),
        (["--target", "llama-3-70b"], "--target llama-3-70b on 8 x h100: no layout fits"),
        (["--target", "paper-3b"], "no layout at TP 8"),
        (["--data", "nowhere"], "data set nowhere does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(
    tmp_path: Path, monkeypatch, capsys, options: list[str], says: str
) -> None:
    data = ["--data", str(write_data_set(tmp_path / "data"))]
    where = ["--work-dir", str(tmp_path / "work"), "--json", "a.json", "--picture", "a.png"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *where, *options])
    assert learning.main() == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_failed_training_ends_it_with_its_status(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(learning, "train", lambda *_: 75)
    data = ["--data", str(write_data_set(tmp_path / "data"))]
    out = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    work = ["--work-dir", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *work, *out])
    assert learning.main() == 75
    assert not (tmp_path / "a.json").exists()
