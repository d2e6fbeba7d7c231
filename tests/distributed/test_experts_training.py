"""Runs with experts by the command line: resumed, killed and resumed, moved to other layouts."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ladder.hf.files.stored import stored_tensors
from pretrain.convert.export import export_run
from pretrain.run.checkpoint import load_weights
from tests.data_sets import write_data_set
from tests.distributed.test_training import (
    STEPS,
    assert_same,
    kill_at_step,
    losses,
    metrics,
    pipeline,
    tensor_parallel,
    train,
)
from tests.unit.hf.tiny import train_sentencepiece

BIASED = (
    *("--model.residual", "standard", "--model.experts.num-moe-experts", "4"),
    *("--model.experts.moe-ffn-hidden-size", "48"),
    *("--model.experts.moe-router-score-function", "sigmoid"),
    "--model.experts.moe-router-enable-expert-bias",
)


def expert_parallel(size: int) -> tuple[str, str]:
    return ("--parallel.expert-model-parallel-size", str(size))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_sentencepiece(folder, "bpe", vocab_size=400).read_bytes()
    return write_data_set(folder / "data", vocab_size=400, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def whole_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data-parallel ranks, each with half of the experts. Nothing disturbed it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(data, run, *BIASED, *expert_parallel(2))
    return run


def half_of(whole: Path, to: Path) -> Path:
    shutil.copytree(whole, to)
    shutil.rmtree(to / f"checkpoints/step_{STEPS:08d}")
    return to


def test_a_resumed_run_is_bitwise_the_same(whole_run: Path, data: Path, tmp_path: Path) -> None:
    run = half_of(whole_run, tmp_path / "run")
    train(data, run, *BIASED, *expert_parallel(2))
    assert metrics(run, "start")[-1]["step"] == 15
    assert_same(run, whole_run)
    bias = load_weights(run / f"checkpoints/step_{STEPS:08d}")[
        "decoder.layers.mlp.router.expert_bias"
    ]
    assert bias.dtype == torch.float32
    assert 1e-3 <= bias.abs().max() <= STEPS * 1e-3 * 1.001


@pytest.mark.slow
def test_a_killed_run_resumes_bitwise(whole_run: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = random.Random(1).randrange(6, STEPS - 2)
    kill_at_step(step, data, run, *BIASED, *expert_parallel(2))
    assert "Resuming" in train(data, run, *BIASED, *expert_parallel(2))
    assert_same(run, whole_run)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        pytest.param((), "expert_model_parallel_size: 2 -> 1", id="one rank"),
        pytest.param(
            (*tensor_parallel(2), "--parallel.sequence-parallel", *expert_parallel(2)),
            "tensor_model_parallel_size: 1 -> 2",
            id="tp2 with sp, ep2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_continues_at_other_layouts(
    options: tuple[str, ...], changed: str, whole_run: Path, data: Path, tmp_path: Path
) -> None:
    run = half_of(whole_run, tmp_path / "run")
    assert changed in train(data, run, *BIASED, *options)
    assert losses(run) == pytest.approx(losses(whole_run), abs=1e-4)


def test_experts_of_two_ranks_are_exported(
    whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Export itself compares logits with megatron-core's model. The bias of a router stays in fp32."""
    caplog.set_level("INFO")
    export_run(whole_run, tmp_path / "model", "bf16", "5GB")
    assert "verified: the largest difference of logits is" in caplog.text
    stored = stored_tensors(tmp_path / "model")
    kinds = {name.partition(".mlp.")[2]: tensor.dtype for name, tensor in stored.items()}
    assert kinds.pop("gate.e_score_correction_bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    weights = load_weights(whole_run / f"checkpoints/step_{STEPS:08d}")
    for i, bias in enumerate(weights["decoder.layers.mlp.router.expert_bias"]):
        name = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
        assert torch.equal(stored[name][:], bias)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert loaded(torch.arange(9)[None]).logits.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((*expert_parallel(2),), id="ep2"),
        pytest.param(
            (*tensor_parallel(2), "--parallel.sequence-parallel", *expert_parallel(2)),
            id="tp2 with sp, ep2",
        ),
        pytest.param((*pipeline(2), *expert_parallel(2)), id="pp2, ep2"),
    ],
)
def test_a_run_of_any_layout_is_exported(
    options: tuple[str, ...], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some layers with experts, a shared one, a capacity: the export drops no token, and says so."""
    caplog.set_level("INFO")
    train(
        *(data, tmp_path / "run", "--model.residual", "ladder", *options),
        *("--model.experts.num-moe-experts", "4", "--model.experts.moe-layer-freq", "2"),
        *("--model.experts.moe-shared-expert-intermediate-size", "32"),
        *("--model.experts.moe-expert-capacity-factor", "1.0"),
    )
    export_run(tmp_path / "run", tmp_path / "model", None, "100KB")
    assert "verified: the largest difference of logits is" in caplog.text
    assert "no token is dropped" in (tmp_path / "model/README.md").read_text()


def test_the_balance_is_logged(whole_run: Path) -> None:
    for line in metrics(whole_run, "train"):
        assert 1 <= line["expert_imbalance"] <= 4 / 2
        assert line["dropped_share"] == 0
        assert 0 < line["router_entropy"] <= 1
        by_layer = [x for x in line["expert_imbalance_by_layer"] if x is not None]
        assert max(by_layer) == pytest.approx(line["expert_imbalance"], abs=1e-4)
    assert losses(whole_run)[-1] < losses(whole_run)[0] - 1


@pytest.mark.slow
def test_a_run_of_ladder_layers_resumes_bitwise(data: Path, tmp_path: Path) -> None:
    options = (
        *BIASED,
        *expert_parallel(2),
        "--model.residual",
        "ladder",
        "--recompute",
        "selective",
    )
    whole = tmp_path / "whole"
    train(data, whole, *options)
    run = half_of(whole, tmp_path / "run")
    train(data, run, *options)
    assert_same(run, whole)
    assert losses(whole)[-1] < losses(whole)[0] - 1


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(
    whole_run: Path, data: Path, tmp_path: Path
) -> None:
    """A run that starts from the weights of one with experts has its loss."""
    run = tmp_path / "run"
    start = ("--init-from", str(whole_run), "--preset", "debug")
    train(data, run, *BIASED, *start)
    first, before = metrics(run, "validation")[0], metrics(whole_run, "validation")[-1]
    assert first["loss"] == pytest.approx(before["loss"], abs=1e-5)
