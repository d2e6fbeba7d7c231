"""Makes the page of GPU results from what gpu.py left: every table, with device, versions and commands.

    python benchmarks/gpu_page.py FOLDER-OR-results.tgz docs/results/h100.md

A part that has not run, or has ended early, is named as such; no figure comes from anywhere else.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout need not be installed

from measuring import facts  # noqa: E402
from measuring.hidden import BLOCKING, PASSES  # noqa: E402

Report = dict[str, Any]
INTRODUCTION = """# Results on a GPU

Written by `python benchmarks/gpu_page.py` from the results of `python benchmarks/gpu.py`; not to be edited.
What each part is, and what is wanted of it: [gpu.md](gpu.md).
"""


def script(name: str) -> ModuleType:
    """A benchmark, whose own table of its rows is shown."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def percent(value: float) -> str:
    return f"{value:.1%}"


def first_precision(report: Report) -> str:
    """The one that others are compared with."""
    return next((row["precision"] for row in report["rows"]), "bf16")


def rows_of(report: Report, name: str) -> str:
    """By the benchmark's own table."""
    found = report["rows"]
    if name == "layers":
        return script(name).table(found, first_precision(report))
    if name == "precision":
        return script(name).table(report["losses"], found, first_precision(report))
    return script({"training": "training_step"}.get(name, name)).table(found)


def besides(reports: dict[str, Report]) -> str:
    """What rows say of attention, memory, clock and power, and how many layers did not fit."""
    said: dict[str, None] = {}
    for name, report in reports.items():
        for row in report.get("rows", [report]):
            labels = [row[label] for label in ("case", "shape", "precision", "by") if label in row]
            text = "; ".join(filter(None, [facts.in_words(row), *row.get("did_not_fit", [])]))
            if text:
                labels = [name] * (len(reports) > 1) + labels
                said[f"- {', '.join(labels) or name}: {text}"] = None
    return "\n".join(said)


def hidden_table(reports: dict[str, Report]) -> str:
    """Ladder's shares of the link's time, each over what can be hidden."""
    lines = []
    for name, report in reports.items():
        found = report["hidden_share"][BLOCKING]
        for line in ("parallel", "ladder"):
            if line not in found:
                continue
            cells = []
            for part in PASSES:
                cell = percent(found[line][part])
                if line == "ladder" and report["most_hidden"]:
                    most = [report["most_hidden"][by][part] for by in ("layers", "planner")]
                    cell += f" of {percent(most[0])}, {percent(most[1])}"
                cells.append(cell)
            allocations = sum(sum(steps[1:]) for steps in report["device_allocations"].values())
            over = report["ladder_over_standard_zero_delay"] if line == "ladder" else ""
            lines.append([name, str(report["layers"]), line, *cells, over, str(allocations)])
    titles = ["part", "layers", "kind", *PASSES, "ladder over standard, no link"]
    return (
        "Measured; of ladder also what its number of layers allows, and what the planner's model of a pass "
        "does with the times measured.\n\n"
        + facts.markdown([*titles, "allocations by CUDA"], lines)
    )


def connections_table(reports: dict[str, Report]) -> str:
    """The second stream of sequence parallelism by the number of hardware queues."""
    lines = []
    for name, report in reports.items():
        shares = report["hidden_share"][BLOCKING]["ladder"]
        medians = {
            (t["kind"], t["link"]): statistics.median(map(sum, t["forward_backward"]))
            for t in report["times_s"]
        }
        times = [f"{1e3 * medians['ladder', way]:.1f}" for way in ("link", "zero")]
        cells = [
            f"{percent(shares[p])} of {percent(report['most_hidden']['layers'][p])}" for p in PASSES
        ]
        lines.append([name.removeprefix("connections-"), *cells, *times])
    titles = ["CUDA_DEVICE_MAX_CONNECTIONS", *(f"hidden, {p}" for p in PASSES)]
    return facts.markdown([*titles, "ladder, ms, link", "no link"], lines)


def learning_table(report: Report) -> str:
    lines = [
        [
            row["kind"],
            f"{row['parameters']:,}",
            f"{row['mean']:.4f}",
            ", ".join(f"{more:+.4f}" for more in row["less_the_firsts"]),
            f"{row['tokens_per_second']:,}",
            *(f"{time:.3f}" for time in row["modelled_time"].values()),
        ]
        for row in report["rows"]
    ]
    names = list(report["rows"][0]["modelled_time"])
    titles = [
        "kind",
        "parameters",
        "validation loss",
        f"less {report['rows'][0]['kind']}'s",
        "tokens/s",
    ]
    data = sum(d["training_tokens"] for d in report["data"])
    return (
        f"{report['tokens']:,} tokens of each kind, {report['tokens'] / data:.2f} epochs of {data:,}. "
        "The times are modelled, over the first kind's.\n\n"
        + facts.markdown([*titles, *(f"time of {name}" for name in names)], lines)
    )


