import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from pretrain.config.presets import PRESETS
from pretrain.data.checks import open_data
from pretrain.data.folders import keep_facts
from pretrain.run import folder as run_folder
from pretrain.run.folder import (
    check_free_space,
    check_output_dir,
    checkpoint_bytes,
    checkpoints,
    latest_checkpoint,
    plan_of,
    write_config,
)
from pretrain.run.lock import lock
from pretrain.sizes import in_units
from pretrain.start.preflight import preflight
from tests.data_sets import write_data_set


def planned(config) -> str:
    check_output_dir(config)
    return plan_of(config)


@pytest.fixture
def config(tmp_path: Path):
    base = PRESETS["debug"]()
    model = replace(base.model, vocab_size=200)
    return replace(base, model=model, output_dir=tmp_path / "run")


def add_checkpoint(config, name: str) -> Path:
    folder = config.output_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    return folder


def test_a_new_run_is_announced(config) -> None:
    assert planned(config) == f"New run in {config.output_dir}"
    assert not config.output_dir.exists()  # checking writes nothing


def test_only_complete_checkpoints_count(config) -> None:
    assert latest_checkpoint(config.output_dir) is None
    for name in ("step_00000010", "step_00000005", "step_00000015.tmp"):
        add_checkpoint(config, name)
    assert [c.name for c in checkpoints(config.output_dir)] == ["step_00000005", "step_00000010"]


def test_a_run_is_resumed_or_finished(config) -> None:
    write_config(config)
    assert "no checkpoint yet" in planned(config)
    add_checkpoint(config, "step_00000010")
    assert "from step 10" in planned(config)
    add_checkpoint(config, "step_00000020")
    assert "from step 20" in planned(config)  # its last validation may be missing
    end = {"kind": "end", "step": 20, "reason": "finished"}
    (config.output_dir / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    assert planned(config) == ""


def test_safe_changes_are_said_and_others_refused(config) -> None:
    write_config(config)
    parallel = replace(config.parallel, tensor_model_parallel_size=2)
    plan = planned(replace(config, parallel=parallel))
    assert "parallel.tensor_model_parallel_size: 1 -> 2" in plan
    with pytest.raises(UserError, match=r"holds another run: seed: 1234 -> 5") as refused:
        check_output_dir(replace(config, seed=5, parallel=parallel))
    assert "parallel" not in str(refused.value).split("\n")[0]
    assert "may change" in str(refused.value)
    scaled = replace(config, model=replace(config.model, residual_scaling="skipinit"))
    with pytest.raises(UserError, match=r"residual_scaling: none -> skipinit"):
        check_output_dir(scaled)


def test_a_folder_of_something_else_is_left_alone(config) -> None:
    config.output_dir.mkdir()
    (config.output_dir / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        check_output_dir(config)
    assert (config.output_dir / "thesis.txt").read_text() == "precious"


def test_an_output_that_is_missing_or_a_file_is_refused(config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no --output-dir"):
        check_output_dir(replace(config, output_dir=None))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: give a folder"):
        check_output_dir(replace(config, output_dir=tmp_path / "file"))


def test_a_folder_without_permission_is_refused(config, monkeypatch) -> None:
    # Root may write anywhere, so the answer of the system is stood in for.
    monkeypatch.setattr(run_folder.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission to write in"):
        check_output_dir(config)


def test_a_disk_too_small_is_refused(config, monkeypatch) -> None:
    check_free_space(config)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"1\.00 kB free, keep_last 2 checkpoints"):
        check_free_space(config)


def test_checkpoints_that_are_there_need_no_more_room(config, monkeypatch, tmp_path: Path) -> None:
    size = checkpoint_bytes(config)  # three are needed: keep_last is 2
    usage = type("usage", (), {"free": size + 1})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage)

    def add(name: str) -> Path:
        file = add_checkpoint(config, name) / "weights"
        with file.open("wb") as opened:
            opened.truncate(size)  # a hole: it takes no room
        return file

    first = add("step_00000005")
    add("step_00000007.damaged")  # is never deleted
    said = rf"of which {in_units(size, 'B')} are there: free space"
    with pytest.raises(UserError, match=said):
        check_free_space(config)
    for name in ("step_00000010", "step_00000015.tmp"):  # the next start deletes the second
        last = add(name)
        check_free_space(config)
        shutil.rmtree(last.parent)
    add("step_00000010")
    (tmp_path / "trunk").hardlink_to(first)  # of a branch: the trunk keeps these bytes
    with pytest.raises(UserError, match=said):
        check_free_space(config)


def test_a_finished_run_needs_no_room(config, monkeypatch, tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")
    config = replace(config, data=replace(config.data, paths=(data,)))
    write_config(config)
    keep_facts(config.output_dir, open_data(config))
    add_checkpoint(config, "step_00000020")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: type("usage", (), {"free": 0}))
    with pytest.raises(UserError, match="0 B free"):  # its last validation is missing
        preflight(config, 1)
    end = {"kind": "end", "step": 20, "reason": "finished"}
    (config.output_dir / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    assert preflight(config, 1)[2] == ""


def test_a_folder_is_trained_in_by_one_process(config) -> None:
    write_config(config)
    held = lock(config.output_dir)
    with pytest.raises(UserError, match=r"another process .* is training in this folder"):
        check_output_dir(config)
    held.close()
    check_output_dir(config)


def test_desync_stays_at_its_tensor_parallel_size(config) -> None:
    desync = replace(config, model=replace(config.model, residual="desync"))
    write_config(desync)
    wider = replace(desync, parallel=ParallelConfig(tensor_model_parallel_size=2))
    with pytest.raises(
        UserError, match=r"trained with desync-2 at .* 1: its ranks' residual states"
    ):
        check_output_dir(wider)
    other = ParallelConfig(pipeline_model_parallel_size=2)
    assert "Resuming" in planned(replace(desync, parallel=other))


def test_a_run_s_first_moment_is_no_other_thing(config) -> None:
    """Other ranks look while the first one begins; and a run may be killed there."""
    config.output_dir.mkdir()
    (config.output_dir / "lock").touch()
    (config.output_dir / "config.json.tmp").write_text("{")
    (config.output_dir / "hangs").mkdir()  # the disk may have hung before the run began
    assert "New run" in planned(config)
