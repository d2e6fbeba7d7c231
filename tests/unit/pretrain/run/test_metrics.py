import resource
from pathlib import Path

import pytest

from pretrain.run.metrics import MetricsLog, read_metrics


def test_lines_wait_for_a_disk_that_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(
        tmp_path, resume_step=0, train_steps=3, tensorboard=False, wandb=False, config={}
    )
    log.save_failed(step=1, reason="first")
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))  # the file is full soon
    try:
        for step in range(2, 200):
            log.save_failed(step=step, reason="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "its lines are kept: [Errno 27] File too large" in capsys.readouterr().err
    assert len(read_metrics(tmp_path)) == 1
    log.end(step=200, reason="finished")
    assert [m["step"] for m in read_metrics(tmp_path)] == list(range(1, 201))
