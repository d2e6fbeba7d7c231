"""How long do import and export take, and how much memory, against a plain copy of the files?

    python benchmarks/commands/conversion.py --json benchmarks/results/conversion.json

The model is made here: random bf16 weights of Llama-3.2-1B's shape, 2.5 GB in shards of at most 500 MB.
(The vocabulary's table is larger and has a shard of its own.) With --experts it is a Qwen3-MoE folder. In
each round every command has its turn, in a process of its own, with its input in the page cache. Every line
is a median of the rounds.

start    seconds until torch, transformers and megatron-core are imported; they are not part of `work`
work     seconds of `pretrain.cli.main`, from its arguments to its exit status, files on disk (fsync)
cpu      processor time of `work`, all threads together
memory   peak of resident memory (VmHWM) above the baseline, which is what is resident after the imports;
         the peaks of anonymous memory and of mapped files are looked at every 10 ms

The copy is shutil.copyfile and fsync of each file. Import, and export without its verification, should need
less memory than 1.3 times the largest tensor and one shard, and reach 60 % of the copy's rate.
"""

import argparse
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring.options import parser_of
from measuring.processes import resident

SHARD = 500_000_000
LINES = ("copy", "import", "export, not verified", "export", "export, verified by layers")
BOUNDED = ("import", "export, not verified")


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="folder for the model and outputs (a new one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--shape",
        type=int,
        nargs=6,
        default=[16, 2048, 8192, 32, 8, 128256],
        metavar=("LAYERS", "HIDDEN", "FFN", "HEADS", "KV_HEADS", "VOCABULARY"),
    )
    parser.add_argument(
        "--experts",
        type=int,
        nargs=3,
        metavar=("EXPERTS", "WIDTH", "OF_A_TOKEN"),
        help="in each layer",
    )
    parser.add_argument("--child", nargs=3, metavar=("LINE", "IN", "OUT"))
    return parser.parse_args()


# --- the model ---


