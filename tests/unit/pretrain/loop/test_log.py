"""What a run logs of a step's operations."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from pretrain.config.presets import PRESETS
from pretrain.loop import log as module
from pretrain.loop.log import RunLog
from pretrain.run.metrics import flops_per_token


@pytest.mark.parametrize("apart", [True, False])
def test_mfu_of_documents_and_of_whole_sequences(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(PRESETS["paper-1b"](), output_dir=tmp_path)
    config = replace(config, data=replace(config.data, attend_across_documents=not apart))
    monkeypatch.setattr(module, "dist", Mock(get_rank=lambda: 0, get_world_size=lambda: 64))
    monkeypatch.setattr(module, "MetricsLog", Mock(return_value=Mock(time_so_far=0.0)))
    run = RunLog(config, 0, "NVIDIA H100 80GB HBM3", Mock(), Mock())
    for step in range(1, config.log_interval + 1):
        run.train(step, 2.0, 1.0, 1e-3, 0.0, 100.0 if apart else 2048.0, {})
    assert run._log is not None
    logged = run._log.train.call_args.kwargs  # type: ignore[attr-defined]
    model = config.model

    def flops(length: float) -> float:
        return flops_per_token(
            num_layers=model.num_layers,
            attention_width=model.attention_width,
            seq_length=length,
            matmul_parameters=model.num_matmul_parameters(),
        )

    if apart:
        ratio = logged["mfu_whole_sequences"] / logged["mfu"]
        assert ratio == pytest.approx(flops(2048) / flops(100))
    else:
        assert "mfu_whole_sequences" not in logged
        expected = flops(2048) * logged["tokens_per_second"] / 64 / 989e12
        assert logged["mfu"] == pytest.approx(expected, rel=0.01)


def test_rates_of_a_ramp_are_of_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2, 4, 6 and 8 sequences that take a second a sequence; z-loss is beside the loss."""
    config = replace(PRESETS["debug"](), output_dir=tmp_path)
    config = replace(config, model=replace(config.model, vocab_size=100))
    schedule = replace(config.schedule, rampup_batch_size=(2, 2, 12), train_steps=6)
    optimizer = replace(config.optimizer, z_loss_coeff=1e-4)
    config = replace(config, schedule=schedule, optimizer=optimizer)
    monkeypatch.setattr(module, "dist", Mock(get_rank=lambda: 0, get_world_size=lambda: 2))
    monkeypatch.setattr(module, "MetricsLog", Mock(return_value=Mock(time_so_far=0.0)))
    now, status, watchdog = [0.0], Mock(), Mock()
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    run = RunLog(config, 0, "cpu", status, watchdog)
    sizes, samples = [2, 2, 4, 6, 8, 8], 0
    assert [config.batch_sizes.of(step) for step in range(1, 7)] == sizes
    for step, size in enumerate(sizes, 1):
        now[0] += size
        samples += size
        run.train(step, 2.0, 1.0, 1e-3, 0.5, 64.0, {})
        logged = run._log.train.call_args.kwargs  # type: ignore[union-attr]
        assert logged["tokens"] == samples * 64
        assert logged["eta_s"] == pytest.approx(sum(sizes) - samples)
        assert logged["tokens_per_second"] == pytest.approx(64)
        assert (logged["loss"], logged["z_loss"]) == (2.0, 0.5)
        shown = status.update.call_args.kwargs
        assert shown["eta_s"] == pytest.approx(sum(sizes) - samples)
        assert shown["tokens_per_second"] == pytest.approx(64)
        following = sizes[step] if step < 6 else 8
        assert watchdog.step_ended.call_args.args == (step, pytest.approx(following))


def test_mfu_of_experts_counts_what_a_token_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Qwen3-30B-A3B: attention of 32 heads of 128 channels, the router, 8 of 128 experts, the head."""
    config = replace(PRESETS["qwen3-30b-a3b"](), output_dir=tmp_path)
    monkeypatch.setattr(module, "dist", Mock(get_rank=lambda: 0, get_world_size=lambda: 64))
    monkeypatch.setattr(module, "MetricsLog", Mock(return_value=Mock(time_so_far=0.0)))
    run = RunLog(config, 0, "NVIDIA H100 80GB HBM3", Mock(), Mock())
    for step in range(1, config.log_interval + 1):
        run.train(step, 2.0, 1.0, 1e-3, 0.0, 4096.0, {})
    logged = run._log.train.call_args.kwargs  # type: ignore[union-attr]
    attention = 2048 * 128 * (2 * 32 + 2 * 4)
    weights = 48 * (attention + 2048 * 128 + 8 * 3 * 2048 * 768) + 151936 * 2048
    flops = 6 * weights + 12 * 48 * 4096 * 4096
    assert logged["mfu"] == pytest.approx(
        flops * logged["tokens_per_second"] / 64 / 989e12, rel=0.01
    )
