"""One rank fails and the others wait for it: srun kills them, and its status is theirs, 137."""

import re
from pathlib import Path

import pytest

from pretrain.run.status import read_status
from slurm.jobs.folders import job_folders
from tests.data_sets import write_data_set
from tests.slurm.conftest import job_ids, log, wait_until
from tests.slurm.test_restarts import Job, history


@pytest.mark.slow
@pytest.mark.parametrize(("status", "ends"), [(2, ["2"]), (1, ["1"] * 4)])
def test_a_rank_s_own_status_decides(
    status: int, ends: list[str], cluster, submit, profile, tmp_path: Path, said
) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run", alone=status)
    job.wait_for("FAILED", 60 * len(ends))
    assert [h[1] for h in history(job.run) if h[0] == "end"] == ends
    assert "task 0: Killed" in log(job.run)  # which was 137
    assert ("stopped at a user's mistake" in said(job.run)) == (status == 2)


@pytest.mark.parametrize("ranks_per_node", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_node_without_its_mount_is_named(
    ranks_per_node: int, cluster, submit, profile, tmp_path: Path, said
) -> None:
    """Once, with rank, node and sentence; started again, as the mount may come back, the run ends well."""
    data, run, empty = tmp_path / "data", tmp_path / "run", tmp_path / "empty"
    write_data_set(data, vocab_size=400)
    empty.mkdir()
    options = f"--nodes 2 --ranks-per-node {ranks_per_node} train --preset debug"
    options += " --schedule.train-steps 4 --eval-interval 0"
    cluster.hide(1, data, empty)
    try:
        submit(
            *("--profile", profile(), *options.split(), "--micro-batch-size", 1),
            *("--data.paths", data, "--output-dir", run),
        )

        def explain() -> str:
            return f"{read_status(run)} {history(run)}\n{log(run)}"

        def status() -> dict:
            return read_status(run) or {}

        # Until all ranks have ended: a rank that reads its data later than the first must not find it.
        wait_until(lambda: history(run)[-1:] and history(run)[-1][:2] == ["end", "1"], 150, explain)
        assert status()["state"] == "failed", explain()
        on_node1 = "[23]" if ranks_per_node == 2 else "1"
        assert re.match(rf"rank {on_node1} on node1: ", status()["reason"]), explain()
        assert str(data) in status()["reason"]
    finally:
        cluster.show(1, data)
    job = job_ids(run)[0]
    wait_until(lambda: history(run)[-1][:2] == ["end", "0"], 200, explain)
    text = log(run)
    # Of two ranks on the node one says it. Ranks that had waited for them may say that a connection is
    # closed.
    assert len(re.findall(r"megatron-ladder train: rank \d on node1: ", text)) == 1, text
    assert [h[:2] for h in history(run)] == [
        ["start", "1"],
        ["end", "1"],  # its own status, not srun's 137
        ["start", "2"],
        ["end", "0"],
    ]
    (folder,) = job_folders(run)
    assert {p.name[:2] for p in (folder / "ends" / "0.1").iterdir()} == {"1."}
    assert not (folder / "ends" / "0.2").exists()
    wait_until(lambda: "COMPLETED" in said(run), 20, explain)
    assert job in said(run)
