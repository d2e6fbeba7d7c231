"""A sweep's folder: a list of its runs, a configuration for each, and the runs' own folders."""

from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_whole, is_word, read_json

SWEEP = "sweep.json"
CONFIGS = "configs"
LOGS = "logs"


def is_sweep(folder: Path) -> bool:
    """Whether `sweep` has written this folder."""
    return (folder / SWEEP).is_file()


def config_file(folder: Path, name: str) -> Path:
    """Where a run's configuration is written."""
    return folder / CONFIGS / f"{name}.json"


def log_file(folder: Path, name: str) -> Path:
    """What a run prints, where `sweep` trains it."""
    return folder / LOGS / f"{name}.log"


def train_command(folder: Path, name: str) -> list[str]:
    """What one would type after `megatron-ladder` to train one run of a sweep."""
    return [
        *("train", "--config", str(config_file(folder, name))),
        *("--output-dir", str(folder / name)),
    ]


def listed_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a sweep, as docs/reference/formats.md describes them.

    Raises:
        UserError: the folder is no sweep's.
    """
    file = folder / SWEEP
    try:
        runs = read_json(file, "a sweep's list of runs").get("runs")
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {SWEEP}: is it a folder of `sweep`?") from None
    if not isinstance(runs, list) or not runs or not all(map(_is_run, runs)):
        raise UserError(f"{file} is not a sweep's list of runs")
    return runs


def _is_run(run: Any) -> bool:
    return (
        isinstance(run, dict)
        and is_word(run.get("name"))
        and Path(run["name"]).name == run["name"]
        and is_word(run.get("size"))
        and isinstance(run.get("values"), dict)
        and all(map(is_word, run["values"]))
        and type(run.get("held_out")) is bool
        and all(is_whole(run.get(name), 1, 1 << 62) for name in ("parameters", "tokens"))
    )
