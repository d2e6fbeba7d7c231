"""Every command that reads a run's folder, on folders that would run code: none does, and all say why."""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

from pretrain.cli import main
from tests.data_sets import write_data_set
from tests.hostile import KINDS
from tests.ranks import fork_managers
from tests.runs import run_train
from tests.unit.hf.tiny import VOCAB, train_sentencepiece

TRAIN = "--preset debug --no-tensorboard --data.num-workers 0 --nproc-per-node 1 --eval-interval 0 "
TRAIN += "--schedule.train-steps 6 --save-interval 4"
COMMANDS = {
    "export": "export {run} {out}",
    "eval": "eval {run} --data {data}",
    "report depth": "report depth {run} --data {data}",
    "generate": "generate {run} --prompt hello",
    "serve": "serve {run} --port 0",
    "init-from": f"train {TRAIN} --data.paths {{data}} --output-dir {{out}} --init-from {{run}}",
    "resume": f"train {TRAIN} --data.paths {{data}} --output-dir {{run}}",
}
# The index is read by all of them. The rest is read where megatron-core loads the model; random states
# are read by a resumed run alone.
CASES = [
    *(("index", command) for command in COMMANDS),
    *(("field", command) for command in ("export", "generate")),
    *(("tensor", command) for command in ("export", "generate", "resume")),
    *(("common", command) for command in ("generate", "init-from", "resume")),
    ("random states", "resume"),
    ("extra state", "resume"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_sentencepiece(folder, "bpe")
    return write_data_set(folder / "data", vocab_size=VOCAB, tokenizer=tokenizer.read_bytes())


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = f"{TRAIN} --data.paths {data} --output-dir {folder / 'run'}"
    codes, output = run_train(options.split(), folder / "log", 300)
    assert codes == [0], output
    shutil.rmtree(folder / "run/checkpoints/step_00000006")  # so it can be resumed
    return folder / "run"


def run_command(argv: list[str], log: Path) -> tuple[int | None, str]:
    """Runs a command in a forked process; returns its exit status and what it printed."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(argv, log))
    process.start()
    process.join(200)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, log.read_text()


def _child(argv: list[str], log: Path) -> None:
    fork_managers()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.exit(main(argv))


@pytest.mark.parametrize(
    ("kind", "command"), CASES, ids=[f"{kind}-{command}" for kind, command in CASES]
)
def test_no_command_runs_code_of_a_folder(
    kind: str, command: str, run: Path, data: Path, tmp_path: Path
) -> None:
    hostile, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(run, hostile)
    (checkpoint,) = (hostile / "checkpoints").iterdir()
    # A stranger can also write a manifest that fits.
    (checkpoint / "manifest.json").unlink()
    KINDS[kind](checkpoint, marker)
    argv = COMMANDS[command].format(run=hostile, data=data, out=tmp_path / "out").split()
    code, output = run_command(argv, tmp_path / "log")
    assert not marker.exists(), output
    assert "Traceback" not in output, output
    assert code == 2, output
    # Random states are tensors: a pickle in their place has other sizes than the index says.
    if kind == "random states":
        assert "has more elements than are stored" in output
    else:
        assert "which no checkpoint needs. Loading it could run code" in output
