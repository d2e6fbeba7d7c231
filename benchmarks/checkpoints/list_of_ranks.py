"""How long does rank 0 take to list what thousands of ranks write into a checkpoint?

    python benchmarks/checkpoints/list_of_ranks.py --json benchmarks/results/checkpoint-list.json

The optimizer's state of Llama 3's 8B at TP 8 is cut as the project cuts it, at 64 and 512 data-parallel
ranks. No data is made. torch's distributed checkpointing gets every rank's list of pieces in one process.
It makes and checks the list of all, as rank 0 does at each save while training waits. Left out are
gathering the lists over a network, and the weights (a few hundred pieces for each tensor rank). Times are
processor time.
"""

import math
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.default_planner import (
    _validate_global_plan,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.options import parser_of
from pretrain.config.presets import PRESETS
from pretrain.optim.shards import _rectangles

TP = 8


def parameters() -> Iterator[tuple[str, tuple[int, ...], int | None, int | None]]:
    """Name, whole shape, the axis that tensor parallelism cuts, and the layer; in the order of backward."""
    model = PRESETS["llama-3-8b"]().model
    hidden, ffn, vocabulary = model.hidden_size, model.ffn_hidden_size, 128_256
    qkv = hidden + 2 * model.kv_heads * model.head_dim
    yield "output_layer", (vocabulary, hidden), 0, None
    for layer in reversed(range(model.num_layers)):
        yield "fc2", (hidden, ffn), 1, layer
        yield "fc1", (2 * ffn, hidden), 0, layer
        yield "norm2", (hidden,), None, layer
        yield "proj", (hidden, hidden), 1, layer
        yield "qkv", (qkv, hidden), 0, layer
        yield "norm1", (hidden,), None, layer
    yield "embedding", (vocabulary, hidden), 0, None


def buckets(dp: int) -> Iterator[list[tuple[int, Any, tuple[int, ...]]]]:
    """As megatron-core cuts the gradients of a tensor rank: start, parameter and local shape."""
    bucket: list[Any] = []
    size = 0
    for parameter in parameters():
        _, shape, axis, _ = parameter
        local = tuple(n // TP if i == axis else n for i, n in enumerate(shape))
        bucket.append((size, parameter, local))
        size += math.ceil(math.prod(local) / 64) * 64
        if size >= max(40_000_000, 1_000_000 * dp):
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def pieces(tp: int, parameter: Any, local: tuple[int, ...]) -> list[ShardedTensor]:
    name, shape, axis, layer = parameter
    layers = () if layer is None else (layer,)
    whole = (*(() if layer is None else (32,)), *shape)
    rows = (local[0] // 2, *local[1:]) if name == "fc1" else local
    offsets = []
    for half in range(2 if name == "fc1" else 1):
        offset = [tp * n if i == axis else 0 for i, n in enumerate(rows)]
        offset[0] += half * shape[0] // 2
        offsets.append((*layers, *offset))
    return [
        ShardedTensor(name, None, torch.float, rows, whole, o, None, (0, 0, 0), len(layers))
        for o in offsets
    ]


def plans(dp: int) -> list[SavePlan]:
    """What each rank writes of the optimizer's state."""
    lists: list[list[WriteItem]] = []
    for tp in range(TP):
        mine: list[list[WriteItem]] = [[] for _ in range(dp)]
        for bucket in buckets(dp):
            last, _, local = bucket[-1]
            multiple = math.lcm(dp, 128)
            part = math.ceil((last + math.prod(local)) / multiple) * multiple // dp
            for begin, parameter, local in bucket:
                if parameter[2] is None and tp > 0:
                    continue  # norms, which tensor ranks share
                size = math.prod(local)
                for rank in range(begin // part, (begin + size - 1) // part + 1):
                    low = max(begin, rank * part) - begin
                    high = min(begin + size, (rank + 1) * part) - begin
                    values = torch.empty(high - low, device="meta")
                    for state in ("param", "exp_avg", "exp_avg_sq"):
                        found = _rectangles(
                            values, low, high, pieces(tp, parameter, local), f"{state}."
                        )
                        mine[rank] += [_item(shard) for shard in found]
        lists += mine
    return [SavePlan(items) for items in lists]


def _item(shard: ShardedTensor) -> WriteItem:
    offset = torch.Size(shard.global_offset)
    chunk = ChunkStorageMetadata(offset, torch.Size(shard.local_shape))
    whole = torch.Size(shard.global_shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=torch.float), whole)
    return WriteItem(MetadataIndex(shard.key, offset), WriteItemType.SHARD, tensor_data=data)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    rows = []
    for dp in (64, 512):
        given = plans(dp)
        begin = time.process_time()
        everything, metadata = create_default_global_save_plan(given)
        listed = time.process_time()
        wrong = _validate_global_plan(everything, metadata)
        checked = time.process_time()
        assert wrong in ([], True), wrong
        rows.append(
            {
                "ranks": TP * dp,
                "pieces": sum(len(plan.items) for plan in given),
                "sent_mb": sum(len(pickle.dumps(plan)) for plan in given) / 1e6,
                "list_s": listed - begin,
                "check_s": checked - listed,
            }
        )
    columns = {"ranks": "{ranks}", "pieces": "{pieces}", "MB of lists": "{sent_mb:.1f}"}
    print(facts.table(rows, {**columns, "list s": "{list_s:.2f}", "check s": "{check_s:.2f}"}))
    facts.write(options.json, {**facts.header("cpu", options), "rows": rows})


if __name__ == "__main__":
    main()
