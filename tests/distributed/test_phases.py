"""A run whose blend changes, stopped, its plan changed, and resumed on other ranks, by the command line."""

import json
import shutil
from pathlib import Path

import pytest

from tests.data_sets import write_data_set
from tests.distributed.test_training import STEPS, losses, metrics, train

STEP_TOKENS = 8 * 64


def plan(file: Path, paths: list[Path], *phases: tuple[int, list[float]]) -> Path:
    """A file for --config; phases are (steps before it, weights)."""
    later = [{"from_tokens": steps * STEP_TOKENS, "weights": w} for steps, w in phases]
    first = [1.0] + [0.0] * (len(paths) - 1)
    data = {"paths": [str(path) for path in paths], "weights": first, "phases": later}
    file.write_text(json.dumps({"data": data}))
    return file


def test_a_plan_changed_on_purpose_is_exact_at_another_dp_size(tmp_path: Path) -> None:
    """Up to the checkpoint the numbers of the run before, then those of a run that had the new plan from
    the start; between the checkpoint and the end the blend changes, with a data set that joins."""
    paths = [
        write_data_set(tmp_path / name, vocab_size=400, train_documents=count, seed=seed)
        for seed, (name, count) in enumerate({"a": 60, "b": 20, "c": 12}.items())
    ]
    old = plan(tmp_path / "old.json", paths[:2], (5, [1, 1]), (12, [1, 3]))
    new = plan(tmp_path / "new.json", paths, (5, [1, 1, 0]), (13, [0, 1, 2]))
    runs = {name: tmp_path / name for name in ("old", "new", "resumed")}

    def start(name: str, config: Path, *options: str) -> str:
        # `train` gives data.paths of its own: the last one counts.
        mine = ["--data.paths", *map(str, json.loads(config.read_text())["data"]["paths"])]
        saved = ("--save-interval", "10")
        return train(paths[0], runs[name], "--config", str(config), *mine, *saved, *options)

    said = start("old", old)
    assert "Blend of steps 6 to 12: a 50.0%, b 50.0%" in said
    start("new", new)
    shutil.copytree(runs["old"], runs["resumed"])
    shutil.rmtree(runs["resumed"] / f"checkpoints/step_{STEPS:08d}")
    said = start("resumed", new, "--nproc-per-node", "2")
    assert "from step 10 (changed: data.paths: " in said
    assert "Blend of steps 14 to 20: b 33.3%, c 66.7%" in said
    assert metrics(runs["resumed"], "start")[-1]["world_size"] == 2
    assert losses(runs["resumed"])[:10] == losses(runs["old"])[:10] == losses(runs["new"])[:10]
    assert losses(runs["resumed"]) == pytest.approx(losses(runs["new"]), abs=1e-4)
    assert losses(runs["resumed"])[12:] != pytest.approx(losses(runs["old"])[12:], abs=1e-3)
    # What joined is kept with the run, and is validated on from then on.
    assert (runs["resumed"] / "data/2/manifest.json").is_file()
    assert [m["dataset"] for m in metrics(runs["resumed"], "baseline")] == ["a", "b", "c"]
    assert metrics(runs["resumed"], "validation")[-1]["dataset"] == "c"
