"""Does a ladder model learn as well as a standard and a parallel one?

    python benchmarks/learning.py --data DATA --work-dir DIR --json FILE --picture FILE [options of `train`]

For each seed one run of each kind is trained: on the same tokens in the same order, with the same schedule
and the same first weights. Each run is an ordinary `megatron-ladder train` into a run folder of --work-dir.
So the same command goes on where it was stopped; when all runs are trained, it only writes the results
again. All other options are given to each `train`: sizes, batch, learning rate, layout, precision. Results
are written after each run of the first seed, then after each seed.

--text in place of --data makes a data set of the machine's own Python and C++ headers. With --seconds a
trial tells the speed, and each run gets as many of --train-tokens as there is time for, so that every
schedule is complete. --rates compares learning rates, in place of seeds.

The picture's other panels put the losses against the time that large shapes (--target) would take for as
many tokens on nodes of 8 GPUs at TP 8. The planner (pretrain/plan) models that time; it is not measured,
and it does not tell what the large shape would learn.
"""

import argparse
import json
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measuring import facts
from measuring.learning import source_text
from measuring.learning.kinds import KINDS, RESIDUALS, model_fields
from measuring.learning.modelled_time import Target, modelled
from measuring.learning.picture import draw
from measuring.learning.runs import Run, data_facts, last_loss, late_mean, read_run
from measuring.standby import Standby
from megatron_ladder.errors import UserError
from pretrain.data.folders import open_folder
from pretrain.files import write_atomically
from pretrain.plan.planner import DEVICES
from pretrain.start.arguments import parse_train

OURS = (
    *("--model.residual", "--model.ladder-layers", "--ladder-layers", "--init-from", "--seed"),
    *("--data.paths", "--output-dir", "--schedule.train-steps", "--schedule.train-tokens"),
)
SPARE = 0.95  # the share of the time left that is planned


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options of this benchmark, and those that are given to `train`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Other options are those of `megatron-ladder train`, given to each run.",
        allow_abbrev=False,
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, nargs="+", help="data set folders")
    data.add_argument(
        "--text",
        type=Path,
        nargs="*",
        help="folders of source files to make one of; none: this machine's",
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="with --text; default 8192")
    parser.add_argument("--work-dir", type=Path, required=True, help="for the run folders")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="PNG")
    parser.add_argument("--preset", default="tiny", help="of `train`; default tiny")
    parser.add_argument(
        "--train-tokens", type=int, default=1_500_000, help="of each run; default 1_500_000"
    )
    parser.add_argument("--seconds", type=float, help="for everything; fewer tokens if need be")
    parser.add_argument(
        "--trial-tokens", type=int, default=10_000_000, help="with --seconds; default 10_000_000"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--rates", nargs="+", help="learning rates, each with each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(RESIDUALS))
    parser.add_argument(
        "--target",
        nargs="*",
        default=["llama-3-8b"],
        help="presets whose time is modelled, with :GPUS for more than 8, and @LINK; none: no time is",
    )
    parser.add_argument("--device", choices=DEVICES, default="h100", help="that it is modelled on")
    return parser.parse_known_args()


def main() -> int:
    options, of_train = arguments()
    try:
        compare(options, of_train)
    except Failed as error:
        message, status = str(error), error.status
    except UserError as error:
        message, status = str(error), 2
    except OSError as error:
        message = f"{error.filename or 'the operating system'}: {error.strerror or error}"
        status = 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on from here", 130
    else:
        return 0
    print(f"learning.py: {message}", file=sys.stderr)
    return status


class Failed(Exception):
    """A training ended with this exit status. It has printed the reason."""

    def __init__(self, status: int) -> None:
        super().__init__(f"training ended with exit status {status}")
        self.status = status


def compare(options: argparse.Namespace, of_train: list[str]) -> None:
    """Trains what is not trained yet, and writes the results."""
    began = time.monotonic()
    refuse_ours(of_train, options.rates is not None)
    for path in options.data or ():
        check_data(path)
    targets = [modelled(target, options.device) for target in options.target]
    trainings = Trainings(options, of_train)
    for file in filter(None, (options.work_dir / "x", options.json, options.picture)):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        if options.data is None:
            folders = options.text or source_text.places()
            options.data = [source_text.make(folders, options.work_dir, options.vocab_size)]
            check_data(options.data[0])
        if options.seconds is not None:
            options.train_tokens = tokens_within(options, trainings, began)
        if options.rates:
            compare_rates(options, trainings)
        else:
            compare_kinds(options, trainings, targets)
    finally:
        trainings.end()


def refuse_ours(of_train: list[str], rates: bool) -> None:
    ours = (*OURS, "--optimizer.lr") if rates else OURS
    for option in of_train:
        if option.split("=")[0].replace("_", "-") in ours:
            raise UserError(f"{option} is not to be given: this benchmark sets it for each run")


