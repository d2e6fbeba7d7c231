"""What does it cost a training that its checkpoints are measured beside it?

    python benchmarks/commands/watching.py --ranks 2 --json benchmarks/results/watching.json

A preset is trained by the command line, on --ranks tensor-parallel ranks with one thread each: as many as
this machine has cores, or fewer, which leaves a core for the measurements. In every second run its
checkpoints are measured by last_word and continuation at the default interval, which is each checkpoint.
The runs are made in turns; the order within a pair alternates.

steps         seconds from the first checkpoint's step to the last step, with saves and validations: from
              then on a checkpoint is being measured, or the next one is waited for
ranks' CPU    processor seconds of the ranks and their helpers, in the whole run
beside        processor seconds of the processes that measure, until the last step is printed
measured      checkpoints whose measurement has ended by then
end           seconds from the last step to the end of the run: the last checkpoint is measured, too

`cost` is the time of the steps with measurements over that without, less 1: the median of the pairs, and
each pair's. On a machine that does other work too, the clock says little: then compare the ranks' CPU time,
which does not count the time in which a rank waits for its core.
"""

import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.options import parser_of
from pretrain.config.presets import PRESETS

STEP = re.compile(r"step +(\d+)/\d+ \|")
MEASURED = re.compile(r"step \d+: measured: ")
TASKS = ["--watch.tasks", "last_word", "continuation"]
TEXT = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest")
POLL_S = 0.2


class Processors(threading.Thread):
    """The processor time of a training and of what runs beside it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._training = psutil.Process(pid)
        self._seconds: dict[int, tuple[bool, float]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(POLL_S):
            self.look()

    def look(self) -> None:
        try:
            processes = [self._training, *self._training.children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                words, times = process.cmdline(), process.cpu_times()
            except psutil.Error:
                continue
            if words:  # a process that has ended has none, and was counted before
                self._seconds[process.pid] = (is_beside(words), times.user + times.system)

    def so_far(self) -> dict[str, float]:
        """Seconds of the ranks, and of what is beside them."""
        seconds = list(self._seconds.values())
        return {
            name: sum(s for beside, s in seconds if beside == wanted)
            for name, wanted in (("ranks_cpu", False), ("beside_cpu", True))
        }

    def stop(self) -> None:
        self._over.set()
        self.join()


def is_beside(words: list[str]) -> bool:
    """Whether a process, by its command line, measures checkpoints, and trains nothing."""
    return "pretrain.watch.child" in words or "eval" in words


def prepare(work: Path) -> None:
    """A tokenizer and a data set, of packages of Python's library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = [*(str(library / name) for name in TEXT), "--include", "*.py"]
    tokenizer = ["--vocab-size", "2000", "--output-dir", str(work / "tokenizer")]
    data = ["--tokenizer", str(work / "tokenizer" / "tokenizer.model")]
    data += ["--validation-fraction", "0.2", "--output-dir", str(work / "data")]
    for command in (["train-tokenizer", *text, *tokenizer], ["tokenize", *text, *data]):
        whole = [sys.executable, "-m", "pretrain.cli", "data", *command]
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)  # noqa: S603


def train(work: Path, name: str, options: list[str], first: int) -> dict[str, float]:
    """One run.

    Args:
        first: the step from which on its time counts.
    """
    places = ["--data.paths", str(work / "data"), "--output-dir", str(work / name)]
    command = [sys.executable, "-m", "pretrain.cli", "train", *options, *places]
    process = subprocess.Popen(  # noqa: S603 (a list)
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    processors = Processors(process.pid)
    processors.start()
    assert process.stdout is not None
    output, measured = [], 0
    seen: dict[int, float] = {}
    at_the_end: dict[str, float] = {}
    for line in process.stdout:
        output.append(line)
        if step := STEP.match(line):
            seen[int(step[1])] = time.perf_counter()
            at_the_end = {**processors.so_far(), "measured": measured}
        measured += bool(MEASURED.match(line))
    status, ended = process.wait(), time.perf_counter()
    processors.stop()
    assert status == 0 and seen, "".join(output)
    last = max(seen)
    ranks_cpu = processors.so_far()["ranks_cpu"]
    times = {"steps": seen[last] - seen[first], "end": ended - seen[last]}
    return {**at_the_end, **times, "ranks_cpu": ranks_cpu}


def costs(rounds: dict[str, list[dict[str, float]]], name: str) -> list[float]:
    """For each pair of runs: what a figure is with measurements, over what it is without, less 1."""
    pairs = zip(rounds["with"], rounds["without"], strict=True)
    return [measured[name] / plain[name] - 1 for measured, plain in pairs]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--ranks", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--save-interval", type=int, help="other than the preset's")
    options = parser.parse_args()
    first = options.save_interval or PRESETS[options.preset]().save_interval
    if not first < options.steps:
        parser.error(f"--steps {options.steps}: give more than the save interval, {first}")
    words = ["--preset", options.preset, "--schedule.train-steps", str(options.steps)]
    words += ["--parallel.tensor-model-parallel-size", str(options.ranks)]
    if options.save_interval is not None:
        words += ["--save-interval", str(options.save_interval)]
    rounds: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory(prefix="watching.") as folder:
        work = Path(folder)
        prepare(work)
        for number in range(options.pairs):
            for line in sorted(rounds, reverse=number % 2 == 0):
                mine = [*words, *(TASKS if line == "with" else [])]
                found = train(work, f"{line}-{number}", mine, first)
                rounds[line].append(found)
                print(line, {name: round(value, 2) for name, value in found.items()}, flush=True)
    medians: dict[str, dict[str, float]] = {
        line: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for line, results in rounds.items()
    }
    cost = {name: costs(rounds, name) for name in ("steps", "ranks_cpu")}
    rows = [{"line": f"{line} measurements", **values} for line, values in medians.items()]
    columns = {
        "": "{line}",
        "steps": "{steps:.1f}",
        "ranks' CPU": "{ranks_cpu:.1f}",
        "beside": "{beside_cpu:.1f}",
        "measured": "{measured:.0f}",
        "end": "{end:.1f}",
    }
    print(
        f"\n{options.preset} on {options.ranks} ranks, steps {first} to {options.steps}; "
        f"medians of {options.pairs} runs, s\n"
    )
    print(facts.table(rows, columns))
    for name, what in (("steps", "time of the steps"), ("ranks_cpu", "the ranks' CPU time")):
        each = ", ".join(f"{share:+.1%}" for share in cost[name])
        print(f"cost in {what}: {statistics.median(cost[name]):+.1%} ({each})")
    report = {"medians": medians, "rounds": rounds, "costs": cost}
    facts.write(options.json, {**facts.header("cpu", options), **report})


if __name__ == "__main__":
    main()
