"""In ladder layers with experts, the all-to-alls run while the other sub-module computes: the order of what
each rank does, forward and backward.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

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


def events_of(kind: str, layout: Layout) -> list[str]:
    """What a rank does in a step, in order; a dash stands for backward."""
    found: list[str] = []
    config = configuration(kind, layout)
    model, optimizer, scheduler = start(config)

    def record(method: str, words: str, dash: str) -> None:
        run = getattr(AllToAll, method)

        def recorded(exchange: AllToAll, *args: Any) -> Any:
            found.append(f"{words} {exchange.name.replace(' ', '')}{dash}")
            return run(exchange, *args)

        setattr(AllToAll, method, recorded)

    for method, words, dash in (
        ("fly", "start", ""),
        ("land", "wait", ""),
        ("fly_back", "start", "'"),
        ("land_back", "wait", "'"),
    ):
        record(method, words, dash)

    def watch(module: Any, name: str) -> None:
        def ran(_module: Any, _inputs: Any, output: Any) -> None:
            found.append(name)
            first: Tensor = output[0] if isinstance(output, tuple) else output
            first.register_hook(lambda _: found.append(name + "'"))  # its backward begins

        module.register_forward_hook(ran, prepend=True)  # before the hook that runs the chain

    for layer in model[0].module.decoder.layers:
        number = layer.layer_number
        watch(layer.self_attention.linear_qkv, f"qkv{number}")
        watch(layer.self_attention.core_attention, f"core{number}")
        watch(layer.mlp.experts, f"experts{number}")
        if layer.mlp.shared_experts is not None:
            watch(layer.mlp.shared_experts, f"shared{number}")
    parts = iter(micro_batches(batches()[0], config))
    train_step(model, optimizer, scheduler, parts, config)
    return found


def between(events: list[str], first: str, last: str) -> list[str]:
    return events[events.index(first) : events.index(last) + 1]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, ep=2),
        Layout(tp=2, sp=True, ep=2),
        pytest.param(Layout(tp=2, sp=True, dp=2, ep=4), marks=pytest.mark.slow),
    ],
)
def test_all_to_alls_run_while_the_other_sub_module_computes(
    layout: Layout, tmp_path: Path
) -> None:
    kind = "ladder, a shared expert"
    for events in run_ranks(layout.ranks, events_of, kind, layout, tmp_path=tmp_path):
        assert between(events, "qkv2", "shared2") == [
            *("qkv2", "wait combine1", "start dispatch2"),
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


def test_layers_that_read_the_newest_state_wait_at_once(tmp_path: Path) -> None:
    """The baseline: the same all-to-alls in standard layers of a hybrid. Layers 1 and 4 are standard."""
    kind = "hybrid, a shared expert"
    for events in run_ranks(2, events_of, kind, Layout(dp=2, ep=2), tmp_path=tmp_path):
        assert between(events, "core4", "shared4") == [
            *("core4", "start dispatch4", "wait dispatch4"),
            *("experts4", "start combine4"),
            "shared4",
        ]
        assert between(events, "start dispatch4'", "core4'")[:2] == [
            "start dispatch4'",
            "wait dispatch4'",
        ]
