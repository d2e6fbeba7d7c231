"""Residual scaling in exported folders: in the weights where no bit changes, else in the modelling file."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf import LadderForCausalLM
from megatron_ladder.hf.from_hf import read_hf_config, to_model_config
from megatron_ladder.hf.model_config import to_hf_config
from tests.unit.hf import tiny
from tests.unit.hf.test_export import export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("residual", "scaling", "layers"),
    [
        ("standard", "1/sqrt-n", 8),  # 1/4
        ("ladder", "1/n", 4),  # 1/8
        ("parallel", "1/n", 2),  # 1/4
    ],
)
def test_a_power_of_two_goes_into_the_weights(
    residual, scaling, layers, dtype, tmp_path, bpe_file
) -> None:
    """Logits are the same bit by bit, and so are those of Llama's own code."""
    options = {"residual": residual, "num_hidden_layers": layers, "residual_scaling": scaling}
    model = tiny.model(**options).to(dtype)
    folder = export(model, tmp_path / "out", bpe_file, dtype=dtype)
    fields = json.loads((folder / "config.json").read_text())
    assert fields.get("residual_scaling", "none") == "none"
    assert ("auto_map" in fields) is (residual != "standard")
    kind = LlamaForCausalLM if residual == "standard" else LadderForCausalLM
    loaded = kind.from_pretrained(folder, dtype=dtype).eval()
    ids = tiny.tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert to_model_config(read_hf_config(folder), folder).residual_scaling == "none"
    scale = model.config.residual_scale()
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        for name, weight in model.named_parameters():
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert torch.equal(opened.get_tensor(name), weight * scale if last else weight), name


@pytest.mark.parametrize(
    ("residual", "scaling", "layers", "dtype"),
    [
        ("standard", "1/sqrt-n", 4, torch.float32),  # 0.3535...
        ("ladder", "1/n", 3, torch.bfloat16),
        ("standard", "skipinit", 4, torch.bfloat16),
        ("parallel-ladder", "skipinit", 4, torch.float32),
        ("ladder", "1/n", 4, torch.float16),  # 1/8: small numbers of fp16 lose bits
    ],
)
def test_else_the_modelling_file_keeps_it(
    residual, scaling, layers, dtype, tmp_path, bpe_file
) -> None:
    options = {"residual": residual, "num_hidden_layers": layers, "residual_scaling": scaling}
    model = tiny.model(**options).to(dtype)
    folder = export(model, tmp_path / "out", bpe_file, dtype=dtype)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["residual_scaling"] == scaling
    assert "auto_map" in fields
    assert "Residual scaling" in (folder / "README.md").read_text()
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == {name for name, _ in model.named_parameters()}
        for name, weight in model.named_parameters():
            assert torch.equal(opened.get_tensor(name), weight), name
    loaded = LadderForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = tiny.tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    imported = to_model_config(read_hf_config(folder), folder)
    assert imported.residual_scaling == scaling
    assert to_hf_config(imported).residual_scaling == scaling


def test_both_configurations_know_the_same() -> None:
    sizes = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
    for residual, scaling in (("ladder", "skipinit"), ("parallel", "skipinit"), ("ladder", "1/n")):
        model = ModelConfig(**sizes, vocab_size=100, residual=residual, residual_scaling=scaling)
        plain = LadderForCausalLM(to_hf_config(model))
        found = sum(p.numel() for p in plain.model.layers.parameters())
        assert model.num_parameters(embeddings=False) - 32 == found
    with pytest.raises(UserError, match=r"residual_scaling is '1/2': choose one of none, 1/n"):
        ModelConfig(**sizes, residual_scaling="1/2")


def test_a_strangers_scaling(tmp_path) -> None:
    tiny.config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {"architectures": ["LadderForCausalLM"]}
    for value, said in (([], r"residual_scaling is \[\]: it must be a string"), ("x", "is 'x'")):
        path.write_text(json.dumps(fields | {"residual_scaling": value}))
        with pytest.raises(UserError, match=said):
            read_hf_config(tmp_path)
