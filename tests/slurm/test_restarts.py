"""What a training job does when it is signalled, killed, preempted or loses a node, on a real cluster.

With a stand-in for the training, whose losses show a step that was lost or done twice.
"""

import hashlib
import sys
from pathlib import Path

import psutil
import pytest

from pretrain import cli
from slurm.jobs.folders import job_folders
from tests.slurm.conftest import job_ids, log, wait_until

STEPS = 20


def losses(run: Path) -> list[str]:
    """By step: of a step done again after a restart, the last."""
    lines = (run / "losses").read_text().splitlines() if (run / "losses").exists() else []
    by_step = dict(line.split() for line in lines)
    return [by_step[key] for key in sorted(by_step, key=int)]


def undisturbed(steps: int = STEPS) -> list[str]:
    result: list[str] = []
    for step in range(1, steps + 1):
        before = result[-1] if result else ""
        result.append(hashlib.sha256(f"{before}{step}".encode()).hexdigest())
    return result


def history(run: Path) -> list[list[str]]:
    lines = [f.read_text() for f in (f / "history" for f in job_folders(run)) if f.exists()]
    return [line.split()[1:] for text in lines for line in text.splitlines()]


class Job:
    """A run of the stand-in that was submitted."""

    def __init__(
        self, cluster, submit, profile, run: Path, *options: object, **plan: object
    ) -> None:
        self.cluster, self.run = cluster, run
        file = profile(stand_in={"steps": STEPS, **plan})
        argv = ("--nodes", 2, *options, "train", "--preset", "debug", "--micro-batch-size", 1)
        # --after a job that is over: the data are not looked at before.
        over = cluster.call("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
        wait_until(lambda: self.state(over) == "COMPLETED", 20, cluster.logs)
        submit(
            "--profile", file, "--after", over, *argv, "--data.paths", "later", "--output-dir", run
        )
        self.id = job_ids(run)[-1]

    def state(self, job_id: str = "") -> str:
        return self.cluster.call(
            "squeue", "-h", "-t", "all", "-j", job_id or self.id, "-o", "%T"
        ).strip()

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: len(losses(self.run)) >= step, 40, self.explain)

    def wait_for(self, state: str, timeout_s: float = 60) -> None:
        wait_until(lambda: self.state() == state, timeout_s, self.explain)

    def explain(self) -> str:
        return f"{self.state()}\n{log(self.run)}\n{history(self.run)}"


def assert_saved_on_stopping(job: Job) -> None:
    """At the step at which it was stopped, after the seventh: the log says why if not.

    The status is 75, or srun's own when SLURM has ended the step while srun was passing a signal on.
    """
    end = history(job.run)[1]
    assert end[0] == "end" and end[1] in ("75", "140", "143"), job.explain()
    assert end[2] != "none" and int(end[2]) >= 7, job.explain()


