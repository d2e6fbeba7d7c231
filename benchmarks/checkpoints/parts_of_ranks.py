"""How much of a checkpoint does each data-parallel rank write and read, and how long does it take?

    python benchmarks/checkpoints/parts_of_ranks.py --json benchmarks/results/checkpoint-ranks.json

At 1, 2 and 4 data-parallel ranks a model in bf16 is saved and loaded in two ways, in turns: as the project
does (each rank its own part of the optimizer's state, and a part of the weights), and as earlier versions
did ("gathered": megatron-core gathers the optimizer's state on every rank, rank 0 writes all, every rank
reads all). Loaded state is compared with what was saved, bit by bit. Times are medians; the page cache is
warm, and the ranks share the machine's cores.

written   bytes in a rank's files
read      bytes that a rank's process read while it loaded
stopped   seconds until training could go on: the slowest rank
saved     seconds until all files are written
loaded    seconds of loading: the slowest rank
"""

import functools
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts
from measuring.batches import random_batch
from measuring.options import parser_of
from megatron_ladder.config import ModelConfig
from megatron_ladder.mcore_checkpoints import BackgroundSave, SharedSaving, start_results_queue
from pretrain.bench.interleaved import measure
from pretrain.config.data import DataConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.train import TrainConfig
from pretrain.loop.step import train_step
from pretrain.model.setup import build, start_ranks
from pretrain.optim.optimizer import gathered_parameters
from pretrain.optim.torch_adam import loading_optimizer
from pretrain.processes import die_with_parent
from pretrain.run.checkpoint import Progress, checkpoint_state, load_checkpoint, model_chunks
from pretrain.run.checkpoint_files import sums

SIZES = (1, 2, 4)
WAYS = ("in parts", "gathered")


def configuration(dp: int) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=256,
            ffn_hidden_size=768,
            num_attention_heads=4,
            vocab_size=8192,
            max_position_embeddings=64,
        ),
        data=DataConfig(seq_length=64),
        schedule=ScheduleConfig(train_steps=100),
        precision="bf16",
        micro_batch_size=1,
        global_batch_size=dp,
    )


def gathered_state(
    progress: Progress,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    *,
    is_loading: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's state as earlier versions made it, without random states."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    group = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    weights = {
        name: chunk.sharded_state_dict(metadata={**metadata, **group})
        for name, chunk in model_chunks(model).items()
    }
    state = {
        **weights,
        "optimizer": optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        ),
        "scheduler": scheduler.state_dict(),
        "progress": asdict(progress),
    }
    return state, {**metadata, "world_size": dist.get_world_size()}


def load_gathered(folder: Path, model: list[Any], optimizer: Any, scheduler: Any) -> None:
    with loading_optimizer(optimizer):
        (part,) = optimizer.chained_optimizers
        set_states = part._set_main_param_and_optimizer_states

        def keeping_step(parameter: Any, tensors: dict[str, Any]) -> None:
            step = part._get_main_param_and_optimizer_states(parameter)["step"]
            set_states(parameter, {"step": step, **tensors})

        part._set_main_param_and_optimizer_states = keeping_step
        state, _ = gathered_state(Progress(0, 0), model, optimizer, scheduler, is_loading=True)
        loaded = dist_checkpointing.load(state, str(folder))
        optimizer.load_state_dict(loaded["optimizer"])
        del part._set_main_param_and_optimizer_states
    for name, chunk in model_chunks(model).items():
        chunk.load_state_dict(loaded[name])


