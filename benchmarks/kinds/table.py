"""All kinds of layers over several links, on two CPU ranks: measures, and writes the table of the page.

    python benchmarks/kinds/table.py benchmarks/results/overlap-kinds-cpu.json docs/results/overlap.md

Each case is a run of overlap.py. FILE keeps the last result of each case, so `--cases` can measure some of
them again; without a name it only writes the page. In PAGE the lines between two markers are replaced.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # where `measuring` is

from measuring import facts  # noqa: E402
from measuring.overlap.hidden import (  # noqa: E402
    Times,
    all_link_time,
    link_in_words,
    median,
    most_by_layers,
    over_standard,
    planned,
    scaled,
    shares,
    uncertainty,
)
from pretrain.bench.kinds_plan import BLOCKING, KINDS, NO_COMM  # noqa: E402
from pretrain.plan.planner import Submodule  # noqa: E402

BEGIN = "<!-- benchmarks/kinds/table.py writes what follows -->\n"
END = "<!-- to here -->\n"
SHAPE = "--processor-time --layers 12 --hidden-size 512 --ffn-hidden-size 1024 --seq-length 128"
OVER_LINKS = """**Links of 70B's layers.** Time of forward and backward over standard's, medians; in
brackets by the planner's model of a pass. The number beside a link is an all-reduce over a sub-module's
forward. Micro-batch 2. The shares and the commands of these four cases are at the end.
"""
TARGET = "llama-3-70b"
ALSO = "--also standard-halves parallel parallel-halves hybrid parallel-ladder no-comm"


@dataclass(frozen=True)
class Case:
    micro_batch_size: int
    link: float | str
    """An all-reduce over a sub-module's forward; or the link for which it is that of 70B's layers."""
    sequence_parallel: bool = False
    one_process: bool = False
    """It plays rank 0 of 2: collectives do no work, and computation alone is compared."""
    steps: int = 15
    """Interleaved repetitions."""

    @property
    def options(self) -> str:
        words = f"{SHAPE} --micro-batch-size {self.micro_batch_size} --steps {self.steps}"
        words += (
            f" --link {self.link} --target {TARGET}"
            if self.target
            else f" --link-ratio {self.link}"
        )
        words += " --sequence-parallel" if self.sequence_parallel else ""
        return f"{words} --fake-tp 2" if self.one_process else words

    @property
    def target(self) -> bool:
        return isinstance(self.link, str)

    @property
    def title(self) -> str:
        with_sp = ", sequence parallelism" if self.sequence_parallel else ""
        alone = ", one process as rank 0 of 2" if self.one_process else ""
        of_70b = ", 70B's layers" if self.target else ""
        return f"Micro-batch {self.micro_batch_size}, link {self.link}{of_70b}{with_sp}{alone}"


CASES = {
    "2-0.5": Case(2, 0.5, steps=60),
    "2-1.5": Case(2, 1.5, steps=30),
    "2-0.5-sp": Case(2, 0.5, sequence_parallel=True),
    "1-0.5": Case(1, 0.5),
    "1-1.5": Case(1, 1.5),
    "2-0.5-alone": Case(2, 0.5, one_process=True),
    **{link: Case(2, link) for link in ("nvswitch", "two-nodes-ndr", "two-nodes", "p2p-off")},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON with the results of all cases")
    parser.add_argument("page", type=Path)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    return parser.parse_args()


def measure(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        words = [*case.options.split(), *ALSO.split()]
        command = [sys.executable, "benchmarks/overlap.py", *words, "--json", str(file)]
        subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603 (a list)
        report: dict[str, Any] = json.loads(file.read_text())
        return report


def planned_link_s(
    case: Case, report: dict[str, Any], times: Times, name: str
) -> tuple[float, float]:
    """Seconds that the link adds to forward and backward by the planner's model of a pass, from the
    measured times of attention and MLP, scaled to the kind's own time without the link."""
    attention, mlp = (Submodule(**part) for part in report["attention_mlp_s"])
    layers = report["layers"]
    alone_s = (median(times, (name, "zero"), p) for p in ("forward", "backward"))
    parts = scaled((attention, mlp), layers, *alone_s)
    options = {"sequence_parallel": case.sequence_parallel}
    return planned(KINDS[name], layers, parts, report["own_s"], report["link_s"], options)


