"""How much do torch's attention and torch.compile save in whole training steps of small models?

    python benchmarks/compile.py --shapes 128:4:128:1 256:6:256:2 --json FILE
    torchrun --nproc-per-node 2 benchmarks/compile.py --shapes 128:6:256:8:4096 --kinds ladder \\
        --variants unfused plain                        # the quick start's training

A shape is HIDDEN:LAYERS:SEQUENCE:MICRO_BATCH, with :VOCABULARY at its end if it is not 512. `plain` is the
default of `train`, `unfused` has `--attention unfused` and `compiled` has `--compile`, which works on one
rank only. In each repetition every run of a shape takes one step, and quotients are of two runs' times in
one repetition. Processor time counts the first rank's process alone; it is comparable on a shared machine
too. "Kept" counts the bytes that a forward pass keeps for backward.
"""

import argparse
import gc
import itertools
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from measuring import facts
from measuring.batches import random_batch
from measuring.options import parser_of
from measuring.rows import Rows
from megatron_ladder.config import ModelConfig, ParallelConfig
from pretrain.bench.interleaved import measure, quotients
from pretrain.config.data import DataConfig
from pretrain.config.train import TrainConfig
from pretrain.data.batches import to_device
from pretrain.loop.step import train_step
from pretrain.model.setup import build, start_ranks
from pretrain.ranks import world_size

VARIANTS: dict[str, dict[str, Any]] = {
    "unfused": {"attention": "unfused"},
    "plain": {},
    "compiled": {"compile": True},
}


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["128:4:128:1", "256:6:256:2"])
    parser.add_argument("--kinds", nargs="+", default=["ladder", "standard"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=30, help="interleaved repetitions")
    return parser.parse_args()


def config_of(shape: str, kind: Any, precision: Any) -> TrainConfig:
    hidden, layers, seq_length, batch, *vocab = map(int, shape.split(":"))
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=vocab[0] if vocab else 512,
        max_position_embeddings=seq_length,
        residual=kind,
    )
    return TrainConfig(
        model=model,
        data=DataConfig(seq_length=seq_length),
        parallel=ParallelConfig(tensor_model_parallel_size=world_size()),
        micro_batch_size=batch,
        global_batch_size=batch,
        precision=precision,
        transformer_impl="local",
    )


class Run:
    """One variant of one model. Its first step has been taken."""

    def __init__(self, config: TrainConfig, variant: str) -> None:
        self._config = replace(config, **VARIANTS[variant])
        torch.manual_seed(0)
        self._parts = build(self._config)
        self._batches = itertools.repeat(random_batch(config))
        begin = time.perf_counter()
        self.first_loss, self.first_norm = self._train()
        self.first_s = time.perf_counter() - begin
        self.attention = facts.attention_of(self._parts[0][0])
        self.kept = self._kept()

    def _kept(self) -> int:
        """Bytes that a forward pass keeps for backward, besides the parameters."""
        (model, *_), batch = self._parts[0], to_device(next(self._batches))
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: list[torch.Tensor] = []  # held, lest an address be used twice

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        storages = (x.untyped_storage() for x in kept)
        return sum(
            {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}.values()
        )

    def _train(self) -> tuple[float, float]:
        loss, norm, *_ = train_step(*self._parts, self._batches, self._config)
        torch.cuda.synchronize()
        return loss, norm

    def step(self) -> tuple[float, float]:
        """Seconds, and seconds of the processor."""
        begin, cpu = time.perf_counter(), time.process_time()
        self._train()
        return time.perf_counter() - begin, time.process_time() - cpu


def compare(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = {
        (kind, variant): Run(config_of(shape, kind, args.precision), variant)
        for kind in args.kinds
        for variant in args.variants
    }
    gc.collect()
    times = measure({key: run.step for key, run in runs.items()}, args.steps)
    load = facts.under_load(runs[args.kinds[0], "plain"].step)
    rows = []
    for (kind, variant), found in times.items():
        plain = times[kind, "plain"]
        over = [quotients([t[i] for t in found], [t[i] for t in plain]) for i in (0, 1)]
        run, other = runs[kind, variant], runs[kind, "plain"]
        rows.append(
            {
                "shape": shape,
                "kind": kind,
                "variant": variant,
                "first_step_s": run.first_s,
                "ms": 1e3 * statistics.median(t[0] for t in found),
                "processor_ms": 1e3 * statistics.median(t[1] for t in found),
                "over_plain": over[0],
                "processor_over_plain": over[1],
                "kept_mib": run.kept / 2**20,
                "first_loss_off": run.first_loss / other.first_loss - 1,
                "first_norm_off": run.first_norm / other.first_norm - 1,
                "attention": run.attention,
                **facts.peak_memory(),  # of all together
                **load,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "hidden:layers:sequence:batch": "{shape}",
        "kind": "{kind}",
        "": "{variant}",
        "step, ms": "{ms:.1f}",
        "over plain": "{over_plain[1]:.2f}",
        "quartiles": "{over_plain[0]:.2f} to {over_plain[2]:.2f}",
        "processor time over plain": "{processor_over_plain[1]:.2f}",
        "its quartiles": "{processor_over_plain[0]:.2f} to {processor_over_plain[2]:.2f}",
        "first step, s": "{first_step_s:.1f}",
        "kept, MiB": "{kept_mib:.0f}",
    }
    return facts.table(rows, columns)


def main() -> None:
    args = arguments()
    device = start_ranks(config_of(args.shapes[0], "ladder", args.precision))
    rows = Rows(device, args)
    for shape in args.shapes:
        with rows.case(shape=shape):
            rows += compare(shape, args)
    rows.end(table(rows))


if __name__ == "__main__":
    main()
