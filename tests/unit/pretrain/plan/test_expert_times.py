"""The planner's times of layers with experts, against sums done by hand."""

import math
from dataclasses import replace

import pytest

from megatron_ladder.config import ParallelConfig
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.plan.expert_times import (
    ExpertLayer,
    Part,
    all_to_all_seconds,
    expert_layer,
    experts_pass_seconds,
)
from pretrain.plan.experts import imbalance_of_ranks, rows_of
from pretrain.plan.links import NVLINK, Network
from pretrain.plan.planner import DEVICES, Hardware, Submodule, pass_seconds
from pretrain.plan.search import row, search

NETWORK = Network(latency_s=10e-6, bytes_per_s=50e9)
HARDWARE = Hardware(DEVICES["h100"], NETWORK)
QWEN = PRESETS["qwen3-30b-a3b"]()

# Seconds. Attention: its first linear 1, the rest 3; in backward 2 for each. Experts: route 1, first GEMM
# 2, the rest 3, the sum 1; a shared expert 2.
ATTENTION = Submodule(forward_s=4.0, backward_s=8.0, weight_gradient_s=1.0)
MLP = Submodule(forward_s=5.0, backward_s=10.0, weight_gradient_s=2.0)
EXPERTS = ExpertLayer(
    route=Part(1.0, 2.0),
    first=Part(2.0, 4.0),
    rest=Part(3.0, 6.0),
    shared=Part(),
    total=Part(1.0, 2.0),
    counts_s=0.0,
    dispatch_s=2.0,
    combine_s=0.5,
    shared_waits=False,
)
SHARED = replace(EXPERTS, shared=Part(2.0, 4.0))
COMPUTE = 4 + 7, 8 + 14  # of a layer


def seconds(kinds: str, experts: ExpertLayer = EXPERTS, collective: float = 0.0, **options):
    """A layer for each letter: s, p, l and q with experts, in capitals with an MLP."""
    names = {"s": "standard", "p": "parallel", "l": "ladder", "q": "parallel-ladder"}
    layers = tuple((names[k.lower()], k.islower()) for k in kinds)
    return experts_pass_seconds(layers, ATTENTION, MLP, experts, collective, **options)


def test_standard_layers_wait_for_every_all_to_all() -> None:
    assert seconds("ss") == pytest.approx((2 * (11 + 2.5), 2 * (22 + 2.5)))
    # megatron-core computes the shared expert before it routes.
    assert seconds("ss", SHARED) == pytest.approx((2 * (13 + 2.5), 2 * (26 + 2.5)))
    # Its full recomputation runs the all-to-alls again.
    assert seconds("ss", recompute=True)[1] == pytest.approx(2 * (22 + 2.5) + 2 * (11 + 2.5))


def test_ladder_layers_hide_dispatch_and_combine() -> None:
    """Dispatch takes 2, behind core attention of 3; combine 0.5, behind the next first linear of 1. The
    last combine of forward, and in backward its gradient's, the first, have nothing to hide behind."""
    assert seconds("lll") == pytest.approx((3 * 11 + 0.5, 3 * 22 + 0.5))
    # A shared expert hides the last one too.
    assert seconds("lll", SHARED) == pytest.approx((3 * 13, 3 * 26))


def test_parallel_layers_are_one_sub_module() -> None:
    """Parallel waits for both. In parallel-ladder dispatch of 2 is behind the experts of the layer before,
    5, and combine of 0.5 behind the attention of the next, 4; the first dispatch of a pass and the last
    combine are behind nothing, in backward the same two."""
    assert seconds("ppp") == pytest.approx((3 * (11 + 2.5), 3 * (22 + 2.5)))
    assert seconds("qqq") == pytest.approx((33 + 2 + 0.5, 66 + 2 + 0.5))
    slow = replace(EXPERTS, dispatch_s=6.0, combine_s=4.5)
    # Dispatch is 1 longer than the experts before it. Combine starts after it, and is there 0.5 after the
    # attention of the next layer.
    assert seconds("qqq", slow)[0] == pytest.approx(33 + 6 + 2 * (1 + 0.5) + 4.5)
    # Dense: as the dense model has it.
    for kinds, name in (("PPP", "parallel"), ("QQQ", "parallel-ladder")):
        dense = pass_seconds([name] * 3, ATTENTION, MLP, 0.5, sequence_parallel=True)
        assert seconds(kinds, collective=0.5) == pytest.approx(dense, abs=0.5)


