"""Measures all that is to be measured on one GPU, in one call, the most important parts first.

    python benchmarks/gpu.py OUTPUT --seconds 540 [--only PART...]

Each part runs in a process of its own. Its results stay when a later part fails or when the time is up.
OUTPUT/summary.json has the status of each part, OUTPUT/NAME.log what it has printed. After each part
OUTPUT/results.tgz holds all results but the traces, which are in OUTPUT/traces.tgz. `--list` prints the
names of the parts; `--only overlap` chooses all parts whose names begin with that word.

While a part runs, the process of the next part has started and imports what it needs
(measuring/standby.py), with one thread and without the GPU. A part's limit counts from when it begins
to measure.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout need not be installed

from measuring.standby import Standby  # noqa: E402

# Layers as a rank of TP=8 has them: hidden size, FFN size, heads, and sequences in a micro-batch. There are
# so many sequences that kernels take much longer than Python takes to launch them. Else the launches would
# take longer than kernels and link together, and every link would seem hidden.
OVERLAP = {"8b": ("4096", "14336", "32", "8"), "70b": ("8192", "28672", "64", "2")}
# Of the parts' processes. With one compile thread the few small kernels are compiled in the process itself;
# else workers, one for each core, would import torch while something is measured. The next variable is set
# as in training (pretrain/model/queues.py).
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONUNBUFFERED": "1",  # what was printed before a part is killed is in its log
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
}
GRACE_S = 10.0  # for a part to print what it has, at its limit
KEPT = (".json", ".log", ".xml", ".png", ".md")
TRACE = ".trace.json.gz"
LARGEST = 4 << 20  # bytes of a file in the archive


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    """After `python`: a script, or -m and a module. OUTPUT stands for the folder of results, WORK for a
    folder that is not kept, SECONDS for the time that the part has."""
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    name: str
    command: str
    status: str
    seconds: float


def benchmark(
    script: str, options: str, limit_s: float, *, name: str = "", **environment: str
) -> Part:
    """A benchmark that writes OUTPUT/NAME.json. Its name is the script's if none is given."""
    name = name or script
    words = [f"benchmarks/{script}.py", *options.split(), "--json", f"OUTPUT/{name}.json"]
    return Part(name, words, limit_s, environment)


def tp8(shape: str) -> str:
    """overlap.py's options for the layers of a rank of TP=8."""
    hidden, ffn, heads, batch = OVERLAP[shape]
    sizes = f"--hidden-size {hidden} --ffn-hidden-size {ffn} --heads {heads} --kv-heads 8"
    return f"{sizes} --micro-batch-size {batch} --seq-length 8192 --fake-tp 8"


def overlap(shape: str, link: str, *, sp: bool = False, precision: str = "bf16") -> Part:
    """16 layers: with their weights, gradients and activations they take some 40 of 80 GB."""
    name = f"overlap-{shape}-{link}-{precision}" + ("-sp" if sp else "")
    options = f"{tp8(shape)} --layers 16 --steps 6 --precision {precision} --link {link}"
    options += " --also parallel" + (" --sequence-parallel" if sp else "")
    if (shape, link, precision) == ("70b", "nvswitch", "bf16"):
        options += f" --trace OUTPUT/{name}{TRACE}"
    return benchmark("overlap", options, 90, name=name, **queues(sp))


def kinds(shape: str, link: str, *, layers: int, sp: bool = False) -> Part:
    """All kinds of layers beside each other, so fewer layers than in `overlap`: each kind has its own."""
    also = "standard-halves parallel parallel-halves hybrid parallel-ladder no-comm"
    options = (
        f"{tp8(shape)} --layers {layers} --steps 5 --precision bf16 --link {link} --also {also}"
    )
    options += " --sequence-parallel" if sp else ""
    name = f"kinds-{shape}-{link}" + ("-sp" if sp else "")
    return benchmark("overlap", options, 60, name=name, **queues(sp))


def queues(sp: bool) -> dict[str, str]:
    """As pretrain/model/queues.py sets them."""
    if not sp:
        return {}
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TORCH_NCCL_HIGH_PRIORITY": "1"}


