"""What is exported is the run's model, or there is no folder."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import hf_to_megatron
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.from_hf import to_model_config
from pretrain.cli import main
from pretrain.convert import export, verify_export
from pretrain.convert.import_model import import_model
from tests.unit.hf import foreign, tiny

# One kind of model a line: what differs from tiny.config.
MODELS = {
    **tiny.KINDS,
    **tiny.SCALED,
    **tiny.EXPERTS,
    "as Mixtral": {"residual": "standard", **tiny.FOUR},
    "as Qwen3-MoE": {
        **(tiny.FOUR | {"residual": "standard", "qk_norm": True}),
        **{"mlp_only_layers": [1], "norm_topk_prob": False},
    },
    "tied": {"residual": "ladder", "tie_word_embeddings": True},
    "parallel, tied": {"residual": "parallel", "tie_word_embeddings": True},
    "as Qwen2": {"residual": "standard", "qkv_bias": True},
    "as Qwen3, tied": {"residual": "standard", "qk_norm": True, "tie_word_embeddings": True},
    "ladder of Qwen3": {"residual": "ladder", "qk_norm": True, "ladder_layers": [1]},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    foreign.write_tokenizer(folder, tiny.VOCAB)
    return folder


def exported(kind: str, tokenizer: Path, folder: Path) -> tuple[dict, ModelConfig]:
    """Writes a folder in bf16; returns what it was written from."""
    model = tiny.model(**MODELS[kind])
    config = to_model_config(model.config, folder)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weights = hf_to_megatron(parameters, model.config, config.padded_vocab_size)
    export_folder(weights, model.config, tokenizer, folder, max_shard_size="30KB")
    return weights, config


def threads() -> list[str]:
    """Names of this process's threads, native ones too. Those of a live group hang what is forked."""
    gc.collect()
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


@pytest.mark.parametrize("kind", MODELS)
def test_both_sides_agree_whole_and_layer_by_layer(
    kind: str,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out"
    weights, model = exported(kind, tokenizer, folder)
    files = {path: path.read_bytes() for path in folder.rglob("*")}
    tokens = verify_export.sample(model)
    assert tokens.shape == (1, 64)
    whole = verify_export.exported_logits(folder, tokens, whole=True)
    by_layer = verify_export.exported_logits(folder, tokens, whole=False)
    assert torch.equal(whole, by_layer)
    run = verify_export.run_logits(weights, model, torch.bfloat16, tokens)
    assert run.shape == whole.shape == (1, 64, tiny.VOCAB)
    assert (run - whole).abs().max() < 1e-5 * run.std()
    # Not rounded as the folder is, the run's weights give other logits than it: rounding matters.
    exact = verify_export.run_logits(weights, model, torch.float32, tokens)
    assert (exact - whole).abs().max() > 100 * verify_export.TOLERANCE * run.std()
    assert "verified: " in verify_export.verify_export(folder, weights, model, torch.bfloat16)
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert "gloo_tcp_loop" not in threads()
    assert files == {path: path.read_bytes() for path in folder.rglob("*")}


def test_a_group_that_is_there_stays(tokenizer: Path, tmp_path: Path) -> None:
    weights, model = exported("ladder", tokenizer, tmp_path / "out")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        verify_export.verify_export(tmp_path / "out", weights, model, torch.bfloat16)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_without_memory_it_goes_by_layers(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, model = exported("last 2", tokenizer, tmp_path / "out")
    size = 4 * model.num_parameters()
    for available, how in ((size * 2, "whole"), (size, "layer by layer")):
        monkeypatch.setattr(verify_export, "memory_here", lambda available=available: available)
        found = verify_export.verify_export(tmp_path / "out", weights, model, torch.bfloat16)
        assert how in found


def test_one_layer_is_in_memory_at_a_time() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)]))
    layers = model[0]
    real = [torch.full((4, 4), float(i)) for i in range(3)]
    makes = {f"0.{i}.weight": (lambda i=i: real[i]) for i in range(3)}
    verify_export._load_by_layers(model, layers, "0.", makes)
    there = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda *_: there.append([i for i, one in enumerate(layers) if not one.weight.is_meta])
        )
    x = torch.ones(4)
    for layer, weight in zip(layers, real, strict=True):
        assert torch.equal(layer(x), weight @ x)
    assert there == [[0], [1], [2]]
    assert all(layer.weight.is_meta for layer in layers)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][3] *= 1.05
    save_file(tensors, path, metadata={"format": "pt"})


def edit_code(folder: Path) -> None:
    path = folder / "rotary_ladder.py"
    code = path.read_text()
    assert "* cos +" in code
    path.write_text(code.replace("* cos +", "* cos -"))


TAMPERED: dict[str, Callable[[Path], None]] = {
    "one tensor": lambda folder: edit_tensor(folder, "model.layers.2.self_attn.k_proj.weight"),
    "a norm": lambda folder: edit_tensor(folder, "model.layers.3.post_attention_layernorm.weight"),
    "another layer is a ladder layer": lambda folder: edit_config(folder, ladder_layers=[1, 3]),
    "RoPE": lambda folder: edit_config(
        folder, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}
    ),
    "its code": edit_code,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    foreign.save(foreign.make("llama, tied, linear"), folder / "published")
    import_model(folder / "published", folder / "run", "1,2")
    return folder / "run"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what", TAMPERED)
def test_another_model_is_never_there(
    what: str,
    whole: bool,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tampered(*args: object, **kwargs: object) -> Path:
        folder = export_folder(*args, **kwargs)
        TAMPERED[what](folder)
        return folder

    monkeypatch.setattr(export, "export_folder", tampered)
    monkeypatch.setattr(verify_export, "memory_here", lambda: 1e12 if whole else 0)
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "bf16"]) == 2
    said = capsys.readouterr().err
    assert "the exported model's logits differ from the run's" in said
    assert "Nothing was written" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_export_says_what_it_found(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'}: verified: the largest difference" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(
    value: float,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    model = tiny.model(residual="ladder")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[-1, -1] = value
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weights = hf_to_megatron(parameters, model.config, 512)
    with pytest.raises(UserError, match=r"model.layers.2.mlp.up_proj.weight holds NaN or infinite"):
        export_folder(weights, model.config, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_beyond_a_dtype(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny.model(residual="ladder")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weights = hf_to_megatron(parameters, model.config, 512)
    with pytest.raises(UserError, match=r"model.norm.weight has values too large for float16"):
        export_folder(weights, model.config, tokenizer, tmp_path / "out", dtype=torch.float16)
    export_folder(weights, model.config, tokenizer, tmp_path / "out", dtype=torch.bfloat16)
