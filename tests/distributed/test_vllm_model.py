"""The plug-in in vLLM itself, on a CPU: logits are those of transformers from the same folder, and each
all-reduce of a ladder layer is under way while the next sub-module runs. Skipped without vLLM, as in CI:
docs/guides/vllm.md says how to run it.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import ranks
from tests.ranks import run_ranks
from tests.unit.hf import tiny

pytest.importorskip(
    "vllm", reason="vLLM is not installed: docs/guides/vllm.md says how to run this"
)

from megatron_ladder.vllm.all_reduce import FINISH, START, AllReduce
from megatron_ladder.vllm.schedule import InFlight
from tests.unit.vllm import real

MODELS = {
    **tiny.KINDS,
    "ladder, tied": {"residual": "ladder", "tie_word_embeddings": True},
    "ladder, as Qwen2": {"residual": "ladder", "qkv_bias": True, "num_key_value_heads": 1},
    "ladder, as Qwen3": {"residual": "ladder", "qk_norm": True, "head_dim": 16},
    "parallel, scaled RoPE": {"residual": "parallel", "rope_parameters": tiny.LLAMA3},
    "ladder, linear RoPE": {
        "residual": "ladder",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    },
    "ladder, windows, YaRN": {
        "residual": "ladder",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0}
        | {"original_max_position_embeddings": 32, "attention_factor": 1.3},
    },
}


@pytest.fixture(autouse=True)
def _without_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not in vLLM's environment, and only its calls to "cuda" need to be sent elsewhere."""
    monkeypatch.setattr(ranks.cpu_platform, "enable", lambda: False)


def exported(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Writes a model; the ids of a sequence, [tokens], and transformers' logits, [tokens, vocabulary]."""
    torch.manual_seed(0)
    model = tiny.model(**MODELS[name])
    model.save_pretrained(folder)
    ids = tiny.tokens(1, 16)
    with torch.no_grad():
        return ids[0], model(ids).logits[0]


def all_logits(tp: int, folder: Path, cases: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, ids in cases.items():
        with real.loaded(folder / name, tp=tp) as model:
            found[name] = real.logits(model, ids)
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_are_those_of_transformers(tp: int, tmp_path: Path) -> None:
    expected = {name: exported(tmp_path / name, name) for name in MODELS}
    cases = {name: ids for name, (ids, _) in expected.items()}
    for found in run_ranks(tp, all_logits, tp, tmp_path, cases, tmp_path=tmp_path):
        for name, (_, logits) in expected.items():
            torch.testing.assert_close(
                found[name], logits, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


def stage_logits(folder: Path, ids: Tensor) -> Tensor | None:
    """Two pipeline stages; what vLLM's workers do between them, by torch.distributed."""
    with real.loaded(folder, pp=2) as model, torch.inference_mode():
        positions = torch.arange(len(ids))
        states = model.make_empty_intermediate_tensors(len(ids), torch.float32, "cpu")
        if dist.get_rank() == 0:
            sent = model(ids, positions)
            assert sent.tensors.keys() == states.tensors.keys()
            for name in sorted(states.tensors):
                dist.send(sent[name].contiguous(), dst=1)
            return None
        for name in sorted(states.tensors):
            dist.recv(states[name], src=0)
        return model.compute_logits(model(ids, positions, states)).clone()


@pytest.mark.parametrize("name", ["ladder, tied", "layers 0 and 2", "parallel-ladder 0 and 2"])
def test_pipeline_stages(name: str, tmp_path: Path) -> None:
    ids, expected = exported(tmp_path / "model", name)
    _, found = run_ranks(2, stage_logits, tmp_path / "model", ids, tmp_path=tmp_path)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def calls(folder: Path, ids: Tensor) -> list[str]:
    """The order of sub-modules' work and of starts and ends of sums."""
    log: list[str] = []
    running: dict[int, str] = {}

    class Recorded(AllReduce):
        def start(self, partial: Tensor) -> InFlight:
            output = super().start(partial)
            running[output.total.data_ptr()] = log[-1]
            log.append(f"start {log[-1]}")
            return output

        def finish(self, residual: Tensor, output: InFlight) -> Tensor:
            log.append(f"finish {running.pop(output.total.data_ptr())}")
            return super().finish(residual, output)

    def note(name: str):
        def hook(module: nn.Module, *_) -> None:
            log.append(name)

        return hook

    with real.loaded(folder, tp=2) as model:
        for number, layer in enumerate(model.model.layers):
            layer.sums = Recorded(layer.sums.group, layer.sums.at_once)
            layer.self_attn.register_forward_hook(note(f"attention {number}"))
            layer.mlp.register_forward_hook(note(f"mlp {number}"))
        model.model.sums = model.model.layers[-1].sums
        real.logits(model, ids)
        config = model.model.layers[0].self_attn.o_proj
        assert not config.reduce_results
    return log


@pytest.mark.parametrize("kind", ["ladder", "parallel-ladder"])
def test_sums_are_under_way_while_what_comes_next_runs(kind: str, tmp_path: Path) -> None:
    """The next sub-module, or the next layer, whose one sum starts after its MLP."""
    ids, _ = exported(tmp_path / "model", kind)
    for log in run_ranks(2, calls, tmp_path / "model", ids, tmp_path=tmp_path):
        expected: list[str] = []
        summed: list[str] = []
        for name in [f"{name} {i}" for i in range(tiny.LAYERS) for name in ("attention", "mlp")]:
            expected.append(name)
            if kind == "ladder" or name.startswith("mlp"):
                expected += [f"start {name}", *(f"finish {last}" for last in summed[-1:])]
                summed.append(name)
        assert log == [*expected, f"finish {summed[-1]}"]


def in_pieces(folder: Path, ids: Tensor) -> tuple[Tensor, list[list[str]]]:
    """The logits, from the graph cut by vLLM; for each piece in turn, which of our operators are in it."""
    from vllm.compilation.backends import split_graph

    pieces: list[list[str]] = []

    def cut(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        cut_graph, items = split_graph(graph, [START, FINISH])
        for item in items:
            targets = [str(n.target) for n in item.graph.graph.nodes if n.op == "call_function"]
            ours = [t.split(".")[1] for t in targets if t.startswith("megatron_ladder")]
            assert item.is_splitting_graph == bool(ours) == (len(ours) == len(targets))
            pieces.append(ours)
        return cut_graph

    with real.loaded(folder, tp=2) as model:
        inner = model.model
        inner.forward = torch.compile(inner.forward, backend=cut, fullgraph=True)
        return real.logits(model, ids), pieces


@pytest.mark.parametrize("name", ["ladder", "layers 0 and 2", "parallel-ladder"])
def test_vllm_cuts_the_graph_at_starts_and_waits(name: str, tmp_path: Path) -> None:
    """Where it captures CUDA graphs in pieces, both operators run between them."""
    ids, expected = exported(tmp_path / "model", name)
    start, finish = "all_reduce_start", "all_reduce_finish"
    for logits, pieces in run_ranks(2, in_pieces, tmp_path / "model", ids, tmp_path=tmp_path):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        cuts = [cut for cut in pieces if cut]
        if name.endswith("ladder"):
            sums = tiny.LAYERS * (2 if name == "ladder" else 1)
            inner = [[start, finish]] * (sums - 2)
            assert cuts == [[start], *inner, [start, finish, finish]]
        else:  # each of the two ladder layers, and the wait after it
            assert cuts == [[start], [start, finish, finish]] * 2
