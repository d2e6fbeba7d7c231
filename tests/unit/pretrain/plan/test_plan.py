"""The planner: a pass's time by hand, links, layouts that the trainer would take."""

import json
from dataclasses import replace

import pytest

from megatron_ladder.config import ParallelConfig, check_layout
from pretrain.commands.bench import bench
from pretrain.config.presets import PRESETS as TRAIN_PRESETS
from pretrain.config.train import TrainConfig
from pretrain.plan.links import MIB, NVLINK, PRESETS, Link, Network, network_of
from pretrain.plan.memory import room
from pretrain.plan.planner import DEVICES, Hardware, Submodule, pass_seconds, submodules
from pretrain.plan.ring import ring_seconds
from pretrain.plan.search import WAYS, layouts, row, search, way
from pretrain.run.metrics import flops_per_token

ATTENTION = Submodule(forward_s=3.0, backward_s=6.0, weight_gradient_s=1.0)
MLP = Submodule(forward_s=5.0, backward_s=10.0, weight_gradient_s=2.0)
COMPUTE = 2 * (3 + 5), 2 * (6 + 10)  # of two layers


def seconds(kinds: str, collective: float, **options) -> tuple[float, float]:
    names = {"s": "standard", "l": "ladder", "p": "parallel", "q": "parallel-ladder"}
    return pass_seconds([names[k] for k in kinds], ATTENTION, MLP, collective, **options)


def test_heads_may_be_wider_than_the_state() -> None:
    """32 heads of 128 channels over states of 2,048, with norms of queries and keys, as in Qwen3."""
    model = replace(
        TRAIN_PRESETS["llama-3-8b"]().model,
        hidden_size=2048,
        ffn_hidden_size=6144,
        kv_channels=128,
        qk_layernorm=True,
    )
    free = Hardware(DEVICES["h100"], NVLINK, kernel_s=0.0)
    sizes = {"tokens": 1000, "seq_length": 4096, "tp": 1, "sp": False}
    attention, _ = submodules(replace(model, num_query_groups=4), free, **sizes)
    gemms = 2 * 1000 * 2048 * (4096 + 2 * 512 + 4096)
    core = 2 * 1000 * 4096 * 4096
    # Norm of the state, norms of queries and keys, RoPE, the addition.
    memory = 2 * 1000 * (2 * 2048 + 4 * (4096 + 512) + 3 * 2048)
    by_hand = free.gemm_s(gemms) + free.attention_s(core) + free.memory_s(memory)
    assert attention.forward_s == pytest.approx(by_hand)
    flops = flops_per_token(
        num_layers=1, attention_width=model.attention_width, seq_length=4096, matmul_parameters=0
    )
    assert 1000 * flops / 2 / 3 == pytest.approx(
        core
    )  # half is masked out; backward is twice forward


def test_residual_scaling_does_not_change_the_modelled_compute() -> None:
    """One multiplication of a state is not counted. Without norms there is less to read and to launch."""
    model = TRAIN_PRESETS["llama-3-8b"]().model
    sizes = {"tokens": 8192, "seq_length": 8192, "tp": 8, "sp": True}
    for residual in ("standard", "ladder", "parallel"):
        given = replace(model, residual=residual)
        plain, *others = (
            submodules(replace(given, **options), Hardware(DEVICES["h100"], NVLINK), **sizes)
            for options in (
                {},
                {"residual_scaling": "1/n"},
                {"residual_scaling": "skipinit"},
                {"layer_norms": False},
            )
        )
        assert others[:2] == [plain, plain]
        assert others[2][0].forward_s < plain[0].forward_s


