"""Forward all-reduces of ladder sub-modules fly while the next sub-module computes."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ladder import collectives
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from tests.ranks import run_ranks

LAYERS = 3


class _Recorded:
    """A collective's handle that notes when it is waited for."""

    def __init__(self, work, name: str, events: list[str]) -> None:
        self._work, self._name, self._events = work, name, events

    def wait(self) -> None:
        self._events.append(f"wait {self._name}")
        self._work.wait()


def record(kind: str, recompute: str) -> list[str]:
    """Sub-modules' computations and their collectives, in the order of one forward pass."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        vocab_size=100,
        residual="ladder",
        ladder_layers=None if kind == "ladder" else 1,
    )
    config = transformer_config(model, parallel, recompute=recompute)
    (gpt,) = build_gpt_model(model, config)
    events: list[str] = []
    current = []
    for layer in gpt.decoder.layers:
        for name, module in (("attn", layer.self_attention), ("mlp", layer.mlp)):
            label = f"{name}{layer.layer_number}"

            def note(_module, _inputs, label=label) -> None:
                events.append(f"compute {label}")
                current[:] = [label]

            module.register_forward_pre_hook(note)

    real = dist.all_reduce

    def all_reduce(tensor, group=None, async_op=False, **kwargs):
        work = real(tensor, group=group, async_op=async_op, **kwargs)
        if not async_op:
            return work
        events.append(f"start {current[0]}")
        return _Recorded(work, current[0], events)

    collectives.dist.all_reduce = all_reduce
    try:
        tokens = torch.zeros(1, 8, dtype=torch.long)
        gpt(tokens, torch.arange(8)[None], None, labels=tokens)
    finally:
        collectives.dist.all_reduce = real
    return [e for e in events if e.split()[1][:3] in ("att", "mlp")]


def test_every_collective_but_the_last_has_the_next_submodule_between(tmp_path: Path) -> None:
    for recompute in ("none", "full"):
        events = run_ranks(2, record, "ladder", recompute, tmp_path=tmp_path)[0]
        names = [f"{kind}{i}" for i in range(1, LAYERS + 1) for kind in ("attn", "mlp")]
        assert [e for e in events if e.startswith("compute")] == [f"compute {n}" for n in names]
        for this, following in pairwise(names):
            started, waited = events.index(f"start {this}"), events.index(f"wait {this}")
            assert started < events.index(f"compute {following}") < waited, (recompute, events)
        assert events[-1] == f"wait {names[-1]}"


def test_standard_layers_of_a_hybrid_wait_before_the_next_submodule(tmp_path: Path) -> None:
    events = run_ranks(2, record, "hybrid", "none", tmp_path=tmp_path)[0]
    assert events.index("wait attn1") < events.index("compute mlp1")
    assert events.index("wait mlp1") < events.index("compute attn2")
    # The first ladder layer hides the last standard MLP's all-reduce behind its attention.
    assert events.index("compute attn3") < events.index("wait mlp2")
