"""The estimated size of a checkpoint, against one on disk."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from pretrain.config.train import TrainConfig
from pretrain.loop.log import RunLog
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.step import train_step
from pretrain.run.checkpoint import Progress
from pretrain.run.folder import checkpoint_at, checkpoint_bytes
from tests.distributed.layouts import Layout, batches, configuration, micro_batches, start
from tests.ranks import run_ranks


def save(config: TrainConfig) -> int:
    """Bytes on disk of a checkpoint after one step."""
    model, optimizer, scheduler = start(config)
    train_step(model, optimizer, scheduler, iter(micro_batches(batches()[0], config)), config)
    saver = CheckpointSaver(config, Mock(spec=RunLog))
    saver.save(Progress(1, 1), model, optimizer, scheduler, wait=True)
    assert config.output_dir is not None
    path = checkpoint_at(config.output_dir, 1)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("fp32", Layout(tp=2)),
        ("bf16", Layout(dp=2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("fp32", Layout()),
                ("fp32", Layout(dp=2)),
                ("bf16", Layout()),
                ("bf16", Layout(tp=2)),
            )
        ),
    ],
    ids=str,
)
def test_a_checkpoint_is_as_large_as_estimated(
    precision: str, layout: Layout, tmp_path: Path
) -> None:
    config = configuration("ladder", layout)
    model = replace(config.model, hidden_size=256, ffn_hidden_size=768)
    config = replace(config, model=model, precision=precision, output_dir=tmp_path / "run")
    sizes = run_ranks(layout.ranks, save, config, tmp_path=tmp_path)
    assert sizes[0] == pytest.approx(checkpoint_bytes(config), rel=0.05)
