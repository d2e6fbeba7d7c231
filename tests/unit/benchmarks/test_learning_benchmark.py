"""benchmarks/learning.py: what it makes of runs' metrics. Training itself is tested elsewhere."""

import argparse
import json
import sys
from pathlib import Path

import pytest

import learning
from measuring.learning import runs as learning_runs
from measuring.learning import source_text
from pretrain.config.presets import PRESETS
from pretrain.config.train import save_config
from pretrain.run.metrics import MetricsLog
from tests.data_sets import write_data_set

LOSSES = {"standard": 5.0, "parallel": 5.25, "ladder": 5.125, "hybrid": 5.0, "parallel-ladder": 5.5}


def write_run(
    path: Path, kind: str, seed: int, balance: list[dict[str, float]] | None = None
) -> None:
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
            eta_s=0.0,
            **at,
            loss=loss,
            grad_norm=1.0,
            learning_rate=1e-3,
            tokens_per_second=100.0,
            tflops_per_gpu=0.1,
            mfu=None,
            memory_gib=1.0,
            **(balance[step - 1] if balance else {}),
        )
        if step % 10 == 0:
            log.validation(**at, dataset="data", loss=loss + 1, perplexity=1.0)
    log.end(step=20, reason="finished")
    save_config(PRESETS["debug"](), path / "config.json")


def test_curves_are_columns_of_the_runs_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "ladder", 1)
    run = learning_runs.read_run(tmp_path / "run", "ladder", 1)
    assert run["training"]["tokens"] == [100 * step for step in range(1, 21)]
    assert run["training"]["loss"][-1] == pytest.approx(3.125)
    assert run["validation"] == {
        "data": {"step": [10, 20], "tokens": [1000, 2000], "loss": [5.125, 4.125]}
    }
    assert run["unigram_loss"] == {"data": 6.0}
    assert learning_runs.last_loss(run) == 4.125
    model = PRESETS["debug"]().model
    assert run["parameters_without_embeddings"] == model.num_parameters(embeddings=False)


def test_several_data_sets_count_by_their_mean() -> None:
    column = {"step": [1, 2], "tokens": [10, 20]}
    data_sets = {"a": {**column, "loss": [4.0, 3.0]}, "b": {**column, "loss": [5.0, 3.5]}}
    assert learning_runs.validation({"validation": data_sets}) == {10: 4.5, 20: 3.25}


def test_mean_and_spread_are_of_the_points_that_all_seeds_have() -> None:
    curves = [{10: 1.0, 20: 2.0, 30: 3.0}, {10: 2.0, 30: 6.0}]
    assert learning_runs.mean_and_spread(curves) == ([10, 30], [1.5, 4.5], [1.0, 3.0], [2.0, 6.0])


def test_smoothing_keeps_a_constant_and_takes_out_noise() -> None:
    tokens = list(range(100))
    flat = {"training": {"tokens": tokens, "loss": [3.0] * 100}}
    assert learning_runs.smoothed(flat) == pytest.approx(dict.fromkeys(tokens, 3.0))
    noisy = {"training": {"tokens": tokens, "loss": [3.0 + (-1) ** i for i in tokens]}}
    assert all(abs(learning_runs.smoothed(noisy)[i] - 3.0) < 0.25 for i in tokens[20:])


class NoStandby:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, ...]]:
    """All but training, which writes a run's metrics: what was asked for."""
    asked: list[tuple[str, ...]] = []

    def train(trainings, kind, seed, run_dir, tokens, *more) -> dict[str, object]:
        asked.append((run_dir.name, str(seed), str(tokens), *trainings._of_train, *more))
        if not run_dir.exists():
            write_run(run_dir, kind, seed)
        return learning_runs.read_run(run_dir, kind, seed)

    monkeypatch.setattr(learning, "Standby", NoStandby)
    monkeypatch.setattr(learning.Trainings, "train", train)
    return asked


