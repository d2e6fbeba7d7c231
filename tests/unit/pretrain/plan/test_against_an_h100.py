"""The planner's compute against what was measured on one H100 (benchmarks/results/h100)."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.config import ModelConfig, Residual
from pretrain.config.presets import PRESETS
from pretrain.plan.links import NVLINK
from pretrain.plan.planner import (
    ATTENTION_KERNELS,
    DEVICES,
    MLP_KERNELS,
    Hardware,
    pass_seconds,
    submodules,
)
from pretrain.plan.search import WAYS

RESULTS = Path(__file__).parents[4] / "benchmarks" / "results" / "h100"
HARDWARE = Hardware(DEVICES["h100"], NVLINK)


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def layer_s(
    model: ModelConfig, kind: Residual, *, tokens: int, seq_length: int, tp: int = 1
) -> float:
    """Forward and backward of a layer, planned."""
    model = replace(model, residual=kind)
    parts = submodules(model, HARDWARE, tokens=tokens, seq_length=seq_length, tp=tp, sp=False)
    return sum(p.forward_s + p.backward_s for p in parts)


def step_s(name: str, micro_batch: int) -> float:
    """A measured step of two micro-batches of the paper's 1B, ladder, in bf16."""
    (found,) = (r for r in result(name)["rows"] if r["case"] == "paper-1b:bf16:ladder")
    assert found["micro_batch_size"] == micro_batch
    return found["step_ms"] / 1e3


def test_a_kernels_time_is_what_two_halves_took_more_than_one_whole() -> None:
    model = PRESETS["paper-1b"]().model
    # Of two micro-batches, all that does not grow with their tokens.
    fixed_s = 2 * step_s("cuda-graph", 4) - step_s("training-1b", 8)
    # The optimizer's part: fp32 gradients are read twice and zeroed, master weights and two moments are
    # read and written, bf16 weights written: 38 bytes.
    fixed_s -= HARDWARE.memory_s(38 * model.num_parameters())
    kernels = 2 * model.num_layers * 3 * (ATTENTION_KERNELS + MLP_KERNELS)
    assert fixed_s / kernels == pytest.approx(HARDWARE.kernel_s, rel=0.1)


@pytest.mark.parametrize("kind", ["standard", "parallel", "ladder"])
@pytest.mark.parametrize("shape", ["paper-1b", "llama-3-8b"])
def test_layers_on_one_gpu(shape: str, kind: Residual) -> None:
    (found,) = (
        r
        for r in result("layers")["rows"]
        if (r["shape"], r["kind"], r["precision"]) == (shape, kind, "bf16")
    )
    config = PRESETS[shape]()
    planned = found["layers"] * layer_s(
        config.model, kind, tokens=found["tokens"], seq_length=config.data.seq_length
    )
    assert 1e3 * planned == pytest.approx(found["ms"], rel=0.1)


@pytest.mark.parametrize("kind", ["standard", "parallel", "ladder"])
def test_layers_as_one_rank_of_eight(kind: Residual) -> None:
    found = result("overlap-70b-nvswitch-bf16")
    times = [
        sum(times)
        for line in found["times_s"]
        if (line["kind"], line["link"]) == (kind, "zero")
        for times in line["forward_backward"]
    ]
    tokens = int(found["options"]["micro_batch_size"]) * int(found["options"]["seq_length"])
    model = PRESETS["llama-3-70b"]().model
    planned = found["layers"] * layer_s(model, kind, tokens=tokens, seq_length=8192, tp=8)
    assert planned == pytest.approx(statistics.median(times), rel=0.1)


@pytest.mark.parametrize(
    ("name", "bound"), [("kinds-70b-nvswitch", 0.05), ("kinds-70b-nvswitch-sp", 0.08)]
)
def test_every_way_over_standard(name: str, bound: float) -> None:
    """Layers of 70B with NVSwitch's link: the time of each way over standard's, planned and measured."""
    found = result(name)
    tokens = int(found["options"]["micro_batch_size"]) * int(found["options"]["seq_length"])
    sp = found["options"]["sequence_parallel"] == "True"

    def seconds(residual: Residual, halves: bool) -> tuple[float, list[float]]:
        """Planned, and measured in each repetition."""
        calls = 2 if halves else 1
        parts = submodules(
            replace(PRESETS["llama-3-70b"]().model, residual=residual),
            HARDWARE,
            tokens=tokens // calls,
            seq_length=8192,
            tp=8,
            sp=sp,
        )
        planned = pass_seconds(
            *([residual] * found["layers"], *parts, found["link_s"] / calls),
            sequence_parallel=sp,
            halves=halves,
        )
        kind = f"{residual} in halves" if halves else residual
        lines = [x for x in found["times_s"] if (x["kind"], x["link"]) == (kind, "link")]
        measured = [sum(times) for line in lines for times in line["forward_backward"]]
        return sum(planned), measured

    standard = seconds("standard", False)
    for kind, overlap in WAYS:
        planned, measured = seconds(kind, overlap == "halves")
        ratios = [way / whole for way, whole in zip(measured, standard[1], strict=True)]
        assert planned / standard[0] == pytest.approx(statistics.median(ratios), abs=bound), (
            f"{kind}, {overlap}"
        )
