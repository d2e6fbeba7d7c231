"""The report of `data clean`: figures, samples of what was dropped, and a summary for people."""

from collections import Counter
from typing import Any

import numpy as np

from data_prep.clean.passes import SAMPLES, Job, place_name
from data_prep.left_out import summary as left_out_summary
from data_prep.parts.plan import Part
from data_prep.read.reading import EXAMPLES


def make_report(judged: list[dict[str, Any]], written: list[dict[str, Any]]) -> dict[str, Any]:
    dropped, dropped_bytes = Counter[str](), Counter[str]()
    for part in (*judged, *written):
        dropped.update(part["dropped"])
        dropped_bytes.update(part["dropped_bytes"])
    passed = sum(part["kept"] for part in judged)
    documents = passed + sum(sum(part["dropped"].values()) for part in judged)
    text_bytes = sum(part["text_bytes"] for part in judged)
    return {
        "documents": documents,
        "text_bytes": text_bytes,
        "kept": {
            "documents": documents - dropped.total(),
            "text_bytes": text_bytes - dropped_bytes.total(),
        },
        "dropped": {
            why: {"documents": count, "text_bytes": dropped_bytes[why]}
            for why, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        },
        "bad_lines": sum(part["bad"]["count"] for part in judged),
    }


def choose_samples(
    job: Job, parts: list[Part], judged: list[dict[str, Any]], written: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The first documents dropped for each reason; duplicates with the name of the document they repeat."""
    seen = Counter[str]()
    chosen = []
    ends = np.cumsum([part["kept"] for part in judged])
    for one in (one for part in (*judged, *written) for one in part["samples"]):
        seen[one["reason"]] += 1
        if seen[one["reason"]] > SAMPLES:
            continue
        if (of := one.pop("of", None)) is not None:
            number = int(np.searchsorted(ends, of, side="right"))
            within = int(of - (ends[number] - judged[number]["kept"]))
            segment = next(s for s in judged[number]["sources"] if within < s["kept_up_to"])
            ordinals = np.memmap(job.file(parts[number], "ordinals"), "<u4", "r")
            one["repeats"] = place_name(segment["path"], segment["begin"], int(ordinals[within]))
        chosen.append(one)
    return chosen


def summarize(report: dict[str, Any], bad: list[str]) -> str:
    """What people read of the report, with some of the lines that could not be used."""
    total, kept = max(report["documents"], 1), report["kept"]
    lines = [
        f"{report['documents']:,} documents, {report['text_bytes'] / 1e6:.1f} MB of text; kept "
        f"{kept['documents']:,} ({100 * kept['documents'] / total:.1f} %), "
        f"{kept['text_bytes'] / 1e6:.1f} MB"
    ]
    lines += [
        f"  {count['documents']:>12,}  {100 * count['documents'] / total:5.1f} %  {why}"
        for why, count in report["dropped"].items()
    ]
    if report["bad_lines"]:
        lines.append(f"{report['bad_lines']:,} lines could not be used; the first ones:")
        lines += [f"  {example}" for example in bad[:EXAMPLES]]
    if "left_out" in report:
        lines.append(left_out_summary(report["left_out"]))
    return "\n".join(lines)
