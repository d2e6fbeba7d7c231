import json
from pathlib import Path

import pytest

from pretrain.report.report import write_report
from pretrain.run.goodput import read_goodput
from tests.unit.pretrain.report.test_report import write_run


def write_starts(run: Path, state: str = "finished") -> None:
    """100 s to a kill at step 12, 50 s of nothing, and from step 10 on 150 s more."""
    before = {
        "state": "training",
        "step": 12,
        "unix_time": 1100.0,
        "reason": "killed while training",
    }
    lines = [
        {"kind": "start", "unix_time": 1000.0, "before": None},
        {"kind": "train", "unix_time": 1020.0, "step": 0},
        {"kind": "start", "unix_time": 1150.0, "before": before},
        {"kind": "train", "unix_time": 1160.0, "step": 10},
    ]
    (run / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "status.json").write_text(
        json.dumps({"state": state, "unix_time": 1300.0, "step": 12, "reason": ""})
    )


def test_lost_time_is_told_apart(tmp_path: Path) -> None:
    write_starts(tmp_path)
    good = read_goodput(tmp_path, counted=150.0)
    assert good is not None
    assert (good.wall, good.starting, good.between, good.steps_again) == (300.0, 30.0, 50.0, 2)
    assert good.share == 0.5
    assert good.ends == {"killed while training": 1}


def test_a_start_that_never_trained_counts_as_one(tmp_path: Path) -> None:
    write_starts(tmp_path)
    before = {"state": "failed", "step": 0, "unix_time": 1400.0, "reason": "no GPU"}
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "start", "unix_time": 1500.0, "before": before}) + "\n")
    (tmp_path / "status.json").write_text(json.dumps({**before, "unix_time": 1600.0}))
    good = read_goodput(tmp_path, counted=150.0)
    assert good is not None
    assert (good.wall, good.between, good.ends["no GPU"]) == (600.0, 150.0, 1)
    assert good.share == pytest.approx(0.25)


def test_the_report_says_what_was_lost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "goodput" not in write_report([run]).read_text()  # a run that did not note its starts
    write_starts(run)
    bad = {"step": 15, "reason": "the loss is nan", "action": "rollback", "passed_over": [11, 15]}
    slow = {"step": 10, "rank": 3, "host": "node1", "what": "computing"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "bad_step", **bad}) + "\n")
        file.write(json.dumps({"kind": "slow_rank", **slow, "seconds": 0.3, "median": 0.1}) + "\n")
    html = write_report([run]).read_text()
    for text in (
        "finished, 1 restart",
        "5 min 00 s",
        "6.7%",  # 20 s of 300
        "1 x killed while training",
        "0 min 50 s",
        "1, so 5 steps are not in the weights; the last bad step is 15: the loss is nan",
        "slow at computing: rank 3 on node1",
        "found once; at step 10 it took 0.3 s, the median of all ranks was 0.1 s",
    ):
        assert text in html, text