def planned_total_s(case: Case, report: dict[str, Any], times: Times, name: str) -> float:
    """Seconds of forward and backward: the kind's own time without the link, and what the link adds."""
    if name == NO_COMM:
        return median(times, (name, "link"), "total")
    return median(times, (name, "zero"), "total") + sum(planned_link_s(case, report, times, name))


def links_table(reports: dict[str, dict[str, Any]]) -> str:
    """Of each kind and link the time of forward and backward over standard's, measured and planned."""
    kinds = [kind for kind in KINDS if kind not in ("standard", BLOCKING)]
    titles, lines = [""], [[kind] for kind in kinds]
    for name, case in CASES.items():
        if not case.target or name not in reports:
            continue
        report, times = reports[name], times_of(reports[name])
        titles.append(f"{name}, {report['link_ratio']:.2f}")
        standard_s = planned_total_s(case, report, times, "standard")
        for line, kind in zip(lines, kinds, strict=True):
            measured = over_standard(times, kind, "link")[1]
            plan = planned_total_s(case, report, times, kind) / standard_s
            line.append(f"{measured:.3f} ({plan:.3f})")
    return facts.markdown(titles, lines)


def times_of(report: dict[str, Any]) -> Times:
    return {(t["kind"], t["link"]): t["forward_backward"] for t in report["times_s"]}


def case_table(case: Case, report: dict[str, Any]) -> str:
    times = times_of(report)
    layers, sp = report["layers"], case.sequence_parallel
    lines = []
    for name, kind in KINDS.items():
        if (name, "link") not in times or name == BLOCKING:
            continue
        cells = [""] * 3
        if name != NO_COMM:
            plan = shares(
                planned_link_s(case, report, times, name),
                all_link_time(layers, sp, report["link_s"]),
            )
            most = most_by_layers(kind, layers, sp) if kind.hides else None
            hidden = report["hidden_share"][BLOCKING][name]
            cells = [
                f"{hidden[p]:z.3f} ± {uncertainty(times, name, p):.3f} ({plan[p]:z.3f})"
                for p in ("forward", "backward")
            ]
            cells.append(f"{most['forward']:.3f}, {most['backward']:.3f}" if most else "")
        over = []
        for way in ("zero", "link"):
            low, middle, high = over_standard(times, name, way)
            over.append(facts.between(low, middle, high, 3))
        lines.append([name, *cells, *over])
    quotients = ("no link, over standard", "link, over standard")
    titles = ["", "forward (planned)", "backward (planned)", "most", *quotients]
    repetitions = min(len(found) for found in times.values())
    left_out = "".join(f"\n{n} left out: {why}." for n, why in report["left_out"].items())
    command = report["command"].partition(" --json")[0]
    for option in (" --ffn-hidden-size", " --micro-batch-size", " --also"):
        command = command.replace(option, f" \\\n       {option}")
    return (
        f"**{case.title}.** {repetitions} repetitions;\n{link_in_words(report)}.{left_out}\n\n"
        f"    {command}\n\n{facts.markdown(titles, lines)}\n"
    )


def tables(reports: dict[str, dict[str, Any]]) -> str:
    over_links = f"{OVER_LINKS}\n{links_table(reports)}\n"
    cases = [case_table(case, reports[name]) for name, case in CASES.items() if name in reports]
    return "\n".join([over_links, *cases])


def with_tables(page: str, reports: dict[str, dict[str, Any]]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"the page needs the two lines {BEGIN!r} and {END!r}"
    return f"{before}{BEGIN}\n{tables(reports)}\n{END}{after}"


def main() -> None:
    args = arguments()
    reports = json.loads(args.file.read_text()) if args.file.exists() else {}
    for name in args.cases:
        reports[name] = measure(CASES[name])
        facts.write(args.file, reports)
    args.page.write_text(with_tables(args.page.read_text(), reports))


if __name__ == "__main__":
    main()
