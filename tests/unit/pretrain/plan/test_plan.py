"""The planner: a pass's time by hand, links, layouts that the trainer would take."""

import json
from dataclasses import replace

import pytest

from megatron_ladder.config import ParallelConfig, check_layout
from pretrain.commands.bench import bench
from pretrain.config.presets import PRESETS as TRAIN_PRESETS
from pretrain.plan.links import MIB, NVLINK, PRESETS, Link
from pretrain.plan.memory import room
from pretrain.plan.planner import DEVICES, Hardware, Submodule, pass_seconds
from pretrain.plan.search import layouts, row, search

ATTENTION = Submodule(forward_s=3.0, backward_s=6.0, weight_gradient_s=1.0)
MLP = Submodule(forward_s=5.0, backward_s=10.0, weight_gradient_s=2.0)
COMPUTE = 2 * (3 + 5), 2 * (6 + 10)  # of two layers


def seconds(kinds: str, collective: float, **options) -> tuple[float, float]:
    names = {"s": "standard", "l": "ladder", "p": "parallel"}
    return pass_seconds([names[k] for k in kinds], ATTENTION, MLP, collective, **options)


@pytest.mark.parametrize("kinds", ["ss", "ll", "pp", "sl", "ls"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_without_a_link_a_pass_is_its_compute(kinds, sequence_parallel) -> None:
    assert seconds(kinds, 0.0, sequence_parallel=sequence_parallel) == pytest.approx(COMPUTE)
    forward, backward = seconds(kinds, 0.0, recompute="full")
    assert (forward, backward) == pytest.approx((COMPUTE[0], COMPUTE[1] + COMPUTE[0]))


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
    assert backward == pytest.approx(COMPUTE[1] + 2 * 1.5)


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
    assert bench(["plan", "--preset", "llama-3-8b", "--gpus", "64", *files]) == 0
    output = capsys.readouterr().out
    assert "modelled, not measured" in output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert set(written) == {"standard", "parallel", "ladder"}
    assert written["ladder"][0]["step_s"] > 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
