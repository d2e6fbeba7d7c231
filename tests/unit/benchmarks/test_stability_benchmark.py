"""benchmarks/commands/stability.py: its runs, and what it makes of their metrics."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from commands import stability
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig, save_config
from pretrain.run.metrics import MetricsLog
from pretrain.start.arguments import parse_train


def config_of(given: list[str]) -> TrainConfig:
    return parse_train(["--preset", "debug", "--output-dir", "run", *given])[0]


def test_the_runs_differ_in_what_is_asked() -> None:
    options = argparse.Namespace(rates=["1e-3", "3e-3"], rate="3e-3", z_loss=1e-4, ramp=[2, 2, 9])
    runs = {name: config_of(given) for name, given in stability.ways(options).items()}
    assert len(runs) == 6
    found = {
        name: (c.optimizer.optimizer, c.optimizer.lr, c.optimizer.z_loss_coeff)
        for name, c in runs.items()
    }
    assert found["Muon, 3e-3"] == ("muon", 3e-3, stability.RECORDED)
    assert found["AdamW, 1e-3"] == ("adam", 1e-3, stability.RECORDED)
    assert found["AdamW with z-loss 0.0001, 3e-3"] == ("adam", 3e-3, 1e-4)
    ramps = [name for name, c in runs.items() if c.schedule.rampup_batch_size]
    assert ramps == ["AdamW with a ramp, 3e-3"]


def test_figures_are_of_the_end(tmp_path: Path) -> None:
    """log^2 Z is 4 in the last 50 steps and 9 before; the norm is largest in warm-up."""
    config = PRESETS["debug"]()
    optimizer = replace(config.optimizer, z_loss_coeff=0.5)
    schedule = replace(config.schedule, train_steps=60, warmup_steps=2)
    config = replace(config, optimizer=optimizer, schedule=schedule)
    save_config(config, tmp_path / "config.json")
    log = MetricsLog(
        tmp_path, resume_step=0, train_steps=60, tensorboard=False, wandb=False, config={}
    )
    facts = {"world_size": 1, "residual": "ladder", "versions": {}, "parameters": 1}
    log.start(step=0, tokens_per_step=512, device="cpu", **facts)
    for step in range(1, 61):
        at = {"step": step, "tokens": 512 * step, "time": float(step)}
        more = {"learning_rate": 1e-3, "tokens_per_second": 1.0, "tflops_per_gpu": 0.1}
        z_loss = 0.5 * (4.0 if step > 10 else 9.0)
        norm = 10.0 if step < 3 else 1.0 + step / 100
        log.train(
            eta_s=0.0,
            **at,
            loss=5.0,
            grad_norm=norm,
            mfu=None,
            memory_gib=1.0,
            z_loss=z_loss,
            **more,
        )
    log.validation(**at, dataset="data", loss=4.5, perplexity=90.0)
    log.end(step=60, reason="finished")
    found = stability.figures(tmp_path, "AdamW, 1e-3")
    assert found["log_z_squared"] == pytest.approx(4.0)
    assert found["largest_gradient_norm_after_warm_up"] == pytest.approx(1.6)
    assert (found["steps"], found["tokens"]) == (60, 60 * 512)
    assert found["held_out"] == [(60 * 512, 4.5)]


def test_the_picture_has_the_best_of_each_and_the_rest() -> None:
    losses = {"AdamW, 1": 5.0, "Muon, 1": 4.0, "AdamW, 2": 4.5, "Muon, 2": 4.2, "AdamW with x": 6.0}
    runs = [{"name": name, "held_out": [(10, loss)]} for name, loss in losses.items()]
    assert [run["name"] for run in stability.chosen(runs)] == [
        "AdamW, 2",
        "Muon, 1",
        "AdamW with x",
    ]
