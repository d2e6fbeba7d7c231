"""Everything that is to be measured on one GPU, in one call, most wanted first, within a time.

    python benchmarks/gpu.py OUTPUT --seconds 540

Each part runs in a process of its own, and what it has written stays when a later one fails or the time
is up; OUTPUT/summary.json says of each what became of it, OUTPUT/NAME.log what it printed. `--only` runs
some parts; `--list` names them.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Layers as a rank of TP=8 has them: hidden sizes, heads, and sequences in a micro-batch, as many as make
# kernels long beside the time that Python takes to launch them, which would hide any link.
OVERLAP = {"8b": ("4096", "14336", "32", "2"), "70b": ("8192", "28672", "64", "1")}
# Of the parts' processes. A few small kernels are compiled: sooner in the process than by workers that
# import torch first, one for each core, beside what is measured. The other is as in training (setup.py).
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # This checkout need not be installed.
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
}
GRACE_S = 10.0  # for a part to say what it has, at its limit


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    """After `python`; OUTPUT stands for the folder."""
    limit_s: float


@dataclass(frozen=True)
class Result:
    name: str
    command: str
    status: str
    seconds: float


def parts() -> list[Part]:
    fp8 = ["tensorwise", "delayed", "blockwise"]  # of Hopper

    def overlap(shape: str, link: str, precision: str) -> Part:
        name = f"overlap-{shape}-{link}-{precision}"
        hidden, ffn, heads, batch = OVERLAP[shape]
        options = ["--hidden-size", hidden, "--ffn-hidden-size", ffn, "--heads", heads]
        options += ["--micro-batch-size", batch, "--seq-length", "8192"]
        options += ["--fake-tp", "8", "--layers", "4", "--steps", "12"]
        options += ["--kv-heads", "8", "--precision", precision, "--link", link]
        options += ["--trace", f"OUTPUT/{name}.trace.json.gz"]
        script = ["benchmarks/overlap.py", *options]
        return Part(name, [*script, "--json", f"OUTPUT/{name}.json"], 90)

    def training(shape: str, cases: list[str]) -> Part:
        name = f"training-{shape}"
        options = ["--accumulate", "4", "--steps", "6", "--json", f"OUTPUT/{name}.json"]
        return Part(name, ["benchmarks/training_step.py", "--cases", *cases, *options], 120)

    paper = [f"paper-1b:{case}" for case in ("bf16:ladder", "bf16:standard", "tensorwise:ladder")]
    llama = [f"llama-3-8b:{case}" for case in ("bf16:ladder:4", "tensorwise:ladder:4")]
    llama.append("llama-3-8b:bf16:ladder:8:full")
    return [
        Part("doctor", ["-m", "pretrain.cli", "doctor"], 90),
        Part(
            "tests",
            [
                *("-m", "pytest", "-v", "--durations", "10", "-m", "gpu", "tests/gpu"),
                *("--junitxml", "OUTPUT/tests.xml"),
            ],
            240,
        ),
        Part(
            "layers",
            [
                *("benchmarks/layers.py", "--precisions", "bf16", *fp8, "--tokens", "16384"),
                *("--steps", "20", "--json", "OUTPUT/layers.json"),
            ],
            120,
        ),
        training("1b", paper),
        Part(  # small micro-batches, which Python cannot launch as fast as they run
            "cuda-graph",
            [
                *("benchmarks/training_step.py", "--cases", *paper[:2]),
                *(f"{case}:graph" for case in paper),
                *("--micro-batch-size", "2", "--accumulate", "2", "--steps", "10"),
                *("--json", "OUTPUT/cuda-graph.json"),
            ],
            120,
        ),
        training("8b", llama),
        overlap("70b", "nvswitch", "bf16"),
        overlap("8b", "nvswitch", "bf16"),
        Part(
            "precision",
            [
                *("benchmarks/precision.py", "--precisions", "bf16", *fp8, "--steps", "250"),
                *("--json", "OUTPUT/precision.json", "--picture", "OUTPUT/precision.png"),
            ],
            120,
        ),
        overlap("70b", "nvswitch", "tensorwise"),
        Part(
            "compile",
            [
                *("benchmarks/compile.py", "--shapes", "256:6:256:2", "512:8:512:4"),
                *("--precision", "bf16", "--json", "OUTPUT/compile.json"),
            ],
            120,
        ),
        overlap("70b", "p2p-off", "bf16"),
        overlap("8b", "p2p-off", "bf16"),
        overlap("8b", "nvswitch", "tensorwise"),
    ]


def run(part: Part, output: Path, limit_s: float) -> Result:
    """Ends it at its limit; its output goes to OUTPUT/NAME.log."""
    command = [sys.executable, *(word.replace("OUTPUT", str(output)) for word in part.command)]
    begin = time.monotonic()
    with (output / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603 (the commands above)
            command,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            status = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            status = f"ended at its limit of {limit_s:.0f} s"
            process.send_signal(signal.SIGINT)  # pytest reports then
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children would keep the GPU
        process.wait()
    shown = " ".join(["python", *part.command])
    return Result(part.name, shown, status, round(time.monotonic() - begin, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {part.name: part for part in parts()}
    parser.add_argument("output", type=Path, nargs="?", default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=3600, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=known)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(known))
        return
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    results = []
    for name in args.only or known:
        left = end - time.monotonic() - GRACE_S
        if left < 20:
            results.append(Result(name, "", "no time left", 0.0))
        else:
            results.append(run(known[name], output, min(known[name].limit_s, left)))
        print(f"{name}: {results[-1].status}, {results[-1].seconds:.0f} s", flush=True)
        summary = [asdict(result) for result in results]
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(any(result.status != "done" for result in results))


if __name__ == "__main__":
    main()
