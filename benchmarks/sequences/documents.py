"""How much time and memory do documents apart take, by themselves and with an s x s mask?

    python benchmarks/sequences/documents.py --shapes 128:6:256:8:6000 128:6:256:8:60 --json FILE
    python benchmarks/sequences/documents.py --shapes 64:1:32768:1:1000 --steps 2 --json FILE
    python benchmarks/sequences/documents.py --shapes 128:6:256:8:data --data quickstart/data --json FILE

A shape is HIDDEN:LAYERS:SEQUENCE:MICRO_BATCH:DOCUMENT, the last the mean length of a document in tokens.
Lengths are drawn from a log-normal distribution (sigma 1) and cut where sequences end, as those of a data
set are; where DOCUMENT is "data", they are those of the data set --data, shuffled. Each step has other
documents. Three ways take one training step each in every repetition, in fp32 on one thread of a CPU:

    together    tokens attend to all earlier ones of their sequence
    mask        a document's tokens attend to it alone, by a mask of s x s numbers for each sequence
    apart       the same, each document by itself: what `train` does

The mask is made once a step and shared by all layers. Memory is the process's peak above what it had before
the step. Masks above --most-gib are not tried.
"""

import argparse
import ctypes
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from megatron.core.datasets.indexed_dataset import IndexedDataset

from measuring import facts
from measuring.batches import random_batch
from measuring.options import parser_of
from measuring.rows import Rows
from megatron_ladder.config import ModelConfig
from megatron_ladder.layers.attention.core import TorchAttention
from megatron_ladder.layers.attention.documents import Documents
from pretrain.bench.interleaved import measure, quotients
from pretrain.config.data import DataConfig
from pretrain.config.train import TrainConfig
from pretrain.loop.step import train_step
from pretrain.model.setup import build, start_ranks

WAYS = ("together", "mask", "apart")


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["128:6:256:8:6000", "128:6:256:8:60"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--data", type=Path, help="a data set with the documents to take")
    parser.add_argument("--steps", type=int, default=15, help="interleaved repetitions")
    parser.add_argument("--most-gib", type=float, default=6.0, help="of a mask")
    return parser.parse_args()


def config_of(hidden: int, layers: int, seq_length: int, batch: int) -> TrainConfig:
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=512,
        max_position_embeddings=seq_length,
    )
    data = DataConfig(seq_length=seq_length, attend_across_documents=False)
    return TrainConfig(model=model, data=data, micro_batch_size=batch, global_batch_size=batch)


def documents_of(config: TrainConfig, lengths: Tensor, steps: int = 1) -> Tensor:
    """A number for each token, int32 [steps, b, s]: documents one after another, from the middle of one on.

    Args:
        lengths: tokens of each document, int64 [documents].
    """
    count = steps * config.tokens_per_step
    numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    first = int(lengths[:20].sum() // 2)
    return numbers[first : first + count].view(steps, config.micro_batch_size, -1)


def drawn_lengths(tokens: int, mean: float) -> Tensor:
    """Lengths of documents that together have at least so many tokens, and half of 20 more: int64."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4 * math.ceil(tokens / mean) + 40, generator=generator)
    return (mean * (drawn - 0.5).exp()).long().clamp(min=2)  # the mean of exp(z) is exp(1/2)


def lengths_of(folder: Path) -> Tensor:
    """The lengths of a data set's training documents, shuffled: int64."""
    index = IndexedDataset(str(folder / "train"))  # it unmaps its arrays when it is deleted
    lengths = torch.from_numpy(index.sequence_lengths.copy())
    return lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))].long()


def by_mask(
    self: TorchAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any
) -> Tensor:
    """In place of `TorchAttention.forward`: what it did when masks kept documents apart."""
    documents: Any = given["packed_seq_params"]
    if not hasattr(documents, "bias"):
        numbers, length = documents._numbers, len(query)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = later | (numbers[:, :, None] != numbers[:, None, :])
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -torch.inf)
        documents.bias = bias[:, None]
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value.contiguous()))
    attended = F.scaled_dot_product_attention(
        query, key, value, documents.bias, scale=self.softmax_scale, enable_gqa=True
    )
    return attended.permute(2, 0, 1, 3).flatten(2).contiguous()


def memory() -> dict[str, int]:
    """Bytes of this process now, and at its peak since `/proc/self/clear_refs` was written to."""
    found = re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {name: 1024 * int(size) for name, size in found}


def measured(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    *sizes, mean = shape.split(":")
    config = config_of(*map(int, sizes))
    steps = args.steps + 1  # the first one warms up
    count = steps * config.tokens_per_step
    lengths = lengths_of(args.data) if mean == "data" else drawn_lengths(count, float(mean))
    numbers = documents_of(config, lengths, steps)
    turns = {way: iter(numbers) for way in WAYS}
    batch, parts = random_batch(config), build(config)
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}
    trim = ctypes.CDLL(None).malloc_trim  # or memory of the step before would be free to be used
    masks = config.tokens_per_step * config.data.seq_length * 4 / 2**30

    def step(way: str) -> tuple[float, ...]:
        documents = next(turns[way])
        given = batch if way == "together" else {**batch, "documents": documents}
        gc.collect()
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, began = memory()["VmRSS"], time.process_time()
        with patch.object(TorchAttention, "forward", by_mask if way == "mask" else forward):
            train_step(*parts, iter([given]), config)
        seconds = time.process_time() - began
        peaks[way].append(memory()["VmHWM"] - before)
        return (seconds,)

    forward = TorchAttention.forward
    ways = [way for way in args.ways if way != "mask" or masks <= args.most_gib]
    runs: dict[str, Callable[[], tuple[float, ...]]] = {
        way: lambda way=way: step(way)  # type: ignore[misc]
        for way in ways
    }
    times = {way: [s for (s,) in of] for way, of in measure(runs, args.steps).items()}
    pieces = [n for row in Documents(numbers.flatten(0, 1)).lengths for n in row]
    return {
        "shape": shape,
        "documents": len(pieces) / steps,  # of a micro-batch
        "attended": sum(n * n for n in pieces) / sum(pieces),
        "mask_gib": masks,
        "seconds": times,
        "peak_bytes": {way: peaks[way][1:] for way in ways},  # the first step warms up
        **{f"{way}_ms": 1e3 * statistics.median(times[way]) for way in ways},
        **{f"{way}_mib": max(peaks[way][1:]) / 2**20 for way in ways},
        **{
            f"apart over {way}": quotients(times["apart"], times[way])
            for way in ways
            if way != "apart"
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    shown = []
    for row in rows:
        over = {
            way: "{1:.2f} ({0:.2f} to {2:.2f})".format(*row[f"apart over {way}"])
            for way in ("together", "mask")
            if f"apart over {way}" in row
        }
        shown.append({**row, **{f"over_{way}": words for way, words in over.items()}})
    columns = {"shape": "{shape}", "documents": "{documents:.1f}", "mask, GiB": "{mask_gib:.2f}"}
    columns |= {f"{way}, ms": f"{{{way}_ms:,.0f}}" for way in WAYS}
    columns |= {f"apart over {way}": f"{{over_{way}}}" for way in ("together", "mask")}
    columns |= {f"{way}, MiB": f"{{{way}_mib:,.0f}}" for way in WAYS}
    return facts.table(shown, columns)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    device = start_ranks(config_of(64, 1, 64, 1))
    rows = Rows(device, args)
    for shape in args.shapes:
        with rows.case(shape=shape):
            rows.append(measured(shape, args))
    rows.end(table(rows))


if __name__ == "__main__":
    main()
