"""Weights of several data sets, written as the configuration that `train` reads."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from data_prep.dataset.folder import DataSet, open_data_set
from data_prep.errors import UserError
from data_prep.files import write_durably


@dataclass(frozen=True)
class Blend:
    """Choose how much of each data set to train on; writes a file for `train --config`."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Data set folders, of one tokenizer."""
    output: Path
    """The file to write (.json): `megatron-ladder train --preset NAME --config FILE`."""
    temperature: float | None = None
    """Weights are tokens to the power of 1 / temperature: 1 takes each as often as the others, higher
    ones take more of the small."""
    epochs: tuple[float, ...] | None = None
    """How many times to go through each data set; how long to train follows."""
    weights: tuple[float, ...] | None = None
    """Shares of the tokens trained on, in any unit."""
    then: tuple[float, ...] | None = None
    """Other weights later on: the tokens trained on before them, then one weight for each data set (0
    leaves it out); and so on. Weights from the start on may then be 0."""
    train_tokens: int | None = None
    """How long training will be: shows the tokens and epochs of each data set."""


def blend(options: Blend) -> str:
    """Writes the file; returns a table of what it means.

    Raises:
        UserError: data sets that cannot be blended, or numbers that make no weights.
    """
    _check(options)
    sets = [open_data_set(path) for path in options.data]
    _check_sets(sets)
    tokens = [data.manifest["splits"]["train"]["tokens"] for data in sets]
    weights = _weights(options, tokens)
    total = options.train_tokens
    if options.epochs:
        all_epochs = sum(e * t for e, t in zip(options.epochs, tokens, strict=True))
        if not 1 <= all_epochs < 1 << 62:
            raise UserError(
                f"--epochs: they come to {all_epochs:.3g} tokens in all: give other numbers"
            )
        total = round(all_epochs)
    phases = _phases(options)
    data = {"paths": [str(d.path.resolve()) for d in sets], "weights": weights, "phases": phases}
    write_durably(options.output, json.dumps({"data": data}, indent=2) + "\n")
    command = f"megatron-ladder train --preset NAME --config {options.output}"
    if total:
        # A preset that sets steps is refused tokens beside them.
        command += f" --schedule.train-steps None --schedule.train-tokens {total}"
    starts = [phase["from_tokens"] for phase in phases]
    stretches = zip(
        [weights, *(p["weights"] for p in phases)], [0, *starts], [*starts, total], strict=True
    )
    tables = []
    for weights, start, end in stretches:
        tables += [f"from {start:,} tokens on"] if start else []
        tables.append(table(sets, tokens, weights, end - start if end else None))
    return "\n".join([*tables, "", command])


def table(sets: list[DataSet], tokens: list[int], weights: list[float], total: int | None) -> str:
    """A line for each data set: its tokens and weight; with `total`, how many tokens and epochs of it a
    training of `total` tokens takes."""
    width = max(len(str(data.path)) for data in sets)
    heading = f"{'data set':<{width}} {'tokens':>16} {'weight':>8}"
    lines = [heading + (f" {'tokens taken':>16} {'epochs':>8}" if total else "")]
    for data, count, weight in zip(sets, tokens, weights, strict=True):
        line = f"{str(data.path)!s:<{width}} {count:>16,} {weight:>8.4f}"
        if total:
            line += f" {weight * total:>16,.0f} {weight * total / count:>8.2f}"
        lines.append(line)
    return "\n".join(lines)


def _weights(options: Blend, tokens: list[int]) -> list[float]:
    """The weights of the data sets; they add up to 1."""
    if options.weights:
        raw = list(options.weights)
    elif options.epochs:
        raw = [e * t for e, t in zip(options.epochs, tokens, strict=True)]
    else:
        largest = max(tokens)  # powers of shares, as those of large numbers are not exact
        raw = [(t / largest) ** (1 / (options.temperature or 1.0)) for t in tokens]
    total = math.fsum(raw)
    return [value / total for value in raw]


