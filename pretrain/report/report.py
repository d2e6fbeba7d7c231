"""Draws runs side by side: an HTML page that needs no other file, and its pictures as PNGs too."""

import statistics
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import in_words
from pretrain.config.train import differences, load_config
from pretrain.evaluation.results import cells
from pretrain.files import write_atomically
from pretrain.report.balance import balance_in_words, draw_balance, has_balance
from pretrain.report.evaluated import draw_needles, draw_positions
from pretrain.report.pages import labels, render
from pretrain.report.plots import draw_losses, draw_series
from pretrain.report.runs import Lines, Run, read_run
from pretrain.report.scores import MOST, draw_scores, names_of
from pretrain.run.lines import left_out


def write_report(run_dirs: list[Path], output_dir: Path | None = None) -> Path:
    """Writes index.html and PNGs for one or several runs, finished or not.

    Args:
        run_dirs: the runs' folders; all others are compared with the first.
        output_dir: None: `report` in the first run's folder.

    Returns:
        The path of index.html.

    Raises:
        UserError: no folder is given, a folder is no run, or its metrics cannot be read.
    """
    if not run_dirs:
        raise UserError("no run is given: give one or several run folders")
    runs = [read_run(path, label) for path, label in zip(run_dirs, labels(run_dirs), strict=True)]
    output_dir = output_dir or run_dirs[0] / "report"
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is no folder: give another --output-dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    # A branch's time begins at 0, so it is not drawn beside a run that has trained from the start.
    timed = [run for run in runs if run.is_branch == runs[0].is_branch]
    pictures = {
        "loss_by_tokens": (draw_losses(runs, "tokens"), "Loss against tokens"),
        "loss_by_time": (draw_losses(timed, "time"), "Loss against training time"),
        "learning_rate": (draw_series(runs, "learning_rate"), "Learning rate"),
        "grad_norm": (draw_series(runs, "grad_norm"), "Gradient norm, before clipping"),
        "throughput": (draw_series(runs, "tokens_per_second"), "Tokens a second"),
    }
    if any(has_balance(run) for run in runs):
        title = "Experts: how evenly tokens are sent to them, and how sure the routers are"
        pictures["experts"] = (draw_balance(runs), title)
    if names := names_of(runs):
        title = "What `eval` measured at several steps, beside the loss"
        if len(names) > MOST:
            title += f"; the first {MOST} of {len(names)} figures"
        pictures["scores"] = (draw_scores(runs), title)
    if any(run.results("by_position") for run in runs):
        title = "Loss against the number of tokens before a token, as `eval` measured it"
        pictures["loss_by_position"] = (draw_positions(runs), title)
    if any(run.results("by_place") for run in runs):
        title = "Needles in a haystack of the data set's text, as `eval` measured them"
        pictures["needle"] = (draw_needles(runs), title)
    for name, (png, _) in pictures.items():
        write_atomically(output_dir / f"{name}.png", png)
    page = output_dir / "index.html"
    write_atomically(page, _page(runs, pictures))
    return page


def _summary(run: Run) -> list[tuple[str, str]]:
    """The table's rows for one run: name and value."""
    start = run.start
    rows = [
        ("residual", start["residual"]),
        ("parameters", _parameters(start)),
        ("device", f"{start['world_size']} x {start['device']}"),
    ]
    if trunk := start.get("branch_from"):
        rows.append(("branch of", in_words(str(trunk))))
    for line in run.changes:
        rows.append((f"changed after step {line['step']:,}", _changed(line["changed"])))
    if run.train:
        last = run.train[-1]
        rows += [
            ("step", f"{last['step']:,} of {start['train_steps']:,}"),
            ("tokens", f"{last['tokens']:,}"),
            ("training time", _duration(last["time"])),
            (
                "tokens a second, median",
                f"{statistics.median(m['tokens_per_second'] for m in run.train):,.0f}",
            ),
            ("training loss, last", f"{last['loss']:.4f}"),
        ]
    for dataset in run.datasets():
        lines = run.validation_of(dataset)
        last, best = lines[-1], min(lines, key=lambda m: m["loss"])
        rows.append((f"validation loss, {dataset}", f"{last['loss']:.4f}"))
        rows.append((f"perplexity, {dataset}", f"{last['perplexity']:.2f}"))
        if best is not last:
            rows.append(
                (
                    f"lowest validation loss, {dataset}",
                    f"{best['loss']:.4f} at step {best['step']:,}",
                )
            )
        if dataset in run.unigram:
            unigram = run.unigram[dataset]
            rows.append((f"entropy of single tokens, {dataset}", f"{unigram:.4f}"))
            rows.append((f"nats below that entropy, {dataset}", f"{unigram - last['loss']:.4f}"))
    if run.evaluated:
        step, results = run.evaluated
        rows.append(("evaluated at step", f"{step:,}"))
        rows += [
            (f"{task} {metric}, {data}", value) for task, data, metric, value, _ in cells(results)
        ]
    if has_balance(run):
        rows += balance_in_words(run)
    if exported := [line["folder"] for line in run.beside if line["kind"] == "export"]:
        rows.append(("exported", ", ".join(dict.fromkeys(exported))))
    state = "finished" if run.finished else "in progress or stopped"
    restarts = f"{run.restarts} restart" + "s" * (run.restarts > 1)
    rows.append(("state", state + (f", {restarts}" if run.restarts else "")))
    return rows + _trouble(run)


