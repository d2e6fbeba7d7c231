"""Weights as people have them: with buffers, with the names of wrapped modules, of several dtypes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pretrain.cli import main
from pretrain.config.train import load_config
from pretrain.convert.plain_model import load_plain_model
from pretrain.convert.weights import checkpoint_weights
from pretrain.run.checkpoint import load_weights
from tests.unit.hf import foreign

Tensors = dict[str, Tensor]
MODELS = {"tied": "llama, tied, linear", "untied": "qwen2, untied"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for short, name in MODELS.items():
        foreign.save(foreign.make(name), folder / short)
        assert main(["import", str(folder / short), str(folder / f"{short} run")]) == 0
    return folder


def changed(published: Path, name: str, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    folder.mkdir()
    for path in (published / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    # safetensors' writer takes no tensors that share memory.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_buffers(tensors: Tensors) -> Tensors:
    """As transformers before 4.33 saved Llama, and some trainers still do. Their values are not read."""
    layer = "model.layers.0.self_attn.rotary_emb."
    return tensors | {
        f"{layer}inv_freq": torch.full((4,), torch.nan),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
        f"{layer}cos_cached": torch.ones(1, 1, 64, 8),
        f"{layer}sin_cached": torch.ones(1, 1, 64, 8, dtype=torch.int64),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.original_inv_freq": torch.ones(4),
    }


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def after_layers(wrapper: str) -> Callable[[Tensors], Tensors]:
    """Each layer was wrapped by itself."""

    def change(tensors: Tensors) -> Tensors:
        for number in range(4):
            layer = f"model.layers.{number}."
            tensors = renamed(layer, f"{layer}{wrapper}.")(tensors)
        return tensors

    return change


def before(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def as_lm_head(tensors: Tensors) -> Tensors:
    """Of shared tensors safetensors' writer keeps one name, which may be either."""
    return renamed("model.embed_tokens.weight", "lm_head.weight")(tensors)


def both_names(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tied", with_buffers),
        ("untied", with_buffers),
        ("tied", before("_orig_mod.")),
        ("untied", before("module.")),
        ("tied", before("module._orig_mod.")),
        ("untied", after_layers("_orig_mod")),
        ("tied", after_layers("_checkpoint_wrapped_module")),
        ("tied", before("_fsdp_wrapped_module.")),
        ("tied", as_lm_head),
        ("tied", both_names),
    ],
)
def test_the_same_weights(published: Path, tmp_path: Path, name: str, change) -> None:
    """As from the folder that has nothing but the weights, bit by bit; the folder can be used directly."""
    folder = changed(published, name, tmp_path / "model", change)
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    right, found = (
        checkpoint_weights(run / "checkpoints" / "step_00000000")
        for run in (published / f"{name} run", tmp_path / "run")
    )
    assert right.keys() == found.keys()
    for key, tensor in right.items():
        assert torch.equal(tensor[:], found[key][:]), key
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(published / name)(tokens).logits
        ours = load_plain_model(folder).model(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [with_buffers, as_lm_head])
def test_transformers_reads_it_as_we_do(published: Path, tmp_path: Path, change) -> None:
    folder = changed(published, "tied", tmp_path / "model", change)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        ours = load_plain_model(folder).model(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("listed", [True, False])
def test_an_index_that_names_what_is_not_needed(
    published: Path, tmp_path: Path, capsys, listed: bool
) -> None:
    """The index of the model that training began with; or the files have what the index does not name."""
    folder = changed(published, "tied", tmp_path / "model", lambda t: t)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    in_file, in_index = (tensors, tensors | more) if listed else (tensors | more, tensors)
    save_file(in_file, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(in_index, "model-00001-of-00001.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        ours = load_plain_model(folder).model(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert main(["import", str(folder), str(tmp_path / "run")]) == (2 if listed else 0)
    assert ("missing lm_head.weight" in capsys.readouterr().err) == listed


def test_what_is_not_read_is_said(published: Path, tmp_path: Path, caplog) -> None:
    folder = changed(published, "tied", tmp_path / "model", with_buffers)
    with caplog.at_level(logging.INFO):
        load_plain_model(folder)
    assert "rotary_emb.cos_cached and 5 more are not read" in caplog.text


def test_other_tensors_are_still_refused(published: Path, tmp_path: Path, capsys) -> None:
    def two(tensors: Tensors) -> Tensors:
        return tensors | {"module.model.norm.weight": tensors["model.norm.weight"]}

    def unknown(tensors: Tensors) -> Tensors:
        return tensors | {"model.layers.0.self_attn.rotary.weight": torch.ones(1)}

    for number, (change, said) in enumerate(
        [(two, "are both model.norm.weight: remove one of them"), (unknown, "not in this model")]
    ):
        folder = changed(published, "tied", tmp_path / str(number), change)
        assert main(["import", str(folder), str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err


def some_in_fp32(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t if part in k else t.bfloat16() for k, t in tensors.items()}


def matrices_in_fp16(tensors: Tensors) -> Tensors:
    return {k: t.half() if "_proj.weight" in k else t.bfloat16() for k, t in tensors.items()}


@pytest.mark.parametrize(
    "change", [some_in_fp32("norm"), some_in_fp32("lm_head"), matrices_in_fp16]
)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_each_tensor_keeps_its_dtype(published: Path, tmp_path: Path, change, size: str) -> None:
    folder = changed(published, "untied", tmp_path / "model", change)
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["import", str(folder), str(run)]) == 0
    assert main(["export", str(run), str(again), "--max-shard-size", size]) == 0
    right = load_file(folder / "model.safetensors")
    found = {k: t for path in again.glob("*.safetensors") for k, t in load_file(path).items()}
    assert right.keys() == found.keys()
    assert len({t.dtype for t in found.values()}) == 2
    for name, tensor in right.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name])
    # And in the dtype that config.json names, fp32, they give the same logits.
    first, second = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, again))
    assert first.dtype == second.dtype == torch.float32
    with torch.no_grad():
        tokens = torch.arange(20)[None]
        assert torch.equal(first(tokens).logits, second(tokens).logits)


def test_one_dtype_where_one_is_asked_for(published: Path, tmp_path: Path) -> None:
    folder = changed(published, "untied", tmp_path / "model", some_in_fp32("norm"))
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["import", str(folder), str(run)]) == 0
    assert load_config(run / "config.json").precision == "bf16"  # of most weights
    assert main(["export", str(run), str(again), "--dtype", "fp16"]) == 0
    assert {t.dtype for t in load_file(again / "model.safetensors").values()} == {torch.float16}
    # Training loads them by megatron-core.
    loaded = load_weights(run / "checkpoints" / "step_00000000")
    assert loaded["decoder.final_layernorm.weight"].dtype == torch.float32
    assert loaded["output_layer.weight"].dtype == torch.bfloat16