class Rank:
    """One rank's model, saved and loaded in each way."""

    def __init__(self, dp: int, folder: Path) -> None:
        self.config = configuration(dp)
        self.folder = folder
        self.parts = build(self.config)
        self.shared = {way: SharedSaving() for way in WAYS}
        self.shared["gathered"].strategy = self.shared["gathered"].index  # not shared
        self.bytes: dict[str, dict[str, int]] = {}
        train_step(*self.parts, iter([random_batch(self.config)]), self.config)

    def save_and_load(self, way: str) -> tuple[float, ...]:
        """Seconds that training stops, until all is written, and of loading."""
        folder, rank = self.folder / way, dist.get_rank()
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        make = checkpoint_state if way == "in parts" else gathered_state
        with gathered_parameters(self.parts[0]):
            saved_state = [tensor.clone() for tensor in self.state()]
            dist.barrier()
            begin = time.perf_counter()
            state, metadata = make(Progress(1, 1), *self.parts)
            saving = BackgroundSave(state, folder, metadata, sums, self.shared[way])
            stopped = time.perf_counter() - begin
            saving.is_written(wait=True)
            saved = time.perf_counter() - begin
            error, _ = saving.result()
            assert not error, error
            if rank == 0:
                saving.write_index()
            dist.barrier()
            for tensor in self.state():
                tensor.zero_()
            dist.barrier()
            read, begin = bytes_read(), time.perf_counter()
            if way == "in parts":
                load_checkpoint(folder, *self.parts)
            else:
                load_gathered(folder, *self.parts)
            loaded, read = time.perf_counter() - begin, bytes_read() - read
        assert all(torch.equal(a, b) for a, b in zip(saved_state, self.state(), strict=True))
        written = sum(file.stat().st_size for file in folder.glob(f"__{rank}_*.distcp"))
        self.bytes[way] = {"written": written, "read": read}
        return stopped, saved, loaded

    def state(self) -> list[torch.Tensor]:
        """This rank's weights, master weights and moments."""
        optimizer = self.parts[1].chained_optimizers[0].optimizer
        masters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return [*(p.detach() for p in self.parts[0][0].parameters()), *masters, *moments]


def bytes_read() -> int:
    """Of this process, from its start, by read calls; from the page cache too."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def run(rank: int, dp: int, port: int, folder: Path, rounds: int, results: Any) -> None:
    logging.disable(logging.WARNING)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dp), **place}
    torch.set_num_threads(1)
    start_ranks(configuration(dp))
    start_results_queue(functools.partial(die_with_parent, os.getpid()))
    measured = Rank(dp, folder)
    runs: dict[str, Callable[[], tuple[float, ...]]] = {
        way: functools.partial(measured.save_and_load, way) for way in WAYS
    }
    times = measure(runs, rounds)
    results.put((rank, measured.bytes, times))
    dist.barrier()
    dist.destroy_process_group()


def world(dp: int, rounds: int) -> dict[str, Any]:
    """By way: bytes of each rank, and seconds of each round."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="checkpoint-ranks.") as folder:
        arguments = (dp, 29_800 + dp, Path(folder), rounds, results)
        ranks = [context.Process(target=run, args=(rank, *arguments)) for rank in range(dp)]
        for rank in ranks:
            rank.start()
        found = sorted((results.get(timeout=1800) for _ in ranks), key=lambda result: result[0])
        for rank in ranks:
            rank.join()
    return {
        way: {
            "written": [counts[way]["written"] for _, counts, _ in found],
            "read": [counts[way]["read"] for _, counts, _ in found],
            "seconds": found[0][2][way],
        }
        for way in WAYS
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    worlds: dict[int, Any] = {dp: world(dp, options.rounds) for dp in SIZES}
    rows = []
    for dp, ways in worlds.items():
        for way, found in ways.items():
            times = [statistics.median(column) for column in zip(*found["seconds"], strict=True)]
            found["median_s"] = dict(zip(("stopped", "saved", "loaded"), times, strict=True))
            row = {"dp": dp, "way": way, **found["median_s"]}
            for name in ("written", "read"):
                row[name] = ", ".join(f"{count / 1e6:.1f}" for count in found[name])
            rows.append(row)
    columns = {n: f"{{{n}:.2f}}" for n in ("stopped", "saved", "loaded")}
    lines = {"DP": "{dp}", "": "{way}", "MB written": "{written}", "MB read": "{read}", **columns}
    print(facts.table(rows, lines))
    report = {"parameters": configuration(1).model.num_parameters(), "by_ranks": worlds}
    facts.write(options.json, {**facts.header("cpu", options), **report})


if __name__ == "__main__":
    main()