def check_data(path: Path) -> None:
    if not open_folder(path).tokens("validation"):
        raise UserError(
            f"{path} has no validation split: tokenize it with --validation-fraction 0.01"
        )


class Trainings:
    """Runs one `train` after another. While one trains, the process of the next one imports."""

    def __init__(self, options: argparse.Namespace, of_train: list[str]) -> None:
        self._options, self._of_train = options, of_train
        trial = options.seconds is not None
        config, _ = parse_train(["--preset", options.preset, *of_train])
        self._num_layers = config.model.num_layers
        self._left = trial + len(options.kinds) * len(options.rates or options.seeds)
        self._now: Standby | None = None
        self._next: Standby | None = Standby(Path.cwd(), session=False)

    def train(self, kind: str, seed: int, run_dir: Path, tokens: int, *more: str) -> Run:
        """One run, to its end. Raises Failed."""
        command = self.command(kind, seed, run_dir, tokens, *more)
        print(f"== {run_dir.name}", flush=True)
        assert self._next is not None
        self._left -= 1
        self._now, self._next = self._next, None
        if self._left > 0:
            self._next = Standby(Path.cwd(), session=False)
        self._now.go(["-m", "pretrain.cli", "train", *command])
        if status := self._now.process.wait():
            raise Failed(status)
        return read_run(run_dir, kind, seed)

    def command(self, kind: str, seed: int, run_dir: Path, tokens: int, *more: str) -> list[str]:
        """The options of `train`."""
        fields = model_fields(kind, self._num_layers)
        layers = fields.get("ladder_layers")
        return [
            *("--preset", self._options.preset, "--eval-sequences", "None", *self._of_train, *more),
            *("--schedule.train-steps", "None", "--schedule.train-tokens", str(tokens)),
            *("--data.paths", *map(str, self._options.data), "--output-dir", str(run_dir)),
            *("--model.residual", fields["residual"], "--seed", str(seed)),
            *(("--model.ladder-layers", str(layers)) if layers is not None else ()),
        ]

    def end(self) -> None:
        for standby in (self._now, self._next):
            if standby is not None:
                standby.end()


def tokens_within(options: argparse.Namespace, trainings: Trainings, began: float) -> int:
    """How many tokens each run can train on in what is left of --seconds, by a trial's speed.

    Kept in the work folder: the same command goes on with as many.
    """
    file = options.work_dir / f"{options.json.stem}-tokens.json"
    if file.exists():
        return int(json.loads(file.read_text()))
    begin = time.monotonic()
    kind = options.kinds[-1]
    trial_dir = options.work_dir / f"{options.json.stem}-trial"
    lr = ["--optimizer.lr", options.rates[0]] if options.rates else []
    trial = trainings.train(kind, options.seeds[0], trial_dir, options.trial_tokens, *lr)
    rate = trial["tokens_per_second"]
    # What a run takes besides: its start, validation, the last checkpoint.
    besides_s = time.monotonic() - begin - trial["training"]["tokens"][-1] / rate
    runs = len(options.kinds) * len(options.rates or options.seeds)
    left_s = SPARE * (options.seconds - (time.monotonic() - began))
    fit = int(rate * (left_s / runs - max(0.0, besides_s)))
    tokens = min(options.train_tokens, max(fit, options.trial_tokens))
    print(
        f"{rate:,} tokens/s, {besides_s:.0f} s besides; {left_s:.0f} s for {runs} runs: "
        f"{tokens:,} tokens each of {options.train_tokens:,} asked for",
        flush=True,
    )
    if fit < tokens:
        needed_s = runs * (max(0.0, besides_s) + tokens / rate)
        print(
            f"NOT ALL RUNS WILL END IN TIME: that takes {needed_s:.0f} s. Give more --seconds, or fewer "
            "--kinds, --rates, --seeds or --trial-tokens (the fewest tokens of a run)",
            flush=True,
        )
    write_atomically(file, json.dumps(tokens))
    return tokens


def compare_kinds(options: argparse.Namespace, trainings: Trainings, targets: list[Target]) -> None:
    """Every kind has its first seed before any has its second."""
    kinds, seeds = list(dict.fromkeys(options.kinds)), list(dict.fromkeys(options.seeds))
    runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for number, seed in enumerate(seeds):
        for kind in kinds:
            run_dir = options.work_dir / f"{kind}-seed{seed}"
            runs[kind].append(trainings.train(kind, seed, run_dir, options.train_tokens))
            if number == 0 or kind == kinds[-1]:
                write_results(options, {k: r for k, r in runs.items() if r}, targets)