@pytest.mark.parametrize("kinds", ["ss", "ll", "pp", "qq", "sl", "ls", "pq", "qp"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_without_a_link_a_pass_is_its_compute(kinds, sequence_parallel) -> None:
    assert seconds(kinds, 0.0, sequence_parallel=sequence_parallel) == pytest.approx(COMPUTE)
    forward, backward = seconds(kinds, 0.0, recompute="full")
    assert (forward, backward) == pytest.approx((COMPUTE[0], COMPUTE[1] + COMPUTE[0]))
    if set(kinds) <= {"s", "p"}:
        halves = seconds(kinds, 0.0, sequence_parallel=sequence_parallel, halves=True)
        assert halves == pytest.approx((2 * COMPUTE[0], 2 * COMPUTE[1]))


def test_standard_exposes_all_of_forward_and_what_its_weight_gradient_leaves() -> None:
    forward, backward = seconds("ss", 1.5)
    assert forward == pytest.approx(COMPUTE[0] + 4 * 1.5)
    # Behind 1 s of attention's, and 2 s of the MLP's weight gradient.
    assert backward == pytest.approx(COMPUTE[1] + 2 * 0.5 + 0)


def test_ladder_exposes_the_last_alone_while_it_fits() -> None:
    forward, backward = seconds("ll", 1.5)
    assert forward == pytest.approx(COMPUTE[0] + 1.5)
    assert backward == pytest.approx(COMPUTE[1] + 0.5)  # behind attention 1's weight gradient
    # 4 s behind attention's 3 s of forward: a second over, in the middle of the two layers.
    forward, _ = seconds("ll", 4.0)
    assert forward == pytest.approx(3 + 5 + (3 + 1) + 5 + 4)


def test_parallel_exposes_one_a_layer() -> None:
    forward, backward = seconds("pp", 1.5)
    assert forward == pytest.approx(COMPUTE[0] + 2 * 1.5)
    assert backward == pytest.approx(COMPUTE[1] + 2 * 0.5)  # behind attention's weight gradients


def test_parallel_ladder_hides_one_a_layer_behind_a_whole_layer() -> None:
    assert seconds("qq", 1.5) == pytest.approx((COMPUTE[0] + 1.5, COMPUTE[1] + 0.5))
    # 10 s on the link behind 8 s of compute. The second layer does not wait for it, the link does.
    assert seconds("qqq", 10.0)[0] == pytest.approx(8 + 3 * 10)
    # The third layer of two hides the first, whatever follows.
    assert seconds("pq", 1.5)[0] == pytest.approx(COMPUTE[0] + 1.5)
    assert seconds("qp", 1.5)[0] == pytest.approx(COMPUTE[0] + 2 * 1.5)


@pytest.mark.parametrize(("kind", "ends"), [("s", 2), ("p", 1)])
def test_halves_hide_behind_each_other(kind: str, ends: int) -> None:
    """Attention and MLP of two halves: 1.5 s, of half a message, fits behind the other half's."""
    forward, backward = seconds(2 * kind, 1.5, halves=True)
    assert (forward, backward) == pytest.approx((2 * COMPUTE[0] + 1.5, 2 * COMPUTE[1] + 0.5))
    # 20 s on the link, after the first half of the first sub-module: nothing but the link counts.
    first = 3 if kind == "s" else 8
    assert seconds(2 * kind, 20.0, halves=True)[0] == pytest.approx(first + 4 * ends * 20)
    # Recomputed, they repeat no collective: no gradient needs it.
    again = seconds(2 * kind, 1.5, halves=True, recompute="full")[1]
    assert again == pytest.approx(2 * COMPUTE[1] + 2 * COMPUTE[0] + 0.5)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5, 2.0, 2.5, 8.0])
def test_many_layers_take_what_the_longer_resource_takes(ratio: float) -> None:
    """Each sub-module 1 s, its all-reduce `ratio` s; backward twice 1 s, a quarter of it after the sum."""
    layers = 400

    def a_layer(kind: str, halves: bool = False) -> tuple[float, float]:
        cost = 1.05 if halves else 1.0  # two halves are less efficient than one whole
        size = cost / 2 if halves else cost
        sub = Submodule(size * 1.0, size * 2.0, size * 0.5)
        link = ratio / 2 if halves else ratio
        found = pass_seconds([kind] * layers, sub, sub, link, halves=halves)
        return found[0] / layers, found[1] / layers

    waits = max(0.0, ratio - 0.5)  # backward's, after the weight gradient
    for kind, halves, forward, backward in (
        ("standard", False, 2 * (1 + ratio), 2 * (2 + waits)),
        ("standard", True, 2 * max(1.05, ratio), 2 * max(2.1, ratio)),
        ("parallel", False, 2 + ratio, 4 + waits),
        ("parallel", True, max(2.1, ratio), max(4.2, ratio)),
        ("ladder", False, 2 * max(1, ratio), 2 * max(2, ratio)),
        ("parallel-ladder", False, max(2, ratio), max(4, ratio)),
    ):
        assert a_layer(kind, halves) == pytest.approx((forward, backward), rel=0.01), kind
    # The bounds in words: where the link takes 1.4 to 2.5 times as long as a sub-module, ladder's forward
    # gains 1.7 to 1.4, and that of parallel-ladder 2.4 to 3.
    if ratio in (1.5, 2.0, 2.5):
        standard = a_layer("standard")[0]
        assert 1.39 < standard / a_layer("ladder")[0] < 1.71
        assert 2.4 < standard / a_layer("parallel-ladder")[0] < 3.01