def test_what_is_longer_than_what_hides_it_is_exposed() -> None:
    """Forward: dispatch of 5 behind 3, combine of 2.5 behind 1, the last behind nothing. Backward: dispatch
    of 5 behind 6, combine of 2.5 behind both GEMMs of the next layer's first linear, 2."""
    slow = replace(EXPERTS, dispatch_s=5.0, combine_s=2.5)
    exposed = 3 * 2 + 2 * 1.5 + 2.5
    assert seconds("lll", slow) == pytest.approx((33 + exposed, 66 + 2 * 0.5 + 2.5))
    # Behind the shared expert as well: 2 in forward, 4 in backward.
    with_shared = replace(slow, shared=Part(2.0, 4.0))
    assert seconds("lll", with_shared) == pytest.approx((39 + 3 * 2 + 0.5, 78))


def test_numbers_of_rows_are_waited_for_in_every_kind() -> None:
    counted = replace(SHARED, counts_s=0.25)
    for kinds in ("sss", "lll"):
        before, after = seconds(kinds, SHARED), seconds(kinds, counted)
        assert after == pytest.approx((before[0] + 3 * 0.25, before[1]))


def test_the_first_ladder_layer_hides_the_last_standard_combine() -> None:
    forward, _ = seconds("sl")
    # The standard dispatch is waited for; its combine is behind the ladder layer's first linear.
    assert forward == pytest.approx(22 + 2 + 0.5)
    assert seconds("sss")[0] > seconds("ssl")[0] > seconds("sll")[0] > seconds("lll")[0]


@pytest.mark.parametrize("collective", [0.0, 0.5, 1.0])
def test_without_experts_it_is_the_model_of_dense_layers(collective: float) -> None:
    """Standard: forward is the same. In backward the gather of an output's gradient starts when the
    gradient is there; the dense model lets it run behind the weight's gradient of the sub-module before.
    Ladder: while collectives are short, both models hide all but what is at the ends."""
    dense = pass_seconds(["standard"] * 3, ATTENTION, MLP, collective, sequence_parallel=True)
    gathers = 5 * collective / 2  # of six sub-modules all but the last
    found = seconds("SSS", collective=collective)
    assert found == pytest.approx((dense[0], dense[1] + gathers))
    dense = pass_seconds(["ladder"] * 3, ATTENTION, MLP, collective, sequence_parallel=True)
    assert seconds("LLL", collective=collective) == pytest.approx(dense, abs=collective)


def test_an_all_to_all_within_a_node_and_between_nodes() -> None:
    """Of 8 MB a rank sends an eighth to each of eight; of 64 ranks 7 are in its node and 56 are not."""
    inside = 10e-6 + 8e6 * 7 / 8 / 300e9
    assert all_to_all_seconds(HARDWARE, 8e6, 8) == pytest.approx(inside)
    between = 10e-6 + 8e6 * 56 / 64 / 50e9
    assert all_to_all_seconds(HARDWARE, 8e6, 64) == pytest.approx(between)
    assert all_to_all_seconds(HARDWARE, 8e6, 2) == pytest.approx(10e-6 + 4e6 / 300e9)
    assert all_to_all_seconds(HARDWARE, 8e6, 1) == 0
    # Half of 16 ranks are in the node: on a network as fast as that the nodes' share is the longer one.
    fast = replace(HARDWARE, network=Network(latency_s=1e-6, bytes_per_s=300e9))
    assert all_to_all_seconds(fast, 8e6, 16) == pytest.approx(
        max(10e-6 + 8e6 * 7 / 16 / 300e9, 1e-6 + 8e6 * 8 / 16 / 300e9)
    )
    twice = replace(HARDWARE, link_bandwidth=2.0)
    assert all_to_all_seconds(twice, 8e6, 64) == pytest.approx(10e-6 + (between - 10e-6) / 2)
    slow = replace(HARDWARE, link="p2p-off")
    assert all_to_all_seconds(slow, 8e6, 8) == pytest.approx(65e-6 + 7e6 / (37e9 * 7 / 4))
    assert all_to_all_seconds(replace(HARDWARE, link="zero"), 8e6, 64) == 0


def laid_out(config: TrainConfig = QWEN, **sizes: int) -> TrainConfig:
    names = {"tp": "tensor_model_parallel_size", "ep": "expert_model_parallel_size"}
    parallel = ParallelConfig(
        sequence_parallel=sizes.get("tp", 1) > 1, **{names[n]: size for n, size in sizes.items()}
    )
    return replace(config, parallel=parallel)