def compare_rates(options: argparse.Namespace, trainings: Trainings) -> None:
    """Every rate has all kinds before the next one begins: what a kill leaves can be compared."""
    rows: list[dict[str, Any]] = []
    for rate in options.rates:
        for kind in options.kinds:
            run_dir = options.work_dir / f"{options.json.stem}-{rate}-{kind}"
            tokens, seed = options.train_tokens, options.seeds[0]
            run = trainings.train(kind, seed, run_dir, tokens, "--optimizer.lr", rate)
            loss = round(last_loss(run), 5)
            rows.append(
                {"rate": rate, "kind": kind, "loss": loss, "tokens": run["training"]["tokens"][-1]}
            )
            write(options, {**about(options, run), "rates": rows})
    found = {(row["rate"], row["kind"]): row["loss"] for row in rows}
    lines = [[r, *(f"{found[r, k]:.4f}" for k in options.kinds)] for r in options.rates]
    print(facts.markdown(["learning rate", *options.kinds], lines), flush=True)


def about(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """The first fields of the results."""
    return {
        "command": facts.command(),
        "device": f"{run['ranks']} x {run['device']} ({platform.machine()})",
        "versions": run["versions"],
        "data": [data_facts(path) for path in options.data],
        "tokens": run["training"]["tokens"][-1],
    }


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1)
    # A curve on a line.
    text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m.group().split()), text)
    write_atomically(options.json, text + "\n")


def write_results(
    options: argparse.Namespace, runs: dict[str, list[Run]], targets: list[Target]
) -> None:
    """The table on the screen, the JSON and the picture of the seeds that are done."""
    rows = table(runs, targets)
    a_run = next(iter(runs.values()))[0]
    seeds = range(len(rows[0]["seeds"]))
    columns = {
        "": "{kind}",
        "parameters": "{parameters:,}",
        "validation loss by seed": ", ".join(f"{{losses[{i}]:.4f}}" for i in seeds),
        "mean": "{mean:.4f}",
        **({"deviation": "{deviation:.4f}"} if len(seeds) > 1 else {}),
        f"less {a_run['kind']}'s": ", ".join(f"{{less_the_firsts[{i}]:+.4f}}" for i in seeds),
        "tokens/s": "{tokens_per_second:,}",
    }
    if "load_balance" in a_run:
        columns["fullest expert over the mean, by seed"] = ", ".join(
            f"{{expert_imbalance[{i}]:.2f}}" for i in seeds
        )
        columns["dropped, %"] = "{dropped_percent:.2f}"
    for target in targets:
        columns[f"time of {target.name}, modelled"] = f"{{modelled_time[{target.name}]:.3f}}"
    print("\n" + facts.table(rows, columns) + "\n", flush=True)
    write(
        options,
        {
            **about(options, a_run),
            "rows": rows,
            "about_parameters": "kinds differ in norms alone: parallel has one a layer, the others two",
            "about_losses": "nats a token of the whole validation split, or of --eval-sequences of it; "
            "of several data sets the mean",
            "modelled": [target.facts(list(runs)) for target in targets],
            "runs": [run for of_kind in runs.values() for run in of_kind],
        },
    )
    if options.picture:
        write_atomically(options.picture, draw(runs, targets))


def table(runs: dict[str, list[Run]], targets: list[Target]) -> list[dict[str, Any]]:
    """Final validation losses by kind, against the first kind's of the same seed, and the modelled times in
    units of the first's."""
    first = next(iter(runs))
    rows = []
    for kind, of_kind in runs.items():
        last = [last_loss(run) for run in of_kind]
        firsts = [last_loss(run) for run in runs[first]]
        rows.append(
            {
                "kind": kind,
                "parameters": of_kind[0]["parameters"],
                "seeds": [run["seed"] for run in of_kind],
                "losses": [round(loss, 5) for loss in last],
                "mean": round(statistics.fmean(last), 5),
                **({"deviation": round(statistics.stdev(last), 5)} if len(last) > 1 else {}),
                "less_the_firsts": [round(a - b, 5) for a, b in zip(last, firsts, strict=True)],
                "tokens_per_second": of_kind[0]["tokens_per_second"],
                "modelled_time": {
                    t.name: round(t.token_s(kind) / t.token_s(first), 4) for t in targets
                },
                **balance(of_kind),
            }
        )
    return rows


def balance(runs: list[Run]) -> dict[str, Any]:
    """How evenly the experts of one kind's runs were used, in the second half of the training."""
    if "load_balance" not in runs[0]:
        return {}
    dropped = statistics.fmean(late_mean(run, "dropped_share") for run in runs)
    return {
        "expert_imbalance": [late_mean(run, "expert_imbalance") for run in runs],
        "dropped_percent": round(100 * dropped, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