def test_the_first_ladder_layer_hides_the_last_standard_mlp() -> None:
    forward, _ = seconds("sl", 1.5)
    # Standard attention waits; its MLP's hides behind the ladder attention; the last is exposed.
    assert forward == pytest.approx(COMPUTE[0] + 1.5 + 1.5)


def test_recomputed_ladder_exposes_no_more_and_standard_repeats_attentions() -> None:
    again = COMPUTE[0]
    _, backward = seconds("ll", 1.5, recompute="full")
    assert backward == pytest.approx(COMPUTE[1] + again + 0.5)
    _, backward = seconds("ss", 1.5, recompute="full")
    assert backward == pytest.approx(COMPUTE[1] + again + 2 * 0.5 + 2 * 1.5)


def test_desync_exposes_one_every_n() -> None:
    forward, backward = pass_seconds(["desync-3", "desync-3"], ATTENTION, MLP, 1.5)
    # After the third sub-module, and after the fourth, the last.
    assert (forward, backward) == pytest.approx((COMPUTE[0] + 3.0, COMPUTE[1] + 3.0))


def test_links_go_through_their_points_and_beyond() -> None:
    link = PRESETS["nvswitch"]
    assert link.all_reduce_seconds(8 * MIB) == pytest.approx(83e-6)
    assert link.all_reduce_seconds(1) == link.latency_s == 20.7e-6
    middle = link.all_reduce_seconds(96 * MIB)
    assert middle == pytest.approx((316e-6 + 561e-6) / 2)
    assert link.all_reduce_seconds(256 * MIB) == pytest.approx(561e-6 + 2 * (561e-6 - 316e-6))
    assert Link.of(1e-3, 1e9).all_reduce_seconds(1e9) == pytest.approx(1.001)
    assert link.for_ranks(1).all_reduce_seconds(8 * MIB) == 0
    twice = link.with_bandwidth(2).all_reduce_seconds(8 * MIB)
    assert twice == pytest.approx(20.7e-6 + (83e-6 - 20.7e-6) / 2)
    assert link.with_bandwidth(2).latency_s == link.latency_s


@pytest.fixture
def hardware() -> Hardware:
    return Hardware(DEVICES["h100"], NVLINK)


def test_every_layout_is_one_the_trainer_takes(hardware) -> None:
    config = TRAIN_PRESETS["llama-3-8b"]()
    found = list(layouts(config, 64))
    assert len({(c.parallel, c.micro_batch_size, c.recompute) for c in found}) == len(found) > 20
    for c in found:
        check_layout(c.model, c.parallel)
        assert c.parallel.model_parallel_size * c.parallel.data_parallel_size(64) == 64
        c.num_microbatches(c.parallel.data_parallel_size(64))


def test_what_is_found_fits_and_is_sorted_and_ladder_is_no_slower(hardware) -> None:
    found = search(TRAIN_PRESETS["llama-3-8b"](), 64, hardware)
    limit = room(80)
    for rows in found.values():
        assert all(r.memory_gb <= limit for r in rows)
        assert [r.step_s for r in rows] == sorted(r.step_s for r in rows)
        for r in rows:
            parts = r.compute_s + r.exposed_tp_s + r.bubble_s + r.transfers_s + r.exposed_dp_s
            assert r.exposed_cp_s == 0
            assert parts == pytest.approx(r.step_s)
            assert 0 < r.mfu < 1
    standard = {r.layout: r for r in found["standard"]}
    for r in found["ladder"]:
        if r.layout in standard and r.recompute == "none" and r.pp == 1:
            assert r.step_s <= standard[r.layout].step_s + 1e-9


def test_the_bubble_shrinks_with_chunks_and_grows_with_stages(hardware) -> None:
    config = TRAIN_PRESETS["llama-3-8b"]()

    def bubble(pp: int, chunks: int | None) -> float:
        parallel = ParallelConfig(
            pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=chunks
        )
        return row(replace(config, parallel=parallel), 64, hardware).bubble

    assert bubble(8, None) > bubble(4, None) > bubble(4, 4) > 0
    assert bubble(1, None) == 0


def test_a_shorter_last_stage_makes_up_for_the_head(hardware) -> None:
    """The head of 8B, three times forward's, counts where the last stage is the slowest."""
    config = TRAIN_PRESETS["llama-3-8b"]()

    def planned(last: int | None):
        parallel = ParallelConfig(
            pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=last
        )
        return row(replace(config, parallel=parallel), 64, hardware)

    even, shorter = planned(None), planned(15)
    assert (even.last_stage, shorter.last_stage) == (16, 15)
    head_s = 3 * hardware.gemm_s(2.0 * 8192 * 4096 * config.model.padded_vocab_size)
    micro_batches = config.global_batch_size // 32
    layer_s = (even.compute_s / micro_batches - head_s) / 16
    assert shorter.compute_s / micro_batches == pytest.approx(
        max(15 * layer_s + head_s, 17 * layer_s)
    )
    assert shorter.step_s < even.step_s
    # Without a head to speak of, the first stage is the slowest.
    small = replace(config, model=replace(config.model, vocab_size=128))
    parallel = ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=15)
    found = row(replace(small, parallel=parallel), 64, hardware)
    assert found.compute_s / micro_batches == pytest.approx(17 * layer_s)


