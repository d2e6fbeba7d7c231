"""How many files does each rank open and look up (stat) when a run is started again?

    python benchmarks/commands/opens.py --json benchmarks/results/opens.json

Small data sets are made, and a run of the preset debug is trained for two steps, which makes the index
files. Its last checkpoint is deleted, and it is started again, at `--ranks` ranks: 2 are tensor-parallel; 8
are 2 tensor-parallel by 2 stages by 2 data-parallel ones. Counted is what the Python code of a rank and of
the processes that it forks asks the file system for (measuring/file_calls.py), from the command's beginning
to its first step, and to its end, after a validation of every data set. The ranks are forked from one
process that has imported everything: imports are not counted.

data_, run_    opens and stats below the data sets' folders, and below the run's, up to the first step
end_opens      opens of both, up to the end
descriptors    files and maps that the rank has open at its first step more than at its beginning
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.file_calls import FileCalls
from measuring.options import parser_of

TENSOR = ["--parallel.tensor-model-parallel-size", "2"]
STAGES = ["--parallel.pipeline-model-parallel-size", "2"]
LAYOUTS: dict[int, list[str]] = {1: [], 2: TENSOR, 4: TENSOR + STAGES, 8: TENSOR + STAGES}
DOCUMENTS, LENGTH, SEQUENCE = 12, 64, 32


def make_data_set(path: Path, number: int) -> None:
    """A data set of random tokens, in the form of docs/reference/formats.md."""
    path.mkdir(parents=True)
    tokenizer = b"a tokenizer"
    (path / "tokenizer.model").write_bytes(tokenizer)
    splits = {}
    for split in ("train", "validation"):
        tokens = np.random.default_rng(number).integers(3, 200, DOCUMENTS * LENGTH, np.uint16)
        (path / f"{split}.bin").write_bytes(tokens.tobytes())
        index = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x08"
        index += np.array([DOCUMENTS, DOCUMENTS + 1], "<u8").tobytes()
        index += np.full(DOCUMENTS, LENGTH, "<i4").tobytes()
        index += (np.arange(DOCUMENTS, dtype="<i8") * 2 * LENGTH).tobytes()
        index += np.arange(DOCUMENTS + 1, dtype="<i8").tobytes()
        (path / f"{split}.idx").write_bytes(index)
        splits[split] = {
            **{"documents": DOCUMENTS, "tokens": len(tokens), "text_bytes": 4 * len(tokens)},
            **{"bin_bytes": 2 * len(tokens), "idx_bytes": len(index)},
            "idx_sha256": hashlib.sha256(index).hexdigest(),
        }
    facts_of = {"kind": "sentencepiece", "file": "tokenizer.model", "vocab_size": 200, "eod_id": 2}
    manifest = {
        **{
            "format": "megatron-ladder-data",
            "version": 1,
            "created_by": "benchmarks/commands/opens.py",
        },
        "tokenizer": {**facts_of, "sha256": hashlib.sha256(tokenizer).hexdigest()},
        **{"dtype": "uint16", "splits": splits, "sources": [], "options": {}},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


def arguments(place: Path, count: int, ranks: int) -> list[str]:
    paths = [str(place / "sets" / f"set{i}") for i in range(count)]
    options = ["--preset", "debug", "--data.paths", *paths, "--output-dir", str(place / "run")]
    options += [
        "--data.seq-length",
        str(SEQUENCE),
        "--micro-batch-size",
        "2",
        "--eval-sequences",
        "2",
    ]
    options += [
        "--global-batch-size",
        "16",
        "--schedule.train-steps",
        "2",
        "--schedule.warmup-steps",
        "0",
    ]
    options += [
        "--save-interval",
        "1",
        "--no-async-save",
        "--no-tensorboard",
        "--eval-interval",
        "0",
    ]
    return [*options, "--data.num-workers", "0", *LAYOUTS[ranks]]


def started(place: Path, count: int, ranks: int, timeout_s: float) -> list[dict]:
    """Trains to the end of the schedule; what each rank asked for, in the order of ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    results = place / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    argv = arguments(place, count, ranks)
    given = [(rank, ranks, port, argv, place, results) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=some) for some in given]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    statuses = [process.exitcode for process in processes]
    if late or any(statuses):
        logs = "\n".join(p.read_text()[-2000:] for p in sorted(results.glob("*.log")))
        sys.exit(f"{count} data sets, {ranks} ranks: statuses {statuses}, {len(late)} late\n{logs}")
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, argv: list[str], place: Path, results: Path) -> None:
    from pretrain.commands.train import train as command
    from pretrain.loop import train

    log = os.open(results / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
    calls = FileCalls({"data": place / "sets", "run": place / "run"})
    before, began = _descriptors(), time.monotonic()
    found: dict[str, Any] = {}
    step = train.train_step

    def counted(*args: Any, **options: Any) -> Any:
        if not found:
            found["descriptors"] = _descriptors() - before
            found["to_first_step"] = calls.so_far()
            found["seconds_to_first_step"] = time.monotonic() - began
        return step(*args, **options)

    train.train_step = counted
    status = command(argv)
    found["to_end"] = calls.so_far()
    (results / f"{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(status)


def _descriptors() -> int:
    """Those of files; a rank has sockets too."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            count += link.readlink().is_absolute()
    return count


def back_to_the_first_step(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000002", ignore_errors=True)


def row(count: int, ranks: int, rank: int, found: dict[str, Any]) -> dict[str, Any]:
    start, end = found["to_first_step"], found["to_end"]
    return {
        **{"data_sets": count, "ranks": ranks, "rank": rank},
        **{f"data_{k}": start["data"][k] for k in ("opens", "stats")},
        **{f"run_{k}": start["run"][k] for k in ("opens", "stats")},
        "end_opens": end["data"]["opens"] + end["run"]["opens"],
        "descriptors": found["descriptors"],
        "seconds": found["seconds_to_first_step"],
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data-sets", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], choices=list(LAYOUTS))
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one start")
    options = parser.parse_args()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    import pretrain.commands.train
    import pretrain.loop.train
    import pretrain.start.preflight  # noqa: F401  (imported before the ranks are forked)

    rows: list[dict[str, Any]] = []
    for count in options.data_sets:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            for number in range(count):
                make_data_set(place / "sets" / f"set{number}", number)
            started(place, count, 1, options.timeout)
            for ranks in options.ranks:
                back_to_the_first_step(place / "run")
                found = started(place, count, ranks, options.timeout)
                rows += [row(count, ranks, rank, some) for rank, some in enumerate(found)]
                print(
                    facts.table(rows[-ranks:], {n: f"{{{n}}}" for n in rows[-1] if n != "seconds"})
                )
    facts.write(options.json, {**facts.header("cpu", options), "rows": rows})


if __name__ == "__main__":
    main()