def test_results_of_runs_that_are_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: list[tuple[str, ...]],
) -> None:
    data = write_data_set(tmp_path / "data")
    files = [tmp_path / "out/result.json", tmp_path / "out/picture.png"]
    where = ["--data", str(data), "--work-dir", str(tmp_path / "work")]
    out = ["--json", str(files[0]), "--picture", str(files[1])]
    target = ["--target", "llama-3-8b", "llama-3-70b:64@p2p-off"]
    kinds = ["standard", "parallel", "ladder", "hybrid"]
    chosen = ["--kinds", *kinds, *target]
    monkeypatch.setattr(
        sys,
        "argv",
        ["learning.py", *where, *out, *chosen, "--precision", "bf16"],
    )
    assert learning.main() == 0
    # Every kind has its first seed before any has its second.
    assert trained == [
        (f"{kind}-seed{seed}", str(seed), "1500000", "--precision", "bf16")
        for seed in (1, 2)
        for kind in kinds
    ]
    text = files[0].read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    rows = {row["kind"]: row for row in found["rows"]}
    assert rows["ladder"]["losses"] == [4.125, 4.625] and rows["ladder"]["mean"] == 4.375
    assert rows["parallel"]["less_the_firsts"] == [0.25, 0.25]
    names = ("llama-3-8b", "llama-3-70b over p2p-off")
    for name, target in zip(names, found["modelled"], strict=True):
        assert target["target"] == name
        ladder, parallel = (rows[k]["modelled_time"][name] for k in ("ladder", "parallel"))
        # Behind a slow link one message a layer helps more than hiding two.
        assert (parallel < ladder < 1) if "p2p-off" in name else (ladder < parallel < 1)
        assert ladder < rows["hybrid"]["modelled_time"][name] < 1
        assert target["kinds"]["standard"]["at_tp8"]["tp"] == 8
    assert found["modelled"][1]["device"] == "64 x h100"
    assert len(found["runs"]) == 8
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "| ladder | 1,000 | 4.1250, 4.6250 | 4.3750 | 0.3535 | +0.1250, +0.1250 |" in (
        capsys.readouterr().out
    )


def test_of_models_with_experts_the_balance_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, trained: list[tuple[str, ...]]
) -> None:
    """Of the last ten of twenty steps: the fullest expert gets fuller by a tenth a step."""
    data = ["--data", str(write_data_set(tmp_path / "data")), "--work-dir", str(tmp_path / "work")]
    out = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png"), "--target"]
    for seed in (1, 2):
        balance = [{"expert_imbalance": seed + i / 10, "dropped_share": 0.03} for i in range(20)]
        write_run(tmp_path / f"work/ladder-seed{seed}", "ladder", seed, balance)
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *out, "--kinds", "ladder"])
    assert learning.main() == 0
    found = json.loads((tmp_path / "a.json").read_text())
    row = found["rows"][0]
    assert row["expert_imbalance"] == [2.45, 3.45] and row["dropped_percent"] == 3
    assert row["deviation"] == pytest.approx(0.5 / 2**0.5, abs=1e-5)
    assert found["runs"][1]["load_balance"]["expert_imbalance"][:2] == [2.0, 2.1]
    assert found["modelled"] == []
    assert "| 2.45, 3.45 | 3.00 |" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seed", "3"], "--seed is not to be given"),
        (["--schedule.train_steps=3"], "is not to be given"),
        (["--target", "llama-3-70b"], "--target llama-3-70b on 8 x h100: no layout fits"),
        (["--target", "paper-3b"], "no layout at TP 8"),
        (["--target", "llama-3-8b:many"], "give one of"),
        (["--target", "llama-3-8b@string"], "@LINK (nvswitch"),
        (["--rates", "1e-3", "--optimizer.lr", "1e-3"], "--optimizer.lr is not to be given"),
        (["--data", "nowhere"], "data set nowhere does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(
    tmp_path: Path, monkeypatch, capsys, options: list[str], says: str
) -> None:
    data = ["--data", str(write_data_set(tmp_path / "data"))]
    where = ["--work-dir", str(tmp_path / "work"), "--json", "a.json", "--picture", "a.png"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *where, *options])
    monkeypatch.setattr(learning, "Standby", NoStandby)
    assert learning.main() == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_tokens_are_what_fits_into_the_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, trained: list[tuple[str, ...]]
) -> None:
    """A trial says 100 tokens a second; its 2,000 tokens took 20 s, by a clock that stands still."""
    data = ["--data", str(write_data_set(tmp_path / "data"))]
    out = ["--json", str(tmp_path / "a.json"), "--work-dir", str(tmp_path / "work")]
    budget = ["--seconds", "6000", "--train-tokens", "1000000", "--trial-tokens", "2000"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *out, *budget, "--seeds", "1"])
    monkeypatch.setattr(learning.time, "monotonic", lambda: 0.0)
    assert learning.main() == 0
    assert [(name, tokens) for name, _, tokens, *_ in trained] == [
        ("a-trial", "2000"),
        *(
            (f"{kind}-seed1", "142500") for kind in learning.RESIDUALS
        ),  # 0.95 x 6000 s / 4 x 100 a second
    ]
    # The same command goes on with as many, whatever is left of the time.
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seconds", "60"])
    trained.clear()
    assert learning.main() == 0
    assert {tokens for _, _, tokens, *_ in trained} == {"142500"}
    assert "NOT ALL" not in capsys.readouterr().out
    # The fewest tokens of a run are a trial's: 20 s each, of 4 runs, where there are 60 s.
    out[-1] = str(tmp_path / "other")
    budget[1] = "60"
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *out, *budget, "--seeds", "1"])
    assert learning.main() == 0
    assert "NOT ALL RUNS WILL END IN TIME: that takes 80 s." in capsys.readouterr().out


