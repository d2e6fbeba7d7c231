"""Tables of overlap.py's results, in Markdown."""

import statistics
from typing import Any

from measuring import facts
from measuring.facts import between, percent
from measuring.overlap.hidden import PASSES, Shares, Times, link_in_words, over_standard
from pretrain.bench.kinds_plan import BLOCKING, KINDS

Report = dict[str, Any]
"""The JSON of a run."""


def milliseconds(report: Report, kind: str, link: str) -> str:
    """The median of forward and backward together."""
    times = [t for t in report["times_s"] if (t["kind"], t["link"]) == (kind, link)]
    return f"{1e3 * statistics.median(map(sum, times[0]['forward_backward'])):.1f}" if times else ""


def most_hidden(report: Report, kind: str) -> dict[str, Shares]:
    """The most that a kind can hide, by how it was found. Older results have ladder's alone."""
    found = report["most_hidden"]
    of_all = found if set(found) <= set(KINDS) else {"ladder": found}
    return of_all.get(kind, {})


def kinds_table(reports: dict[str, Report]) -> str:
    """Of each kind the hidden shares beside the most, and its time over standard's, with and without the
    link."""
    texts = []
    for name, report in reports.items():
        times: Times = {(t["kind"], t["link"]): t["forward_backward"] for t in report["times_s"]}
        shares = report["hidden_share"][BLOCKING]
        lines = []
        for kind in KINDS:
            if (kind, "link") not in times:
                continue
            most = most_hidden(report, kind)
            bound = most.get("planner") or most.get("layers")
            hidden = [
                percent(shares[kind][p]) + (f" of {percent(bound[p])}" if bound else "")
                for p in PASSES
                if kind in shares
            ]
            over = (
                between(low, middle, high, 3)
                for low, middle, high in (over_standard(times, kind, w) for w in ("zero", "link"))
            )
            lines.append([kind, *(hidden or [""] * len(PASSES)), *over])
        left_out = [f"\n\nNot measured, {kind}: {why}." for kind, why in report["left_out"].items()]
        repetitions = min(len(found) for found in times.values())
        texts.append(
            f"Part `{name}`, {report['layers']} layers, {repetitions} repetitions. "
            f"{link_in_words(report).capitalize()}.\n\n"
            + facts.markdown(["", *PASSES, "no link, over standard", "link, over standard"], lines)
            + "".join(left_out)
        )
    return "\n\n".join(texts)


def hidden_table(reports: dict[str, Report]) -> str:
    """Shares of the link's time that each kind hides, and the most that ladder can."""
    texts = []
    for name, report in reports.items():
        found = report["hidden_share"][BLOCKING]
        lines = [
            [
                "megatron-core's standard" if kind == "standard" else kind,
                *(percent(found[kind][part]) for part in PASSES),
                *(milliseconds(report, kind, link) for link in ("link", "zero")),
            ]
            for kind in ("standard", "parallel", "ladder")
            if kind in found
        ]
        most = most_hidden(report, "ladder")
        for by, words in (
            ("layers", "number of layers"),
            ("planner", "times and the planner's model"),
        ):
            if by in most:
                bounds = [percent(most[by][part]) for part in PASSES]
                lines.append([f"ladder at most, by its {words}", *bounds])
        allocations = sum(sum(steps[1:]) for steps in report["device_allocations"].values())
        texts.append(
            f"Part `{name}`, {report['layers']} layers. Without the link ladder takes "
            f"{report['ladder_over_standard_zero_delay']} of\nstandard's time. CUDA was asked for "
            f"memory {allocations} times while it was measured.\n\n"
            + facts.markdown(["hidden", *PASSES, "ms, link", "ms, no link"], lines)
        )
    return "\n\n".join(texts)


def connections_table(reports: dict[str, Report]) -> str:
    """The second stream of sequence parallelism by the number of hardware queues."""
    lines = []
    for name, report in reports.items():
        shares = report["hidden_share"][BLOCKING]["ladder"]
        times = [milliseconds(report, "ladder", link) for link in ("link", "zero")]
        cells = [
            f"{percent(shares[p])} of {percent(most_hidden(report, 'ladder')['layers'][p])}"
            for p in PASSES
        ]
        lines.append([name.removeprefix("connections-"), *cells, *times])
    titles = ["queues", *(f"hidden, {p}" for p in PASSES)]
    return facts.markdown([*titles, "ladder, ms, link", "no link"], lines)
