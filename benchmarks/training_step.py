"""How fast is a whole training step on one device, and how close is its peak of memory to the plan's?

    python benchmarks/training_step.py --cases paper-1b:bf16:ladder llama-3-8b:tensorwise:ladder:8

A case is SHAPE:PRECISION:KIND. It may go on with :LAYERS and :RECOMPUTE, and it may end in :graph, for a
CUDA graph (pretrain/model/graphs.py). Model, loss, backward, gradient buffers and optimizer are those of
`megatron-ladder train`; tokens are random, and no checkpoint is written. MFU counts 6 N + 12 L h s
operations a token (pretrain/run/metrics.py) over the card's dense bf16 peak, in FP8 too.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import replace
from typing import Any, get_args

import torch

from measuring import facts
from measuring.batches import random_batch
from measuring.options import parser_of
from measuring.precisions import precision_of
from measuring.rows import Rows
from megatron_ladder.config import Attention, ParallelConfig
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.loop.step import train_step
from pretrain.model.graphs import WARM_UP_STEPS, StepGraph
from pretrain.model.setup import build, layers_config, start_ranks
from pretrain.plan.memory import in_words, is_planned, kept_as, memory_plan
from pretrain.run.metrics import flops_per_token, peak_flops


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--micro-batch-size", type=int, help="None: the preset's")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--attention", choices=get_args(Attention), default="auto")
    return parser.parse_args()


def config_of(case: str, args: argparse.Namespace) -> TrainConfig:
    shape, precision, kind, *rest = case.removesuffix(":graph").split(":")
    config = PRESETS[shape]()
    layers = int(rest[0]) if rest and rest[0] else config.model.num_layers
    recompute: Any = rest[1] if len(rest) > 1 else "none"
    number_format, fp8 = precision_of(precision)
    residual: Any = kind
    micro = args.micro_batch_size or config.micro_batch_size
    return replace(
        config,
        model=replace(
            config.model,
            num_layers=layers,
            residual=residual,
            ladder_layers=None,
            vocab_size=config.model.vocab_size or 512,
        ),
        parallel=ParallelConfig(),
        precision=number_format,
        fp8=fp8,
        recompute=recompute,
        attention=args.attention,
        cuda_graph=case.endswith(":graph"),
        micro_batch_size=micro,
        global_batch_size=micro * args.accumulate,
    )


def measure(case: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    config = config_of(case, args)
    model, optimizer, scheduler = build(config)
    batches = itertools.repeat(random_batch(config))
    graph = StepGraph(model) if config.cuda_graph else None
    warm_up = WARM_UP_STEPS + 2 if graph else 2
    losses, seconds = [], []

    def step() -> None:
        begin = time.perf_counter()
        loss, *_ = train_step(model, optimizer, scheduler, batches, config, graph=graph)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss)

    for _ in range(args.steps + warm_up):
        step()
    step_s, steps_s = statistics.median(seconds[warm_up:]), list(seconds)
    load = facts.under_load(step)
    flops = config.tokens_per_step * flops_per_token(
        num_layers=config.model.num_layers,
        attention_width=config.model.attention_width,
        seq_length=config.data.seq_length,
        matmul_parameters=config.model.num_matmul_parameters(),
    )
    peak = None if device == "cpu" else peak_flops(device)
    found = {
        "case": case,
        "parameters": config.model.num_parameters(),
        "micro_batch_size": config.micro_batch_size,
        "seq_length": config.data.seq_length,
        "step_ms": 1e3 * step_s,
        "steps_ms": [1e3 * s for s in steps_s],
        "tokens_per_second": config.tokens_per_step / step_s,
        "tflops": flops / step_s / 1e12,
        "mfu": flops / step_s / peak if peak else None,
        "loss": losses[args.steps + 1],
        "attention": facts.attention_of(model[0]),
        "peak_gib": None,
        **facts.peak_memory(),
        **load,
        "planned_gib": None,
    }
    if is_planned(config):
        plan = memory_plan(config, 1, kept_as(layers_config(config).core_attention))
        found["planned_gib"], found["planned"] = plan.total / 2**30, in_words(plan)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    millions = [
        {**row, "millions": row["parameters"] / 1e6} if "parameters" in row else row for row in rows
    ]
    columns = {
        "case": "{case}",
        "parameters": "{millions:,.0f} M",
        "step, ms": "{step_ms:.1f}",
        "tokens/s": "{tokens_per_second:,.0f}",
        "TFLOP/s": "{tflops:.1f}",
        "MFU": "{mfu:.1%}",
        "peak, GiB": "{peak_gib:.2f}",
        "planned": "{planned_gib:.2f}",
    }
    return facts.table(millions, columns)


def main() -> None:
    args = arguments()
    configs = [config_of(case, args) for case in args.cases]
    device = start_ranks(max(configs, key=lambda config: config.cuda_graph))
    rows = Rows(device, args)
    for case in args.cases:
        with rows.case(case=case):
            rows.append(measure(case, args, device))
            print(table(rows).splitlines()[-1], flush=True)
    rows.end(table(rows))


if __name__ == "__main__":
    main()
