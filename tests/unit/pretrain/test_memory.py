import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_ladder.config import ParallelConfig
from megatron_ladder.fp8 import Fp8Config
from pretrain.config import TrainConfig
from pretrain.memory import activation_bytes, in_words, memory_plan, what_to_turn
from pretrain.presets import PRESETS


@pytest.fixture
def config() -> TrainConfig:
    config = PRESETS["llama-3-8b"]()
    return replace(config, model=replace(config.model, vocab_size=128_000, residual="ladder"))


def test_a_layer_by_hand() -> None:
    model = replace(
        PRESETS["debug"]().model, hidden_size=100, ffn_hidden_size=400, num_attention_heads=10
    )
    model = replace(model, num_query_groups=10, residual="ladder")
    kept = partial(activation_bytes, model, tokens=7)
    # Bytes a token: 8 h are whole without sequence parallelism; queries, keys, values and attention's
    # output 4 h, twice; log-sums 4 a head; the MLP's 2 ffn and ffn.
    whole, divided = 800, 2 * 400 + 40 + 2 * 1200
    assert kept(tp=1, sp=False, recompute="none") == 7 * (whole + divided)
    assert kept(tp=2, sp=False, recompute="none") == 7 * (whole + divided / 2)
    assert kept(tp=2, sp=True, recompute="none") == 7 * (whole + divided) / 2
    assert kept(tp=2, sp=True, recompute="full") == 7 * whole / 2
    # The values as a view: of queries, keys and values as the linear gives them, twice.
    selective = 7 * (whole + (divided + 2 * 200) / 2)
    assert kept(tp=2, sp=False, recompute="selective") == selective
    # In FP8: the first linears' inputs a byte, SwiGLU's output a byte.
    in_fp8 = 7 * (400 + 200 + divided - 400) / 2
    assert kept(tp=2, sp=True, recompute="none", fp8="tensorwise") == in_fp8
    assert kept(tp=2, sp=True, recompute="full", fp8="tensorwise") == 7 * (400 + 200) / 2
    # Blocks along tokens and along the width have scales of their own: two bytes, and 1/64 more.
    both = 7 * (400 + 400 * (1 + 4 / 128)) / 2
    assert kept(tp=2, sp=True, recompute="full", fp8="blockwise") == both


def test_what_does_not_depend_on_tokens(config: TrainConfig) -> None:
    config = replace(config, parallel=ParallelConfig(tensor_model_parallel_size=8))
    plan = memory_plan(config, dp=4)
    parameters = config.model.num_parameters() / 8
    assert plan.weights == pytest.approx(2 * parameters, rel=1e-3)
    assert plan.gradients == 2 * plan.weights
    assert plan.optimizer == 6 * plan.weights / 4
    assert plan.fp8_weights == 0


def test_fp8_keeps_copies_of_the_layers_weights(config: TrainConfig) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=8)
    fp8 = Fp8Config(recipe="tensorwise")
    plan = memory_plan(replace(config, parallel=parallel, fp8=fp8), dp=4)
    plain = memory_plan(replace(config, parallel=parallel), dp=4)
    tables = 2 * config.model.padded_vocab_size * config.model.hidden_size / 8
    assert plan.fp8_weights == pytest.approx(plain.weights - 2 * tables, rel=1e-3)
    assert plan.activations < plain.activations
    some = replace(fp8, num_layers_at_start_in_bf16=8)
    fewer = memory_plan(replace(config, parallel=parallel, fp8=some), dp=4)
    assert fewer.fp8_weights == pytest.approx(plan.fp8_weights * 24 / 32)


def test_scales_of_blocks_take_room_too(config: TrainConfig) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=8)
    one, blocks, groups = (
        memory_plan(replace(config, parallel=parallel, fp8=Fp8Config(recipe)), dp=4)
        for recipe in ("tensorwise", "blockwise", "mxfp8")
    )
    assert blocks.fp8_weights == pytest.approx(one.fp8_weights * (1 + 4 / 128**2), rel=1e-9)
    assert groups.fp8_weights == pytest.approx(one.fp8_weights * 33 / 32, rel=1e-9)
    assert groups.activations == blocks.activations > one.activations


def test_primary_weights_are_in_fp8_alone(config: TrainConfig) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=8)
    plans = [
        memory_plan(replace(config, parallel=parallel, fp8=fp8), dp=4)
        for fp8 in (Fp8Config("tensorwise"), Fp8Config("tensorwise", primary_weights=True))
    ]
    tables = 2 * config.model.padded_vocab_size * config.model.hidden_size / 8
    assert plans[1].weights == pytest.approx(2 * tables, rel=1e-3)
    assert replace(plans[1], weights=plans[0].weights) == plans[0]


def test_words(config: TrainConfig) -> None:
    plan = memory_plan(config, dp=8)
    words = in_words(plan)
    assert words.startswith(f"{plan.total / 2**30:.2f} GiB (")
    assert "fp8" not in words
    assert words.index("gradients") < words.index("weights")


def test_advice_is_of_this_run(config: TrainConfig) -> None:
    big = replace(
        config,
        micro_batch_size=4,
        global_batch_size=32,
        parallel=ParallelConfig(tensor_model_parallel_size=2),
    )
    advice = what_to_turn(big, dp=2)
    for knob in ("--micro-batch-size 2", "sequence-parallel", "--recompute full"):
        assert knob in advice
    small = replace(
        big,
        micro_batch_size=1,
        recompute="full",
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    )
    advice = what_to_turn(small, dp=2)
    for knob in ("micro-batch-size", "sequence-parallel", "--recompute"):
        assert knob not in advice
    assert "tensor-model-parallel-size 4" in advice


def test_out_of_memory_says_what_to_turn(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from pretrain import train

    def run_out(*_: object) -> int:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
            "of which 1.00 GiB is free. Including non-PyTorch memory, this process has much"
        )

    monkeypatch.setattr(train, "_train", run_out)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    parallel = ParallelConfig(tensor_model_parallel_size=8)
    config = replace(config, parallel=parallel, output_dir=tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert train.train(config, [], None) == 2
    said = capsys.readouterr().err
    for part in ("rank 3: CUDA out of memory", "2.00 GiB", "Planned for the fullest GPU: "):
        assert part in said
    assert "--recompute full" in said
    assert "Including" not in said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"


def test_moments_in_bf16_take_four_bytes_less(config: TrainConfig) -> None:
    fewer = replace(config, optimizer=replace(config.optimizer, moments="bf16"))
    plan, plain = memory_plan(fewer, dp=2), memory_plan(config, dp=2)
    assert plan.optimizer == pytest.approx(plain.optimizer * 8 / 12)
    assert replace(plan, optimizer=plain.optimizer) == plain
