"""In ladder layers with experts, the all-to-alls run while the other sub-module computes: the order of what
each rank does, forward and backward.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_ladder.collectives import streams
from megatron_ladder.collectives.all_to_all import AllToAll
from tests.distributed.layouts import (
    Layout,
    batches,
    configuration,
    micro_batches,
    start,
    train_step,
)
from tests.ranks import run_ranks

EP_2, TP_2 = Layout(dp=2, ep=2), Layout(tp=2, sp=True, ep=2)
CASES = {
    "ladder": ("ladder, a shared expert", EP_2, False),
    "ladder, TP 2": ("ladder, a shared expert", TP_2, False),
    "ladder on a GPU": ("ladder, a shared expert", EP_2, True),
    "ladder on a GPU, padded": ("ladder, capacity, padded", EP_2, True),
    "hybrid": ("hybrid, a shared expert", EP_2, False),
    "parallel": ("parallel, a shared expert", EP_2, False),
    "parallel-ladder": ("parallel-ladder, a shared expert", EP_2, False),
}
"""Kind, layout, and whether the host launches work, as with a GPU, and does not do it."""
POINTS = (
    ("fly", "start", ""),
    ("land", "wait", ""),
    ("fly_back", "start", "'"),
    ("land_back", "wait", "'"),
)


def events_of(kind: str, layout: Layout, on_a_gpu: bool) -> list[str]:
    """What a rank does in a step, in order; a dash stands for backward."""
    found: list[str] = []
    config = configuration(kind, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "host_runs_ahead", lambda: on_a_gpu)
        model, optimizer, scheduler = start(config)

        def record(method: str, words: str, dash: str) -> None:
            run = getattr(AllToAll, method)

            def recorded(exchange: AllToAll, *args: Any) -> Any:
                found.append(f"{words} {exchange.name.replace(' ', '')}{dash}")
                return run(exchange, *args)

            patch.setattr(AllToAll, method, recorded)

        for point in POINTS:
            record(*point)
        watch_layers(model[0].module.decoder.layers, found)
        parts = iter(micro_batches(batches()[0], config))
        train_step(model, optimizer, scheduler, parts, config)
    return found


def watch_layers(layers: Any, found: list[str]) -> None:
    def watch(module: Any, name: str) -> None:
        def ran(_module: Any, _inputs: Any, output: Any) -> None:
            found.append(name)
            first: Tensor = output[0] if isinstance(output, tuple) else output
            first.register_hook(lambda _: found.append(name + "'"))  # its backward begins

        module.register_forward_hook(ran, prepend=True)  # before the hook that runs the chain

    for layer in layers:
        number = layer.layer_number
        router = layer.mlp.router
        router.register_forward_hook(lambda *_, n=number: found.append(f"route{n}"))
        watch(layer.self_attention.linear_qkv, f"qkv{number}")
        watch(layer.self_attention.core_attention, f"core{number}")
        watch(layer.mlp.experts, f"experts{number}")
        if layer.mlp.shared_experts is not None:
            watch(layer.mlp.shared_experts, f"shared{number}")


def all_events() -> dict[str, list[str]]:
    return {name: events_of(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """What each rank does, by case."""
    return run_ranks(2, all_events, tmp_path=tmp_path_factory.mktemp("ranks"))


def between(events: list[str], first: str, last: str) -> list[str]:
    return events[events.index(first) : events.index(last) + 1]


def assert_that_ladder_layers_hide(events: list[str]) -> None:
    assert between(events, "qkv2", "shared2") == [
        *("qkv2", "wait combine1", "route2", "start dispatch2"),
        *("core2", "wait dispatch2"),
        *("experts2", "start combine2"),
        "shared2",
    ]
    assert between(events, "start combine2'", "wait dispatch2'") == [
        "start combine2'",
        *("qkv3'", "shared2'", "wait combine2'"),
        *("experts2'", "start dispatch2'"),
        *("core2'", "wait dispatch2'"),
    ]


@pytest.mark.parametrize("case", ["ladder", "ladder, TP 2"])
def test_all_to_alls_run_while_the_other_sub_module_computes(
    case: str, both_ranks: list[dict[str, list[str]]]
) -> None:
    for events in both_ranks:
        assert_that_ladder_layers_hide(events[case])


@pytest.mark.slow
def test_on_four_ranks_too(tmp_path: Path) -> None:
    layout = Layout(tp=2, sp=True, dp=2, ep=4)
    for events in run_ranks(
        4, events_of, "ladder, a shared expert", layout, False, tmp_path=tmp_path
    ):
        assert_that_ladder_layers_hide(events)


def test_on_a_gpu_core_attention_is_launched_before_the_host_waits(
    both_ranks: list[dict[str, list[str]]],
) -> None:
    """It waits for numbers of tokens, between routing and dispatch. With padding to a capacity there are
    none to wait for."""
    chain = ["wait combine1", "route2", "start dispatch2"]
    for events in both_ranks:
        dropless, padded = events["ladder on a GPU"], events["ladder on a GPU, padded"]
        last = ("wait dispatch2", "experts2")
        assert between(dropless, "qkv2", "experts2") == ["qkv2", "core2", *chain, *last]
        assert between(padded, "qkv2", "experts2") == ["qkv2", *chain, "core2", *last]


def test_parallel_ladder_layers_hide_each_behind_one_sub_module(
    both_ranks: list[dict[str, list[str]]],
) -> None:
    for by_case in both_ranks:
        events = by_case["parallel-ladder"]
        assert between(events, "start combine1", "shared2") == [
            *("start combine1", "shared1"),
            *("wait dispatch2", "qkv2", "core2"),
            *("wait combine1", "route3", "start dispatch3"),
            *("experts2", "start combine2", "shared2"),
        ]
        assert between(events, "start combine2'", "wait dispatch3'") == [
            *("start combine2'", "core3'", "qkv3'", "start dispatch3'"),
            *("shared2'", "wait combine2'", "experts2'", "wait dispatch3'"),
        ]


def test_parallel_layers_wait_at_once(both_ranks: list[dict[str, list[str]]]) -> None:
    """A baseline: the same all-to-alls."""
    for events in both_ranks:
        assert between(events["parallel"], "route2", "route3") == [
            *("route2", "start dispatch2", "wait dispatch2", "qkv2", "core2"),
            *("experts2", "start combine2", "shared2", "wait combine2", "route3"),
        ]


def test_layers_that_read_the_newest_state_wait_at_once(
    both_ranks: list[dict[str, list[str]]],
) -> None:
    """A baseline too: standard layers of a hybrid. Layers 1 and 4 are standard."""
    for by_case in both_ranks:
        events = by_case["hybrid"]
        assert between(events, "core4", "shared4") == [
            *("core4", "route4", "start dispatch4", "wait dispatch4"),
            *("experts4", "start combine4"),
            "shared4",
        ]
        assert between(events, "start dispatch4'", "core4'")[:2] == [
            "start dispatch4'",
            "wait dispatch4'",
        ]
