import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe
from pretrain.commands.train import train
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.plan.fits import check_memory, what_to_turn
from pretrain.plan.memory import (
    HEADROOM,
    Attention,
    MemoryPlan,
    activation_bytes,
    in_words,
    layer_parameters,
    memory_plan,
    stage_layers,
)
from pretrain.start import launch


@pytest.fixture
def config() -> TrainConfig:
    config = PRESETS["llama-3-8b"]()
    return replace(config, model=replace(config.model, vocab_size=128_000, residual="ladder"))


def test_a_layer_by_hand() -> None:
    model = replace(
        PRESETS["debug"]().model, hidden_size=100, ffn_hidden_size=400, num_attention_heads=10
    )
    model = replace(model, num_query_groups=10, residual="ladder")
    kept = partial(activation_bytes, model, tokens=7, seq_length=7)
    # Bytes a token: 8 h are whole without sequence parallelism; queries, keys, values and attention's
    # output 4 h, twice; log-sums 4 a head; the MLP's 2 ffn and ffn.
    whole, divided = 800, 2 * 400 + 40 + 2 * 1200
    assert kept(tp=1, sp=False, recompute="none") == 7 * (whole + divided)
    assert kept(tp=2, sp=False, recompute="none") == 7 * (whole + divided / 2)
    assert kept(tp=2, sp=True, recompute="none") == 7 * (whole + divided) / 2
    assert kept(tp=2, sp=True, recompute="full") == 7 * whole / 2
    # The values as a view, of all that the linear gives, 2 h more, twice; no log-sums.
    selective = 7 * (whole + (divided + 2 * 200 - 40) / 2)
    assert kept(tp=2, sp=False, recompute="selective") == selective
    # In FP8: the first linears' inputs a byte, SwiGLU's output a byte.
    in_fp8 = 7 * (400 + 200 + divided - 400) / 2
    assert kept(tp=2, sp=True, recompute="none", fp8="tensorwise") == in_fp8
    assert kept(tp=2, sp=True, recompute="full", fp8="tensorwise") == 7 * (400 + 200) / 2
    # Blocks along tokens and along the width have scales of their own: two bytes, and 1/64 more.
    both = 7 * (400 + 400 * (1 + 4 / 128)) / 2
    assert kept(tp=2, sp=True, recompute="full", fp8="blockwise") == both


def test_what_residual_scaling_keeps(config: TrainConfig) -> None:
    """Numbers that are given: nothing more, and a standard layer is one of this project's. Learned scales:
    what is added, 2 h a token, or h in a parallel layer. Without norms: no input of a norm, 2 h less."""
    kept = partial(activation_bytes, tokens=1, seq_length=8192, tp=8, recompute="none")
    for residual, outputs in (("standard", 2), ("ladder", 2), ("parallel", 1)):
        model = replace(config.model, residual=residual)
        fixed, learned = (replace(model, residual_scaling=s) for s in ("1/n", "skipinit"))
        for sp, cut in ((False, 1), (True, 8)):
            before = kept(model, sp=sp)
            more = 2 * outputs * model.hidden_size / cut
            assert kept(fixed, sp=sp) == before
            assert kept(learned, sp=sp) == before + more
            assert kept(replace(fixed, layer_norms=False), sp=sp) == before - more
    standard = replace(config.model, residual="standard", residual_scaling="1/n")
    full = partial(kept, sp=True, recompute="full")
    assert full(standard) == full(config.model)


@pytest.mark.parametrize(
    ("attention", "numbers", "bytes_of_a_score"),
    [("torch", 300, 0), ("te-unfused", 400, 2), ("torch-unfused", 700, 4), ("unfused", 400, 6)],
)
def test_attention_by_hand(attention: Attention, numbers: int, bytes_of_a_score: int) -> None:
    """Ten heads of ten channels, two for each key: 100 numbers a token of queries, 50 of keys."""
    model = replace(
        PRESETS["debug"]().model, hidden_size=100, ffn_hidden_size=400, num_attention_heads=10
    )
    model = replace(model, num_query_groups=5, residual="ladder")
    kept = partial(activation_bytes, model, tokens=32, seq_length=16, tp=2, sp=True)
    rest = 800 + 2 * 1200
    mine = 2 * numbers + bytes_of_a_score * 10 * 16 + (40 if attention == "torch" else 0)
    assert kept(recompute="none", attention=attention) == 32 * (rest + mine) / 2
    # Recomputed, attention keeps what it takes and gives.
    assert kept(recompute="selective", attention=attention) == 32 * (rest + 2 * 450) / 2
    # Delayed scaling keeps attention's output in FP8; in bf16 too, where attention itself does.
    in_fp8 = 400 + 200 + (2 * 2 + 1) * 400 + mine + 100 - (0 if attention == "torch" else 200)
    assert kept(recompute="none", attention=attention, fp8="delayed") == 32 * in_fp8 / 2


