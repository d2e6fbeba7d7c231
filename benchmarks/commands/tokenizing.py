"""How fast does text become tokens, against the reference tokenizers called as Megatron-LM calls them?

    python benchmarks/commands/tokenizing.py --json benchmarks/results/data-prep.json

Measured are the CPU seconds of all processes from start to end (with start-up, checks, merge and index),
and the most memory that any one process had. MB are 10^6 bytes of JSONL.

Megatron's way (tools/preprocess_data.py): the parent reads lines and hands them to a pool, processes
parse JSON, call the tokenizer for one document, and send lists of ids back through a pipe; the parent
writes them with megatron-core's IndexedDatasetBuilder. The tokenizers are called directly, without
Megatron-LM's own imports, which would add seconds.

The text is the Linux kernel's source: Debian's linux-source-6.1, which is fetched unless --linux names an
unpacked one. It is deduplicated and in the order of its hashes, so that both sizes have the same mixture.
Tokenizers are trained on it, unless --sentencepiece and --bpe name some.

Vocabularies of several sizes that cut text as Llama 3 does are compared with the reference in pairs, one
after the other, on the smallest text: whichever vocabulary it is, the fast engine must be used.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import orjson

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring.options import parser_of
from measuring.processes import measured
from measuring.vocabularies import digests, vocabularies

ENDINGS = (".c", ".h", ".S", ".rst", ".txt", ".dts", ".dtsi", ".yaml", ".py", ".json")
MAX_DOCUMENT_BYTES = 16 << 20  # data_prep's own limit
PACKAGE = "linux-source-6.1"


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="folder for text and outputs (a new one)")
    parser.add_argument("--linux", type=Path, help="unpacked sources of a kernel")
    parser.add_argument("--sentencepiece", type=Path, help="a BPE model with byte fallback")
    parser.add_argument("--bpe", type=Path, help="a tokenizer.json")
    parser.add_argument("--sizes-mb", type=float, nargs="+", default=[100, 620])
    sizes = [32_000, 50_000, 64_000, 100_000]
    parser.add_argument("--vocabularies", type=int, nargs="*", default=sizes, help="Llama 3's way")
    parser.add_argument("--text", type=Path, help="JSONL instead of a kernel: pairs alone")
    parser.add_argument("--megatron-way", nargs=4, metavar=("IN", "TOKENIZER", "OUT", "WORKERS"))
    return parser.parse_args()


# --- Megatron's way ---

_encode: Any = None


def _start(tokenizer: str) -> None:
    global _encode, _eod
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if tokenizer.endswith(".model"):
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        _encode = model.EncodeAsIds
    else:
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(tokenizer)
        _encode = lambda text: fast.encode(text, add_special_tokens=False).ids  # noqa: E731


def _one(job: tuple[bytes, int]) -> tuple[list[int], int]:
    line, eod = job
    text = json.loads(line)["text"]
    ids = _encode(text)
    return ([*ids, eod] if ids else []), len(line)


def megatron_way(source: str, tokenizer: str, out: str, workers: int) -> None:
    """What tools/preprocess_data.py does with --append-eod."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from data_prep.dataset.shards import token_dtype
    from data_prep.encode.encoders import open_encoder

    encoder = open_encoder(Path(tokenizer))
    eod, dtype = encoder.eod_id, np.dtype(token_dtype(encoder.vocab_size))
    import torch

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=dtype.type)
    with (
        multiprocessing.Pool(workers, _start, (tokenizer,)) as pool,
        Path(source).open("rb") as file,
    ):
        for ids, _ in pool.imap(_one, ((line, eod) for line in file), 32):
            if ids:
                builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{out}.idx")


# --- text and tokenizers ---


def kernel(work: Path) -> Path:
    if not (work / PACKAGE).is_dir():
        for command in (
            ["apt-get", "download", PACKAGE],
            ["sh", "-c", f"dpkg-deb -x {PACKAGE}_*.deb . && tar -xf usr/src/{PACKAGE}.tar.xz"],
        ):
            print(" ".join(command), file=sys.stderr)
            subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return work / PACKAGE


