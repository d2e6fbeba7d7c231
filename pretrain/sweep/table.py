"""The table of a sweep's runs, and how long those that are left will take."""

import statistics
from bisect import bisect
from pathlib import Path

from pretrain.run.metrics import read_metrics
from pretrain.sizes import in_units
from pretrain.sweep.checks import CheckedRun

Sample = tuple[float, float]
"""A finished run's work, and its seconds."""


def table(runs: list[CheckedRun]) -> str:
    """A line for each run, and their sums. Times are those of finished runs of this sweep, by work."""
    samples = finished_samples(runs)
    width = max(len(run.plan.name) for run in runs)
    lines = [f"{'run':{width}}  {'parameters':>10}  {'tokens':>8}  {'about':>8}"]
    for run in runs:
        about = "done" if run.state == "done" else in_time(seconds_of(run.work, samples))
        held = "  held out" if run.plan.held_out else ""
        begun = "  begun" if run.state == "begun" else ""
        lines.append(
            f"{run.plan.name:{width}}  {in_units(run.plan.parameters):>10}  "
            f"{in_units(run.plan.tokens):>8}  {about:>8}{held}{begun}"
        )
    left = [run for run in runs if run.state != "done"]
    tokens = in_units(sum(run.plan.tokens for run in left))
    lines.append(f"{len(runs)} runs, {len(runs) - len(left)} done; {tokens} tokens to train")
    if left and samples:
        seconds = [seconds_of(run.work, samples) or 0.0 for run in left]
        lines[-1] += f" in about {in_time(sum(seconds))}, one after another"
    elif left:
        lines[-1] += "; how long that takes is known when the first run is done"
    lines.append("Parameters are those without embeddings.")
    return "\n".join(lines)


def finished_samples(runs: list[CheckedRun]) -> list[Sample]:
    """Work and seconds of the runs that were trained in one start, from its first second to its last."""
    return [
        (run.work, seconds)
        for run in runs
        if run.state == "done" and (seconds := wall_s(run.plan.config.output_dir)) is not None
    ]


def wall_s(run_dir: Path | None) -> float | None:
    """How long a finished run took; None: it was started several times."""
    assert run_dir is not None
    lines = read_metrics(run_dir)
    starts = [line for line in lines if line["kind"] == "start"]
    ends = [line for line in lines if line["kind"] == "end"]
    if len(starts) != 1 or not ends or "unix_time" not in starts[0]:
        return None
    return max(0.0, ends[-1]["unix_time"] - starts[0]["unix_time"])


def seconds_of(work: float, samples: list[Sample]) -> float | None:
    """How long a run may take: on the line through the finished runs of the nearest work.

    Where all finished runs have the same work, in proportion to it: too much for runs so small that their
    start takes longest. None: no run is finished.
    """
    if not samples:
        return None
    by_work: dict[float, list[float]] = {}
    for at, seconds in samples:
        by_work.setdefault(at, []).append(seconds)
    works = sorted(by_work)
    means = [statistics.fmean(by_work[at]) for at in works]
    place = bisect(works, work)
    if place == 0:
        return means[0]
    if len(works) == 1:
        return means[0] * work / works[0]
    place = min(place, len(works) - 1)  # beyond the last, the line through the last two
    share = (work - works[place - 1]) / (works[place] - works[place - 1])
    return max(means[place - 1] + share * (means[place] - means[place - 1]), min(means))


def in_time(seconds: float | None) -> str:
    """Seconds in words; "?": not known."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
