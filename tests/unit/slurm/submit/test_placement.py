"""Where and on what terms a job runs: the profile's, one submission's, the environment's."""

from pathlib import Path

import pytest

from slurm.errors import UserError
from slurm.jobs.folders import read_job
from slurm.submit.placement import from_environment, placed
from slurm.submit.profile import Profile
from tests.unit.slurm.conftest import TOKENIZE, TRAIN, FakeSlurm, run
from tests.unit.slurm.submit.test_scripts import HOSTILE


def directives(script: Path) -> list[str]:
    lines = script.read_text().splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_a_submission_wins_over_the_profile(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.toml").write_text('partition = "cpu"\nexclude = "node1"\nmail_type = "FAIL"\n')
    options = ["--exclude", "node[1-2]", "--reservation=maint", "--exclusive", "--qos", "high"]
    chain = [*TOKENIZE, "then", "export", "run", "model"]
    run(capsys, "submit", "--profile", "p.toml", *options, *chain)
    for folder in ("tokens-slurm/1", "model-slurm/1"):  # every job of the chain
        found = directives(tmp_path / folder / "job.sh")
        for line in (
            *("--partition=cpu", "--exclude='node[1-2]'", "--reservation=maint", "--exclusive"),
            *("--qos=high", "--mail-type=FAIL"),
        ):
            assert found.count(line) == 1, line
    assert read_job(tmp_path / "tokens-slurm/1").asked["profile"]["exclude"] == "node[1-2]"


def test_mail_may_be_said_in_two_places(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.toml").write_text('mail_type = "FAIL"\n')
    options = ["--mail-user", "me@example.org"]
    run(capsys, "submit", "--profile", "p.toml", *options, *TOKENIZE)
    found = directives(tmp_path / "tokens-slurm/1/job.sh")
    assert {"--mail-type=FAIL", "--mail-user=me@example.org"} <= set(found)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.isprintable() and text])
def test_a_comment_is_any_text(slurm: FakeSlurm, capsys, text: str) -> None:
    run(capsys, "submit", "--profile", "p.toml", f"--comment={text}", *TOKENIZE)
    assert f"--comment={text}" in slurm.calls("sbatch")[0]
    assert not (slurm.folder.parent / "pwned").exists()


def test_mistakes_are_said(slurm: FakeSlurm, tmp_path: Path, capsys) -> None:
    start = ["submit", "--profile", "p.toml"]
    for options, message in {
        ("--exclude", "node1; id"): "exclude 'node1; id' is not allowed",
        ("--exclude", ""): "exclude '' is not allowed",
        ("--comment", "a\nb"): "comment 'a\\nb' is not allowed",
        ("--mail-user", "me@example.org"): "mail_user is given without mail_type",
    }.items():
        assert message in run(capsys, *start, *options, *TOKENIZE, status=2)
    (tmp_path / "p.toml").write_text('mail_user = "me@example.org"')
    assert "mail_user is given without mail_type" in run(capsys, *start, *TOKENIZE, status=2)
    (tmp_path / "p.toml").write_text('launcher = "local"')
    options = ["--exclude", "node1", "--exclusive"]
    refused = run(capsys, *start, *options, *TRAIN, status=2)
    assert '--exclude, --exclusive: SLURM\'s, and the profile has launcher = "local"' in refused
    assert not slurm.calls("sbatch")


def test_the_environment_fills_what_is_open(monkeypatch, slurm, tmp_path: Path, capsys) -> None:
    for name, value in {
        "SBATCH_RESERVATION": "maint",
        "SBATCH_EXCLUDE": "node[1-2]",
        "SBATCH_EXCLUSIVE": "",
        "SBATCH_PARTITION": "gpu",  # the profile has another
        "SBATCH_ACCOUNT": "theirs",  # an option has another
        "SBATCH_QOS": "high",  # an option has the same
        "SBATCH_TIMELIMIT": "10",
    }.items():
        monkeypatch.setenv(name, value)
    options = ["--account", "mine", "--qos", "high"]
    said = run(capsys, "submit", "--profile", "p.toml", *options, *TOKENIZE)
    found = directives(tmp_path / "tokens-slurm/1/job.sh")
    for line in ("--reservation=maint", "--exclude='node[1-2]'", "--exclusive", "--partition=cpu"):
        assert line in found
    assert "--account=mine" in found
    assert "reservation maint is that of SBATCH_RESERVATION in the environment" in said
    unused = "SBATCH_ACCOUNT=theirs, SBATCH_PARTITION=gpu, SBATCH_TIMELIMIT=10 of the environment"
    assert f"not used: {unused}" in said
    assert "SBATCH_QOS" not in said


def test_what_the_environment_may_not_say() -> None:
    with pytest.raises(
        UserError, match=r"SBATCH_\* of the environment: exclude 'a b' is not allowed"
    ):
        from_environment(Profile(), {"SBATCH_EXCLUDE": "a b"})
    profile, lines = from_environment(Profile(), {"SBATCH_EXCLUSIVE": "user", "SLURM_JOB_ID": "7"})
    assert not profile.exclusive
    assert lines == [
        "not used: SBATCH_EXCLUSIVE=user of the environment: the profile and submit's options decide"
    ]
    assert placed(Profile(exclusive=True), {"exclusive": False, "qos": None}) == Profile(
        exclusive=True
    )
