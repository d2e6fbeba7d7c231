"""How long does it take to make the index files of many data sets, by megatron-core and in parts?

    python benchmarks/commands/index_files.py --json benchmarks/results/index-files.json

Two measurements on the CPU, in seconds and in CPU seconds, which other work of the machine changes less:

files   The index files of a blend of made-up data sets. Their documents have random lengths; their token
        files are holes, because index files are made from lengths alone. megatron-core makes them one
        after another; `megatron-ladder index` makes them in parts, by a process for each core. Both in
        turns, and the files are compared byte for byte.
order   How long megatron-core takes for one sequence of a blend's order, for so many data sets.

The last lines are no measurement: they multiply both rates by the size of a large run.
"""

import filecmp
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets import helpers

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.options import parser_of
from pretrain.config.data import DataConfig
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.data.checks import open_data
from pretrain.data.sequences import train_sequences
from pretrain.index.cache import make_index

LENGTH, BATCH = 4096, 1024
MEAN_DOCUMENT = 1000  # tokens
SETS = (10, 100, 1000)
LARGE = {"sets": 1000, "tokens": 15e12}


def write_data_set(folder: Path, documents: int, seed: int) -> Path:
    """A data set without its tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2 * MEAN_DOCUMENT, documents).astype("<i4")
    ends = np.cumsum(lengths, dtype=np.int64)
    folder.mkdir(parents=True)
    with (folder / "train.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([8]))
        file.write(np.array([documents, documents + 1], "<u8").tobytes())
        for array in (lengths, (ends - lengths) * 2, np.arange(documents + 1, dtype="<i8")):
            file.write(array.tobytes())
    with (folder / "train.bin").open("wb") as file:
        file.truncate(2 * int(ends[-1]))
    facts_of_split = {
        "documents": documents,
        "tokens": int(ends[-1]),
        "bin_bytes": 2 * int(ends[-1]),
        "idx_bytes": (folder / "train.idx").stat().st_size,
    }
    manifest = {
        "format": "megatron-ladder-data",
        "version": 1,
        "tokenizer": {
            "kind": "none",
            "file": "none",
            "sha256": "0",
            "vocab_size": 200,
            "eod_id": 2,
        },
        "dtype": "uint16",
        "splits": {"train": facts_of_split},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def one_epoch(paths: tuple[Path, ...], tokens: int) -> TrainConfig:
    """A training that reads about all of the data sets once."""
    config = PRESETS["debug"]()
    model = replace(config.model, max_position_embeddings=LENGTH)
    steps = max(1, tokens // (LENGTH * BATCH))
    data = DataConfig(paths=paths, seq_length=LENGTH)
    schedule = replace(config.schedule, train_steps=steps, warmup_steps=0)
    return replace(config, model=model, data=data, schedule=schedule, global_batch_size=BATCH)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def by_megatron(config: TrainConfig, target: Path) -> tuple[float, float]:
    """Seconds and CPU seconds."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    begin, cpu = time.perf_counter(), cpu_seconds()
    train_sequences(config, open_data(config), target)
    seconds = time.perf_counter() - begin, cpu_seconds() - cpu
    dist.destroy_process_group()
    return seconds


def in_parts(config: TrainConfig, target: Path) -> tuple[float, float]:
    """Seconds and CPU seconds."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    list(make_index(config, open_data(config), target))
    return time.perf_counter() - begin, cpu_seconds() - cpu


def seconds_a_sequence(sets: int, size: int) -> float:
    """CPU seconds."""
    weights = np.random.default_rng(0).dirichlet(np.ones(sets)).tolist()
    order, sequence = np.zeros(size, np.int16), np.zeros(size, np.int64)
    begin = time.process_time()
    helpers.build_blending_indices(order, sequence, weights, sets, size, False)
    return (time.process_time() - begin) / size


def same_files(one: Path, other: Path) -> bool:
    names = [file.name for file in one.iterdir()]
    assert {f.name for f in other.iterdir()} == {*names, "made.json"}
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--documents", type=int, default=200_000, help="of each data set")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"by megatron-core": [], "in parts": []}
    with tempfile.TemporaryDirectory(prefix="index-files.") as folder:
        place = Path(folder)
        paths = [place / f"set{i}" for i in range(options.sets)]
        written = (write_data_set(path, options.documents, i) for i, path in enumerate(paths))
        config = one_epoch(tuple(written), 0)
        tokens = sum(f.tokens("train") for f in open_data(config))
        config = one_epoch(tuple(paths), tokens)
        for _ in range(options.rounds):
            times["by megatron-core"].append(by_megatron(config, place / "theirs"))
            times["in parts"].append(in_parts(config, place / "ours"))
            assert same_files(place / "theirs", place / "ours")
            shutil.rmtree(place / "theirs")
            shutil.rmtree(place / "ours")
    per_sequence = {sets: seconds_a_sequence(sets, 200_000_000 // sets) for sets in SETS}
    medians = {
        line: tuple(statistics.median(some) for some in zip(*rounds, strict=True))
        for line, rounds in times.items()
    }
    print(
        f"index files of {options.sets} data sets with {tokens:,} tokens, "
        f"medians of {options.rounds}: "
        + ", ".join(f"{line} {s:.1f} s, {cpu:.1f} CPU s" for line, (s, cpu) in medians.items())
    )
    rows = [{"sets": sets, "ns": 1e9 * seconds} for sets, seconds in per_sequence.items()]
    print(facts.table(rows, {"data sets": "{sets}", "CPU ns a sequence": "{ns:.0f}"}))
    sequences = LARGE["tokens"] / LENGTH
    order_s = sequences * per_sequence[1000]
    # The blend's own order is in megatron-core's time: of few data sets it is a small share.
    rate = tokens / (medians["by megatron-core"][1] - tokens / LENGTH * per_sequence[10])
    print(
        f"{LARGE['tokens']:.3g} tokens of {LARGE['sets']:,} data sets, by multiplication: the order "
        f"{order_s / 3600:.1f} h on one core, all else {LARGE['tokens'] / rate / 3600:.1f} core hours"
    )
    report = {
        "tokens": tokens,
        "seconds_and_cpu_seconds": times,
        "cpu_ns_a_sequence": {sets: 1e9 * seconds for sets, seconds in per_sequence.items()},
    }
    facts.write(options.json, {**facts.header("cpu", options), **report})


if __name__ == "__main__":
    main()