def _parameters(start: dict[str, Any]) -> str:
    """The number of the model's parameters; of a side-tuned run the side network's too."""
    whole = start["parameters"]
    trained = start.get("trained_parameters", whole)  # older runs have trained all
    return f"{whole:,}" if trained == whole else f"{whole:,}, and {trained:,} of a side network"


def _changed(changed: dict[str, list[Any]]) -> str:
    return "; ".join(f"{name}: {_value(a)} -> {_value(b)}" for name, (a, b) in changed.items())


def _value(value: Any) -> str:
    """A value of the configuration; lists, such as of data sets, may be long."""
    text = in_words(str(value))
    return text if len(text) < 120 else f"{text[:117]}..."


def _trouble(run: Run) -> list[tuple[str, str]]:
    """Rows on the time that a run lost, its bad steps and its slow ranks."""
    rows = []
    if good := run.goodput:
        rows += [
            ("wall-clock time since the first start", _duration(good.wall)),
            ("share of it in steps that count (goodput)", f"{100 * good.share:.1f}%"),
            ("time from a start to its first step, all starts", _duration(good.starting)),
        ]
        if run.restarts:
            rows += [
                (
                    "how earlier starts ended",
                    ", ".join(f"{n} x {end}" for end, n in good.ends.items()),
                ),
                ("time between starts", _duration(good.between)),
                ("steps that were lost and trained again", f"{good.steps_again:,}"),
            ]
    if run.bad_steps:
        passed_over = [b["passed_over"] for b in run.bad_steps if b["passed_over"]]
        over = sum(last - first + 1 for first, last in passed_over)
        last = run.bad_steps[-1]
        rows.append(
            (
                "bad steps",
                f"{len(run.bad_steps)}, so {over} steps are not in the weights; "
                f"the last bad step is {last['step']:,}: {in_words(last['reason'])}",
            )
        )
    done = {(line["step"], line["kind"]) for line in run.beside}
    failed = {
        (line["step"], line["what"]): line["reason"]
        for line in run.beside
        if line["kind"] == "watch_failed"
    }
    for (step, what), reason in failed.items():
        again = ", and later succeeded" if (step, what) in done else ""
        rows.append((f"{what} of step {step:,}", f"failed: {in_words(reason)}{again}"))
    left = [line for line in run.beside if line["kind"] == "watch_left_out"]
    for what, words in (("evaluation", "measurements"), ("export", "exports")):
        if steps := sorted({line["step"] for line in left if left_out(line) == what}):
            rows.append((f"steps left out of the {words}", ", ".join(f"{n:,}" for n in steps)))
    by_rank: dict[tuple[int, str, str], Lines] = {}
    for line in run.slow_ranks:
        by_rank.setdefault((line["rank"], line["host"], line["what"]), []).append(line)
    for (rank, host, what), lines in by_rank.items():
        last = lines[-1]
        often = "once" if len(lines) == 1 else f"{len(lines):,} times"
        rows.append(
            (
                f"slow at {what}: rank {rank} on {host}",
                f"found {often}; at step {last['step']:,} it took "
                f"{last['seconds']:.3g} s, the median of all ranks was {last['median']:.3g} s",
            )
        )
    return rows


def _comparison(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of the other runs' validation loss minus the first run's: at the end, and at equal time."""
    rows = []
    first = runs[0]
    for dataset in first.datasets():
        at_end, at_time = ["-"], ["-"]
        for other in runs[1:]:
            mine, theirs = first.validation_of(dataset), other.validation_of(dataset)
            if not theirs:
                at_end.append("-")
                at_time.append("-")
                continue
            at_end.append(f"{theirs[-1]['loss'] - mine[-1]['loss']:+.4f}")
            if first.is_branch != other.is_branch:
                at_time.append("- (a branch's time begins where it branches off)")
                continue
            seconds = min(mine[-1]["time"], theirs[-1]["time"])
            pair = (other.loss_at(dataset, seconds), first.loss_at(dataset, seconds))
            at_time.append(
                "-" if None in pair else f"{pair[0] - pair[1]:+.4f} at {_duration(seconds)}"  # type: ignore[operator]
            )
        rows.append((f"last validation loss minus {first.label}'s, {dataset}", at_end))
        rows.append((f"the same difference at equal training time, {dataset}", at_time))
    return rows


def _page(runs: list[Run], pictures: dict[str, tuple[bytes, str]]) -> str:
    summaries = [dict(_summary(run)) for run in runs]
    names = list(dict.fromkeys(name for summary in summaries for name in summary))
    rows = [(name, [summary.get(name, "-") for summary in summaries]) for name in names]
    if len(runs) > 1:
        rows += _comparison(runs)
    changed = []
    if all(run.config_text for run in runs):
        configs = [load_config(run.path / "config.json") for run in runs]
        for other, config in zip(runs[1:], configs[1:], strict=True):
            changed += [
                (other.label, name, str(a), str(b))
                for name, (a, b) in differences(configs[0], config).items()
                if not name.startswith("past.")  # what was trained before a change, not a choice
            ]
    return render(
        "report/report.html.jinja",
        runs=runs,
        rows=rows,
        changed=changed,
        pictures=list(pictures.values()),
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
