"""Do training steps wait for a disk whose fsync takes half a second?

    python benchmarks/commands/slow_disk.py --json benchmarks/results/slow-disk.json

One rank trains a small model by the command line, and saves checkpoints in between. In every second run
strace delays each of its fsyncs, and those of its helper processes; in the others strace only counts them.
The time of a step is that between two printed lines.

steps     seconds from the first step's line to the last one's, with the saves in between
longest   the longest time between two of these lines
end       seconds from the last step's line to the end of the run: the last save is waited for
fsyncs    number of calls in the whole run
"""

import itertools
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.options import parser_of

STEPS, SAVES, LOG = 60, 30, re.compile(r"step +(\d+)/\d+ \|")
FSYNCS = re.compile(r"\b(?:fsync|fdatasync)\(")


def prepare(work: Path) -> None:
    """A tokenizer and a data set, of a package of Python's library."""
    text = [str(Path(sysconfig.get_paths()["stdlib"]) / "email"), "--include", "*.py"]
    tokenizer = ["--vocab-size", "400", "--output-dir", str(work / "tokenizer")]
    data = ["--tokenizer", str(work / "tokenizer" / "tokenizer.model")]
    data += ["--validation-fraction", "0.1", "--output-dir", str(work / "data")]
    for command in (["train-tokenizer", *text, *tokenizer], ["tokenize", *text, *data]):
        whole = [sys.executable, "-m", "pretrain.cli", "data", *command]
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)  # noqa: S603


def train(work: Path, name: str, delay_s: float) -> dict[str, float]:
    """One run under strace; the delay is before each fsync."""
    trace, run = work / f"{name}.trace", work / name
    strace = ["strace", "-f", "--seccomp-bpf", "-o", str(trace), "-e", "trace=fsync,fdatasync"]
    if delay_s:
        strace += ["-e", f"inject=fsync,fdatasync:delay_enter={round(delay_s * 1e6)}"]
    options = (
        f"--preset debug --schedule.train-steps {STEPS} --save-interval {SAVES} --nproc-per-node 1"
    )
    options += " --eval-interval 0 --data.num-workers 0 --log-interval 1 --global-batch-size 64"
    places = ["--data.paths", str(work / "data"), "--output-dir", str(run)]
    command = [*strace, sys.executable, "-m", "pretrain.cli", "train", *options.split(), *places]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    assert process.stdout is not None
    seen: list[float] = []
    output = []
    for line in process.stdout:
        output.append(line)
        if LOG.match(line):
            seen.append(time.perf_counter())
    assert process.wait() == 0 and len(seen) == STEPS, "".join(output)
    ended = time.perf_counter()
    return {
        "steps": seen[-1] - seen[0],
        "longest": max(after - before for before, after in itertools.pairwise(seen)),
        "end": ended - seen[-1],
        "fsyncs": len(FSYNCS.findall(trace.read_text())),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.5, help="seconds before each fsync")
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory(prefix="slow-disk.") as folder:
        work = Path(folder)
        prepare(work)
        for number in range(options.rounds):
            for line, results in rounds.items():
                delay_s = options.delay if line == "with" else 0.0
                results.append(train(work, f"{line}-{number}", delay_s))
                print(
                    line, {name: round(value, 2) for name, value in results[-1].items()}, flush=True
                )
    medians: dict[str, dict[str, Any]] = {
        line: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for line, results in rounds.items()
    }
    rows = [{"line": f"{line} the delay", **m} for line, m in medians.items()]
    print(f"\n{STEPS} steps, a checkpoint each {SAVES}; medians of {options.rounds}\n")
    columns = {name: f"{{{name}:.2f}}" for name in ("steps", "longest", "end", "fsyncs")}
    print(facts.table(rows, {"": "{line}", **columns}))
    report = {"medians": medians, "rounds": rounds, "steps": STEPS, "save_interval": SAVES}
    facts.write(options.json, {**facts.header("cpu", options), **report})


if __name__ == "__main__":
    main()
