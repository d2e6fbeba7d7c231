"""How much do all-reduces in int8 change a model's loss, and how often its likeliest token?

    python benchmarks/quantised_sums.py MODEL DATA --json benchmarks/results/quantised-sums.json

MODEL is a trained ladder or parallel run, or its exported folder; DATA a data set made with its tokenizer.
At each tensor-parallel size the model reads the same windows of the validation split twice: with exact
all-reduces of the sub-modules' outputs, and with all-reduces in int8
(megatron_ladder/collectives/quantised_sum.py). All else is fp32 on a CPU.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from measuring import facts
from measuring.options import parser_of
from megatron_ladder.config import ParallelConfig
from megatron_ladder.inference.sums import set_all_reduce
from pretrain.data.folders import open_folder
from pretrain.evaluation.documents import open_split
from pretrain.inference.loaded import find, load


@torch.no_grad()
def measured(args: argparse.Namespace) -> dict[str, Any]:
    """At one size; called by each rank."""
    tp = args.rank_of
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    found = find(args.model, parallel, "int8")
    chunk = load(found, parallel, seed=0)
    device = torch.cuda.current_device()
    length = args.seq_length
    stream = open_split(open_folder(args.data), "validation").ids()
    assert len(stream) > args.windows * length, "fewer tokens than --windows asks for"
    more, losses, errors, others = [], [], [], 0.0
    positions = torch.arange(length, device=device)[None]
    for i in tqdm(range(args.windows), desc=f"TP {tp}", disable=dist.get_rank() > 0):
        window = torch.from_numpy(stream[i * length : (i + 1) * length + 1].astype(np.int64))
        ids, labels = window[None, :-1].to(device), window[1:].to(device)
        logits = {}
        for way in ("exact", "int8"):
            set_all_reduce(chunk.decoder, way)
            output = chunk(ids, positions, None, runtime_gather_output=True)
            logits[way] = output[0, :, : found.model.vocab_size].float()
        exact, int8 = (F.cross_entropy(logits[way], labels).item() for way in logits)
        losses.append(exact)
        more.append(int8 - exact)
        difference = logits["int8"] - logits["exact"]
        errors.append((difference.norm() / logits["exact"].norm()).item())
        others += (logits["int8"].argmax(-1) != logits["exact"].argmax(-1)).double().mean().item()
    return {
        "tensor_model_parallel_size": tp,
        "tokens": args.windows * length,
        "loss": float(np.mean(losses)),
        "loss_more": float(np.mean(more)),
        "loss_more_stderr": float(np.std(more, ddof=1) / math.sqrt(args.windows)),
        "logits_error": float(np.mean(errors)),
        "other_likeliest": others / args.windows,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tensor-model-parallel-sizes", nargs="+", type=int, default=[2])
    parser.add_argument("--seq-length", type=int, default=256, help="that it was trained with")
    parser.add_argument("--windows", type=int, default=64, help="of the validation split")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        row = measured(args)
        if dist.get_rank() == 0:
            args.row.write_text(json.dumps(row))
        dist.destroy_process_group()
        return
    rows = []
    for tp in args.tensor_model_parallel_sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "row.json"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*torchrun, f"--nproc-per-node={tp}", *sys.argv, f"--rank-of={tp}"]
            subprocess.run([*command, f"--row={path}"], check=True)  # noqa: S603 (a list, no shell)
            rows.append(json.loads(path.read_text()))
    columns = {
        "TP": "{tensor_model_parallel_size}",
        "loss": "{loss:.4f}",
        "more with int8": "{loss_more:+.5f} +- {loss_more_stderr:.5f}",
        "relative error of logits": "{logits_error:.2%}",
        "another likeliest token": "{other_likeliest:.2%}",
    }
    print(facts.table(rows, columns))
    facts.write(args.json, {**facts.header("cpu", args), "rows": rows})


if __name__ == "__main__":
    main()
