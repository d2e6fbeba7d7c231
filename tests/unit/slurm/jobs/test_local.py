"""launcher = "local": the same scripts without SLURM, in the background of this machine."""

import sys
import time
from pathlib import Path

import pytest

from pretrain import cli
from slurm.jobs.folders import job_folders
from slurm.jobs.local import stop
from slurm.watch.history import read_history

FAKE_PYTHON = f"""#!{sys.executable}
import signal, sys, time
from pathlib import Path
print("SAW", *sys.argv[1:], flush=True)
if "train" in sys.argv:
    run = Path(sys.argv[sys.argv.index("--output-dir") + 1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if (run / "crash").exists():
        (run / "crash").unlink()
        sys.exit(1)
    while not (run / "go on").exists():
        time.sleep(0.05)
"""
TRAIN = ["train", "--preset", "debug", "--data.paths", "data", "--output-dir", "run"]
CHAIN = ["data", "verify", "data", "then", *TRAIN, "then", "export", "run", "model"]


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A chain under way: its first command is over, its training runs."""
    root = Path(__file__).parents[4]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (tmp_path / "p.toml").write_text(f'launcher = "local"\npython = "{python}"\n')
    (tmp_path / "run").mkdir()
    yield lambda: cli.main(["submit", "--profile", "p.toml", *CHAIN])
    for folder in job_folders(tmp_path / "run"):
        stop(folder, in_good_order=False)


def said(capsys, *outputs: str) -> str:
    capsys.readouterr()
    assert cli.main(["status", *outputs]) == 0
    return capsys.readouterr().out


def wait_for(text: str, capsys, *outputs: str) -> str:
    end = time.monotonic() + 30
    while text not in (now := said(capsys, *outputs)):
        assert time.monotonic() < end, now
        time.sleep(0.1)
    return now


def test_a_chain_runs_here(chain, tmp_path: Path, capsys) -> None:
    (tmp_path / "run" / "crash").touch()
    assert chain() == 0
    assert "in the background: train" in capsys.readouterr().out
    wait_for("RUNNING", capsys, "run")
    assert "COMPLETED" in said(capsys, "data")
    assert "PENDING, waits for the job before it" in said(capsys, "model")
    wait_for("started 2 times", capsys, "run")  # it crashed once
    (tmp_path / "run" / "go on").touch()
    wait_for("COMPLETED", capsys, "model")
    assert "COMPLETED, exit status 0; started 2 times; last: finished" in said(capsys, "run")
    assert cli.main(["logs", "-f", "run"]) == 0
    log = capsys.readouterr().out
    assert (
        log.count(f"SAW -P -m pretrain.cli train --nproc-per-node 1 {' '.join(TRAIN[1:])}\n") == 2
    )
    assert cli.main(["logs", "model"]) == 0
    assert capsys.readouterr().out == "SAW -P -m pretrain.cli export run model\n"


def test_cancel_stops_the_chain(chain, tmp_path: Path, capsys) -> None:
    assert chain() == 0
    wait_for("RUNNING", capsys, "run")
    end = time.monotonic() + 30
    log = tmp_path / "run" / "slurm" / "1" / "log"
    while "SAW" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert cli.main(["cancel", "run"]) == 0
    assert "asked to save a checkpoint and stop" in capsys.readouterr().out
    text = wait_for("CANCELLED", capsys, "run")
    assert "it stopped in good order, and goes on when it is submitted again" in text
    assert read_history(log.parent).last == "stopped in good order as it was asked to"
    assert "never ran: a job it waited for failed" in wait_for("CANCELLED", capsys, "model")


def test_a_killed_job_is_seen(chain, tmp_path: Path, capsys) -> None:
    assert chain() == 0
    wait_for("RUNNING", capsys, "run")
    assert cli.main(["cancel", "--now", "run"]) == 0
    wait_for("FAILED, exit status 137", capsys, "run")


def test_what_is_slurms_is_refused_here(chain, tmp_path: Path, capsys) -> None:
    for option in (
        ["--nodes", "2"],
        ["--after", "3"],
        ["--time", "1:00:00"],
        ["--spare-nodes", "1"],
    ):
        argv = ["submit", "--profile", "p.toml", *option, "export", "run", "model"]
        assert cli.main(argv) == 2
        assert "need SLURM" in capsys.readouterr().err
        assert not job_folders(tmp_path / "model")
