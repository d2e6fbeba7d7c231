"""What a training's script does at signals, and where it cannot write its history."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.submit.profile import Profile
from slurm.submit.render import Resources, train_script

# A rank that saves for a second after a signal; a second signal ends it at once.
SAVING = """#!{python}
import os, signal, sys, time
seen = []
def on(number, _):
    seen.append(number)
    if len(seen) == 2:
        os._exit(128 + number)
signal.signal(signal.SIGUSR1, on)
signal.signal(signal.SIGUSR2, on)
signal.signal(signal.SIGTERM, on)
print("RANK IS UP", flush=True)
while not seen:
    time.sleep(0.02)
end = time.monotonic() + 1
while time.monotonic() < end:
    time.sleep(0.02)
sys.exit(75)
"""
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="1")
os.execvp(words[0], words)
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*"
[ "$1" != --oneliner ] || echo JobState=RUNNING
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job, with its script in job.sh and programs in bin that stand in for SLURM's."""
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path)
    folder = tmp_path / "run" / "slurm" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name, text in {"python": SAVING, "srun": SRUN, "scontrol": SCONTROL}.items():
        file = tmp_path / "bin" / name
        file.write_text(text.format(python=sys.executable) if "{python}" in text else text)
        file.chmod(0o755)
    profile = Profile(python=str(tmp_path / "bin" / "python"))
    script = train_script(profile, Resources(1, 1), [], tmp_path / "run", folder)
    (tmp_path / "job.sh").write_text(script.replace("sleep 2 #", "#"))
    return tmp_path


def start(job: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["/bin/bash", job / "job.sh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            "PATH": f"{job / 'bin'}:/usr/bin:/bin",
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node7",
        },
    )


@pytest.mark.parametrize(
    ("signals", "status", "requeued"),
    [
        ((signal.SIGUSR1,), 0, True),
        ((signal.SIGUSR2,), 75, False),
        # Cancelled; the time limit, or a preemption, comes while it saves.
        ((signal.SIGUSR2, signal.SIGUSR1), 75, False),
        ((signal.SIGUSR2, signal.SIGTERM), 75, False),
        (
            (signal.SIGUSR1, signal.SIGUSR2),
            75,
            False,
        ),  # cancelled while it saves for the time limit
    ],
)
def test_a_cancelled_job_saves_and_is_over(job: Path, signals, status: int, requeued) -> None:
    process = start(job)
    assert process.stdout is not None
    while "RANK IS UP" not in process.stdout.readline():
        assert process.poll() is None
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == status, said
    assert ("scontrol requeue 41" in said) == requeued
    asked = "stop" if status else "limit"
    history = (job / "run" / "slurm" / "1" / "history").read_text()
    assert f"end 75 none {asked}\n" in history


def test_a_second_cancel_lets_a_local_training_save(job: Path) -> None:
    profile = Profile(launcher="local", python=str(job / "bin" / "python"))
    folder = job / "run" / "slurm" / "1"
    script = train_script(profile, Resources(1, 1), [], job / "run", folder)
    (job / "job.sh").write_text(script.replace("sleep 2 #", "#"))
    process = start(job)
    assert process.stdout is not None
    while "RANK IS UP" not in process.stdout.readline():
        assert process.poll() is None
    for _ in range(2):
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.3)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "end 75 none stop\n" in (folder / "history").read_text()


def test_it_gives_up_though_the_disk_takes_no_history(job: Path) -> None:
    (job / "run" / "slurm" / "1" / "history").mkdir()  # tee fails, as on a full or read-only disk
    (job / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    said, _ = (process := start(job)).communicate(timeout=60)
    assert process.returncode == 1
    assert said.count(" end 1 none") == 4, said
    assert "stop gave up: 3 restarts ended before another checkpoint" in said


def test_a_new_checkpoint_begins_the_count_again(job: Path) -> None:
    (job / "run" / "slurm" / "1" / "history").mkdir()
    checkpoints = job / "run" / "checkpoints"
    checkpoints.mkdir()
    (job / "bin" / "python").write_text(
        f"#!/bin/bash\necho x >> {job}/starts\n"
        f"[ $(wc -l < {job}/starts) != 3 ] || mkdir {checkpoints}/step_00000005\nexit 1\n"
    )
    said, _ = start(job).communicate(timeout=60)
    assert said.count(" end 1 none") == 2
    assert said.count(" end 1 00000005") == 4, said