def _phases(options: Blend) -> list[dict[str, Any]]:
    """The phases as `train` reads them; the weights of each add up to 1."""
    then, each = options.then or (), 1 + len(options.data)
    phases = []
    for begin in range(0, len(then), each):
        start, *raw = then[begin : begin + each]
        total = math.fsum(raw)
        weights = [value / total for value in raw]
        phases.append({"from_tokens": int(start), "weights": weights})
    return phases


def _check_phases(options: Blend) -> None:
    then, each = options.then or (), 1 + len(options.data)
    if len(then) % each or options.then == ():
        raise UserError(
            f"--then has {len(then)} values: give the tokens before the change and {len(options.data)} "
            f"weights, {each} values for each change"
        )
    if not all(0 <= value < math.inf for value in then):
        raise UserError("--then: tokens and weights are 0 or more")
    before = 0.0
    for begin in range(0, len(then), each):
        start, *weights = then[begin : begin + each]
        if start != int(start) or start <= before:
            raise UserError(
                f"--then {start:g}: give a whole number of tokens above {before:g}: changes are in order"
            )
        if not any(weights):
            raise UserError(f"--then {start:g}: its weights are all 0")
        before = start
    if before and options.train_tokens and before >= options.train_tokens:
        raise UserError(
            f"--then {before:g} is not before the end, --train-tokens {options.train_tokens}"
        )


def _check(options: Blend) -> None:
    if not options.data:
        raise UserError("no data: give data set folders")
    ways = {
        "--temperature": options.temperature,
        "--epochs": options.epochs,
        "--weights": options.weights,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both given: weights come from one of them")
    if options.then is not None:
        if options.epochs:
            raise UserError("--epochs counts over the whole training: with --then give --weights")
        _check_phases(options)
    if options.epochs and options.train_tokens:
        raise UserError("--epochs says how long to train: leave out --train-tokens")
    for name in ("epochs", "weights"):
        values = getattr(options, name)
        if values is not None and len(values) != len(options.data):
            raise UserError(f"--{name} has {len(values)} values for {len(options.data)} data sets")
    weights = options.weights or ()
    if options.then and any(weights):  # one that is 0 may come later
        weights = tuple(weight for weight in weights if weight)
    numbers = [options.temperature, *(options.epochs or ()), *weights]
    for number in (*numbers, options.train_tokens):
        if number is not None and not 0 < number < math.inf:
            raise UserError(
                f"{number}: --temperature, --epochs, --weights and --train-tokens are above 0"
            )
    if options.output.exists():
        raise UserError(f"--output {options.output} exists: choose another name, or remove it")
    if options.output.suffix != ".json" or not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: give a .json file in a folder that exists")


def _check_sets(sets: list[DataSet]) -> None:
    seen: dict[Path, Path] = {}
    for data in sets:
        if (place := data.path.resolve()) in seen:
            raise UserError(f"{data.path} is given twice: give it more --epochs or weight instead")
        seen[place] = data.path
        if problems := data.wrong_sizes():
            raise UserError(f"{problems[0]}: the data set is damaged, tokenize again")
        if "train" not in data.manifest["splits"]:
            raise UserError(f"{data.path} has no train split")
        ours, first = data.manifest["tokenizer"], sets[0].manifest["tokenizer"]
        if ours.get("bos_id") != first.get("bos_id"):
            raise UserError(
                f"documents of {data.path if 'bos_id' in ours else sets[0].path} begin with a BOS token, "
                "those of the other data set do not: tokenize one of them again, both with --add-bos or "
                "both without"
            )
        if ours["sha256"] != first["sha256"] or ours["eod_id"] != first["eod_id"]:
            raise UserError(
                f"{data.path} and {sets[0].path} were tokenized with different tokenizers: ids mean "
                "different things; tokenize one of them again"
            )
