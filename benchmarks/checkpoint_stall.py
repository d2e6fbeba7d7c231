"""How much time does training lose to a checkpoint, written in the background or waited for?

    python benchmarks/checkpoint_stall.py --json benchmarks/results/checkpoint-stall.json

One rank trains a model on random tokens; its checkpoint has some 300 MB. In each round one checkpoint is
saved in the background (`--async-save`, the default), and training waits for another one. Every figure is a
median of the rounds. On a CPU the weights are not copied first: the process that writes is forked, and
pages are copied when training changes them.

step      seconds of an undisturbed training step (median of the steps before each save)
stopped   seconds that the call which saves the checkpoint takes; training stands still
slowed    seconds that the steps during the writing take longer than undisturbed ones, all together
visible   seconds from that call until the checkpoint is complete and has its name
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from measuring import facts
from measuring.batches import random_batch
from measuring.options import parser_of
from megatron_ladder.config import ModelConfig
from pretrain.config.data import DataConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.train import TrainConfig
from pretrain.loop.log import RunLog
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.step import train_step
from pretrain.loop.watchdog import Watchdog
from pretrain.model.setup import build, start_ranks, stop_ranks
from pretrain.optim.optimizer import gathered_parameters
from pretrain.run.checkpoint import Progress
from pretrain.run.folder import latest_checkpoint
from pretrain.run.status import Status

BATCH, LENGTH, VOCABULARY = 4, 256, 8192
BEFORE = 5  # undisturbed steps before each save


def configuration(folder: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            num_layers=6,
            hidden_size=448,
            ffn_hidden_size=1536,
            num_attention_heads=7,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
        ),
        data=DataConfig(seq_length=LENGTH),
        schedule=ScheduleConfig(train_steps=10_000),
        micro_batch_size=BATCH,
        global_batch_size=BATCH,
        output_dir=folder,
        tensorboard=False,
    )


class Training:
    """A model in training, a step at a time."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.parts = build(config)
        log = RunLog(config, 0, "cpu", Status(config), Watchdog())
        self.saver = CheckpointSaver(config, log)
        self.step_number = 0

    def step(self) -> float:
        """Seconds of one step and of checking whether a checkpoint is complete."""
        begin = time.perf_counter()
        self.step_number += 1
        train_step(*self.parts, iter([random_batch(self.config)]), self.config)
        self.complete = self.saver.complete()
        return time.perf_counter() - begin

    def save(self, *, wait: bool) -> dict[str, float]:
        undisturbed = [self.step() for _ in range(BEFORE)]
        usual = statistics.median(undisturbed)
        progress = Progress(self.step_number, self.step_number * BATCH)
        begin = time.perf_counter()
        with gathered_parameters(self.parts[0]):
            self.saver.save(progress, *self.parts, wait=wait)
        stopped = time.perf_counter() - begin
        slowed, self.complete = 0.0, wait
        while not self.complete:
            slowed += self.step() - usual
        visible = time.perf_counter() - begin
        return {"step": usual, "stopped": stopped, "slowed": slowed, "visible": visible}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the writing process has a core of its own
    with tempfile.TemporaryDirectory(prefix="checkpoint-stall.") as folder:
        config = configuration(Path(folder))
        start_ranks(config)
        training = Training(config)
        training.save(wait=True)  # warms up
        rounds: dict[str, list[dict[str, float]]] = {"in the background": [], "waited for": []}
        for _ in range(options.rounds):
            for line, results in rounds.items():
                results.append(training.save(wait=line == "waited for"))
        checkpoint = latest_checkpoint(Path(folder))
        assert checkpoint is not None
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        stop_ranks()
    medians = {
        line: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for line, results in rounds.items()
    }
    print(f"a checkpoint of {size / 1e6:.0f} MB, medians of {options.rounds}, in seconds\n")
    rows = [{**m, "line": k, "added": m["stopped"] + m["slowed"]} for k, m in medians.items()]
    columns = {n: f"{{{n}:.2f}}" for n in ("step", "stopped", "slowed", "added", "visible")}
    print(facts.table(rows, {"": "{line}", **columns}))
    report = {
        "parameters": config.model.num_parameters(),
        "checkpoint_bytes": size,
        "medians_s": medians,
        "rounds_s": rounds,
    }
    facts.write(options.json, {**facts.header("cpu", options), **report})


if __name__ == "__main__":
    main()