def test_rows_of_the_fullest_rank() -> None:
    """4,096 tokens a micro-batch, 8 experts each of 128."""
    found = rows_of(laid_out(ep=8), of_experts=2.0)
    uneven = 1 + math.sqrt(8 / 128 * math.log(8) / math.log(128))
    assert (found.routed, found.sent) == (4096, 8 * 4096)
    assert found.received == found.exchanged == pytest.approx(8 * 4096 * uneven)
    # Tensor-parallel ranks route a half each. A rank with all experts gets what it sends.
    assert rows_of(laid_out(ep=8, tp=2), 2.0).sent == 4 * 4096
    assert rows_of(laid_out(ep=1), 2.0).received == 8 * 4096
    # A rank with one expert gets as much as the fullest expert.
    assert imbalance_of_ranks(128, 128, 3.0) == 3.0
    experts = QWEN.model.experts

    def with_capacity(**fields: object) -> TrainConfig:
        model = replace(QWEN.model, experts=replace(experts, **fields))
        return laid_out(replace(QWEN, model=model), ep=8)

    padded = with_capacity(moe_expert_capacity_factor=1.25, moe_pad_expert_input_to_capacity=True)
    # 256 tokens an expert of each rank on average, so 320 rows for each of 128.
    assert rows_of(padded, 2.0).received == rows_of(padded, 2.0).sent == 128 * 320
    bounded = with_capacity(moe_expert_capacity_factor=1.1)
    assert rows_of(bounded, 2.0).received == pytest.approx(8 * 4096 * 1.1)
    assert rows_of(bounded, 1.0).received == 8 * 4096


def test_a_layer_of_experts_by_hand() -> None:
    """Qwen3-30B-A3B on eight GPUs, evenly used: 32,768 rows a rank, 16 experts of 2,048 x 768."""
    even = replace(HARDWARE, expert_imbalance=1.0)
    found = expert_layer(laid_out(ep=8), even)
    h, f, rows, k = 2048, 768, 32768, 12e-6

    def memory(elements: float) -> float:
        return 2 * elements / 3.35e12

    in_tiles = rows + 16 * 64
    gemm = 2 * in_tiles * 2 * h * f / (989e12 * 0.65)  # the first, gate and up
    kernels = 4 * k  # sixteen GEMMs, four at a time
    sorting = memory(2 * h * rows) + 2 * k
    assert found.first.forward_s == pytest.approx(sorting + gemm + kernels)
    # Its weights' gradients, in fp32, take longer to read and write than GEMMs of so few rows take.
    gradients = memory(2 * 2 * 16 * 2 * h * f)
    assert found.first.backward_s == pytest.approx(
        2 * sorting + gemm + max(gemm, gradients) + 2 * kernels
    )
    swiglu = memory(3 * f * rows) + k
    assert found.rest.forward_s == pytest.approx(swiglu + gemm / 2 + kernels + sorting)
    router = 2 * 4096 * h * 128 / (989e12 * 0.65) + memory(2 * h * 4096 + 8 * 2 * 4096 * 128)
    assert found.route.forward_s == pytest.approx(router + memory(2 * h * rows) + 21 * k)
    assert found.total.forward_s == pytest.approx(memory(3 * h * (rows + 4096)) + 3 * k)
    tokens, weights = 10e-6 + 2 * h * rows * 7 / 8 / 300e9, 10e-6 + 4 * rows * 7 / 8 / 300e9
    assert found.combine_s == pytest.approx(tokens)
    assert found.dispatch_s == pytest.approx(tokens + weights)
    assert found.counts_s == pytest.approx(10e-6 + 4 * 128 * 7 / 8 / 300e9)
    assert found.shared == Part() and not found.shared_waits


def test_small_groups_are_less_efficient() -> None:
    """The same rows: with all 128 experts on a rank each has 256 of them, and tiles are filled less."""
    even = replace(HARDWARE, expert_imbalance=1.0)

    def gemms(ep: int) -> float:
        found = expert_layer(laid_out(ep=ep), even)
        return found.first.forward_s + found.rest.forward_s

    assert gemms(1) > 1.2 * gemms(8) > gemms(32)
    # One row an expert: reading the weights takes longer than the products.
    few = replace(QWEN, data=replace(QWEN.data, seq_length=16))
    found = expert_layer(laid_out(few, ep=1), replace(even, kernel_s=0.0))
    weights = 2 * 128 * 2 * 2048 * 768 / 3.35e12
    assert found.first.forward_s == pytest.approx(weights + 2 * 2 * 2048 * 128 / 3.35e12)