def test_one_node_needs_no_network(hardware) -> None:
    """Stages and data-parallel ranks of 8 GPUs send over NVLink or PCIe, those of 16 over their NICs."""
    config = TRAIN_PRESETS["llama-3-8b"]()
    network = Network(latency_s=0.0, bytes_per_s=1e9)
    # Compute takes no time, and hides nothing.
    quick = {"gemm_efficiency": 1e9, "attention_efficiency": 1e9, "kernel_s": 0.0}
    device = replace(hardware.device, hbm_bytes_per_s=1e24)
    slow = replace(hardware, device=device, network=network, **quick)
    pcie = replace(slow, link="p2p-off")
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    one_stage, two_stages = (
        replace(config, parallel=ParallelConfig()),
        replace(config, parallel=parallel),
    )
    state = 2 * config.micro_batch_size * config.data.seq_length * 4096
    weights = config.model.num_parameters()
    for gpus, given, link in ((8, slow, NVLINK), (8, pcie, pcie.in_a_node), (16, slow, network)):
        micro_batches = config.global_batch_size // config.micro_batch_size // (gpus // 2)
        sent_s = 2 * micro_batches * link.seconds(2 * state)  # a ladder's two states
        assert row(two_stages, gpus, given).transfers_s == pytest.approx(sent_s)
        found = row(one_stage, gpus, given).exposed_dp_s
        sums_s = link.seconds(4 * weights * (gpus - 1) / gpus)
        gathers_s = link.seconds(2 * weights * (gpus - 1) / gpus)
        assert found == pytest.approx(sums_s + gathers_s, rel=1e-3)


def test_the_slowest_stage_of_a_hybrid_counts(hardware) -> None:
    """Four ladder layers of eight, in two stages: the standard ones' stage waits more."""
    config = TRAIN_PRESETS["llama-3-8b"]()
    parallel = ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2)

    def exposed(**kind) -> float:
        model = replace(config.model, num_layers=8, vocab_size=128, **kind)
        return row(replace(config, model=model, parallel=parallel), 64, hardware).exposed_tp_s

    assert exposed(residual="ladder", ladder_layers=4) == exposed(residual="standard")
    assert exposed(residual="ladder") < exposed(residual="standard")
    assert exposed(residual="parallel-ladder", ladder_layers=4) == exposed(residual="parallel")


def long(config: TrainConfig, length: int) -> TrainConfig:
    model = replace(config.model, max_position_embeddings=length)
    return replace(config, model=model, data=replace(config.data, seq_length=length))


def test_a_ring_exposes_what_a_transfer_takes_longer_than_attention(hardware) -> None:
    model = TRAIN_PRESETS["llama-3-8b"]().model
    slow = replace(hardware, network=Network(latency_s=0.0, bytes_per_s=1e9))

    def exposed(tp: int, cp: int, device: Hardware = slow) -> tuple[float, float]:
        return ring_seconds(model, device, tokens=1000, seq_length=1000 * cp, tp=tp, cp=cp)

    # Keys and values of 8 heads of 128 channels, in bf16; in backward their gradients as well.
    sent_s = 1000 * 2 * 8 * 128 * 2 / 8 / 1e9
    part_s = hardware.attention_s(2 * 1000 * 1000 * 4096 / 8)
    assert exposed(8, 4) == pytest.approx((3 * (sent_s - part_s), 3 * (2 * sent_s - 2.5 * part_s)))
    # Eight ranks are in one node, and go over its links, behind attention.
    nodes = NVLINK.seconds(1000 * 2 * 8 * 128 * 2 / 2)
    part_s = hardware.attention_s(2 * 1000 * 1000 * 4096 / 2)
    forward_s, _ = exposed(2, 4)
    assert forward_s == pytest.approx(3 * max(0.0, nodes - part_s))
    assert exposed(8, 1) == (0, 0)


