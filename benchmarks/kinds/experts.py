"""Do ladder layers hide the all-to-alls of their experts? Two CPU ranks, expert parallel, a modelled link.

    python benchmarks/kinds/experts.py --json FILE
    python benchmarks/kinds/experts.py --fake-ranks 8 --experts 64 ... --json FILE      # on one GPU

With --fake-ranks this process is one of so many ranks, and there are no others: all-to-alls move nothing,
and take time on the modelled link alone. What experts get is padded to the mean: no rank says its numbers.

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
from megatron_ladder.config import ModelConfig, ParallelConfig, Precision  # noqa: E402
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
from pretrain.ranks import launched_rank, take_gpu  # noqa: E402
from pretrain.start.launch import become_torchrun  # noqa: E402

RANKS = 2
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
        num_attention_heads=args.heads,
        vocab_size=128,
        max_position_embeddings=args.seq_length,
        residual=residual,
        experts=ExpertsConfig(
            num_moe_experts=args.experts,
            moe_router_topk=args.top_k,
            moe_ffn_hidden_size=args.expert_size,
            moe_shared_expert_intermediate_size=(args.shared_size or args.expert_size)
            if shared
            else None,
            moe_expert_capacity_factor=1.0 if args.fake_ranks else None,
            moe_pad_expert_input_to_capacity=bool(args.fake_ranks),
        ),
    )


def one_pass(model: Any, args: argparse.Namespace, link_s: float) -> tuple[float, float, float]:
    """Seconds of forward and backward, and of the link in each of the two passes (they are alike)."""
    tokens = args.micro_batch_size * args.seq_length * args.top_k
    whole = tokens * args.hidden_size * model.config.params_dtype.itemsize
    spent: list[float] = []

    def seconds(_operation: str, size: int) -> float:
        spent.append(link_s * size / whole)
        return spent[-1]

    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (args.micro_batch_size, args.seq_length)
    here = torch.cuda.current_device()
    batch = torch.randint(0, 128, shape, generator=generator).to(here)
    positions = torch.arange(args.seq_length, device=here).expand(shape)
    model.zero_grad(set_to_none=True)
    dist.barrier()
    torch.cuda.synchronize()
    restart()
    with over(parallel_state.get_expert_model_parallel_group(), seconds):
        begin = wire.time.perf_counter()
        loss = model(batch, positions, None, labels=batch).mean()
        torch.cuda.synchronize()
        middle = wire.time.perf_counter()
        loss.backward()
        torch.cuda.synchronize()
        end = wire.time.perf_counter()
    return middle - begin, end - middle, sum(spent) / 2


def median_of(values: list[float], chosen: list[int]) -> float:
    return statistics.median(values[i] for i in chosen)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--fake-ranks", type=int, help="see above; without it two CPU ranks")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--expert-size", type=int, default=512)
    parser.add_argument("--shared-size", type=int, help="of the shared expert; as the others'")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--link-ms", type=float, default=6.0)
    parser.add_argument("--steps", type=int, default=15)
    return parser.parse_args()


def join(args: argparse.Namespace) -> tuple[str, ParallelConfig]:
    """Makes the ranks. Returns the device's name, and the layout."""
    on_cpu = cpu_platform.enable()
    if args.fake_ranks:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if not on_cpu:
            take_gpu()
        store = FakeStore()
        dist.init_process_group("fake", store=store, rank=0, world_size=args.fake_ranks)
    else:
        dist.init_process_group("gloo")
    if on_cpu:
        use_processor_time()
    parallel = ParallelConfig(expert_model_parallel_size=args.fake_ranks or RANKS)
    initialize_model_parallel(parallel, seed=1)
    return "cpu" if on_cpu else torch.cuda.get_device_name(), parallel


def main() -> None:
    args = arguments()
    if not args.fake_ranks and launched_rank() is None:
        become_torchrun(RANKS, *sys.argv)
    device, parallel = join(args)
    precision: Precision = "fp32" if device == "cpu" else "bf16"
    runs: dict[tuple[str, str], Callable[[], tuple[float, ...]]] = {}
    for name, (residual, shared) in KINDS.items():
        model = model_of(args, residual, shared)
        config = transformer_config(model, parallel, precision=precision)
        (gpt,) = build_gpt_model(model, config)
        for link, link_s in (("link", args.link_ms / 1e3), ("none", 0.0)):
            runs[name, link] = partial(one_pass, gpt.train(), args, link_s)
    times = measure(runs, args.steps, keep_what_is_there=bool(args.fake_ranks))
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
            report = {**header(device, args), "rows": rows}
            write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