def documents(source: Path) -> list[tuple[bytes, Path]]:
    """Hashes and files, without copies of one text, in the order of the hashes."""
    found: dict[bytes, Path] = {}
    for path in sorted(source.rglob("*")):
        if path.suffix in ENDINGS and path.is_file() and not path.is_symlink():
            raw = path.read_bytes()
            try:
                raw.decode()
            except UnicodeDecodeError:
                continue
            if raw.strip() and len(raw) < MAX_DOCUMENT_BYTES * 0.9:
                found.setdefault(hashlib.blake2b(raw, digest_size=16).digest(), path)
    return sorted(found.items())


def write_text(target: Path, chosen: list[tuple[bytes, Path]], size: float) -> dict[str, int]:
    count = written = 0
    with target.open("wb") as file:
        for _, path in chosen:
            if written >= size:
                break
            written += file.write(orjson.dumps({"text": path.read_text()}) + b"\n")
            count += 1
    return {"documents": count, "bytes": written}


def tokenizers_of(args: argparse.Namespace, work: Path, text: Path) -> dict[str, Path]:
    sample = work / "sample.jsonl"
    sample.write_bytes(b"".join(text.open("rb").readlines()[:1500]))
    sp = args.sentencepiece or work / "sp" / "tokenizer.model"
    if not sp.is_file():
        command = [sys.executable, "-m", "data_prep", "train-tokenizer", str(sample)]
        command += ["--vocab-size", "32000", "--output-dir", str(sp.parent)]
        subprocess.run(command, check=True)  # noqa: S603
    bpe = args.bpe or work / "bpe.json"
    if not bpe.is_file():
        import tokenizers

        model = tokenizers.ByteLevelBPETokenizer()
        lines = (orjson.loads(line)["text"] for line in sample.open("rb"))
        model.train_from_iterator(lines, vocab_size=100_000, special_tokens=["<|endoftext|>"])
        model.save(str(bpe))
    return {"SentencePiece": sp, "BPE": bpe}


def in_pairs(
    sizes: list[int], work: Path, text: Path, about: dict[str, int]
) -> list[dict[str, Any]]:
    """Each vocabulary, ours beside the reference engine, twice."""
    runs: list[dict[str, Any]] = []
    for size, tokenizer in vocabularies(sizes, work, text).items():
        rates: dict[str, list[float]] = {"ours": [], "ours, reference engine": []}
        found = set()
        for name in [*rates, *rates]:
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            run = measured(command_of(name, text, tokenizer, out, 1))
            found.add(digests(out))
            rates[name].append(about["bytes"] / 1e6 / run["cpu_s"])
            facts = {"tokenizer": f"Llama 3's pattern, {size:,}", "name": name, "workers": 1}
            runs.append({**about, **run, **facts, "mb_per_cpu_s": rates[name][-1]})
        runs[-1]["identical"] = len(found) == 1
        fast, reference = rates.values()
        print(
            f"  Llama 3's pattern, {size:7,}: {fast[0]:5.1f} and {fast[1]:5.1f} MB per CPU-second, "
            f"reference {reference[0]:4.1f} and {reference[1]:4.1f}: "
            f"{fast[0] / reference[0]:.1f} and {fast[1] / reference[1]:.1f} x, "
            f"identical: {len(found) == 1}",
            flush=True,
        )
    return runs


def command_of(name: str, text: Path, tokenizer: Path, out: Path, workers: int) -> list[str]:
    if name == "Megatron's way":
        out.mkdir()
        words = [__file__, "--megatron-way", str(text), str(tokenizer), str(out / "train")]
        return [sys.executable, *words, str(workers)]
    words = ["-m", "data_prep", "tokenize", str(text), "--tokenizer", str(tokenizer)]
    words += ["--output-dir", str(out), "--validation-fraction", "0", "--workers", str(workers)]
    return [sys.executable, *words, *(["--engine", "reference"] if "reference" in name else [])]


