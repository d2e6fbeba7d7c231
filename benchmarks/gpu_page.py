"""Makes the page of GPU results from what gpu.py left: of each part the question, command and tables.

    python benchmarks/gpu_page.py FOLDER-OR-results.tgz docs/results/h100.md

A part that has not run, or has ended early, is named as such; no figure comes from anywhere else. The
folder's `notes.md`, where somebody wrote one, is copied in. gpu_questions.py has the words around figures.
"""

import argparse
import importlib.util
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout need not be installed

from gpu_questions import QUESTIONS, Words  # noqa: E402
from measuring import facts  # noqa: E402
from measuring.facts import between  # noqa: E402
from measuring.overlap.tables import connections_table, hidden_table, kinds_table  # noqa: E402

Report = dict[str, Any]
INTRODUCTION = """# Results on one GPU

Everything that `python benchmarks/gpu.py` has measured. `python benchmarks/gpu_page.py` writes this page
from the results: do not edit it. [All results](index.md) says what is measured and what is modelled;
[the guide](../guides/gpu.md#measure-your-gpu) how to measure a GPU of yours.
"""


def script(name: str) -> ModuleType:
    """A benchmark, whose own table of its rows or parts is read."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def hidden_experts_table(report: Report) -> str:
    lines = [
        [
            row["kind"],
            row["pass"],
            f"{1e3 * row['without_link_s']:.2f}",
            f"{1e3 * row['link_s']:.2f}",
            f"{1e3 * row['added_s']:.2f}",
            f"{row['hidden_share']:.2f} ± {row['plus_or_minus']:.2f}",
        ]
        for row in report["rows"]
    ]
    titles = ["layers", "pass", "without the link, ms", "link, ms", "the link adds, ms"]
    return facts.markdown([*titles, "hidden share"], lines)


def by_shape(
    rows: list[dict[str, Any]], titles: list[str], cells: Callable[[dict[str, Any]], list[str]]
) -> str:
    """A table for each shape, named above it."""
    tables = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        lines = [cells(row) for row in rows if row["shape"] == shape]
        tables.append(f"Shape `{shape}`:\n\n{facts.markdown(titles, lines)}")
    return "\n\n".join(tables)


def layers_table(report: Report) -> str:
    rows = report["rows"]
    first = next((row["precision"] for row in rows), "bf16")

    def cells(row: dict[str, Any]) -> list[str]:
        if "error" in row:
            return [row["precision"], row.get("kind", "all"), row["error"]]
        low, high = row["quartiles"]
        speed = row.get(f"times_{first}s_speed")
        return [
            row["precision"],
            row["kind"],
            f"{row['ms']:.2f}",
            between(low, row["over_standard"], high, 3),
            f"{row['tflops']:.1f}",
            f"{speed:.2f}" if speed else "",
        ]

    titles = ["precision", "kind", "ms", "over standard (quartiles)", "TFLOP/s"]
    return by_shape(rows, [*titles, f"speed over {first}"], cells)


def training_table(report: Report) -> str:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        [row["case"], row["error"]]
        if "error" in row
        else [
            row["case"],
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            cell(row["mfu"], ".1%"),
            cell(row["peak_gib"], ".2f"),
            cell(row["planned_gib"], ".2f"),
        ]
        for row in report["rows"]
    ]
    sizes = {
        f"{row['case'].split(':')[0]} {row['parameters'] / 1e6:,.0f} M"
        for row in report["rows"]
        if "error" not in row
    }
    titles = ["case", "step, ms", "tokens/s", "MFU", "peak, GiB", "planned, GiB"]
    words = f"Parameters: {', '.join(sorted(sizes))}.\n\n" if sizes else ""
    return words + facts.markdown(titles, lines)


def compile_table(report: Report) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        if "error" in row:
            return ["all", row["error"]]
        return [
            f"{row['kind']}, {row['variant']}",
            f"{row['ms']:.1f}",
            between(*row["over_plain"]),
            between(*row["processor_over_plain"]),
            f"{row['first_step_s']:.1f}",
            f"{row['kept_mib']:.0f}",
        ]

    titles = ["layers", "step, ms", "over plain (quartiles)", "processor time over plain"]
    return by_shape(report["rows"], [*titles, "first step, s", "kept, MiB"], cells)


def load_table(reports: dict[str, Report]) -> str:
    """Attention, memory, clock and power of each row, and how many layers did not fit."""
    columns = {
        "attention": ("attention", "{}"),
        "peak_gib": ("peak, GiB", "{:.2f}"),
        "peak_reserved_gib": ("reserved, GiB", "{:.2f}"),
        "sm_clock_mhz": ("SMs, MHz", "{:.0f}"),
        "power_w": ("power, W", "{:.0f}"),
    }
    found = [
        (name, row) for name, report in reports.items() for row in report.get("rows", [report])
    ]
    if any("planned_gib" in row for _, row in found):  # their table has the peak
        columns["peak_gib"] = ("TFLOP/s", "{:.1f}")
        found = [(name, {**row, "peak_gib": row.get("tflops")}) for name, row in found]
    lines: dict[str, list[str]] = {}
    notes: dict[str, None] = {}
    for name, row in found:
        labels = [row[label] for label in ("case", "shape", "precision", "by") if label in row]
        label = ", ".join([name] * (len(reports) > 1) + labels) or name
        notes.update({f"- {label}: {words}": None for words in row.get("did_not_fit", [])})
        cells = [
            "" if row.get(fact) is None else form.format(row[fact])
            for fact, (_, form) in columns.items()
        ]
        if any(cells):
            lines[label] = [label, *cells]
    titles = ["under load", *(title for title, _ in columns.values())]
    table = facts.markdown(titles, list(lines.values())) if lines else ""
    return "\n\n".join(filter(None, [table, "\n".join(notes)]))


def learning_table(report: Report) -> str:
    lines = [
        [
            row["kind"],
            f"{row['parameters']:,}",
            f"{row['mean']:.4f}",
            ", ".join(f"{more:+.4f}" for more in row["less_the_firsts"]),
            f"{row['tokens_per_second']:,}",
        ]
        for row in report["rows"]
    ]
    first = report["rows"][0]
    times = [
        [row["kind"], *(f"{time:.3f}" for time in row["modelled_time"].values())]
        for row in report["rows"]
    ]
    titles = ["kind", "parameters", "validation loss", f"less {first['kind']}'s", "tokens/s"]
    data = sum(d["training_tokens"] for d in report["data"])
    about = report.get("about_tokens_per_second")
    return (
        f"{report['tokens']:,} tokens of each kind, {report['tokens'] / data:.2f} epochs of {data:,}.\n\n"
        + facts.markdown(titles, lines)
        + (f"\n\nTokens/s: {about}." if about else "")
        + f"\n\nTimes of large shapes over {first['kind']}'s. **Modelled**, not measured:\n\n"
        + facts.markdown(["kind", *(f"time of {name}" for name in first["modelled_time"])], times)
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


def in_lines(command: str) -> str:
    """As a block of code of a page's width."""
    lines = [""]
    for word in command.split(" "):
        if len(lines[-1]) + len(word) > 100:
            lines.append("    ")
        lines[-1] += " " * bool(lines[-1].strip()) + word
    return " \\\n".join(f"    {line}" for line in lines)


