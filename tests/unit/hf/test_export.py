"""Exported folders, read by transformers alone in a process that has never heard of this package."""

import json
import subprocess
import sys

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import hf_to_megatron
from megatron_ladder.hf.export import export_folder, model_card
from tests.unit.hf import tiny

PADDED = 512
FACTS = {
    "name": "Tiny",
    "license": "apache-2.0",
    "data": {"source": "one | file", "tokens": "1,000"},
    "training": {"steps": 10, "loss": 3.25},
    "limits": ["It is tiny."],
}

LOAD = """
import os, re, sys, torch
folder, trust = sys.argv[1], sys.argv[2] == "True"
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
ids = torch.load(folder + "/../ids.pt")
with torch.no_grad():
    logits = model(ids).logits
how = {"max_new_tokens": 8, "do_sample": False}
cached = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
uncached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **how)
assert torch.equal(cached, uncached)
os.chdir(folder)
(example,) = re.findall("```python\\n(.*?)```", open("README.md").read(), re.S)
exec(example)
assert not any(name.startswith(("megatron", "pretrain")) for name in sys.modules)
torch.save({"logits": logits, "class": type(model).__name__, "module": type(model).__module__,
            "ids": tokenizer.encode("def f(x):\\n    return x"), "generated": cached,
            "inputs": set(inputs), "tokenizer": type(tokenizer).__name__}, folder + "/../result.pt")
"""


def export(model, folder, tokenizer_file, **changes):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = hf_to_megatron(weights, model.config, PADDED)
    options = {"dtype": torch.float32, "model_card_facts": FACTS} | changes
    return export_folder(tensors, model.config, tokenizer_file, folder, **options)


def load_elsewhere(folder, trust):
    subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(folder), str(trust)],
        cwd=folder.parent,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "cache")},
        check=True,
        timeout=120,
    )
    return torch.load(folder.parent / "result.pt")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("layers 0 and 2", {"tie_word_embeddings": True}),
        ("parallel-ladder 0 and 2", {"max_shard_size": "30KB"}),
        pytest.param("parallel", {"max_shard_size": "30KB"}, marks=pytest.mark.slow),
        pytest.param(
            *("standard", {"tie_word_embeddings": True, "max_shard_size": "30KB"}),
            marks=pytest.mark.slow,
        ),
        ("standard", {"rope": "llama3"}),
        ("last 2, expert bias, some MLPs", {"max_shard_size": "30KB"}),
    ],
)
def test_loads_without_this_package(kind, options, tmp_path, bpe_file):
    tied = options.get("tie_word_embeddings", False)
    sharded = "max_shard_size" in options
    rope = None
    if "rope" in options:
        rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    kinds = tiny.KINDS | tiny.EXPERTS
    model = tiny.model(**kinds[kind], tie_word_embeddings=tied, rope_parameters=rope)
    folder = tmp_path / "out"
    shard = {"max_shard_size": options["max_shard_size"]} if sharded else {}
    assert export(model, folder, bpe_file, **shard) == folder

    ids = tiny.tokens(2, 100)
    torch.save(ids, tmp_path / "ids.pt")
    standard = kind == "standard"
    result = load_elsewhere(folder, trust=not standard)
    torch.testing.assert_close(result["logits"], model(ids).logits, atol=1e-5, rtol=1e-5)
    assert result["class"] == ("LlamaForCausalLM" if standard else "LadderForCausalLM")
    assert result["module"].startswith("transformers.models" if standard else "transformers_mod")
    assert result["tokenizer"] == "TokenizersBackend"  # PreTrainedTokenizerFast
    assert result["ids"][-1] != 2
    assert result["inputs"] == {"input_ids", "attention_mask"}

    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.model"} <= names
    assert ("modeling_ladder.py" in names) is not standard
    assert ("model.safetensors.index.json" in names) is sharded
    assert ("model.safetensors" in names) is not sharded
    config = json.loads((folder / "config.json").read_text())
    assert ("auto_map" in config) is not standard
    assert config["dtype"] == "float32"
    if standard:
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert (config["rope_scaling"] is None) is (rope is None)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_shards_and_dtype(tmp_path, bpe_file):
    model = tiny.model(residual="ladder")
    folder = export(model, tmp_path / "out", bpe_file, max_shard_size="20KB", dtype=torch.bfloat16)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = dict(model.named_parameters())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == 2 * sum(w.numel() for w in weights.values())
    files = sorted(folder.glob("*.safetensors"))
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert len(files) > 3
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            assert file.stat().st_size < 20_000 + 2000 or len(names) == 1
            for name in names:
                assert torch.equal(opened.get_tensor(name), weights[name].bfloat16())
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    loaded = AutoConfig.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.ladder_layer_indices() == (0, 1, 2, 3)


def test_output_folder_is_all_or_nothing(tmp_path, bpe_file):
    model = tiny.model(residual="ladder")
    folder = tmp_path / "deep/out"
    with pytest.raises(UserError, match="does not exist"):
        export(model, folder, tmp_path / "none.model")
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = hf_to_megatron(weights, model.config, PADDED)
    tensors.pop("decoder.final_layernorm.weight")
    with pytest.raises(ValueError, match=r"missing decoder.final_layernorm.weight"):
        export_folder(tensors, model.config, bpe_file, folder)
    assert list(folder.parent.iterdir()) == []

    folder.mkdir()
    export(model, folder, bpe_file)  # an empty folder will do
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="is not empty"):
        export(model, folder, bpe_file)
    with pytest.raises(UserError, match="is not a folder"):
        export(model, folder / "README.md", bpe_file)
    assert sorted(folder.iterdir()) == before


