"""What experts take in a layout, by hand: parameters, memory, whether it fits; presets of public shapes."""

import re
from dataclasses import replace

import pytest

from megatron_ladder.config import ParallelConfig, check_layout
from megatron_ladder.errors import UserError
from megatron_ladder.fields.stages import chunks_of_stages
from pretrain.commands.bench import bench
from pretrain.commands.train import train
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.plan.experts import Rows, buffer_bytes, imbalance_of_ranks, kept_bytes
from pretrain.plan.fits import check_memory, what_to_turn
from pretrain.plan.memory import activation_bytes, memory_plan, stage_parameters

QWEN, LITE = PRESETS["qwen3-30b-a3b"](), PRESETS["deepseek-v2-lite-mha"]()
AN_EXPERT = 3 * 2048 * 768


def laid_out(config: TrainConfig, **sizes: int) -> TrainConfig:
    names = {
        "tp": "tensor_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
    }
    sequence_parallel = sizes.get("tp", 1) > 1
    given = {names[name]: size for name, size in sizes.items()}
    return replace(config, parallel=ParallelConfig(sequence_parallel=sequence_parallel, **given))


def test_the_published_sizes() -> None:
    """30.5 G parameters, of which a token is multiplied by 3.3 G with the embedding; 15.7 G and 2.4 G with
    MLA, whose weights are 3 M a layer fewer than this attention's."""
    table = 151936 * 2048
    assert QWEN.model.num_parameters() == pytest.approx(30.53e9, rel=1e-3)
    assert QWEN.model.num_matmul_parameters() + table == pytest.approx(3.35e9, rel=1e-2)
    mla = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * 256 + 16 * 128 * 2048
    more = 27 * (4 * 2048 * 2048 - mla)
    assert LITE.model.num_parameters() - more == pytest.approx(15.7e9, rel=2e-3)
    active = LITE.model.num_matmul_parameters() - more
    assert active == pytest.approx(2.4e9, rel=0.03)
    for config in (QWEN, LITE):
        check_layout(config.model, config.parallel)
        assert config.parallel.data_parallel_size(64) == 64
        assert config.model.residual == "ladder"


def test_parameters_of_a_stage() -> None:
    """Two stages of 24 layers, experts over eight ranks; tensor parallelism cuts all but experts and
    routers."""
    config = laid_out(QWEN, tp=2, ep=8, pp=2)
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    norms = 2 * 2048 + 2 * 128
    table = 151936 * 2048
    shared, routed = stage_parameters(config, 0)
    assert routed == 24 * 16 * AN_EXPERT
    assert shared == 24 * ((attention + norms) / 2 + 2048 * 128) + table / 2
    # All ranks' parts together are the model, but for the routers, of which each tensor-parallel rank has
    # one.
    total = sum(2 * s + 8 * r for s, r in (stage_parameters(config, stage) for stage in (0, 1)))
    assert total == QWEN.model.num_parameters() - 2048 + 48 * 2048 * 128
    # The first layer of the other has an MLP, and is on the first of two stages with two parts each.
    experts = replace(LITE.model.experts, moe_layer_freq=(0,) + (1,) * 27)
    config = replace(LITE, model=replace(LITE.model, num_layers=28, experts=experts))
    config = laid_out(config, pp=2, vpp=2)
    assert chunks_of_stages(28, config.parallel) == [
        [range(7), range(14, 21)],
        [range(7, 14), range(21, 28)],
    ]
    expert = 3 * 2048 * 1408
    assert [stage_parameters(config, stage)[1] for stage in (0, 1)] == [
        13 * 64 * expert,
        14 * 64 * expert,
    ]