@pytest.mark.parametrize(
    ("shape", "kind", "layers", "recipe", "micro_batch", "peak"),
    [
        ("paper-1b", "ladder", 40, None, 2, 44.826),
        ("paper-1b", "standard", 40, None, 2, 44.835),
        ("paper-1b", "ladder", 40, "tensorwise", 2, 45.905),
        ("llama-3-8b", "ladder", 4, None, 1, 63.216),
    ],
)
def test_peaks_measured_on_an_h100(
    shape: str, kind: str, layers: int, recipe: Fp8Recipe | None, micro_batch: int, peak: float
) -> None:
    """GiB of benchmarks/training_step.py on one H100 80GB HBM3: TE 2.20.2, torch 2.11.0, megatron-core
    0.19.2, attention unfused."""
    config = PRESETS[shape]()
    config = replace(
        config,
        model=replace(config.model, residual=kind, num_layers=layers),
        parallel=ParallelConfig(),
        precision="bf16",
        fp8=Fp8Config(recipe),
        recompute="none",
        micro_batch_size=micro_batch,
        global_batch_size=4 * micro_batch,
    )
    planned = memory_plan(config, 1, "te-unfused").total / 2**30
    assert planned == pytest.approx(peak, rel=0.02)
    assert planned < peak  # what is left out
    assert peak - planned < HEADROOM / 2 * peak


def test_scores_gradients_or_the_loss_whichever_is_more(config: TrainConfig) -> None:
    config = replace(config, parallel=ParallelConfig(), recompute="none")
    fused, unfused = (memory_plan(config, 64, attention) for attention in ("te", "te-unfused"))
    scores = 32 * 8192**2
    assert fused.logits == unfused.logits == 10 * 8192 * config.model.padded_vocab_size
    assert fused.backward == unfused.backward == 0
    more = unfused.activations - fused.activations
    assert more == pytest.approx(2 * scores * config.model.num_layers, rel=0.03)
    small = replace(config, model=replace(config.model, vocab_size=1024))
    plan = memory_plan(small, 64, "te-unfused")
    assert (plan.logits, plan.backward) == (0, 4 * scores)
    # Recomputed, one layer has its scores at a time.
    plan = memory_plan(replace(config, recompute="selective"), 64, "te-unfused")
    assert plan.logits == 0
    assert plan.backward == pytest.approx((2 + 4) * scores, rel=0.01)
    exact = memory_plan(replace(config, deterministic=True), 64)
    assert exact.logits == 0.6 * fused.logits


CARD = 79.18 * 2**30  # an H100's, as torch has it


def test_the_papers_1b_fits_on_one_card_with_fused_attention_alone() -> None:
    config = replace(PRESETS["paper-1b"](), parallel=ParallelConfig(), precision="bf16")
    check_memory(config, 1, CARD)
    check_memory(config, 1, CARD, "torch")
    with pytest.raises(UserError) as refused:
        check_memory(config, 1, CARD, "te-unfused")
    said = str(refused.value)
    plan = memory_plan(config, 1, "te-unfused")
    assert f"would hold {in_words(plan)}, and has 79.18 GiB, 75.22 of it" in said
    saved = (plan.total - memory_plan(config, 1, "torch").total) / 2**30
    advice = (
        f"To need less: --attention torch (no scores in memory: {saved:.2f} GiB less); --recompute"
    )
    assert advice in said
    assert "--micro-batch-size 4" in said


