"""A rank other than the first fails, anywhere: it says so once, and RUN/status.json says it too."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ladder.errors import UserError
from pretrain.loop import train as training
from pretrain.run.ends import ENDS, left
from pretrain.run.status import read_status
from tests.data_sets import write_data_set
from tests.runs import run_train

HOST = os.uname().nodename


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


@pytest.mark.parametrize(
    ("place", "error", "status", "said"),
    [
        ("build", RuntimeError("no kernel image"), 1, "RuntimeError: no kernel image"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("train_sequences", UserError("no such blend"), 2, "no such blend"),
                (
                    "load_checkpoint",
                    OSError(5, "Input/output error", "__1_0.distcp"),
                    1,
                    "__1_0.distcp: Input/output error",
                ),
                ("train_step", torch.OutOfMemoryError("CUDA out of memory"), 2, "To need less"),
                ("validate", KeyError("loss"), 1, "KeyError: 'loss'"),
            )
        ),
    ],
)
def test_a_rank_that_fails_is_named_once(
    place: str, error: Exception, status: int, said: str, data: Path, tmp_path: Path, monkeypatch
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    argv = (
        "--preset debug --save-interval 4 --eval-interval 2 --no-tensorboard --schedule.train-steps"
    )
    argv = [*argv.split(), "4", "--data.paths", str(data), "--output-dir", str(run)]
    argv += ["--micro-batch-size", "2", "--nproc-per-node", "2"]
    if place == "load_checkpoint":
        codes, output = run_train(argv, log, 150)
        assert codes == [0, 0], output
        (run / "checkpoints" / "step_00000004").rename(run / "checkpoints" / "step_00000003")
    monkeypatch.setenv(ENDS, str(tmp_path / "ends" / "0.1"))
    works = getattr(training, place)

    def fails(*given: Any, **more: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise error
        return works(*given, **more)

    monkeypatch.setattr(training, place, fails)  # the ranks are forked with it
    codes, output = run_train(argv, log, 150)
    assert codes[1] == status, output
    assert codes[0] not in (0, None), output  # its peer is gone
    assert output.count(f"rank 1 on {HOST}: ") == 1, output
    assert said in output
    now = read_status(run)
    assert now and now["state"] == "failed", output
    assert now["reason"].startswith(f"rank 1 on {HOST}: ") and said in now["reason"]
    first, *others = left()
    assert (first.rank, first.status) == (1, status)
    assert len(others) <= 1  # what rank 0 met