def test_memory_of_a_mixture_by_hand() -> None:
    """64 GPUs: all share the optimizer's state of most weights; eight have the same experts."""
    config = laid_out(QWEN, ep=8)
    plan = memory_plan(config, 64)
    routed = 48 * 16 * AN_EXPERT
    others = QWEN.model.num_parameters() - 48 * 128 * AN_EXPERT
    assert plan.weights == pytest.approx(2 * (others + routed), rel=1e-5)
    assert plan.gradients == 2 * plan.weights
    assert plan.optimizer == pytest.approx(12 * (others / 64 + routed / 8), rel=1e-5)
    # Attention and norms keep what they keep without experts. A token is 8 rows. A row keeps itself, 2 x
    # 768 and 768 numbers, and its weight; a token two lists of 8 experts, 8 weights, and of 128 experts two
    # scores and a mask.
    tokens = 4096
    received = 8 * tokens * imbalance_of_ranks(128, 8)
    a_token = 8 * (16 + 4) + 128 * 9 + 8 * 8
    kept = received * (2 * (2048 + 3 * 768) + 4) + tokens * a_token
    attention = activation_bytes(
        QWEN.model, tokens=tokens, seq_length=tokens, tp=1, sp=False, recompute="none", ffn=0
    )
    assert plan.activations == pytest.approx(48 * (attention + kept))
    assert plan.logits == 10 * tokens * 151936 and plan.backward == 0
    # With a small vocabulary one layer's backward takes more than the loss.
    small = replace(config, model=replace(QWEN.model, vocab_size=1024))
    buffers = buffer_bytes(QWEN.model, Rows(tokens, 8 * tokens, received))
    assert memory_plan(small, 64).backward == buffers == 2 * 2 * 2048 * received
    # A shared expert keeps what an MLP of its width does.
    config = replace(LITE, model=replace(LITE.model, residual="standard"))
    lite = laid_out(config, ep=8)
    received = 6 * tokens * imbalance_of_ranks(64, 8)
    rows = Rows(tokens, 6 * tokens, received)
    attention, mlp, shared = (
        activation_bytes(
            LITE.model, tokens=tokens, seq_length=tokens, tp=1, sp=False, recompute="none", ffn=ffn
        )
        for ffn in (0, 10944, 2816)
    )
    assert shared - attention == 2 * 3 * 2816 * tokens
    expected = mlp + 26 * (shared + kept_bytes(LITE.model, rows))
    assert memory_plan(lite, 64).activations == pytest.approx(expected)
    # Recomputed, a ladder layer keeps four states, and the rows that have come.
    ladder = memory_plan(replace(lite, model=LITE.model, recompute="full"), 64)
    states = 27 * 4 * 2 * 2048 * tokens
    came = received * (2 * 2048 + 4) + 8 * 6 * tokens + tokens * (6 * 20 + 64 * 9)
    assert ladder.activations == pytest.approx(states + 26 * came)
    # Recomputed, a standard layer keeps its input, and one layer at a time the rest.
    full = memory_plan(replace(lite, recompute="full"), 64)
    assert full.activations == 27 * 2 * 2048 * tokens
    again = shared + kept_bytes(LITE.model, rows) + buffer_bytes(LITE.model, rows)
    assert max(full.backward, full.logits) == pytest.approx(max(again, 10 * tokens * 102400))


def test_more_ranks_have_fewer_experts_and_less_even_ones() -> None:
    plans = {ep: memory_plan(laid_out(QWEN, ep=ep), 64) for ep in (8, 64)}
    assert plans[64].weights < plans[8].weights / 2.5
    # Eight ranks have each expert; of 64 in EP one. The state of experts is divided as far in both.
    assert plans[64].optimizer == pytest.approx(plans[8].optimizer)
    assert plans[64].activations > plans[8].activations
    uneven = [imbalance_of_ranks(128, ep) for ep in (1, 2, 8, 64, 128)]
    assert uneven == sorted(uneven) and (uneven[0], uneven[-1]) == (1.0, 2.0)


def test_a_mixture_that_does_not_fit_is_refused() -> None:
    card = 79.18 * 2**30
    check_memory(QWEN, 64, card)
    with pytest.raises(UserError, match="the fullest GPU would hold") as refused:
        check_memory(QWEN, 8, card)
    assert "--parallel.expert-model-parallel-size 16" in str(refused.value)
    assert "--recompute full" in str(refused.value)
    assert "moe-expert-capacity-factor" in what_to_turn(QWEN, 8)
    divided = laid_out(QWEN, ep=128)
    assert "expert-model-parallel-size" not in what_to_turn(divided, 128)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--nproc-per-node 64", 0, ["optimizer 5.33", "It fits.", "fullest expert of 2 times"]),
        ("--nproc-per-node 8", 1, ["It does not fit.", "--optimizer.moments bf16"]),
    ],
)
def test_plan_only_with_experts(options: str, status: int, words: list[str], capsys) -> None:
    argv = ["--preset", "qwen3-30b-a3b", "--plan-only", "h100", *options.split()]
    assert train(argv) == status
    said = capsys.readouterr().out
    for word in words:
        assert word in said


def test_bench_plan_of_a_mixture(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shallow one: the command's paragraphs, and a table without halves."""
    shallow = replace(QWEN, model=replace(QWEN.model, num_layers=2), global_batch_size=16)
    monkeypatch.setitem(PRESETS, "qwen3-30b-a3b", lambda: shallow)
    assert bench(["plan", "--preset", "qwen3-30b-a3b", "--gpus", "8", "--top", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fullest expert 2x the mean" in said
    assert "With experts nothing of the model was compared with a GPU" in said
    assert re.search(r"EP \d\) is", said) and "EP exposed" in said
    assert "standard alone computes what standard does" in said
    assert "halves" not in said