@pytest.mark.parametrize(
    ("impl", "card", "refused"),
    [
        ("transformer_engine", 40e9, True),
        ("transformer_engine", CARD, False),
        ("local", 40e9, False),  # not counted
    ],
)
def test_a_run_is_refused_before_its_model_is_built(
    impl: str, card: float, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.loop import train

    class Built(Exception):
        pass

    config = replace(PRESETS["paper-1b"](), parallel=ParallelConfig(), precision="bf16")
    config = replace(config, output_dir=tmp_path)
    monkeypatch.setattr(train, "IndexCache", Mock())
    monkeypatch.setattr(train, "start_ranks", Mock())
    monkeypatch.setattr(train, "resolve_impl", lambda _: impl)
    monkeypatch.setattr(train, "smallest_card", lambda: card)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(train, "build", Mock(side_effect=Built))
    with pytest.raises(UserError if refused else Built):
        train._train(config, [], Mock(), Mock(), Mock(), [])


def test_scores_of_one_layer_where_torch_has_no_other_kernel(config: TrainConfig) -> None:
    config = replace(config, recompute="none")
    assert "--attention" not in what_to_turn(config, 1, "torch-unfused")
    assert "--recompute selective" in what_to_turn(config, 1, "torch-unfused")
    selective = replace(config, recompute="selective")
    assert "--recompute selective" not in what_to_turn(selective, 1, "unfused")
    assert "--recompute none" in what_to_turn(selective, 1)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--plan-only h100", 0, ["would hold 57.81 GiB", "without it 117.75 GiB", "It fits."]),
        ("--plan-only=h100", 0, ["It fits."]),
        ("--plan-only h100 --micro-batch-size 16", 1, ["does not fit", "--micro-batch-size 8"]),
        ("--plan-only h100 --nproc-per-node 8", 0, ["of 8 GPUs", "optimizer 1.69"]),
        # A copy of attention's output: 16384 tokens, 1536 numbers in bf16, in each of 40 layers.
        ("--plan-only h100 --data.no-attend-across-documents", 0, ["hold 59.69 GiB", "It fits."]),
        ("--plan-only h100 --transformer-impl local", 2, ["leave out --transformer-impl local"]),
        ("--plan-only b200", 2, ["choose one of h100"]),
        ("--plan-only h100 --precision fp32", 2, ["is ladder in fp32"]),
        ("--plan-only h100 --parallel.tensor-model-parallel-size 5", 2, ["5"]),
    ],
)
def test_plan_only(
    options: str, status: int, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Without data, a GPU or ranks."""
    monkeypatch.setattr(launch, "launch", None)
    assert train(["--preset", "paper-1b", *options.split()]) == status
    said = "".join(capsys.readouterr())
    for word in words:
        assert word in said


def test_plan_only_of_the_card_that_is_here(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    argv = ["--preset", "paper-1b", "--plan-only"]
    assert train(argv) == 2
    assert "no GPU here" in capsys.readouterr().err
    card = SimpleNamespace(total_memory=int(40e9))
    for name, found in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_name", "a small one"),
        ("get_device_properties", card),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    assert train(argv) == 1
    assert "a small one has 37.25 GiB, 35.39 of it to plan with" in capsys.readouterr().out


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
    assert "context-parallel" not in advice  # what takes most is the optimizer's
    model = replace(config.model, max_position_embeddings=131072)
    long = replace(small, model=model, data=replace(config.data, seq_length=131072))
    assert "context-parallel-size 2" in what_to_turn(long, dp=32)
    # Not where the run would then be refused.
    apart = replace(long.data, attend_across_documents=False)
    for refused in (
        replace(long, data=replace(config.data, seq_length=131072 - 2)),  # not of 4 x TP 2 parts
        replace(long, compile=True),
        replace(long, cuda_graph=True),
        replace(long, data=apart, attention="te"),
    ):
        assert "context-parallel" not in what_to_turn(refused, dp=32)


def test_out_of_memory_says_what_to_turn(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.loop import train
    from pretrain.loop.watchdog import Watchdog

    def run_out(*_: object) -> int:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
            "of which 1.00 GiB is free. Including non-PyTorch memory, this process has much"
        )

    monkeypatch.setattr(train, "_train", run_out)
    monkeypatch.setattr(train, "world_size", lambda: 8)
    parallel = ParallelConfig(tensor_model_parallel_size=8)
    config = replace(config, parallel=parallel, output_dir=tmp_path / "run")
    (tmp_path / "run").mkdir()
    with Watchdog() as watchdog, pytest.raises(UserError) as refused:
        train.train(config, [], None, watchdog)
    said = str(refused.value)
    for part in ("CUDA out of memory", "2.00 GiB", "Planned for the fullest GPU: "):
        assert part in said
    assert "--recompute full" in said
    assert "Including" not in said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", said)


def test_moments_in_bf16_take_four_bytes_less(config: TrainConfig) -> None:
    fewer = replace(config, optimizer=replace(config.optimizer, moments="bf16"))
    plan, plain = memory_plan(fewer, dp=2), memory_plan(config, dp=2)
    assert plan.optimizer == pytest.approx(plain.optimizer * 8 / 12)
    assert replace(plan, optimizer=plain.optimizer) == plain


def test_stages_hold_the_layers_that_they_are_given(config: TrainConfig) -> None:
    def plan(pp: int, last: int | None) -> MemoryPlan:
        parallel = ParallelConfig(
            pipeline_model_parallel_size=pp, num_layers_in_last_pipeline_stage=last
        )
        return memory_plan(replace(config, parallel=parallel), dp=1)

    layer = layer_parameters(replace(config, parallel=ParallelConfig()))
    table = config.model.padded_vocab_size * config.model.hidden_size
    assert plan(2, None).weights == pytest.approx(2 * (16 * layer + table))
    assert plan(2, 14).weights == pytest.approx(2 * (18 * layer + table))
    # 15 layers on each of two stages between, 1 on each end: the first between is the fullest.
    parallel = ParallelConfig(
        pipeline_model_parallel_size=4,
        num_layers_in_first_pipeline_stage=1,
        num_layers_in_last_pipeline_stage=1,
    )
    uneven = replace(config, parallel=parallel)
    assert stage_layers(uneven) == [1, 15, 15, 1]
    assert memory_plan(uneven, dp=1).weights == pytest.approx(2 * 15 * layer)


def test_halves_keep_what_own_layers_keep(config: TrainConfig) -> None:
    """Recomputed, megatron-core's standard layer keeps its input; this project's two of each sub-module."""
    standard = replace(config.model, residual="standard")
    kept = {
        halves: activation_bytes(
            standard,
            tokens=1,
            seq_length=1,
            tp=2,
            sp=True,
            recompute="full",
            halves=halves,
        )
        for halves in (False, True)
    }
    assert kept == {False: 2 * 4096 / 2, True: 4 * 2 * 4096 / 2}


def test_the_ranks_of_a_sequence_share_its_memory(config: TrainConfig) -> None:
    model = replace(config.model, max_position_embeddings=32768)
    config = replace(config, model=model, data=replace(config.data, seq_length=32768))

    def plan(cp: int, attention: Attention = "te") -> MemoryPlan:
        parallel = ParallelConfig(context_parallel_size=cp)
        return memory_plan(replace(config, parallel=parallel), 2, attention)

    one, four = plan(1), plan(4)
    assert four.activations == one.activations / 4
    assert four.logits == one.logits / 4
    assert four.optimizer == one.optimizer / 4
    assert (four.weights, four.gradients) == (one.weights, one.gradients)
    # Where keys and values are gathered: two chunks of 4,096 tokens, whose keys are nine chunks together.
    # In each layer they are kept in bf16, repeated for all 32 heads, instead of 8,192 tokens' for 8 heads.
    gathered = 32 * 2 * 2 * 128 * (32 * 9 * 4096 - 8 * 8192)
    mask = 2 * 9 * 4096**2  # one for all layers
    assert plan(4, "torch").activations - four.activations == gathered + mask
    assert plan(1, "torch") == one
    apart = replace(config, data=replace(config.data, attend_across_documents=False))
    parallel = ParallelConfig(context_parallel_size=4)
    copies = 32 * 2 * 4096 * 8192
    found = memory_plan(replace(apart, parallel=parallel), 2, "torch")
    assert found.activations - four.activations == gathered + copies + mask
    # With a key for each head nothing is repeated: those of all tokens are kept, instead of a quarter.
    config = replace(config, model=replace(model, num_query_groups=32))
    gathered = 32 * 2 * 2 * 4096 * (32768 - 8192)
    assert plan(4, "torch").activations - plan(4).activations == gathered + mask


def test_windows_by_torch_keep_the_keys_of_all_heads(config: TrainConfig) -> None:
    def kept(attention: Attention, window: int | None) -> float:
        model = replace(config.model, sliding_window=window)
        one = replace(config, model=model, parallel=ParallelConfig())
        return memory_plan(one, 2, attention).activations

    tokens = config.micro_batch_size * config.data.seq_length
    repeated = 32 * 2 * 2 * tokens * (32 - 8) * 128
    assert kept("torch", 1024) - kept("torch", None) == repeated
    assert kept("torch", config.data.seq_length) == kept("torch", None)
    assert kept("te", 1024) == kept("te", None)