def test_two_nodes_train(cluster, submit, profile, tmp_path, said, capsys) -> None:
    run = tmp_path / "a 'run' %j 日本\n$(touch pwned)"  # of which sbatch could read %j as its own
    job = Job(cluster, submit, profile, run, "--ranks-per-node", 2)
    job.wait_for("COMPLETED")
    assert (run / "slurm" / "1" / "log").is_file()
    text = log(job.run)
    for rank in range(4):  # neighbours share a node
        assert f"{rank}: rank {rank} of 4 on node{rank // 2} from step 0" in text
    assert losses(job.run) == undisturbed()
    assert f"train, job {job.id}" in said(job.run)
    assert "COMPLETED; last: finished" in said(job.run)
    assert cli.main(["logs", str(job.run)]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_before_its_time_limit_it_saves_and_queues_itself(
    cluster, submit, profile, tmp_path, said
) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run")
    job.wait_for_step(7)
    cluster.call("scancel", "--batch", "--signal=USR1", job.id)  # as SLURM does at --signal's time
    wait_until(lambda: ["start", "1"] in [h[:2] for h in history(job.run)[1:]], 40, job.explain)
    assert "started 2 times" in said(job.run)
    job.wait_for("COMPLETED")
    assert losses(job.run) == undisturbed()
    end = history(job.run)[1]
    assert (end[0], end[1], end[3]) == ("end", "75", "limit")
    assert int(end[2]) >= 7  # of the step at which it was asked, not of the fifth
    assert "Restarts=1 " in cluster.call("scontrol", "-o", "show", "job", job.id)


def test_cancel_saves_and_a_second_submit_goes_on(
    cluster, submit, profile, tmp_path, said, capsys
) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run")
    job.wait_for_step(7)
    assert cli.main(["cancel", str(job.run)]) == 0
    assert f"job {job.id}: asked to save a checkpoint and stop" in capsys.readouterr().out
    job.wait_for("FAILED")  # with 75: what waits for it shall not run
    assert "stopped in good order as it was asked to" in said(job.run)
    assert 7 <= len(losses(job.run)) < STEPS
    again = Job(cluster, submit, profile, job.run)
    again.wait_for("COMPLETED")
    assert losses(job.run) == undisturbed()
    assert "from step 0" not in (job_folders(job.run)[1] / "log").read_text()


@pytest.mark.slow
def test_scancel_saves_too(cluster, submit, profile, tmp_path) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run")
    job.wait_for_step(7)
    cluster.call("scancel", job.id)
    job.wait_for("CANCELLED")
    wait_until(lambda: [h[:2] for h in history(job.run)[1:]] == [["end", "75"]], 20, job.explain)
    again = Job(cluster, submit, profile, job.run)
    again.wait_for("COMPLETED")
    assert losses(job.run) == undisturbed()


@pytest.mark.slow
def test_a_requeue_from_outside(cluster, submit, profile, tmp_path) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run")
    job.wait_for_step(7)
    cluster.call("scontrol", "requeue", job.id)
    wait_until(lambda: losses(job.run) == undisturbed(), 60, job.explain)
    job.wait_for("COMPLETED")
    assert_saved_on_stopping(job)


@pytest.mark.slow
def test_preemption_saves_and_is_queued_again(cluster, submit, profile, tmp_path) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run", step_s=0.2)
    job.wait_for_step(7)
    cluster.call(
        "sbatch",
        "--partition=urgent",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    )
    wait_until(lambda: "end" in [h[0] for h in history(job.run)], 30, job.explain)
    assert_saved_on_stopping(job)
    wait_until(lambda: losses(job.run) == undisturbed(), 90, job.explain)
    job.wait_for("COMPLETED")
    assert [h[0] for h in history(job.run)] == ["start", "end", "start", "end"]


def test_a_killed_rank_is_started_again_in_the_job(cluster, submit, profile, tmp_path) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run", crash_at=8)
    job.wait_for("COMPLETED", 90)
    assert losses(job.run) == undisturbed()
    assert [h[:3] for h in history(job.run)] == [
        ["start", "1", "none"],
        ["end", "137", "00000005"],
        ["start", "2", "00000005"],
        ["end", "0", "00000020"],
    ]
    assert "Restarts=0 " in cluster.call("scontrol", "-o", "show", "job", job.id)


def test_a_killed_srun_leaves_no_ranks_behind(cluster, submit, profile, tmp_path) -> None:
    """With its helper, which would otherwise end the step; the run's folder is locked while ranks live."""
    job = Job(cluster, submit, profile, tmp_path / "run", step_s=0.5, steps=30)
    job.wait_for_step(7)
    found = psutil.process_iter(["name", "cmdline"])
    ours = [p for p in found if str(job.run) in (p.info["cmdline"] or [])]
    sruns = [p for p in ours if p.info["name"] == "srun"]
    ranks = [p for p in ours if p.info["cmdline"][0] == sys.executable]
    assert len(sruns) == len(ranks) == 2
    # STAND_IN stands for a secret of the profile's environment: on no command line, of srun neither.
    assert '{"steps":' in ranks[0].environ()["STAND_IN"]
    words = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [text for text in words if '{"steps":' in text]
    for srun in sruns:
        srun.suspend()
    for srun in sruns:
        srun.kill()
    _, left = psutil.wait_procs(ranks, timeout=9)  # they have more steps than that before them
    assert not left
    job.wait_for("COMPLETED", 90)
    assert losses(job.run) == undisturbed(30)


@pytest.mark.slow
def test_it_gives_up_when_restarts_do_not_help(cluster, submit, profile, tmp_path, said) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run", always_crash_at=8, step_s=0.02)
    job.wait_for("FAILED", 90)
    assert [h[0] for h in history(job.run)].count("start") == 4
    assert "gave up: 3 restarts ended before another checkpoint" in said(job.run)


def test_a_mistake_is_not_started_again(cluster, submit, profile, tmp_path, said) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run", mistake=True)
    job.wait_for("FAILED")
    assert [h[:2] for h in history(job.run)] == [["start", "1"], ["end", "2"]]
    assert "stopped at a user's mistake" in said(job.run)


@pytest.mark.slow
def test_a_spare_node_stands_in(cluster, submit, profile, tmp_path) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run", "--spare-nodes", 1, step_s=0.3)
    job.wait_for_step(7)
    cluster.crash(1)
    job.wait_for("COMPLETED", 120)
    assert losses(job.run) == undisturbed()
    starts = [h for h in history(job.run) if h[0] == "start"]
    assert starts[0][3:] == ["on", "node0", "node1"]
    assert starts[-1][3:] == ["on", "node0", "node2"]
    assert "Restarts=0 " in cluster.call("scontrol", "-o", "show", "job", job.id)


@pytest.mark.slow
def test_a_spare_node_stands_in_for_one_that_hangs(cluster, submit, profile, tmp_path) -> None:
    plan = {"step_s": 0.3, "crash_at": 12}
    job = Job(cluster, submit, profile, tmp_path / "run", "--spare-nodes", 1, **plan)
    job.wait_for_step(3)
    daemon = cluster.freeze(1)
    try:
        job.wait_for("COMPLETED", 120)
    finally:
        daemon.resume()
    assert losses(job.run) == undisturbed()
    starts = [h for h in history(job.run) if h[0] == "start"]
    assert [h[3:] for h in starts] == [["on", "node0", "node1"], ["on", "node0", "node2"]]


@pytest.mark.slow
def test_when_spare_nodes_are_spent_it_is_queued_again(cluster, submit, profile, tmp_path) -> None:
    job = Job(cluster, submit, profile, tmp_path / "run", "--spare-nodes", 1, step_s=0.3)
    job.wait_for_step(7)
    cluster.crash(1)
    cluster.crash(2)
    wait_until(lambda: "fewer than 2 nodes" in log(job.run), 120, job.explain)
    cluster.start_node(1)
    job.wait_for("COMPLETED", 120)
    assert losses(job.run) == undisturbed()
    assert "Restarts=1 " in cluster.call("scontrol", "-o", "show", "job", job.id)


@pytest.mark.slow
def test_a_dead_node_without_a_spare_one(cluster, submit, profile, tmp_path) -> None:
    """SLURM takes the job off the node and queues it again."""
    job = Job(cluster, submit, profile, tmp_path / "run", step_s=0.2)
    job.wait_for_step(7)
    cluster.crash(1)
    wait_until(lambda: losses(job.run) == undisturbed(), 120, job.explain)
    job.wait_for("COMPLETED")
    assert "Restarts=1 " in cluster.call("scontrol", "-o", "show", "job", job.id)


@pytest.mark.slow
def test_a_time_limit(cluster, submit, profile, tmp_path) -> None:
    """SLURM itself sends the signal, some seconds early or late, and nothing is lost."""
    options = ("--time", "00:01:00", "--signal-lead", 40)
    job = Job(cluster, submit, profile, tmp_path / "run", *options, steps=120, step_s=0.3)
    wait_until(lambda: losses(job.run) == undisturbed(120), 200, job.explain)
    job.wait_for("COMPLETED")
    ends = [h for h in history(job.run) if h[0] == "end"]
    assert [h[1] for h in ends] == ["75"] * (len(ends) - 1) + ["0"]
    assert len(ends) > 1
