"""Hardware queues by what runs on a second stream."""

import os
from dataclasses import replace
from typing import Any

import pytest

from megatron_ladder.config import ParallelConfig
from pretrain.config.presets import PRESETS
from pretrain.model.queues import set_queues

NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_HIGH_PRIORITY")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)


def chosen(residual: Any, tp: int, sp: bool, overlap: Any = "none") -> list[str | None]:
    config = replace(PRESETS["debug"](), micro_batch_size=2)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, sequence_parallel=sp, tp_overlap=overlap
    )
    set_queues(replace(config, model=replace(config.model, residual=residual), parallel=parallel))
    return [os.environ.get(name) for name in NAMES]


@pytest.mark.parametrize(
    ("residual", "tp", "sp"),
    [("ladder", 2, False), ("ladder", 1, True), ("standard", 2, True), ("parallel", 2, True)],
)
def test_one_queue_keeps_the_order_of_issue(residual: str, tp: int, sp: bool) -> None:
    assert chosen(residual, tp, sp) == ["1", None]


def test_halves_without_sequence_parallelism_have_one_stream() -> None:
    assert chosen("standard", 2, False, "halves") == ["1", None]


@pytest.mark.parametrize(
    ("residual", "overlap"),
    [("ladder", "none"), ("parallel-ladder", "none"), ("parallel", "halves")],
)
def test_a_second_stream_has_queues_and_its_collectives_priority(
    residual: str, overlap: str
) -> None:
    assert chosen(residual, 2, True, overlap) == ["8", "1"]


@pytest.mark.parametrize(("residual", "queues"), [("ladder", "8"), ("standard", "1")])
def test_the_second_stream_of_ladder_layers_with_experts_has_queues(
    residual: Any, queues: str
) -> None:
    config = PRESETS["tiny-experts"]()
    set_queues(replace(config, model=replace(config.model, residual=residual)))
    assert os.environ.get(NAMES[0]) == queues


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("32", "0"), strict=True):
        monkeypatch.setenv(name, value)
    assert chosen("ladder", 2, True) == ["32", "0"]
