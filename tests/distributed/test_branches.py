"""Runs that change, by the command line: branches of a trunk, other options on resume; all bit by bit.

`python -m tests.distributed.branches` does the same with a trunk of 400 steps.
"""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.report.report import write_report
from pretrain.run.folder import checkpoint_at, checkpoint_step, checkpoints
from tests.data_sets import write_data_set
from tests.distributed.branches import (
    assert_same_end,
    branch_of,
    branches,
    interrupted,
    losses_after,
    train_trunk,
)
from tests.distributed.test_training import command, losses, metrics, train
from tests.runs import run_train

STEPS, AT = 20, 10
ONE_RANK = ("--data.num-workers", "0", "--no-tensorboard")
TIMEOUT_S = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The second data set is gone through several times."""
    folder = tmp_path_factory.mktemp("data")
    return [
        write_data_set(folder / name, vocab_size=400, train_documents=count, seed=seed)
        for seed, (name, count) in enumerate({"web": 60, "code": 12}.items())
    ]


@pytest.fixture(scope="module")
def trunk(data: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trunk"
    train_trunk(run, data, steps=STEPS, interval=5)
    return run


def test_a_branch_that_changes_nothing_is_its_trunk(trunk: Path, tmp_path: Path) -> None:
    """From the first step to the end; the trunk's files are its own, and nothing is copied."""
    run = tmp_path / "branch"
    said = branch_of(trunk, AT, run)
    assert f"New branch in {run}, of {trunk}@{AT}" in said
    assert losses_after(run, AT, STEPS) == losses(trunk)[AT:]
    assert_same_end(run, trunk, STEPS)
    assert metrics(run, "start")[0]["branch_from"] == f"{trunk}@{AT}"
    assert [m["tokens"] for m in metrics(run, "train")] == [
        m["tokens"] for m in metrics(trunk, "train")[AT:]
    ]
    note = json.loads((run / "trunk.json").read_text())
    assert (note["run"], note["step"]) == (str(trunk), AT)
    assert "nothing to do" in branch_of(trunk, AT, run)