def rates_table(report: Report) -> str:
    kinds = list(dict.fromkeys(row["kind"] for row in report["rates"]))
    found = {(row["rate"], row["kind"]): f"{row['loss']:.4f}" for row in report["rates"]}
    rates = dict.fromkeys(row["rate"] for row in report["rates"])
    lines = [[rate, *(found.get((rate, kind), "") for kind in kinds)] for rate in rates]
    return f"{report['tokens']:,} tokens each.\n\n" + facts.markdown(
        ["learning rate", *kinds], lines
    )


def tests_table(log: str) -> str:
    """pytest's last line, and what failed."""
    lines = log.splitlines()
    last = next(
        (line.strip("= ") for line in reversed(lines) if line.startswith("==")), "no result"
    )
    failed = [
        f"- `{line.split(' - ')[0]}`" for line in lines if line.startswith(("FAILED", "ERROR "))
    ]
    return "\n".join([last, *(["", *failed] if failed else [])])


def section(
    title: str, names: list[str], folder: Path, render: Callable[[dict[str, Report]], str]
) -> str:
    """A heading, and what is there of these parts."""
    reports = {}
    for name in names:
        if (file := folder / f"{name}.json").exists():
            reports[name] = json.loads(file.read_text())
    missing = [name for name in names if name not in reports]
    text = [f"## {title}\n"]
    if reports:
        text.append(render(reports) + "\n")
        if said := besides(reports):
            text.append(said + "\n")
    if missing:
        text.append(f"No results: {', '.join(missing)}.\n")
    return "\n".join(text)


def where(folder: Path) -> str:
    """Devices and versions of all results, and what became of each part."""
    found: dict[str, None] = {}
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        if isinstance(report, dict) and "versions" in report:
            versions = ", ".join(
                f"{name} {version}" for name, version in report["versions"].items()
            )
            found[f"{report['device']}: {versions}"] = None
    summary = folder / "summary.json"
    parts = json.loads(summary.read_text()) if summary.exists() else []
    lines = [[p["name"], p["status"], f"{p['seconds']:.0f}", f"`{p['command']}`"] for p in parts]
    text = "\n".join(f"- {line}" for line in found) or "**There are no results yet.**"
    return (
        text
        + "\n\n"
        + (facts.markdown(["part", "", "s", "command"], lines) + "\n" if lines else "")
    )


def page(folder: Path) -> str:
    known = [part.name for part in script("gpu").parts()]

    def named(start: str) -> list[str]:
        return [name for name in known if name.startswith(start)]

    def of_one(render: Callable[[Report], str]) -> Callable[[dict[str, Report]], str]:
        def each(reports: dict[str, Report]) -> str:
            named = len(reports) > 1
            return "\n\n".join(
                (f"{name}:\n\n" if named else "") + render(report)
                for name, report in reports.items()
            )

        return each

    tests = folder / "tests.log"
    return (
        "\n".join(
            [
                INTRODUCTION,
                where(folder),
                section(
                    "Attention", ["attention"], folder, of_one(lambda r: rows_of(r, "attention"))
                ),
                "## Tests\n\n"
                + (tests_table(tests.read_text()) if tests.exists() else "No results.")
                + "\n",
                section("Layers, TP=1", ["layers"], folder, of_one(lambda r: rows_of(r, "layers"))),
                section(
                    "Training steps",
                    [*named("training"), "cuda-graph"],
                    folder,
                    of_one(lambda r: rows_of(r, "training")),
                ),
                section(
                    "Hidden share of a modelled link, TP=8",
                    named("overlap"),
                    folder,
                    hidden_table,
                ),
                section("Hardware queues", named("connections"), folder, connections_table),
                section("Learning", ["learning"], folder, of_one(learning_table)),
                section("Learning rates", ["rates-of-learning"], folder, of_one(rates_table)),
                section(
                    "Precisions", ["precision"], folder, of_one(lambda r: rows_of(r, "precision"))
                ),
                section(
                    "torch.compile", ["compile"], folder, of_one(lambda r: rows_of(r, "compile"))
                ),
            ]
        ).rstrip()
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the folder, or its results.tgz")
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    if not args.results.exists():
        sys.exit(f"gpu_page.py: {args.results} does not exist")
    with tempfile.TemporaryDirectory() as unpacked:
        folder = args.results
        if folder.is_file():
            with tarfile.open(folder) as tar:
                tar.extractall(unpacked, filter="data")
            folder = Path(unpacked)
        args.page.write_text(page(folder))


if __name__ == "__main__":
    main()
