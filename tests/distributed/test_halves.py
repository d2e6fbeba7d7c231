"""A run is resumed in halves, and whole again: the same checkpoints, the same training."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from pretrain.config.train import TrainConfig
from pretrain.loop.log import RunLog
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.step import train_step
from pretrain.optim.optimizer import gathered_parameters
from pretrain.run.checkpoint import Progress, load_checkpoint
from pretrain.run.folder import latest_checkpoint
from tests.distributed.layouts import Layout, batches, configuration, micro_batches, start
from tests.ranks import run_ranks
from tests.te_run import name_of


def config_of(
    kind: str, sp: bool, recompute: str, halves: bool, out: Path, **options: Any
) -> TrainConfig:
    """With biases, norms of heads and fewer keys: what attention does to each half by itself."""
    config = configuration(kind, Layout(tp=2, sp=sp, recompute=recompute, accumulation=2))
    config = replace(config, **options)
    model = replace(config.model, add_qkv_bias=True, qk_layernorm=True, num_query_groups=2)
    parallel = replace(config.parallel, tp_overlap="halves" if halves else "none")
    return replace(config, model=model, parallel=parallel, output_dir=out, tensorboard=False)


def weights(model: list[Any]) -> dict[str, torch.Tensor]:
    with gathered_parameters(model):
        named = model[0].module.named_parameters()
        return {name_of(n): p.detach().float().clone() for n, p in named}


def there_and_back(
    kind: str, sp: bool, recompute: str, folder: Path, **options: Any
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Saves whole and opens in halves, then the other way round: what both have, and train to."""
    found = []
    for number, first in enumerate((False, True)):
        out, both = folder / str(number), []
        for halves in (first, not first):
            config = config_of(kind, sp, recompute, halves, out, **options)
            tokens = [batch[:, : config.data.seq_length + 1] for batch in batches()]
            model, optimizer, scheduler = start(config)
            if halves == first:
                parts = iter(micro_batches(tokens[0], config))
                train_step(model, optimizer, scheduler, parts, config)
                with gathered_parameters(model):
                    saver = CheckpointSaver(config, Mock(spec=RunLog))
                    saver.save(Progress(1, 8), model, optimizer, scheduler, wait=True)
            else:
                checkpoint = latest_checkpoint(out)
                assert checkpoint is not None
                load_checkpoint(checkpoint, model, optimizer, scheduler)
            modules = model[0].module.named_modules()
            states = {n: m.get_extra_state() for n, m in modules if ".linear_" in n}
            result = {"weights": weights(model), "scales": states}
            parts = iter(micro_batches(tokens[1], config))
            loss, norm, *_ = train_step(model, optimizer, scheduler, parts, config)
            result |= {"numbers": (loss, norm), "trained": weights(model)}
            both.append(result)
        found.append((both[0], both[1]))
    return found


@pytest.mark.parametrize(
    ("kind", "sp", "recompute"),
    [
        ("standard", False, "none"),
        ("standard", True, "full"),
        ("parallel", True, "selective"),
        pytest.param("parallel", False, "full", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_halves_and_whole(
    kind: str, sp: bool, recompute: str, tmp_path: Path
) -> None:
    """Standard layers that run whole are megatron-core's own."""
    args = (kind, sp, recompute, tmp_path / "runs")
    for found in run_ranks(2, there_and_back, *args, tmp_path=tmp_path):
        for before, after in found:
            for name, weight in before["weights"].items():
                torch.testing.assert_close(after["weights"][name], weight, atol=0, rtol=0)
            assert after["numbers"] == pytest.approx(before["numbers"], rel=1e-5)
            for name, weight in before["trained"].items():
                torch.testing.assert_close(after["trained"][name], weight, atol=1e-5, rtol=1e-4)
                assert not torch.equal(weight, before["weights"][name])