def asked(words: Words) -> str:
    return f"**Question:**\n{words.question}\n\n**Wanted:**\n{words.wanted}\n"


def run_by(names: list[str], folder: Path, devices: list[str]) -> str:
    """Devices, and the commands of these parts."""
    summary = folder / "summary.json"
    parts = json.loads(summary.read_text()) if summary.exists() else []
    commands = [in_lines(p["command"]) for p in parts if p["name"] in names and p["command"]]
    device = f"**Device:** {', '.join(devices)}." if devices else ""
    command = "**Command:**" if commands else ""
    head = " ".join(filter(None, [device, command]))
    return "\n\n".join([head, *commands]) + "\n" if head else ""


def section(
    title: str, names: list[str], folder: Path, render: Callable[[dict[str, Report]], str]
) -> str:
    """A heading, the question, what was run, what is there of these parts, and what it does not show."""
    reports: dict[str, Report] = {}
    for name in names:
        if (file := folder / f"{name}.json").exists():
            reports[name] = json.loads(file.read_text())
        elif (log := folder / f"{name}.log").exists() and name == "tests":
            reports[name] = {"log": log.read_text()}
    missing = [f"`{name}`" for name in names if name not in reports]
    words = QUESTIONS[title]
    text = [f"## {title}\n", asked(words)]
    if reports:
        devices = list(dict.fromkeys(r["device"] for r in reports.values() if "device" in r))
        text += [run_by(list(reports), folder, devices), render(reports) + "\n"]
        if load := load_table(reports):
            text.append(load + "\n")
    if missing:
        text.append("**No results:**\n" + ",\n".join(missing) + ".\n")
    if reports:
        text.append(f"**What it does not show:**\n{words.not_shown}\n")
    return "\n".join(filter(None, text))


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
    lines = [[p["name"], p["status"], f"{p['seconds']:.0f}"] for p in parts]
    text = "\n".join(f"- {line}" for line in found) or "**There are no results yet.**"
    table = facts.markdown(["part of `gpu.py`", "what became of it", "s"], lines) + "\n"
    return text + "\n\n" + (table if lines else "")


def page(folder: Path) -> str:
    known = [part.name for part in script("gpu").parts()]
    notes = folder / "notes.md"

    def named(start: str) -> list[str]:
        return [name for name in known if name.startswith(start)]

    def of_one(render: Callable[[Report], str]) -> Callable[[dict[str, Report]], str]:
        def each(reports: dict[str, Report]) -> str:
            named = len(reports) > 1
            return "\n\n".join(
                (f"Part `{name}`:\n\n" if named else "") + render(report)
                for name, report in reports.items()
            )

        return each

    def precision_table(report: Report) -> str:
        first = next((row["precision"] for row in report["rows"]), "bf16")
        return script("precision").table(report["losses"], report["rows"], first)

    sections = (
        ("Attention", ["attention"], of_one(lambda r: script("attention").table(r["rows"]))),
        ("Tests", ["tests"], of_one(lambda r: tests_table(r["log"]))),
        ("Layers, TP=1", named("layers"), of_one(layers_table)),
        ("Training steps", [*named("training"), "cuda-graph"], of_one(training_table)),
        ("Hidden share of a modelled link, TP=8", named("overlap"), hidden_table),
        ("All kinds of layers over a modelled link, TP=8", named("kinds"), kinds_table),
        (
            "All-to-alls of experts over a modelled link, EP=8",
            ["experts-link"],
            of_one(hidden_experts_table),
        ),
        ("Hardware queues", named("connections"), connections_table),
        ("Learning", ["learning"], of_one(learning_table)),
        ("Learning rates", ["rates-of-learning"], of_one(rates_table)),
        ("Precisions", ["precision"], of_one(precision_table)),
        ("torch.compile", ["compile"], of_one(compile_table)),
    )
    texts = [section(title, names, folder, render) for title, names, render in sections]
    kept = [notes.read_text().strip() + "\n"] if notes.exists() else []
    return "\n".join([INTRODUCTION, where(folder), *kept, *texts]).rstrip() + "\n"


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