def test_a_branch_shares_the_trunk_s_files_and_outlives_it(trunk: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint, after the trunk has gone; then at other ranks."""
    mine = tmp_path / "trunk"
    shutil.copytree(trunk, mine)
    run = tmp_path / "branch"
    longer = ("--schedule.train-steps", "24", "--save-interval", "100")
    interrupted(mine, AT, run, *longer, until=AT + 3)
    assert [c.name for c in checkpoints(run)] == [f"step_{AT:08d}"]
    ours, theirs = (checkpoint_at(folder, AT) for folder in (run, mine))
    assert {f.name: f.stat().st_ino for f in ours.iterdir()} == {
        f.name: f.stat().st_ino for f in theirs.iterdir()
    }
    mine.rename(tmp_path / "gone")
    said = branch_of(mine, AT, run, *longer, "--nproc-per-node", "2")
    assert f"from step {AT}" in said
    assert losses_after(run, AT, 24)[: STEPS - AT] == pytest.approx(losses(trunk)[AT:], abs=1e-4)
    # Without its own checkpoints it would need the trunk.
    shutil.rmtree(run / "checkpoints")
    codes, said = run_train(
        ["--branch-from", f"{mine}@{AT}", "--output-dir", str(run), *longer],
        tmp_path / "log",
        TIMEOUT_S,
    )
    assert codes == [2]
    assert "has no checkpoint of step 10; it has none" in said


@pytest.mark.parametrize(
    "name", ["anneal", *(pytest.param(n, marks=pytest.mark.slow) for n in ("decay", "longer"))]
)
def test_a_killed_branch_is_the_one_that_was_never_stopped(
    name: str, trunk: Path, data: list[Path], tmp_path: Path
) -> None:
    options, steps = branches(data, at=AT, decay=14, longer=30)[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    branch_of(trunk, AT, whole, *options)
    interrupted(trunk, AT, killed, *options, until=AT + 6)
    branch_of(trunk, AT, killed, *options)
    assert losses_after(killed, AT, steps) == losses_after(whole, AT, steps)
    assert_same_end(killed, whole, steps)
    rates = [m["learning_rate"] for m in metrics(whole, "train")]
    if name == "longer":
        assert set(rates) == {rates[0]}
        assert losses_after(whole, AT, steps)[: STEPS - AT] == losses(trunk)[AT:]
    else:
        assert rates[0] < 3e-3
        assert rates[-1] == pytest.approx(3e-4 if name == "decay" else 0.0)
    if name == "decay":  # the same data
        assert losses_after(whole, AT, steps)[:1] == losses(trunk)[AT : AT + 1]
    if name == "anneal":
        assert losses_after(whole, AT, steps)[0] != losses(trunk)[AT]


def test_a_branch_of_a_branch(trunk: Path, tmp_path: Path) -> None:
    """Each with other batches: the place in the data is counted in sequences."""
    first, second = tmp_path / "first", tmp_path / "second"
    branch_of(trunk, AT, first, "--global-batch-size", "16", "--schedule.train-steps", "15")
    branch_of(first, 15, second, "--global-batch-size", "8", "--schedule.train-steps", "18")
    config = json.loads((second / "config.json").read_text())
    assert config["past"]["batch_sizes"] == [
        {"last_step": 10, "global_batch_size": 8},
        {"last_step": 15, "global_batch_size": 16},
    ]
    tokens = {m["step"]: m["tokens"] for m in metrics(second, "train")}
    assert tokens == {16: 64 * (80 + 80 + 8), 17: 64 * (160 + 16), 18: 64 * (160 + 24)}
    assert [m["dataset"] for m in metrics(second, "validation")][-2:] == ["web", "code"]


def test_options_change_on_resume_and_the_report_says_where(
    trunk: Path, data: list[Path], tmp_path: Path
) -> None:
    """And where checkpoints are damaged, the change is made again, at the step of the one that is left."""
    run = tmp_path / "run"
    shutil.copytree(trunk, run)
    shutil.rmtree(checkpoint_at(run, 20))
    shutil.rmtree(checkpoint_at(run, 15))
    base = ("--data.paths", str(data[0]), str(data[1]), "--data.weights", "3", "1")
    base = (*base, "--schedule.decay", "wsd", "--keep-last", "10", *ONE_RANK)
    wider = ("--global-batch-size", "16", "--optimizer.lr", "1e-3")
    steps = ("--schedule.train-steps", "22", "--schedule.wsd-decay-steps", "0")
    said = train(data[0], run, *base, *wider, *steps)
    assert "global_batch_size: 8 -> 16" in said and "optimizer.lr: 0.003 -> 0.001" in said
    assert losses(run, 22)[:10] == losses(trunk)[:10]
    assert losses(run, 22)[10] != losses(trunk)[10]
    rates = [m["learning_rate"] for m in metrics(run, "train")]
    assert rates[9:11] == [3e-3, 1e-3]
    undisturbed = losses(run, 22)
    # Killed, and the newest checkpoint is damaged: the one before it is of the step of the change.
    damage_last(run, left=15)
    train(data[0], run, *base, *wider, *steps)
    assert losses(run, 22) == undisturbed
    page = write_report([run]).read_text()
    assert "changed after step 10" in page
    assert "global_batch_size: 8 -&gt; 16" in page and "optimizer.lr: 0.003 -&gt; 0.001" in page
    # Two are damaged, and what is left is of before the change: it holds from there on.
    damage_last(run, left=15)
    damage_last(run, left=10)
    argv = [*command(data[0], run, *base, *wider, *steps)[4:]]
    codes, said = run_train(argv, run.with_name("log"), TIMEOUT_S)
    assert codes == [1], said
    assert "the newest checkpoint is damaged, and options have changed since" in said
    train(data[0], run, *base, *wider, *steps)
    assert losses(run, 22)[:5] == losses(trunk)[:5]
    assert losses(run, 22)[5] != losses(trunk)[5]
    config = json.loads((run / "config.json").read_text())
    assert config["past"]["batch_sizes"] == [{"last_step": 5, "global_batch_size": 8}]
    page = write_report([run]).read_text()
    assert "changed after step 5" in page and "changed after step 10" not in page


def damage_last(run: Path, left: int) -> None:
    """Deletes the checkpoints after step `left`, and damages that one."""
    for path in checkpoints(run):
        if checkpoint_step(path) > left:
            shutil.rmtree(path)
    largest = max(checkpoint_at(run, left).glob("*.distcp"), key=lambda f: f.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])


def test_what_is_no_branch_is_refused(
    trunk: Path, data: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: str) -> str:
        assert main(["train", *argv, "--output-dir", str(tmp_path / "new")]) == 2
        output = capfd.readouterr()
        assert not (tmp_path / "new").exists()
        return " ".join((output.out + output.err).split())

    at = f"{trunk}@{AT}"
    assert "has no checkpoint of step 7; it has 5, 10, 15, 20" in refused(
        "--branch-from", f"{trunk}@7"
    )
    assert "give a run's folder and a step" in refused("--branch-from", str(trunk))
    assert "leave --preset out" in refused("--branch-from", at, "--preset", "debug")
    assert "leave --init-from out" in refused("--branch-from", at, "--init-from", str(trunk))
    assert "is of another run: seed: 1234 -> 5 (the order" in refused(
        "--branch-from", at, "--seed", "5"
    )
    assert "give these first and in this order" in refused(
        *("--branch-from", at, "--data.paths", str(data[1]), "--data.weights", "1")
    )
    assert "the run is to have 8 steps in all, and 10 are trained" in refused(
        "--branch-from", at, "--schedule.train-steps", "8"
    )


def test_a_checkpoint_that_goes_while_it_is_linked_leaves_nothing(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trunk deletes it: renamed, then file by file. The next start may begin."""
    mine = tmp_path / "trunk"
    shutil.copytree(trunk, mine)
    from pretrain.start.going_on import branch

    link = branch.link_or_copy

    def late(file: Path, target: Path) -> None:
        if file.suffix == ".distcp":
            shutil.rmtree(file.parent, ignore_errors=True)
        link(file, target)

    run = tmp_path / "branch"
    argv = ["--branch-from", f"{mine}@{AT}", "--output-dir", str(run), *ONE_RANK]
    with monkeypatch.context() as patch:
        patch.setattr(branch, "link_or_copy", late)
        codes, said = run_train(argv, tmp_path / "log", TIMEOUT_S)
    assert codes == [2]
    assert "its run has just deleted it. Choose another step" in said
    assert not list((run / "checkpoints").iterdir())
    shutil.copytree(checkpoint_at(trunk, AT), checkpoint_at(mine, AT))
    # And where the file system has no links, the files are copied.
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.files.os.link", _no_links)
        codes, said = run_train(argv, tmp_path / "log", TIMEOUT_S)
    assert codes == [0], said
    assert "is copied: " in said
    assert losses_after(run, AT, STEPS) == losses(trunk)[AT:]


def _no_links(*_: object, **__: object) -> None:
    raise OSError(18, "Invalid cross-device link")