def compare(
    lines: list[tuple[str, int]], text: Path, tokenizer: Path, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every line with one text and one tokenizer."""
    megabytes, kind, out = about["bytes"] / 1e6, about["tokenizer"], text.parent / "out"
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    found = set()
    for name, workers in lines:
        shutil.rmtree(out, ignore_errors=True)
        run = measured(command_of(name, text, tokenizer, out, workers))
        found.add(digests(out))
        rate = megabytes / run["cpu_s"]
        about_run = {"file": tokenizer.name, "name": name, "workers": workers}
        runs[name, workers] = {**about, **run, **about_run, "mb_per_cpu_s": rate}
        print(
            f"  {kind:14} {name:24} {workers} processes: {run['wall_s']:7.1f} s, "
            f"{rate:6.1f} MB per CPU-second, {megabytes / run['wall_s']:6.1f} MB/s, "
            f"{run['worker_bytes'] / 1e6:4.0f} MB a worker, "
            f"{run['parent_bytes'] / 1e6:4.0f} MB the parent",
            flush=True,
        )
    print(f"  {kind:14} .bin and .idx of all of them identical: {len(found) == 1}")
    for (name, workers), run in runs.items():
        if name == "Megatron's way":
            ratio = runs["ours", workers]["mb_per_cpu_s"] / run["mb_per_cpu_s"]
            print(f"  {kind:14} per core, {workers} processes: {ratio:.1f} x Megatron's way")
    # T(n) = alone + shared / n, with both from two measurements.
    one, two = (runs["ours", workers]["wall_s"] for workers in (1, 2))
    shared = 2 * (one - two)
    far = megabytes / (one - shared + shared / 64)
    print(f"  {kind:14} projected from 1 and 2 processes to 64: {far:,.0f} MB/s (not measured)")
    result = list(runs.values())
    result[-1] |= {"identical": len(found) == 1, "projected_64_mb_per_s": far}
    return result


def main() -> None:
    args = arguments()
    if args.megatron_way:
        source, tokenizer, out, workers = args.megatron_way
        megatron_way(source, tokenizer, out, int(workers))
        return
    from measuring import facts  # imports torch

    work = args.work or Path(tempfile.mkdtemp(prefix="data-prep-"))
    work.mkdir(parents=True, exist_ok=True)
    packages = ("gigatoken", "sentencepiece", "tokenizers", "orjson", "numpy")
    if args.text:
        about = {"documents": len(args.text.open("rb").readlines())}
        runs = in_pairs(
            args.vocabularies, work, args.text, {**about, "bytes": args.text.stat().st_size}
        )
        facts.write(args.json, {**facts.header("cpu", args, *packages), "runs": runs})
        return
    chosen = documents(args.linux or kernel(work))
    runs = []
    for size in sorted(args.sizes_mb):
        text = work / f"text-{size:.0f}.jsonl"
        wrote = write_text(text, chosen, size * 1e6)
        print(f"\n{text.name}: {wrote['documents']:,} documents, {wrote['bytes'] / 1e6:.1f} MB")
        # The reference takes minutes on the larger text, where one count of workers will do.
        lines = [("ours", 1), ("ours", 2), ("ours, reference engine", 2), ("Megatron's way", 2)]
        if size < max(args.sizes_mb) or len(args.sizes_mb) == 1:
            lines.insert(3, ("Megatron's way", 1))
        for kind, tokenizer in tokenizers_of(args, work, text).items():
            runs += compare(lines, text, tokenizer, {**wrote, "tokenizer": kind})
        if size == min(args.sizes_mb) and args.vocabularies:
            runs += in_pairs(args.vocabularies, work, text, wrote)
    facts.write(args.json, {**facts.header("cpu", args, *packages), "runs": runs})


if __name__ == "__main__":
    main()
