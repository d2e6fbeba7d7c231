"""The variables of ranks: incomplete, wrong, mixed. All tests of several ranks use whole ones."""

import os
import socket
from pathlib import Path

import pytest
import torch

from megatron_ladder.errors import UserError
from pretrain import ranks
from pretrain.cli import main
from pretrain.ranks import (
    NEEDED,
    Rank,
    RankError,
    check_gpus,
    is_first_rank,
    launched_rank,
    take_gpu,
)
from pretrain.run.lock import lock
from pretrain.start import launch as starting
from tests.data_sets import write_data_set

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NEEDED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def give(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, None),
        ({"MASTER_ADDR": "here", "MASTER_PORT": "1"}, None),  # of no use alone, and no harm
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script
        (WHOLE, Rank(1, 4, 0)),
        ({**WHOLE, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Rank(1, 4, 1)),
        ({**WHOLE, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, Rank(1, 4, 0)),
        # torchrun as each of two tasks of srun, with one rank in each: it numbers ranks itself.
        (
            {**WHOLE, "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
            | {"TORCHELASTIC_RUN_ID": "7"},
            Rank(1, 2, 0),
        ),
    ],
)
def test_what_is_there(monkeypatch, variables: dict[str, str], rank: Rank | None) -> None:
    give(monkeypatch, **variables)
    assert launched_rank() == rank
    assert is_first_rank() == (rank is None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "has RANK, but WORLD_SIZE, MASTER_ADDR and MASTER_PORT are not set"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "has RANK and WORLD_SIZE, but MASTER_ADDR and MASTER_PORT",
        ),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but RANK, MASTER_ADDR and MASTER_PORT are not set"),
        ({**WHOLE, "RANK": ""}, "has WORLD_SIZE, MASTER_ADDR and MASTER_PORT, but RANK is not set"),
        ({**WHOLE, "RANK": "", "SLURM_PROCID": "1"}, "Under srun, RANK is SLURM_PROCID"),
        ({**WHOLE, "MASTER_PORT": ""}, "but MASTER_PORT is not set"),
        ({**WHOLE, "RANK": "x"}, "RANK is 'x' in the environment: it must be a number, 0 or more"),
        ({**WHOLE, "RANK": "-1"}, "RANK is '-1'"),
        ({**WHOLE, "RANK": "٣"}, "RANK is '٣'"),
        ({**WHOLE, "RANK": "4"}, "RANK is 4 in the environment, and WORLD_SIZE is 4: .* 0 to 3"),
        ({**WHOLE, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment: .* 1 or more"),
        ({**WHOLE, "WORLD_SIZE": "2.0"}, r"WORLD_SIZE is '2\.0'"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (
            {**WHOLE, "MASTER_PORT": "70000"},
            "MASTER_PORT is 70000 in the environment: give 1 to 65535",
        ),
        ({**WHOLE, "LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
        ({**WHOLE, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is 2: .* 0 to 1"),
        # An sbatch script that exports RANK=1 once, for all tasks of its srun.
        (
            {**WHOLE, "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"},
            "RANK is 1, but srun has started this process as task 3 of 4",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    monkeypatch, capsys, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    give(monkeypatch, **variables)
    with pytest.raises(RankError, match=message):
        launched_rank()
    # By every process that finds it, whatever its rank.
    data = write_data_set(tmp_path / "data")
    options = [
        "--preset",
        "debug",
        "--data.paths",
        str(data),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron-ladder train: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_commands_of_one_process_do_not_care(monkeypatch, capsys) -> None:
    """A worker of a cluster may have RANK=1 in its environment: mistakes are said there too."""
    for variables in ({"RANK": "1"}, WHOLE):
        give(monkeypatch, **variables)
        assert main(["report", "no-such-run"]) == 2
        assert "no-such-run" in capsys.readouterr().err


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Stands for a machine with GPUs; the list has those that were taken."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)

    def see(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return taken

    return see


def test_a_rank_takes_its_own_gpu(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = gpus(8)
    take_gpu()
    give(monkeypatch, **WHOLE, LOCAL_RANK="7")
    take_gpu()
    assert taken == [0, 7]
    gpus(1)  # srun has bound each rank to one GPU
    with pytest.raises(
        RankError, match=r"LOCAL_RANK is 7, but this process sees 1 GPU, .*gpu-bind=none"
    ):
        take_gpu()
    monkeypatch.delenv("LOCAL_RANK")
    take_gpu()  # it sees no other
    gpus(8)
    with pytest.raises(RankError, match="LOCAL_RANK is not set, and this process sees 8 GPUs"):
        take_gpu()
    assert taken == [0, 7, 0]


def test_more_ranks_than_gpus_are_not_started(gpus, monkeypatch, capsys, tmp_path: Path) -> None:
    gpus(0)
    check_gpus(64, "--nproc-per-node")  # on a CPU
    gpus(2)
    check_gpus(2, "--nproc-per-node")
    with pytest.raises(UserError, match="--nproc-per-node 4: this machine has 2 GPUs"):
        check_gpus(4, "--nproc-per-node")
    argv = ["train", "--preset", "debug", "--output-dir", str(tmp_path / "run")]
    assert main([*argv, "--nproc-per-node", "4"]) == 2
    assert "--nproc-per-node 4: this machine has 2 GPUs" in capsys.readouterr().err


def test_options_of_another_torchrun_are_not_taken(monkeypatch, caplog, tmp_path: Path) -> None:
    """PET_NNODES=2, as Kubernetes' operators set it, would make the ranks wait for another machine."""
    give(monkeypatch, PET_NNODES="2", PET_NODE_RANK="1", PET_MAX_RESTARTS="9", OMP_NUM_THREADS="1")
    seen = []

    def run(options) -> None:
        seen.append((options.nnodes, options.nproc_per_node, options.max_restarts))

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.setattr(starting.signal, "signal", lambda *_: None)
    give(monkeypatch, MEGATRON_LADDER_ENDS="")  # which `launch` sets
    assert starting.launch(["--preset", "debug"], 2, tmp_path) == 0
    assert seen == [("1:1", "2", 0)]
    assert "PET_MAX_RESTARTS, PET_NNODES, PET_NODE_RANK in the environment: not used" in caplog.text


def test_ranks_import_nothing_from_the_folder_one_is_in(monkeypatch, tmp_path: Path) -> None:
    """`python -m` would take any torch.py. A checkout is an exception: it may not be installed."""
    give(monkeypatch, MEGATRON_LADDER_ENDS="", OMP_NUM_THREADS="1", PYTHONSAFEPATH="")
    seen = []
    monkeypatch.setattr(
        "torch.distributed.run.run", lambda _: seen.append(os.environ["PYTHONSAFEPATH"])
    )
    monkeypatch.setattr(os, "execve", lambda _, __, given: seen.append(given["PYTHONSAFEPATH"]))
    monkeypatch.setattr(starting.signal, "signal", lambda *_: None)
    for folder in (tmp_path, Path(__file__).parents[4]):
        monkeypatch.chdir(folder)
        starting.launch([], 2, tmp_path)
        starting.become_torchrun(2, "--module", "pretrain.cli", "serve")
        monkeypatch.setenv("PYTHONSAFEPATH", "")
    assert seen == ["1", "1", "", ""]


def test_tasks_of_srun_that_are_no_ranks(monkeypatch, tmp_path: Path) -> None:
    held = lock(tmp_path / "run")
    give(monkeypatch, SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0")
    with pytest.raises(UserError, match=r"or end it$"):
        lock(tmp_path / "run")
    give(monkeypatch, SLURM_STEP_NUM_TASKS="4")
    with pytest.raises(
        UserError, match="srun has started 4 tasks, each a run of its own: RANK is not"
    ):
        lock(tmp_path / "run")
    held.close()


def test_a_port_in_use_is_said_in_a_line(monkeypatch, capsys, tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        give(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
        options = ["--preset", "debug", "--data.paths", str(data)]
        assert main(["train", *options, "--output-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert f"MASTER_ADDR localhost, MASTER_PORT {port}: the ranks did not meet" in said
    assert "Traceback" not in said
    assert ranks.launched_rank() == Rank(0, 1, 0)
