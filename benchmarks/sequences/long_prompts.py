"""What does a long prompt, whole or in chunks, cost in memory, and in time of requests beside it?

    python benchmarks/sequences/long_prompts.py --json FILE

A shape is HIDDEN:LAYERS:PROMPT. Four requests decode when the prompt comes. In every repetition each way
reads it once, with an engine of its own, in fp32 on one thread of a CPU:

    128, 512, 2048   in chunks of about so many tokens
    whole            in one step, as the engine did before it read in chunks

Each of the four gets a token in every step, so the longest step is the longest gap between two tokens.
Seconds are those of the processor. Memory is the process's peak above what it had when the prompt came:
what the steps compute, and the prompt's keys and values.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.options import parser_of
from measuring.processes import resident
from measuring.rows import Rows
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.inference.cache import in_bytes
from megatron_ladder.inference.engine import DynamicEngine
from megatron_ladder.inference.requests import Request, Sampling
from megatron_ladder.mcore_compat import build_gpt_model, transformer_config
from pretrain.config.data import DataConfig
from pretrain.config.train import TrainConfig
from pretrain.model.setup import start_ranks

WAYS = ("128", "512", "2048", "whole")
DECODING, DECODED = 4, 12
"""Requests beside the prompt, and the tokens of each before it comes."""


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["256:4:2048", "256:4:8192"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--residual", default="ladder")
    return parser.parse_args()


def model_of(hidden: int, layers: int, prompt: int, residual: Any = "ladder") -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=1024,
        max_position_embeddings=prompt + 512,
        residual=residual,
    )


def request(number: int, prompt: int, new: int) -> Request:
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 1024, (prompt,), generator=draw).tolist()
    return Request(number, tuple(ids), Sampling(new))


def read(gpt: Any, model: ModelConfig, prompt: int, way: str) -> dict[str, Any]:
    """Seconds of the steps before the prompt comes and until its first token; bytes; its first token."""
    tokens = prompt if way == "whole" else int(way)
    engine = DynamicEngine(gpt, model, end_ids=[], max_requests=DECODING + 1, prompt_tokens=tokens)
    for number in range(DECODING):
        engine.add(request(number, 32, 400))

    def step() -> tuple[float, list[int]]:
        began = time.process_time()
        outputs = engine.step()
        seconds = time.process_time() - began
        decoded = [output for output in outputs if output.id < DECODING]
        assert [len(output.new_ids) for output in decoded] == [1] * DECODING
        return seconds, [i for output in outputs if output.id == DECODING for i in output.new_ids]

    started: set[int] = set()
    while len(started) < DECODING:
        started |= {output.id for output in engine.step()}
    alone = [step()[0] for _ in range(DECODED)]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory of steps before would be free to be used
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    engine.add(request(DECODING, prompt, 1))
    seconds: list[float] = []
    first: list[int] = []
    while not first:
        took, first = step()
        seconds.append(took)
    peak = resident("VmHWM") - before
    return {"alone": alone, "steps": seconds, "bytes": peak, "first": first}


def measured(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    hidden, layers, prompt = map(int, shape.split(":"))
    model = model_of(hidden, layers, prompt, args.residual)
    (gpt,) = build_gpt_model(model, transformer_config(model, ParallelConfig()))
    gpt.eval()
    read(gpt, model, 256, "128")  # warms up
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for _ in range(args.repetitions):
        for way in args.ways:
            found[way].append(read(gpt, model, prompt, way))
    assert len({tuple(run["first"]) for runs in found.values() for run in runs}) == 1
    cache = 4 * 2 * layers * model.kv_heads * model.head_dim * prompt
    return [
        {
            "shape": shape,
            "way": way,
            "cache_of_prompt": in_bytes(cache),
            "runs": runs,
            "steps": len(runs[0]["steps"]),
            "alone_ms": 1e3 * statistics.median(s for run in runs for s in run["alone"]),
            "gap_ms": 1e3 * statistics.median(max(run["steps"]) for run in runs),
            "first_s": statistics.median(sum(run["steps"]) for run in runs),
            "mib": max(run["bytes"] for run in runs) / 2**20,
        }
        for way, runs in found.items()
    ]


COLUMNS = {
    "shape": "{shape}",
    "chunks of": "{way}",
    "steps": "{steps}",
    "a step without the prompt, ms": "{alone_ms:,.0f}",
    "longest gap, ms": "{gap_ms:,.0f}",
    "first token of the prompt, s": "{first_s:.1f}",
    "memory, MiB": "{mib:,.0f}",
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    config = TrainConfig(
        model=model_of(64, 1, 64),
        data=DataConfig(seq_length=64),
        micro_batch_size=1,
        global_batch_size=1,
    )
    rows = Rows(start_ranks(config), args)
    for shape in args.shapes:
        with rows.case(shape=shape):
            rows.extend(measured(shape, args))
    rows.end(facts.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
