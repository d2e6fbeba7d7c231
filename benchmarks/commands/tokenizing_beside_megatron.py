"""How fast does text become tokens, beside Megatron-LM's fast tool?

    git clone https://github.com/NVIDIA/Megatron-LM
    python benchmarks/commands/tokenizing_beside_megatron.py --megatron-lm Megatron-LM --texts TEXT.jsonl

tools/preprocess_data_fast.py uses the same fast tokenizer as this project, gigatoken. It neither compares
it with the reference, nor cuts text into parts, nor writes checksums. It runs in this Python's environment.

Both commands tokenize one text with one tokenizer in turn, twice, for vocabularies of several sizes that
cut text as Llama 3 does. Measured are the CPU seconds of all their processes from start to end. So the
imports count: about 7 CPU-seconds of Megatron-LM's. They weigh less on larger texts. MB are 10^6 bytes of
JSONL.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring.options import parser_of
from measuring.processes import measured
from measuring.vocabularies import digests, vocabularies

OURS, THEIRS = "ours", "Megatron-LM's fast tool"


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--megatron-lm", type=Path, required=True, help="a checkout of its sources")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="JSONL files")
    sizes = [32_000, 50_000, 64_000, 100_000]
    parser.add_argument("--vocabularies", type=int, nargs="+", default=sizes, help="entries")
    return parser.parse_args()


def model_folder(tokenizer: Path) -> Path:
    """The folder that Megatron-LM opens: a tokenizer as models have it."""
    folder = tokenizer.with_suffix("")
    folder.mkdir()
    shutil.copy(tokenizer, folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ours(text: Path, model: Path, out: Path) -> dict[str, float]:
    words = ["-m", "data_prep", "tokenize", str(text), "--tokenizer", str(model / "tokenizer.json")]
    words += ["--output-dir", str(out), "--validation-fraction", "0", "--workers", "1"]
    return measured([sys.executable, *words])


def theirs(megatron_lm: Path, text: Path, model: Path, out: Path) -> dict[str, float]:
    out.mkdir()
    words = [str(megatron_lm / "tools" / "preprocess_data_fast.py"), "--input", str(text)]
    words += ["--output-prefix", str(out / "train"), "--append-eod", "--use-gigatoken"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model)]
    run = measured([sys.executable, *words], {**os.environ, "PYTHONPATH": str(megatron_lm)})
    for ending in ("bin", "idx"):
        (out / f"train_text_document.{ending}").rename(out / f"train.{ending}")
    return run


def pairs(args: argparse.Namespace, text: Path, models: dict[int, Path]) -> list[dict[str, Any]]:
    megabytes = text.stat().st_size / 1e6
    runs: list[dict[str, Any]] = []
    for size, model in models.items():
        rates: dict[str, list[float]] = {THEIRS: [], OURS: []}
        found = set()
        for name in [*rates, *rates]:
            with tempfile.TemporaryDirectory(dir=model.parent) as folder:
                out = Path(folder) / "out"
                tokenize = ours if name == OURS else partial(theirs, args.megatron_lm)
                run = tokenize(text, model, out)
                found.add(digests(out))
            rates[name].append(megabytes / run["cpu_s"])
            facts = {"mb": megabytes, "entries": size, "name": name}
            runs.append({**facts, **run, "mb_per_cpu_s": rates[name][-1]})
        ratios = [fast / slow for fast, slow in zip(rates[OURS], rates[THEIRS], strict=True)]
        runs[-1] |= {"ratios": ratios, "identical": len(found) == 1}
        print(
            f"{megabytes:6.1f} MB, {size:7,} entries: {said(rates[OURS])} MB per CPU-second, "
            f"{THEIRS} {said(rates[THEIRS])}: {said(ratios)} x, identical: {len(found) == 1}",
            flush=True,
        )
    return runs


def said(figures: list[float]) -> str:
    return " and ".join(f"{figure:.1f}" for figure in figures)


def main() -> None:
    args = arguments()
    args.megatron_lm = args.megatron_lm.resolve()
    if not (args.megatron_lm / "tools" / "preprocess_data_fast.py").is_file():
        sys.exit(
            f"{args.megatron_lm} has no tools/preprocess_data_fast.py: check out its main branch"
        )
    from measuring import facts  # imports torch

    with tempfile.TemporaryDirectory(prefix="beside-megatron-") as work:
        found = vocabularies(args.vocabularies, Path(work), args.texts[0])
        models = {size: model_folder(tokenizer) for size, tokenizer in found.items()}
        runs = [run for text in args.texts for run in pairs(args, text, models)]
    packages = ("gigatoken", "tokenizers", "megatron-core", "transformers", "numpy")
    facts.write(args.json, {**facts.header("cpu", args, *packages), "runs": runs})


if __name__ == "__main__":
    main()