def connections(count: int) -> Part:
    """How many hardware queues does the second stream of sequence parallelism need? CUDA reads the number
    once, so each number is a part."""
    options = f"{tp8('70b')} --layers 8 --steps 8 --precision bf16 --link nvswitch"
    options += " --also --sequence-parallel"
    variables = {**queues(sp=True), "CUDA_DEVICE_MAX_CONNECTIONS": str(count)}
    return benchmark("overlap", options, 60, name=f"connections-{count}", **variables)


def experts() -> Part:
    """A rank of EP=8 with layers of DeepSeek-V2-Lite's shape: how much of the all-to-alls' time is hidden?
    One of 16,384 tokens takes about a millisecond over NVSwitch."""
    options = (
        "--fake-ranks 8 --experts 64 --top-k 6 --hidden-size 2048 --heads 16 --expert-size 1408"
    )
    options += " --shared-size 2816 --layers 6"
    options += " --seq-length 4096 --micro-batch-size 4 --link-ms 1 --steps 8"
    return benchmark("kinds/experts", options, 90, name="experts-link", **queues(True))


# 25.7 million parameters without the embedding. The micro-batches keep the GPU longer than Python takes to
# launch their kernels.
LEARNING = """--text --work-dir WORK --seeds 1 --target llama-3-8b llama-3-70b:64 --preset paper-1b
    --model.num-layers 8 --model.hidden-size 512 --model.ffn-hidden-size 1408
    --model.num-attention-heads 8 --model.vocab-size None --data.seq-length 1024 --data.num-workers 8
    --micro-batch-size 128 --global-batch-size 128 --schedule.warmup-steps 60 --eval-interval 200
    --eval-sequences 512 --save-interval 1000000 --log-interval 5 --no-tensorboard --seconds SECONDS"""
PAPER = "paper-1b:bf16:ladder paper-1b:bf16:standard"
LLAMA = "llama-3-8b:bf16:ladder:4 llama-3-8b:tensorwise:ladder:4 llama-3-8b:bf16:ladder:8:full"
FP8 = "tensorwise delayed blockwise"  # of Hopper


def parts() -> list[Part]:
    tests = "-m pytest -v --durations 10 -m gpu tests/gpu --junitxml OUTPUT/tests.xml"
    paper_1b = f"--cases {PAPER} paper-1b:tensorwise:ladder --accumulate 4 --steps 6"
    llama_8b = f"--cases {LLAMA} --accumulate 4 --steps 6"
    # Small micro-batches, whose kernels run faster than Python launches them.
    small = "--micro-batch-size 4 --accumulate 2 --steps 10"
    graphs = " ".join(f"{case}:graph" for case in f"{PAPER} paper-1b:tensorwise:ladder".split())
    te = f"--cases paper-1b:bf16:ladder --attention te {small}"
    learning = f"{LEARNING} --train-tokens 210_000_000 --optimizer.lr 2e-3"
    # Six runs: each takes 8 s to train, and 13 to 55 s besides.
    rates = f"{LEARNING} --kinds standard ladder --train-tokens 20_000_000 --rates 1e-3 2e-3 4e-3"
    precision = f"--precisions bf16 {FP8} --steps 250 --picture OUTPUT/precision.png"
    # Two of its layers have 1.2 billion parameters, and four kinds are there at once.
    with_experts = "--shapes qwen3-30b-a3b --precisions bf16 tensorwise --layers 2 --tokens 8192"
    return [
        # Transformer Engine prints why it chooses a backend.
        benchmark("attention", "", 60, NVTE_DEBUG="1", NVTE_DEBUG_LEVEL="2"),
        Part("doctor", ["-m", "pretrain.cli", "doctor"], 60),
        Part("tests", tests.split(), 240),
        benchmark("layers", f"--precisions bf16 {FP8} --tokens 16384 --steps 15", 120),
        benchmark("training_step", paper_1b, 120, name="training-1b"),
        # To be compared with the first rows of cuda-graph, which have torch's attention.
        benchmark("training_step", te, 60, name="training-1b-te"),
        benchmark("training_step", f"--cases {PAPER} {graphs} {small}", 120, name="cuda-graph"),
        benchmark("training_step", llama_8b, 120, name="training-8b"),
        overlap("70b", "nvswitch"),
        kinds("70b", "nvswitch", layers=8),
        kinds("70b", "nvswitch", layers=8, sp=True),
        kinds("8b", "p2p-off", layers=6),
        experts(),
        benchmark("layers", f"{with_experts} --steps 15", 120, name="layers-experts"),
        overlap("70b", "nvswitch", sp=True),
        overlap("8b", "nvswitch"),
        overlap("8b", "nvswitch", sp=True),
        overlap("70b", "p2p-off"),
        overlap("8b", "p2p-off"),
        overlap("70b", "p2p-off", sp=True),
        overlap("8b", "p2p-off", sp=True),
        *(connections(count) for count in (1, 2, 8, 32)),
        benchmark("learning", f"{learning} --picture OUTPUT/learning.png", 500),
        benchmark("learning", rates, 400, name="rates-of-learning"),
        benchmark("precision", precision, 120),
        benchmark("compile", "--shapes 256:6:256:2 512:8:512:4 --precision bf16", 120),
        overlap("70b", "nvswitch", precision="tensorwise"),
    ]


