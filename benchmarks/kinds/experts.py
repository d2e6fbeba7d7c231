"""Do ladder layers hide the all-to-alls of their experts? Two CPU ranks, expert parallel, a modelled link.

    python benchmarks/kinds/experts.py --json FILE

Each kind of layers runs forward and backward of one micro-batch over a link that takes --link-ms for an
all-to-all of evenly spread tokens (and as much less for a smaller message), and over a link that takes no
time, in turns. What the link adds to a pass, over the link's time in that pass, is the exposed share.

Computation counts by the processor time of the thread that computes, and a wait for the link is added, not
slept (benchmarks/measuring/overlap/clock.py): other programs may use the machine. What gloo itself takes,
also to exchange numbers of tokens, is in neither.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # where `measuring` is

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from measuring.facts import header  # noqa: E402
from measuring.options import parser_of  # noqa: E402
from measuring.overlap.clock import restart, use_processor_time  # noqa: E402
from measuring.overlap.hidden import half_width  # noqa: E402
from megatron_ladder import cpu_platform  # noqa: E402
from megatron_ladder.config import ModelConfig, ParallelConfig  # noqa: E402
from megatron_ladder.fields.experts import ExpertsConfig  # noqa: E402
from megatron_ladder.mcore_compat import (  # noqa: E402
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.bench import wire  # noqa: E402
from pretrain.bench.interleaved import measure  # noqa: E402
from pretrain.bench.wire import over  # noqa: E402
from pretrain.files import write_atomically  # noqa: E402
from pretrain.ranks import launched_rank  # noqa: E402
from pretrain.start.launch import become_torchrun  # noqa: E402

RANKS, TOP = 2, 2
PARALLEL = ParallelConfig(expert_model_parallel_size=RANKS)
KINDS = {
    "standard, shared expert": ("standard", True),
    "ladder, shared expert": ("ladder", True),
    "standard": ("standard", False),
    "ladder": ("ladder", False),
}


def most(layers: int, shared: bool) -> float:
    """The share that ladder layers can hide: of 2 L all-to-alls of a pass all, behind the other sub-module.
    But behind the last combine of forward, and the first of backward, there is only the shared expert."""
    return 1.0 if shared else (2 * layers - 1) / (2 * layers)


def model_of(args: argparse.Namespace, residual: Any, shared: bool) -> ModelConfig:
    return ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.expert_size,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=args.seq_length,
        residual=residual,
        experts=ExpertsConfig(
            num_moe_experts=4,
            moe_router_topk=TOP,
            moe_ffn_hidden_size=args.expert_size,
            moe_shared_expert_intermediate_size=args.expert_size if shared else None,
        ),
    )


def one_pass(model: Any, args: argparse.Namespace, link_s: float) -> tuple[float, float, float]:
    """Seconds of forward and backward, and of the link in each of the two passes (they are alike)."""
    tokens = args.micro_batch_size * args.seq_length * TOP
    whole = tokens * args.hidden_size * 4
    spent: list[float] = []

    def seconds(_operation: str, size: int) -> float:
        spent.append(link_s * size / whole)
        return spent[-1]

    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (args.micro_batch_size, args.seq_length)
    batch = torch.randint(0, 128, shape, generator=generator)
    positions = torch.arange(args.seq_length).expand(shape)
    model.zero_grad(set_to_none=True)
    dist.barrier()
    restart()
    with over(parallel_state.get_expert_model_parallel_group(), seconds):
        begin = wire.time.perf_counter()
        loss = model(batch, positions, None, labels=batch).mean()
        middle = wire.time.perf_counter()
        loss.backward()
        end = wire.time.perf_counter()
    return middle - begin, end - middle, sum(spent) / 2


def median_of(values: list[float], chosen: list[int]) -> float:
    return statistics.median(values[i] for i in chosen)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--expert-size", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--link-ms", type=float, default=6.0)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    if launched_rank() is None:
        become_torchrun(RANKS, *sys.argv)
    use_processor_time()
    cpu_platform.enable()
    dist.init_process_group("gloo")
    initialize_model_parallel(PARALLEL, seed=1)
    runs: dict[tuple[str, str], Callable[[], tuple[float, ...]]] = {}
    for name, (residual, shared) in KINDS.items():
        model = model_of(args, residual, shared)
        (gpt,) = build_gpt_model(model, transformer_config(model, PARALLEL))
        for link, link_s in (("link", args.link_ms / 1e3), ("none", 0.0)):
            runs[name, link] = partial(one_pass, gpt.train(), args, link_s)
    times = measure(runs, args.steps)
    if dist.get_rank() == 0:
        rows: list[dict[str, Any]] = []
        for name, (_, shared) in KINDS.items():
            for number, which in enumerate(("forward", "backward")):
                # Of each repetition by itself: a slow moment of the machine hits both of its runs.
                pairs = list(zip(times[name, "link"], times[name, "none"], strict=True))
                added = [a[number] - b[number] for a, b in pairs]
                added_s = statistics.median(added)
                link_s = statistics.median(a[2] for a, _ in pairs)
                rows.append(
                    {
                        "kind": name,
                        "pass": which,
                        "without_link_s": statistics.median(b[number] for _, b in pairs),
                        "link_s": link_s,
                        "added_s": added_s,
                        "hidden_share": 1 - added_s / link_s,
                        "plus_or_minus": half_width(partial(median_of, added), len(added)) / link_s,
                        "most": most(args.layers, shared) if "ladder" in name else 0.0,
                    }
                )
        for row in rows:
            print(
                f"{row['kind']:24} {row['pass']:9} {1e3 * row['without_link_s']:7.1f} ms, link "
                f"{1e3 * row['link_s']:6.1f} ms, adds {1e3 * row['added_s']:6.1f} ms: hidden "
                f"{row['hidden_share']:5.2f} +- {row['plus_or_minus']:.2f} (at most {row['most']:.2f})"
            )
        if args.json:
            report = {**header("cpu", args), "rows": rows}
            write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
