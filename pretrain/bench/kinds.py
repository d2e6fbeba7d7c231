"""`megatron-ladder bench kinds`: every residual kind on the GPUs of this machine, at its best layouts."""

import difflib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import tyro

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from pretrain.bench.kinds_page import draw, figures, line, table
from pretrain.bench.kinds_plan import (
    ALIVE,
    LEAST_LAYERS,
    ROWS,
    START_S,
    Job,
    Setting,
    fitted,
    guessed_seconds,
    settings_of,
    write_job,
)
from pretrain.bench.machine import NO_MEMORY, Machine, look, processor, topology, without_folders
from pretrain.config.presets import OF_A_MODEL, PRESETS
from pretrain.config.values import to_dict
from pretrain.files import write_atomically
from pretrain.model.queues import PRIORITY, queue_variables
from pretrain.processes import STOP_SIGNALS, die_with_parent
from pretrain.ranks import check_gpus, launched_rank
from pretrain.run.ends import ENDS, left
from pretrain.run.versions import versions
from pretrain.start.launch import torchrun_command

SCHEMA = 1
PATIENCE_S = 240.0
"""Ranks that have run no pass for so long hang. A first pass compiles kernels and connects the ranks."""
GRACE_S = 60.0
"""The layout that is being measured at the end of the time gets so long to end: its row is kept then."""
_END_S = 10.0  # ranks get so long to end
_MOST_MINUTES = 10_000
_VARIABLES = ("NCCL_", "TORCH_NCCL_", "NVTE_", "CUDA_")
_ENDS = "ends"
_NO_TIME = "no time was left"


@dataclass(frozen=True)
class KindsOptions:
    """Measure every residual kind on this machine's GPUs, over their real links, in each layout.

    Forward and backward of a model's layers: standard, in halves, parallel, ladder and more, in turns.
    """

    output: tyro.conf.Positional[Path]
    """The result file (JSON), written anew after each layout. Beside it: a picture (.png), and what the
    ranks print (.log)."""
    preset: str = "llama-3-8b"
    """A preset of `train`: the shapes of its layers, as many of them as fit, and its sequence length."""
    nproc_per_node: int | None = None
    """Ranks. None: all GPUs of this machine; without GPUs 2."""
    minutes: float = 20.0
    """For all of it. The most important layouts come first; those that do not fit in are left out."""

    def __post_init__(self) -> None:
        names = [
            name
            for name, preset in PRESETS.items()
            if name not in OF_A_MODEL and preset().model.experts.num_moe_experts is None
        ]
        if self.preset not in names:
            near = difflib.get_close_matches(self.preset, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"no preset {self.preset!r}{hint}: choose one of {', '.join(names)}")
        if not 0 < self.minutes < _MOST_MINUTES:
            raise UserError(
                f"--minutes {self.minutes:g}: give more than 0 and less than {_MOST_MINUTES}"
            )
        if self.output.suffix != ".json":
            raise UserError(f"{self.output}: give a name that ends in .json")
        if self.nproc_per_node is not None and self.nproc_per_node < 2:
            raise UserError(
                f"--nproc-per-node {self.nproc_per_node}: one rank has nobody to talk to, so there is "
                "nothing to hide: give 2 or more"
            )


def main_kinds(options: KindsOptions, argv: list[str]) -> int:
    """Measures, and writes the result file after each layout.

    Returns:
        The exit status: 0; 1 where nothing could be measured; 130 where it was stopped by a signal.

    Raises:
        UserError: before anything starts: the file is there, or there are not two GPUs.
    """
    end_s = time.monotonic() + 60 * options.minutes
    if launched_rank():
        raise UserError(
            "bench kinds starts the ranks of this machine itself: run it once, without torchrun"
        )
    if options.output.exists():
        raise UserError(f"{options.output} is there already: give another name")
    machine = look()
    ranks = options.nproc_per_node or machine.cards or 2
    check_gpus(ranks, "--nproc-per-node")
    if ranks < 2:
        raise UserError("bench kinds measures what several GPUs hide: this machine has 1 GPU")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    bench = _Bench(options, machine, ranks, argv, end_s)
    print(bench.plan(), flush=True)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    stopped = False
    try:
        bench.measure()
    except KeyboardInterrupt:
        stopped = True
    bench.finish(stopped)
    if stopped:
        return 130
    return 0 if bench.has_times else 1


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