def test_keys_that_are_gathered_are_all_exposed(hardware) -> None:
    """Documents apart, windows and torch's attention have no ring."""
    config = replace(long(TRAIN_PRESETS["llama-3-8b"](), 32768), global_batch_size=8)
    config = replace(config, parallel=ParallelConfig(context_parallel_size=4))
    sent_s = NVLINK.seconds(2 * 8192 * 2 * 8 * 128)
    apart = replace(config.data, attend_across_documents=False)
    windows = replace(config.model, sliding_window=32768)  # as many scores
    assert row(config, 8, hardware).exposed_cp_s == 0
    for changed in (
        replace(config, data=apart),
        replace(config, model=windows),
        replace(config, attention="torch"),
    ):
        found = row(changed, 8, hardware)
        # Four micro-batches, 32 layers; backward sends twice as much.
        expected = 4 * 32 * 3 * (sent_s + NVLINK.seconds(2 * 2 * 8192 * 2 * 8 * 128))
        assert found.exposed_cp_s == pytest.approx(expected)
        alone = replace(changed, parallel=ParallelConfig())
        assert row(alone, 8, hardware).exposed_cp_s == 0


@pytest.mark.parametrize("preset", ["extend", "adapt", "adapt-control"])
def test_a_preset_without_a_model_of_its_own_is_refused(preset: str, capsys) -> None:
    assert bench(["plan", "--preset", preset, "--gpus", "8"]) == 2
    assert f"no preset '{preset}'" in capsys.readouterr().err


def test_long_sequences_are_divided_over_ranks_too(hardware) -> None:
    config = replace(long(TRAIN_PRESETS["llama-3-8b"](), 32768), global_batch_size=8)
    found = list(layouts(config, 32))
    assert {c.parallel.context_parallel_size for c in found} == {1, 2, 4}  # 8,192 tokens at least
    slow = replace(hardware, network=Network(latency_s=1e-5, bytes_per_s=1e9))
    planned = [row(c, 32, slow) for c in found if c.parallel.context_parallel_size == 4]
    assert any(r.exposed_cp_s for r in planned)
    for r in planned:
        parts = r.compute_s + r.exposed_tp_s + r.exposed_cp_s + r.bubble_s + r.transfers_s
        assert parts + r.exposed_dp_s == pytest.approx(r.step_s)
        assert r.tp * r.cp * r.pp * r.dp == 32


def test_the_ranks_of_a_sequence_share_its_compute(hardware) -> None:
    """Its GEMMs and its scores; the time of a kernel stays, and each sequence is one micro-batch."""
    config = replace(long(TRAIN_PRESETS["llama-3-8b"](), 32768), global_batch_size=8)
    free = replace(hardware, kernel_s=0.0)
    one, four = (
        row(replace(config, parallel=ParallelConfig(context_parallel_size=cp)), 8, free)
        for cp in (1, 4)
    )
    assert (one.dp, four.dp) == (8, 2)
    assert four.compute_s == pytest.approx(one.compute_s)  # a quarter, for four sequences a rank
    assert four.exposed_cp_s == 0  # behind attention of 32,768 tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--preset llama-3-80b --gpus 8", "did you mean llama-3-8"),
        ("--preset llama-3-8b --gpus 0", "more than 0"),
        ("--preset llama-3-70b --gpus 1", "no layout"),
        ("--preset llama-3-70b --gpus 8 --seq-length 131072", "no layout fits in 80 GB"),
        ("--preset llama-3-8b --gpus 8 --device a100 --fp8", "no fp8 units"),
    ],
)
def test_mistakes_are_said_in_a_line(options, message, capsys) -> None:
    assert bench(["plan", *options.split()]) == 2
    output = capsys.readouterr().err
    assert message in output
    assert "Traceback" not in output


def test_the_command_prints_draws_and_writes(tmp_path, capsys) -> None:
    files = ["--json", str(tmp_path / "plan.json"), "--png", str(tmp_path / "plan.png")]
    assert bench(["plan", "--preset", "llama-3-8b", "--gpus", "16", *files]) == 0
    output = capsys.readouterr().out
    assert "modelled, not measured" in output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert set(written) == {way(*kind) for kind in WAYS} and len(written) == 6
    assert written["ladder"][0]["step_s"] > 0
    assert not any(r["halves"] for r in written["standard"])
    assert all(
        r["halves"] and r["tp"] > 1 and r["micro_batch_size"] % 2 == 0
        for r in written["standard, halves"]
    )
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_link_between_nodes_is_no_node() -> None:
    for link, is_network in (("two-nodes", True), ("nvswitch", False), (None, False)):
        hardware = Hardware(DEVICES["h100"], network_of(100), link=link)
        assert (hardware.between(8) == hardware.network) == is_network
        assert hardware.between(16) == hardware.network