def standby_of(part: Part, output: Path) -> Standby:
    """A part's process, which begins to import."""
    return Standby(
        ROOT,
        session=True,
        log=output / f"{part.name}.log",
        environment={**ENVIRONMENT, **part.environment},
    )


def words_of(part: Part, output: Path, limit_s: float) -> list[str]:
    work = Path(tempfile.gettempdir()) / f"{output.name}-work"
    seconds = max(limit_s - 30, 0.5 * limit_s)
    stands_for = {"OUTPUT": str(output), "WORK": str(work), "SECONDS": f"{seconds:.0f}"}
    words = list(part.command)
    for name, value in stands_for.items():
        words = [word.replace(name, value) for word in words]
    return words


def run(part: Part, standby: Standby, output: Path, limit_s: float) -> Result:
    """Runs a part, and ends it at its limit, which counts from now."""
    begin = time.monotonic()
    standby.go(words_of(part, output, limit_s))
    try:
        code = standby.process.wait(limit_s)
        status = "done" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        status = f"ended at its limit of {limit_s:.0f} s"
        standby.process.send_signal(signal.SIGINT)  # pytest reports then
        with contextlib.suppress(subprocess.TimeoutExpired):
            standby.process.wait(GRACE_S)
    standby.end()  # else its children could go on using the GPU
    shown = [f"{name}={value}" for name, value in part.environment.items()]
    shown += ["python", *part.command]
    return Result(part.name, " ".join(shown), status, round(time.monotonic() - begin, 1))


def archive(output: Path) -> list[str]:
    """Writes results.tgz and traces.tgz; returns the names of files too large for them."""
    left_out = []
    for name, ending in (("results.tgz", KEPT), ("traces.tgz", (TRACE,))):
        temporary = output / f".{name}"
        with tarfile.open(temporary, "w:gz") as tar:
            for file in sorted(output.iterdir()):
                if not file.name.endswith(ending):
                    continue
                if file.stat().st_size > LARGEST:
                    left_out.append(file.name)
                else:
                    tar.add(file, file.name)
        temporary.replace(output / name)
    return left_out


def chosen(only: list[str] | None) -> list[Part]:
    """The parts whose names begin with one of the words, in the order of the words."""
    known = parts()
    if only is None:
        return known
    found = {p.name: p for word in only for p in known if p.name.startswith(word)}
    for word in only:
        if not any(name.startswith(word) for name in found):
            sys.exit(f"gpu.py: no part begins with {word!r}: --list names them")
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=3600, help="for all parts together")
    parser.add_argument("--only", nargs="+", help="names of parts, or how the names begin")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    wanted = chosen(args.only)
    if args.list:
        print("\n".join(part.name for part in wanted))
        return
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    results = []
    standby = standby_of(wanted[0], output)
    for part, following in zip(wanted, [*wanted[1:], None], strict=True):
        current = standby
        if following is not None:
            standby = standby_of(following, output)
        left = end - time.monotonic() - GRACE_S
        if left < 20:
            current.end()
            results.append(Result(part.name, "", "no time left", 0.0))
        else:
            results.append(run(part, current, output, min(part.limit_s, left)))
        print(f"{part.name}: {results[-1].status}, {results[-1].seconds:.0f} s", flush=True)
        summary = [asdict(result) for result in results]
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        for name in archive(output):
            print(f"{name} is too large for the archive", flush=True)
    sys.exit(any(result.status != "done" for result in results))


if __name__ == "__main__":
    main()
