"""What a checkpoint costs training: written in the background, against waiting for it.

    python benchmarks/checkpoint_stall.py --json benchmarks/results/checkpoint-stall.json

One rank trains a model whose checkpoint has some 300 MB, on random tokens. In turn, a checkpoint is
saved in the background (`--async-save`, the default) and one is waited for; every figure is a median of
the rounds. On a CPU the copy is a fork: pages are copied when training changes them, while the other
process writes.

step      seconds of an undisturbed training step (median of the steps before each save)
stopped   seconds in which training does not go on, from asking for the checkpoint on
slowed    seconds that the steps during the writing take longer than undisturbed ones, all together
visible   seconds from asking for the checkpoint until it is complete and has its name
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_ladder.config import ModelConfig
from pretrain.config.train import DataConfig, ScheduleConfig, TrainConfig
from pretrain.loop.log import RunLog
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.step import train_step
from pretrain.loop.watchdog import Watchdog
from pretrain.model.optimizer import gathered_parameters
from pretrain.model.setup import build, start_ranks, stop_ranks
from pretrain.run.checkpoint import Progress
from pretrain.run.folder import latest_checkpoint
from pretrain.run.status import Status
from pretrain.run.versions import versions

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


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(BATCH, LENGTH),
        "position_ids": torch.arange(LENGTH).expand(BATCH, -1),
    }


class Training:
    """A model in training, a step at a time."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.parts = build(config)
        log = RunLog(config, 0, "cpu", Status(config), Watchdog(config))
        self.saver = CheckpointSaver(config, log)
        self.step_number = 0

    def step(self) -> float:
        """Seconds of one step, with the question whether a checkpoint is complete."""
        begin = time.perf_counter()
        self.step_number += 1
        train_step(*self.parts, iter([batch()]), self.config)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every figure")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the writing process has a core of its own
    with tempfile.TemporaryDirectory(prefix="checkpoint-stall.") as folder:
        config = configuration(Path(folder))
        start_ranks(config)
        training = Training(config)
        training.save(wait=True)  # the first of everything
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
    print("| | step | stopped | slowed | added | visible after |")
    print("|---|---|---|---|---|---|")
    for line, m in medians.items():
        added = m["stopped"] + m["slowed"]
        figures = (m["step"], m["stopped"], m["slowed"], added, m["visible"])
        print(f"| {line} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    if options.json:
        facts: dict[str, Any] = {
            "command": "python benchmarks/checkpoint_stall.py "
            "--json benchmarks/results/checkpoint-stall.json",
            "device": f"cpu, {platform.machine()}, 1 thread",
            "versions": versions(),
            "parameters": config.model.num_parameters(),
            "checkpoint_bytes": size,
            "medians_s": medians,
            "rounds_s": rounds,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
