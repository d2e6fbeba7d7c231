import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from megatron_ladder.errors import UserError
from pretrain.config.presets import PRESETS
from pretrain.run import status as status_file
from pretrain.run.prometheus import device_figures, prometheus_text
from pretrain.run.status import Status, read_starts, read_status, record_failure

FIELDS = {
    *(
        "state",
        "phase",
        "step",
        "train_steps",
        "tokens",
        "loss",
        "tokens_per_second",
        "eta_s",
        "watch",
        "host",
        "pid",
    ),
    *("last_checkpoint", "starts", "reason", "unix_time", "world_size", "job_id", "ends"),
}


@pytest.fixture
def config(tmp_path: Path):
    (tmp_path / "run").mkdir()
    return replace(PRESETS["debug"](), output_dir=tmp_path / "run")


def now(config) -> dict:
    return json.loads((config.output_dir / "status.json").read_text())


def test_a_start_is_said_before_anything_else(config, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    Status(config).wait()
    said = now(config)
    assert set(said) == FIELDS
    assert (said["state"], said["starts"], said["job_id"]) == ("starting", 1, "123")
    assert said["loss"] is None and said["train_steps"] == 20


def test_phases_of_the_start_are_written_at_once_until_training_begins(config) -> None:
    status = Status(config)
    for phase in ("building the model", "reading the checkpoint"):
        status.update(phase=phase)
        status.wait()
        assert (now(config)["state"], now(config)["phase"]) == ("starting", phase)
    status.begin(0, last_checkpoint=None)
    status.wait()
    assert (now(config)["state"], now(config)["phase"]) == ("training", "")


def test_a_change_of_state_is_written_at_once_and_steps_once_a_second(config, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(status_file.time, "monotonic", lambda: clock[0])
    status = Status(config)

    def written() -> dict:
        status.wait()
        return now(config)

    status.begin(10, last_checkpoint=10)
    assert written()["tokens"] == 10 * 8 * 64
    clock[0] = 0.9
    status.update("training", step=11)
    assert written()["step"] == 10
    status.update("saving")
    assert (written()["state"], written()["step"]) == ("saving", 11)
    status.update("training", step=12)
    assert written()["step"] == 12
    clock[0] = 2.0
    status.update("training", step=13)
    assert written()["step"] == 13


def test_a_slow_disk_gets_the_newest_status(config, monkeypatch) -> None:
    """Training goes on meanwhile, and what was written last is what came last."""
    write, free, written = status_file.write_atomically, threading.Event(), []

    def slow(path: Path, content: str) -> None:
        free.wait()
        if path.name == "status.json":
            written.append(json.loads(content)["step"])
        write(path, content)

    monkeypatch.setattr(status_file, "write_atomically", slow)
    with Status(config) as status:
        for step in range(1, 100):
            status.update("training", step=step, last_checkpoint=step)  # each is news
        free.set()
    assert now(config)["step"] == 99 and written[-1] == 99
    assert len(written) <= 2
    assert now(config)["unix_time"] <= time.time()


def test_the_failure_of_another_rank_stays(config) -> None:
    status = Status(config)
    status.wait()
    record_failure(config.output_dir, "rank 5: no disk")
    status.update("training", step=3, last_checkpoint=3)
    status.wait()
    assert (now(config)["state"], now(config)["reason"]) == ("failed", "rank 5: no disk")
    Status(config).wait()  # another start
    assert now(config)["state"] == "starting"


def test_reasons_of_many_lines_are_read(config) -> None:
    """CUDA and torch say much. Each start is counted."""
    reason = (
        "RuntimeError: CUDA error: no address\nFor debugging consider\n\tCUDA_LAUNCH_BLOCKING=1"
    )
    status = Status(config)
    status.wait()
    record_failure(config.output_dir, reason)
    status.update("training", step=3, last_checkpoint=3)
    status.wait()
    assert (now(config)["state"], now(config)["reason"]) == ("failed", reason)
    Status(config).wait()
    assert now(config)["starts"] == 2
    assert read_starts(config.output_dir)[-1]["before"]["reason"] == reason
    Status(config).wait()
    assert now(config)["starts"] == 3


def test_mistakes_and_crashes_end_in_failed_with_the_reason(config) -> None:
    with pytest.raises(UserError), Status(config):
        raise UserError("lower optimizer.lr")
    assert (now(config)["state"], now(config)["reason"]) == ("failed", "lower optimizer.lr")
    with pytest.raises(ZeroDivisionError), Status(config):
        raise ZeroDivisionError("by zero")
    assert now(config)["reason"] == "ZeroDivisionError: by zero"
    with pytest.raises(KeyboardInterrupt), Status(config):
        raise KeyboardInterrupt
    assert (now(config)["state"], now(config)["reason"]) == ("stopped", "interrupted")
    with pytest.raises(SystemExit), Status(config):
        raise SystemExit("3 checkpoints in a row could not be written")
    assert now(config)["state"] == "failed"
    assert now(config)["reason"] == "3 checkpoints in a row could not be written"
    # Whoever exits with a number has said why.
    status = Status(config)
    status.update("stopped", reason="signal SIGUSR1")
    status.wait()
    with pytest.raises(SystemExit), status:
        raise SystemExit(75)
    assert now(config)["reason"] == "signal SIGUSR1"


def test_the_first_rank_to_fail_is_the_one_to_blame(config, monkeypatch) -> None:
    status = Status(config)
    status.wait()
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("RANK", "1")
    other = Status(config)
    other.update("validating")  # only the first rank says what goes on
    assert now(config)["state"] == "starting"
    with pytest.raises(RuntimeError), other:
        raise RuntimeError("out of memory")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConnectionError), status:
        raise ConnectionError("peer closed")
    assert now(config)["reason"] == "RuntimeError: out of memory"
    assert sorted(p.name for p in config.output_dir.iterdir()) == [
        "metrics.prom",
        "starts.jsonl",
        "status.json",
    ]


def test_starts_are_counted_and_say_how_the_one_before_ended(config) -> None:
    with Status(config) as first:
        first.begin(0, last_checkpoint=None)
    with (config.output_dir / "starts.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # cut short by a kill
    status = Status(config)
    status.update("stopped", step=7, reason="signal SIGTERM")
    status.wait()
    Status(config).wait()
    starts = [line for line in read_starts(config.output_dir) if line["kind"] == "start"]
    assert [s["before"] and s["before"]["reason"] for s in starts] == [
        None,
        "killed while training",
        "signal SIGTERM",
    ]
    assert starts[2]["before"]["step"] == 7
    assert now(config)["starts"] == 3


def test_what_cannot_be_written_or_read_ends_no_run(config, monkeypatch, caplog) -> None:
    assert read_status(config.output_dir) is None
    record_failure(config.output_dir, "before it began")
    status = Status(config)
    status.wait()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status_file, "write_atomically", no_space)
    status.update("training", step=1)
    status.wait()
    assert "No space left" in caplog.text
    record_failure(config.output_dir, "crash")
    assert now(config)["state"] == "starting"


def test_prometheus_text_is_valid(config) -> None:
    with Status(config) as status:
        status.update("training", step=3, loss=2.5)
    text = (config.output_dir / "metrics.prom").read_text()
    values = {
        sample.name: (sample.value, sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["megatron_ladder_loss"] == (2.5, {"run": "run"})
    assert values["megatron_ladder_state"][1]["state"] == "training"
    assert "megatron_ladder_eta_s" not in values


def test_prometheus_text_by_the_letter(config) -> None:
    Status(config).wait()
    text = prometheus_text('a"b\\', now(config), [{"memory_used_bytes": 2.0}, {}])
    assert '# TYPE megatron_ladder_step gauge\nmegatron_ladder_step{run="a\\"b\\\\"} 0.0\n' in text
    assert 'megatron_ladder_gpu_memory_used_bytes{run="a\\"b\\\\",gpu="0"} 2.0\n' in text
    assert "megatron_ladder_loss" not in text and "gpu_power" not in text
    assert text.endswith("\n")


def test_gpu_figures_do_without_nvml(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert device_figures() == []  # nor is CUDA started by asking
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5)
    for name in ("device_memory_used", "utilization", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 4000)
    assert device_figures()[1]["power_watts"] == 4.0

    def missing(_: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert device_figures() == [{}, {"memory_used_bytes": 5.0}]
