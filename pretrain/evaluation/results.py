"""Files of evaluation results; docs/reference/formats.md describes them.

Each command writes a file of its own. So it changes no earlier file, and several commands can measure the
same run at the same time.
"""

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_whole, is_word, read_json, short
from pretrain.files import write_atomically
from pretrain.run.folder import EVALUATIONS

MOST_BYTES, MOST = 256 << 20, (1 << 63) - 1
FORMAT = "megatron-ladder-evaluation"

Result = dict[str, Any]


def new_file(folder: Path, step: int | None) -> Path:
    """The path of a new file. No other command takes the same name; names sort by step, then by time.

    Args:
        folder: the folder of results; it is made.
        step: the step of a run's checkpoint; None: the model is no run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    of_step = f"step_{step:08d}." if step is not None else ""
    return folder / f"{of_step}{moment}-{uuid.uuid4().hex[:8]}.json"


def save(path: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """Writes all results so far; called after each result, so that none is lost when a later one fails."""
    content = {"format": FORMAT, "version": 1, **facts, "results": results}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def results_by_step(run: Path) -> dict[int, list[Result]]:
    """For each step of the run that was measured, the newest result of each task and data set.

    Raises:
        UserError: a file in the run's folder of evaluations is not a file of results.
    """
    files = []
    for path in sorted((run / EVALUATIONS).glob("*.json")):
        content = read_json(path, "a file of `megatron-ladder eval`", MOST_BYTES)
        if wrong := _wrong(content):
            raise UserError(
                f"{path} is not a file of `megatron-ladder eval` ({wrong}): move it to another folder"
            )
        files.append((content["step"], content["unix_time"], content["results"]))
    latest: dict[int, dict[Any, Result]] = {}
    for step, _, results in sorted(files, key=lambda file: file[:2]):
        for result in results:
            name = (result["task"], result.get("data"), result.get("split"))
            latest.setdefault(step, {})[name] = result
    return {step: list(of_step.values()) for step, of_step in latest.items()}


@dataclass(frozen=True)
class Point:
    """A figure at a step."""

    step: int
    value: float
    stderr: float | None


def points_by_name(by_step: dict[int, list[Result]]) -> dict[str, list[Point]]:
    """The figures of all steps: by task, data set and metric, in the order of the steps."""
    found: dict[str, list[Point]] = {}
    for step, results in sorted(by_step.items()):
        for result in results:
            where = f", {result['data']} {result['split']}" if "data" in result else ""
            for metric, value in result["metrics"].items():
                if "_stderr" in metric or type(value) not in (int, float):
                    continue
                stderr = result["metrics"].get(_stderr_of(metric))
                known = float(stderr) if type(stderr) in (int, float) else None
                name = f"{result['task']} {metric}{where}"
                found.setdefault(name, []).append(Point(step, float(value), known))
    return found


def _wrong(content: dict[str, Any]) -> str:
    """Which field is missing or has another type than docs/reference/formats.md says; "" where none is."""
    step, results = content.get("step"), content.get("results")
    if content.get("format") != FORMAT or content.get("version") != 1:
        return "format"
    if not is_whole(step, 0, MOST) or type(content.get("unix_time")) not in (int, float):
        return "step or unix_time"
    if not isinstance(results, list):
        return "results"
    for result in results:
        if not (isinstance(result, dict) and _is_result(result)):
            return f"a result is {short(result)}"
    return ""


def _is_result(result: Result) -> bool:
    metrics = result.get("metrics")
    if not isinstance(metrics, dict) or ("data" in result) != ("split" in result):
        return False
    names = [result.get("task"), *metrics, *(result[k] for k in ("data", "split") if k in result)]
    counts = [result.get(key) for key in ("tokens", "trained_tokens", "items")]
    counts += [value for value in metrics.values() if type(value) is int]
    curve, places = result.get("by_position", []), result.get("by_place", [])
    needs = "trained_loss" not in metrics or result.get("trained_tokens") is not None
    return (
        needs
        and _are_rows(curve, ("first", "last", "loss"))
        and _are_rows(places, ("length", "depth", "accuracy"))
        and all(map(is_word, names))
        and all(n is None or is_whole(n, -MOST, MOST) for n in counts)
        and result.get("tokens", 0) is not None
    )


def _are_rows(rows: Any, names: tuple[str, ...]) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict) and all(_is_number(row.get(name)) for name in names) for row in rows
    )


def _is_number(value: Any) -> bool:
    """One that can be drawn; a loss may be NaN."""
    return type(value) in (int, float) and (abs(value) <= MOST or value != value)


def curve(result: Result) -> str:
    """The loss by position as a line of text: the last position of each bucket, and the bucket's loss."""
    return ", ".join(f"{row['last']:,}: {row['loss']:.2f}" for row in result["by_position"])


def grid(result: Result) -> str:
    """The accuracy of needle as text: a line for each depth, a column for each length."""
    found = {(row["length"], row["depth"]): row["accuracy"] for row in result["by_place"]}
    lengths, depths = (sorted({place[i] for place in found}) for i in (0, 1))
    lines = [["depth", *(f"{length:,}" for length in lengths)]]
    for depth in depths:
        shown = [found.get((length, depth)) for length in lengths]
        lines.append([f"{depth:.0%}", *("-" if one is None else f"{one:.2f}" for one in shown)])
    return "\n".join(" ".join(cell.rjust(8) for cell in line) for line in lines)


def cells(results: list[Result]) -> list[tuple[str, str, str, str, str]]:
    """The table's lines: task, data, metric, value with its standard error, what it was measured on."""
    found = []
    for result in results:
        metrics = result["metrics"]
        data = f"{result['data']} {result['split']}" if "data" in result else "lm-eval"
        for name, value in metrics.items():
            if "_stderr" in name or not isinstance(value, int | float):
                continue
            stderr = metrics.get(_stderr_of(name))
            shown = f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
            if isinstance(stderr, int | float):
                shown += f" ± {stderr:.4f}"
            found.append((result["task"], data, name, shown, _measured_on(result, name)))
    return found


def _stderr_of(metric: str) -> str:
    """The name of a metric's standard error. In lm-eval, that of "acc,none" is "acc_stderr,none"."""
    name, comma, filters = metric.partition(",")
    return f"{name}_stderr{comma}{filters}"


def _measured_on(result: Result, metric: str) -> str:
    if metric == "trained_loss":
        return f"{result['trained_tokens']:,} tokens"
    if "tokens" in result:
        return f"{result['tokens']:,} tokens"
    return f"{result['items']:,} items" if result.get("items") else ""


def table(results: list[Result]) -> str:
    """The results as text: a line of column names, then aligned columns."""
    lines = [("task", "data", "metric", "value", "of"), *cells(results)]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