def test_a_hybrid_is_ladder_in_its_last_half(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(learning, "Standby", NoStandby)
    options = argparse.Namespace(
        **{"preset": "tiny", "data": [], "seconds": None, "rates": None, "seeds": [1]},
        **{"kinds": ["ladder", "hybrid"]},
    )
    trainings = learning.Trainings(options, ["--model.num-layers", "6"])
    hybrid, ladder = (
        " ".join(trainings.command(kind, 1, tmp_path, 8)) for kind in ("hybrid", "ladder")
    )
    assert "--model.residual ladder --seed 1 --model.ladder-layers 3" in hybrid
    assert "--model.residual ladder" in ladder and "ladder-layers" not in ladder


def test_rates_are_compared_by_kind(
    tmp_path: Path, monkeypatch, capsys, trained: list[tuple[str, ...]]
) -> None:
    data = ["--data", str(write_data_set(tmp_path / "data"))]
    out = ["--json", str(tmp_path / "a.json"), "--work-dir", str(tmp_path / "work")]
    rates = ["--rates", "1e-3", "2e-3", "--kinds", "standard", "ladder"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *out, *rates])
    assert learning.main() == 0
    assert [(*found[:1], *found[-2:]) for found in trained][1:3] == [
        ("a-1e-3-ladder", "--optimizer.lr", "1e-3"),
        ("a-2e-3-standard", "--optimizer.lr", "2e-3"),
    ]
    rows = json.loads((tmp_path / "a.json").read_text())["rates"]
    assert [row["loss"] for row in rows] == [4.0, 4.125, 4.0, 4.125]
    assert "| 2e-3 | 4.0000 | 4.1250 |" in capsys.readouterr().out


def test_places_of_source_text_are_not_inside_one_another() -> None:
    found = source_text.places()
    assert any((Path(pytest.__file__)).is_relative_to(place) for place in found)
    assert not any(a in b.parents for a in found for b in found)


def test_a_failed_training_ends_it_with_its_status(tmp_path: Path, monkeypatch, capsys) -> None:
    def train(*_: object) -> None:
        raise learning.Failed(75)

    monkeypatch.setattr(learning, "Standby", NoStandby)
    monkeypatch.setattr(learning.Trainings, "train", train)
    data = ["--data", str(write_data_set(tmp_path / "data"))]
    out = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    work = ["--work-dir", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["learning.py", *data, *work, *out])
    assert learning.main() == 75
    assert "exit status 75" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()
