"""Writes a sweep's page: its runs, best rates, laws and predictions."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from pretrain.files import write_atomically
from pretrain.report.pages import render
from pretrain.run.metrics import read_metrics
from pretrain.sizes import in_units
from pretrain.sweep import words
from pretrain.sweep.analysis import Analysis, analysed
from pretrain.sweep.plots import pictures
from pretrain.sweep.results import Result, read_results

Table = tuple[str, list[str], list[list[str]]]


def write_sweep_report(folder: Path, output_dir: Path | None = None) -> tuple[Path, str]:
    """Writes index.html, PNGs and scaling.json for a sweep, finished or not.

    Args:
        folder: the sweep's.
        output_dir: None: `report` in that folder.

    Returns:
        The path of index.html, and its tables as text.

    Raises:
        UserError: the folder is no sweep's, no run is done, or scipy is not installed.
    """
    results = read_results(folder)
    if not any(run.loss is not None for run in results):
        raise UserError(f"{folder}: no run of the sweep is done yet")
    found = analysed(results)
    output_dir = output_dir or folder / "report"
    output_dir.mkdir(parents=True, exist_ok=True)
    drawn = pictures(found)
    for name, (png, _) in drawn.items():
        write_atomically(output_dir / f"{name}.png", png)
    write_atomically(
        output_dir / "scaling.json", json.dumps(_facts(folder, found, results), indent=1) + "\n"
    )
    page = output_dir / "index.html"
    text = render(
        "sweep/sweep.html.jinja",
        name=folder.absolute().name,
        done=sum(run.loss is not None for run in results),
        runs=results,
        in_units=in_units,
        noise=None if found.noise is None else f"{found.noise:.2%}",
        noise_source=found.noise_source,
        tables=_tables(found),
        sentences=words.rate_sentences(found),
        warnings=words.warnings(found),
        pictures=list(drawn.values()),
    )
    write_atomically(page, text)
    return page, words.summary(found)


def _tables(found: Analysis) -> list[Table]:
    tables = [
        ("Best learning rates", words.RATES, words.rate_rows(found)),
        ("L(N, D) = E + A / N^alpha + B / D^beta", words.LAWS, words.law_rows(found)),
        ("Sizes that were held out", words.HELD_OUT, words.held_out_rows(found)),
        ("The presets", words.PRESETS, words.preset_rows(found)),
    ]
    return [table for table in tables if table[2]]


def _facts(folder: Path, found: Analysis, results: list[Result]) -> dict[str, Any]:
    done = next(run.name for run in results if run.loss is not None)
    start = next(line for line in read_metrics(folder / done) if line["kind"] == "start")
    return {
        **{name: start[name] for name in ("device", "world_size", "versions")},
        "parameters_are": "without embeddings",
        "losses_are": "validation, nats a token, after the last step",
        "intervals_are": "90 %",
        "noise": found.noise,
        "noise_source": found.noise_source,
        "runs": [asdict(run) for run in results],
        "best_rates": [
            {
                **{
                    n: getattr(cell, n)
                    for n in ("kind", "size", "parameters", "tokens", "held_out")
                },
                **asdict(cell.best),
                "rate_between": cell.rate_between,
            }
            for cell in found.cells
        ],
        "rate_laws": {kind: asdict(rates) for kind, rates in found.rates.items()},
        "laws": {
            kind: {
                **asdict(fit.law),
                "between": {name: fit.between(name) for name in asdict(fit.law)},
                "errors": fit.errors,
            }
            for kind, fit in found.fits.items()
        },
        "not_fitted": found.not_fitted,
        "held_out": [{**asdict(p), "is_within": p.is_within} for p in found.held_out],
        "presets": [asdict(p) for p in found.presets],
    }