def test_bad_arguments(tmp_path, bpe_file):
    with pytest.raises(ValueError, match="'loss'"):
        export(tiny.model(), tmp_path / "out", bpe_file, model_card_facts={"loss": 1.0})
    with pytest.raises(ValueError, match="eos_token_id"):
        export(tiny.model(eos_token_id=None), tmp_path / "out", bpe_file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_model_card_says_what_it_was_given(kind):
    config = tiny.config(**tiny.KINDS[kind])
    with_code = kind != "standard"
    card = model_card(config, torch.bfloat16, FACTS, with_code=with_code)
    for text in (
        "# Tiny",
        "license: apache-2.0",
        "| source | one \\| file |",
        "| tokens | 1,000 |",
        "| loss | 3.25 |",
        "- It is tiny.",
        "| weights | bfloat16 |",
        "| RoPE | default, theta 10000.0 |",
        "grouped-query",
        "no biases.",
        "Trained with megatron-ladder",
        "No special token is added",
        f"- {config.residual}-residual",
    ):
        assert text in card
    assert ("trust_remote_code=True" in card) is with_code
    assert ("`import megatron_ladder.hf`" in card) is with_code
    assert ("2501.06589" in card) is ("ladder" in config.residual)
    assert "Adapted" not in card
    said = {
        "standard": "**Standard residual**",
        "ladder": "All 4 layers are ladder layers.",
        "parallel": "**Parallel residual**",
        "last 2": "Ladder layers, from 0: 2, 3; the other layers of 4 have the standard residual.",
        "layers 0 and 2": "Ladder layers, from 0: 0, 2; the other layers of 4 have the standard",
        "parallel-ladder": "**Parallel ladder residual**",
        "parallel-ladder 0 and 2": "Ladder layers, from 0: 0, 2; the other layers of 4 have the parallel",
    }
    assert said[kind] in card
    assert ("as in transformers' own LlamaForCausalLM." in card) is (kind == "standard")
    bare = model_card(config, torch.float32, {}, with_code=with_code)
    assert "## Data" not in bare
    assert "## Training" not in bare
    assert "license" not in bare
    assert "None" not in bare
    assert "\n\n\n" not in bare + card


@pytest.mark.parametrize(
    ("changes", "said", "not_said"),
    [
        (
            {"qkv_bias": True},
            "biases of queries, keys and values (no others), as in Qwen2",
            "RMSNorm of",
        ),
        (
            {"qk_norm": True},
            "RMSNorm of each head's query and key, as in Qwen3, no biases.",
            "(no others)",
        ),
        (
            {"qk_norm": True, "qkv_bias": True},
            "biases of queries, keys and values (no others), RMSNorm of each head's query and key.",
            "no biases",
        ),
    ],
)
def test_model_card_knows_biases_and_norms(changes, said, not_said):
    card = model_card(tiny.config(**changes), torch.float32, {}, with_code=True)
    assert said in card
    assert not_said not in card


def test_model_card_says_what_it_was_adapted_from():
    facts = {"origin": "Qwen3ForCausalLM"}
    standard = tiny.config(residual="standard", qk_norm=True)
    card = model_card(standard, torch.bfloat16, facts, with_code=False)
    assert "Converted with megatron-ladder" in card
    assert "**Adapted from another model**, a Qwen3ForCausalLM, with its weights.\n" in card
    assert "The original's licence applies to this one too" in card
    assert "as in transformers' own Qwen3ForCausalLM." in card
    assert "Tokenizer and settings of generation are the original's" in card
    assert "seen pretraining only" not in card
    assert "poor text" not in card
    hybrid = tiny.config(residual="ladder", ladder_layers=2)
    untrained = model_card(hybrid, torch.bfloat16, facts, with_code=True)
    assert "was not trained since: expect poor text" in untrained
    trained = facts | {"training": {"Steps": "10"}}
    card = model_card(hybrid, torch.bfloat16, trained, with_code=True)
    assert "Trained with megatron-ladder" in card
    assert "a Qwen3ForCausalLM, whose weights training started from.\n" in card
    assert "poor text" not in card
    assert "\n\n\n" not in card + untrained


def test_a_model_like_qwen2_keeps_its_own_tokenizer(tmp_path, bpe_file):
    """transformers would read a Qwen2 model's tokenizer by Qwen2's rules."""
    model = tiny.model(residual="standard", qkv_bias=True)
    folder = export(model, tmp_path / "own", bpe_file)
    ids = AutoTokenizer.from_pretrained(folder).encode("def f(x):\n    return x")
    assert ids == sentencepiece.SentencePieceProcessor(str(bpe_file)).encode(
        "def f(x):\n    return x"
    )
    assert json.loads((folder / "config.json").read_text())["model_type"] == "ladder"
    (tmp_path / "imported").mkdir()
    export(model, tmp_path / "theirs", tmp_path / "imported")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize(
    ("own", "context", "found"), [(100, 256, 256), (100, 128, 100), (512, 256, 512)]
)
def test_a_copied_tokenizer_takes_texts_of_a_longer_context(
    own: int, context: int, found: int, tmp_path, bpe_file
):
    """Only of a context that is longer than the original's, 128 tokens; what was lower there stays so."""
    first = export(tiny.model(), tmp_path / "first", bpe_file)
    settings = json.loads((first / "tokenizer_config.json").read_text())
    (first / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": own}))
    longer = tiny.model(max_position_embeddings=context)
    second = export(longer, tmp_path / "second", first)
    settings = json.loads((second / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == found
    assert AutoTokenizer.from_pretrained(second).model_max_length == found