def make_model(folder: Path, shape: list[int], experts: list[int] | None) -> None:
    """Writes a Llama folder with random weights, or a Qwen3-MoE folder."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    layers, hidden, ffn, heads, kv_heads, vocabulary = shape
    kind: Any = LlamaConfig
    if experts:
        names = ("num_experts", "moe_intermediate_size", "num_experts_per_tok")
        of_experts = dict(zip(names, experts, strict=True))
        kind = functools.partial(Qwen3MoeConfig, norm_topk_prob=True, **of_experts)
    config = kind(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)
    words = {f"t{i}": i for i in range(vocabulary)}
    Tokenizer(models.WordLevel(words, "t0")).save(str(folder / "tokenizer.json"))


def largest_tensor(folder: Path) -> int:
    """Bytes, in bf16."""
    from safetensors import safe_open

    sizes = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            names = file.keys()
            sizes += [2 * math.prod(file.get_slice(name).get_shape()) for name in names]
    return max(sizes)


# --- one line, in a process of its own ---


def child(line: str, source: Path, target: Path) -> None:
    """Runs one line of the table and prints its times and its memory."""
    work = _prepared(line, source, target)
    baseline = resident("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    status = work()
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    seen = {"work_s": wall, "cpu_s": cpu, "baseline_bytes": baseline, "status": status}
    seen["memory_bytes"] = resident("VmHWM") - baseline
    print("\n" + json.dumps(seen))


def _prepared(line: str, source: Path, target: Path) -> Any:
    if line == "copy":
        return lambda: copy(source, target)
    from pretrain.cli import main
    from pretrain.convert import export, verify_export

    if line == "export, not verified":
        export.verify_export = lambda *_: "not verified"
    if line == "export, verified by layers":
        verify_export.memory_here = lambda *_: 0
    if line == "import":
        return lambda: main(["import", str(source), str(target)])
    return lambda: main(["export", str(source), str(target), "--max-shard-size", "500MB"])


def copy(source: Path, target: Path) -> int:
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return 0


def measured(line: str, source: Path, target: Path) -> dict[str, Any]:
    for path in source.rglob("*"):
        if path.is_file():  # into the page cache
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    peaks = {"RssAnon": 0, "RssFile": 0}
    begin = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, __file__, "--child", line, str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def watch() -> None:
        while process.poll() is None:
            for what in peaks:
                try:
                    peaks[what] = max(peaks[what], resident(what, process.pid))
                except (OSError, IndexError):
                    return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    wall = time.perf_counter() - begin
    watcher.join()
    seen = {"status": 1} if process.returncode else json.loads(output.strip().splitlines()[-1])
    if seen["status"]:
        sys.exit(f"{line}\n{output}\n{errors}")
    return seen | {
        "line": line,
        "start_s": wall - seen["work_s"],
        "anonymous_bytes": peaks["RssAnon"],
        "mapped_bytes": peaks["RssFile"],
        "said": next((said for said in errors.splitlines() if "verified" in said), ""),
    }


# --- all of it ---


def main() -> None:
    args = arguments()
    if args.child:
        child(args.child[0], Path(args.child[1]), Path(args.child[2]))
        return
    work = args.work or Path(tempfile.mkdtemp(prefix="conversion-"))
    model = work / "model"
    if not model.is_dir():
        model.mkdir(parents=True)
        make_model(model, args.shape, args.experts)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    largest = largest_tensor(model)
    bound = int(1.3 * largest + min(SHARD, size))
    runs = []
    for number in range(args.rounds):
        imported = work / "imported"
        for line in LINES:
            target = imported if line == "import" else work / "out"
            source = imported if line.startswith("export") else model
            run = measured(line, source, target)
            runs.append({**run, "round": number})
            print(f"round {number + 1}, {line}: {run['work_s']:.1f} s", file=sys.stderr, flush=True)
            if target != imported:
                shutil.rmtree(target)
        shutil.rmtree(imported)

    def median(line: str, what: str) -> float:
        return statistics.median(run[what] for run in runs if run["line"] == line)

    copied = median("copy", "work_s")
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB; medians of {args.rounds}")
    print(f"bound of memory: {bound / 1e6:.0f} MB; of the rate: 60 % of the copy's\n")
    medians = {}
    for line in LINES:
        found = {what: median(line, what) for what in runs[0] if what.endswith(("_s", "_bytes"))}
        found["of_copy"] = copied / found["work_s"]
        found["cpu_of_copy"] = median("copy", "cpu_s") / found["cpu_s"]
        if line in BOUNDED:
            found["memory_within_bound"] = found["memory_bytes"] <= bound
            found["rate_within_bound"] = found["of_copy"] >= 0.6
        medians[line] = found
    from measuring import facts  # imports torch, which no line but import and export needs

    rows = [
        {"line": line, "rate": size / 1e6 / found["work_s"], **found}
        | {"memory": found["memory_bytes"] / 1e6, "baseline": found["baseline_bytes"] / 1e6}
        for line, found in medians.items()
    ]
    columns = {"": "{line}", "start, s": "{start_s:.1f}", "work, s": "{work_s:.1f}"}
    columns |= {"MB/s": "{rate:.0f}", "of the copy's": "{of_copy:.0%}", "cpu, s": "{cpu_s:.1f}"}
    columns |= {"memory, MB": "{memory:.0f}", "baseline, MB": "{baseline:.0f}"}
    print(facts.table(rows, columns))
    report = {
        **facts.header("cpu", args, "transformers", "safetensors"),
        "load_average": os.getloadavg(),
        "shape": args.shape,
        "experts": args.experts,
        "bytes": size,
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": bound,
        "medians": medians,
        "runs": [{**run, "said": run["said"].replace(str(work), "WORK")} for run in runs],
    }
    facts.write(args.json, report)
    if args.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