def test_padded_experts_are_full_and_their_numbers_need_no_exchange() -> None:
    experts = replace(
        QWEN.model.experts, moe_expert_capacity_factor=1.25, moe_pad_expert_input_to_capacity=True
    )
    config = laid_out(replace(QWEN, model=replace(QWEN.model, experts=experts)), ep=8)
    found, dropless = (
        expert_layer(c, replace(HARDWARE, kernel_s=0.0)) for c in (config, laid_out(ep=8))
    )
    assert found.counts_s == 0 < dropless.counts_s
    # 16 experts of 8 ranks' 320 rows: 20 whole tiles each.
    gemm = 2 * 16 * 8 * 320 * 2 * 2048 * 768 / (989e12 * 0.65)
    assert found.first.forward_s == pytest.approx(gemm + 2 * 2 * 2048 * 128 * 320 / 3.35e12)
    assert found.combine_s == pytest.approx(10e-6 + 2 * 2048 * 128 * 320 * 7 / 8 / 300e9)


def test_a_shared_expert_over_tensor_parallel_ranks_waits() -> None:
    lite = PRESETS["deepseek-v2-lite-mha"]()
    one, two = (expert_layer(laid_out(lite, ep=8, tp=tp), HARDWARE) for tp in (1, 2))
    gemm = 2 * 4096 * 3 * 2048 * 2816 / (989e12 * 0.65)
    memory = 2 * 3 * 4096 * 2816 / 3.35e12
    assert one.shared.forward_s == pytest.approx(gemm + memory + 3 * 12e-6)
    assert two.shared.forward_s == pytest.approx((gemm + memory) / 2 + 3 * 12e-6)
    assert (one.shared_waits, two.shared_waits) == (False, True)
    waiting = replace(SHARED, shared_waits=True)
    quiet, found = (seconds("ll", e, collective=0.5) for e in (SHARED, waiting))
    # Its collectives, 0.5, come after combine on the link, which takes 0.5.
    assert found[0] == pytest.approx(quiet[0] + 2 * (0.5 + 0.5))


def test_a_step_is_the_sum_of_its_parts() -> None:
    """Of 64 GPUs, experts over 8: one stage, two micro-batches a rank. The times of a pass are those of
    `experts_pass_seconds`, and only the all-to-alls differ between the kinds."""
    config = replace(laid_out(ep=8), global_batch_size=128)
    standard, ladder = (
        row(replace(config, model=replace(config.model, residual=kind)), 64, HARDWARE)
        for kind in ("standard", "ladder")
    )
    experts = expert_layer(config, HARDWARE)
    exchanged = experts.dispatch_s + experts.combine_s
    waited = 2 * 48 * (2 * exchanged + experts.counts_s)
    assert standard.exposed_ep_s == pytest.approx(waited)
    assert 0 < ladder.exposed_ep_s < 0.6 * waited
    assert ladder.compute_s == pytest.approx(standard.compute_s)
    for found in (standard, ladder):
        assert (found.ep, found.dp, found.exposed_tp_s, found.bubble_s) == (8, 64, 0, 0)
        parts = found.compute_s + found.exposed_ep_s + found.exposed_dp_s
        assert parts == pytest.approx(found.step_s)
        flops = 6 * config.model.num_matmul_parameters() + 12 * 48 * 4096 * 4096
        assert found.mfu == pytest.approx(128 * 4096 * flops / (64 * 989e12 * found.step_s))


def test_gradients_of_experts_are_summed_over_their_own_ranks() -> None:
    """Of 64 ranks with experts over 64 nobody has another's: no gradient of theirs is exchanged."""
    network = Network(latency_s=0.0, bytes_per_s=1e8)
    slow = replace(HARDWARE, network=network, link="zero")
    config = replace(laid_out(ep=64), global_batch_size=64)
    routed = 48 * 128 * 3 * 2048 * 768
    others = config.model.num_parameters() - routed

    def exposed(ep: int) -> float:
        laid = replace(laid_out(ep=ep), global_batch_size=64)
        return row(laid, 64, slow).exposed_dp_s

    difference = exposed(32) - exposed(64)
    # Two ranks with the same experts: of gradients 4 bytes, of weights 2.
    a_half = 6 * routed / 32 / 2 / 1e8
    assert difference == pytest.approx(a_half, rel=0.02)
    assert exposed(64) == pytest.approx(6 * others * 63 / 64 / 1e8, rel=0.02)


def test_layouts_with_experts_are_searched() -> None:
    small = replace(
        QWEN,
        model=replace(QWEN.model, num_layers=4),
        global_batch_size=16,
    )
    found = search(small, 16, HARDWARE)
    assert set(found) == {"standard", "parallel", "ladder", "parallel-ladder"}
    assert {r.ep for r in found["standard"]} == {1, 2, 4, 8, 16}
    assert found["ladder"][0].step_s < found["standard"][0].step_s
    assert NVLINK.bytes_per_s > NETWORK.bytes_per_s
    assert found["ladder"][0].ep <= 8  # beyond a node the network is six times slower