class _Bench:
    """A measurement: its settings, and the report so far."""

    def __init__(
        self, options: KindsOptions, machine: Machine, ranks: int, argv: list[str], end_s: float
    ) -> None:
        config = PRESETS[options.preset]()
        self._model: ModelConfig = config.model
        self._seq_length = config.data.seq_length
        self._options, self._machine, self._ranks = options, machine, ranks
        self._begin_s, self._end_s = time.monotonic(), end_s
        self.report: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": "megatron-ladder bench kinds",
            "command": " ".join(["megatron-ladder bench kinds", *without_folders(argv)]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "ended": "not yet",
            "device": machine.device,
            "ranks": ranks,
            "cards": machine.cards,
            "card_bytes": machine.card_bytes,
            "machine": processor(),
            "topology": topology() if machine.cards else None,
            "versions": {**versions(), **machine.libraries},
            "no_fp8": machine.no_fp8,
            "environment": without_folders(
                f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)
            ),
            "options": {"preset": options.preset, "minutes": options.minutes},
            "model": to_dict(self._model),
            "seq_length": self._seq_length,
            "rows": [],
        }
        self._left: list[Setting] = []
        for setting in settings_of(
            *(self._model, ranks),
            "bf16" if machine.cards else "fp32",
            fp8=bool(machine.cards) and not machine.no_fp8,
        ):
            try:
                fits = fitted(setting, self._model, self._seq_length, machine.card_bytes)
                self._left.append(fits)
            except UserError as error:
                self._add(setting, {"error": str(error)})
        self._guessed_s = self._guess(self._left)

    def plan(self) -> str:
        """What will be measured, in order, and a guess of its time."""
        total, asked = self._guessed_s, self._options.minutes
        out = [
            f"{self._options.preset} on {self._ranks} x {self._machine.device}, sequence "
            f"{self._seq_length}: {len(self._left)} layouts, each with up to "
            f"{max((len(s.kinds) for s in self._left), default=0)} kinds, in this order:",
            *(f"  {s.layout} ({s.num_layers} layers): {len(s.kinds)} kinds" for s in self._left),
        ]
        refused: dict[str, list[str]] = {}
        for row in self.report["rows"]:
            refused.setdefault(row["error"], []).append(row["layout"])
        for why, rows in refused.items():
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            out.append(f"not measured: {rows[0]}{more}: {why}")
        if self._machine.no_fp8 and self._machine.cards:
            out.append(f"not measured: FP8, which needs {self._machine.no_fp8}")
        short = "" if total < 60 * asked else ", so with fewer repetitions"
        return "\n".join(
            [
                *out,
                f"It takes about {total / 60:.0f} minutes (a guess); {asked:g} are given{short}.",
            ]
        )

    def measure(self) -> None:
        """Measures what is left, until the time is over."""
        while self._left and time.monotonic() < self._end_s:
            _, together = next(groupby(self._left, key=attrgetter("hardware_queues")))
            self._start(list(together))
        while self._left:
            self._done({"error": _NO_TIME})

    def _start(self, settings: list[Setting]) -> None:
        """Starts ranks for these settings. The one that makes them fail has a row with the reason."""
        done = 0
        with tempfile.TemporaryDirectory(prefix="megatron-ladder-") as name:
            folder = Path(name)
            job = Job(
                replace(self._model, vocab_size=None),
                self._seq_length,
                tuple(settings),
                len(self._left) - len(settings),
                time.time() + self._end_s - time.monotonic(),
            )
            write_job(folder, job)
            log = self._options.output.with_suffix(".log")
            ranks = _started(folder, self._ranks, settings[0].hardware_queues, log)
            try:
                for row in _rows(folder, ranks, self._end_s):
                    self._done(row)
                    done += 1
                hang = ranks.poll() is None
            finally:
                _end(ranks)
            if done == len(settings):
                return
            if hang and time.monotonic() >= self._end_s:
                return
            ends = left(str(folder / _ENDS))
            if ends:
                why = f"rank {ends[0].rank}: {ends[0].message}"
            elif hang:
                why = f"no pass has ended for {PATIENCE_S:.0f} s, so the ranks were ended"
            else:
                why = f"the ranks ended with exit status {ranks.returncode}: see the log"
        failed = self._left[0]
        self._done({"error": why})
        if NO_MEMORY in why and failed.num_layers >= 2 * LEAST_LAYERS:
            self._left.insert(0, replace(failed, num_layers=failed.num_layers // 2))

    def _done(self, row: dict[str, Any]) -> None:
        """Takes the first setting from what is left, with what was measured, or why nothing was."""
        print(line(self._add(self._left.pop(0), row)))
        if self._left:
            now, rest_s = time.monotonic(), self._guess(self._left)
            pace = (now - self._begin_s) / (self._guessed_s - rest_s)
            rest_s = min(pace * rest_s, max(0.0, self._end_s - now))
            print(f"  {len(self._left)} left, about {rest_s / 60:.1f} minutes", flush=True)

    def _add(self, setting: Setting, row: dict[str, Any]) -> dict[str, Any]:
        """Adds a row with its figures to the report, and writes it."""
        row = {"layout": setting.layout, **asdict(setting), **row}
        found = figures(row, self._model.num_layers, self._seq_length)
        self.report["rows"].append(found)
        self._write()
        return found

    def _write(self) -> None:
        write_atomically(self._options.output, json.dumps(self.report, indent=1) + "\n")

    def finish(self, stopped: bool) -> None:
        """Writes why it ended, draws the picture and prints the table."""
        no_time = any(row.get("error") == _NO_TIME for row in self.report["rows"])
        self.report["ended"] = (
            "stopped by a signal" if stopped else _NO_TIME if no_time else "complete"
        )
        self._write()
        print(table(self.report))
        if self.has_times:
            draw(self._options.output.with_suffix(".png"), self.report)
        print(f"\n{self._options.output}: {self.report['ended']}", flush=True)

    @property
    def has_times(self) -> bool:
        """Whether any kind has been measured."""
        kinds = [kind for row in self.report["rows"] for kind in row.get("kinds", {}).values()]
        return any("forward_backward_s" in kind for kind in kinds)

    def _guess(self, settings: list[Setting]) -> float:
        each = partial(
            guessed_seconds,
            model=self._model,
            seq_length=self._seq_length,
            device=self._machine.device,
        )
        starts = len(list(groupby(settings, key=attrgetter("hardware_queues"))))
        return sum(map(each, settings)) + START_S * starts


def _started(folder: Path, ranks: int, queues: int, log: Path) -> subprocess.Popen:
    """torchrun with the ranks, in a session of its own: a Ctrl-C reaches this process alone."""
    command, environment = torchrun_command(
        ranks, "--module", "pretrain.bench.kinds_ranks", str(folder)
    )
    environment.pop(PRIORITY, None)  # a user's own: `queues` says whether it is on
    environment |= {ENDS: str(folder / _ENDS), **queue_variables(queues)}
    with log.open("a") as file:
        return subprocess.Popen(  # noqa: S603 (a list)
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def _rows(folder: Path, ranks: subprocess.Popen, end_s: float) -> Iterator[dict[str, Any]]:
    """The rows that rank 0 writes, until the ranks have ended, hang, or the time is over.

    The setting that is measured when the time is over gets GRACE_S more. No other begins.
    """
    path, alive, seen = folder / ROWS, folder / ALIVE, 0
    begin = time.time()
    while True:
        is_last = ranks.poll() is not None  # asked first: nothing comes after it
        late_s = time.monotonic() - end_s
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        new, seen = lines[seen:], len(lines)
        for row in new:
            yield json.loads(row)
        is_over = late_s > (0 if new else GRACE_S)
        last = max([begin, *(p.stat().st_mtime for p in (path, alive) if p.exists())])
        if is_last or is_over or time.time() - last > PATIENCE_S:
            return
        time.sleep(0.2)


def _end(ranks: subprocess.Popen) -> None:
    """Ends torchrun and its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if ranks.poll() is not None:
            return
        os.killpg(ranks.pid, number)
        try:
            ranks.wait(_END_S)
        except subprocess.TimeoutExpired:
            continue
