"""What `import` refuses, before it has written anything."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.cli import main
from pretrain.config.train import load_config
from pretrain.convert import import_model
from pretrain.model.staleness import saved_staleness
from pretrain.start.arguments import parse_train
from pretrain.start.ladder_layers import parse_layers
from tests.data_sets import write_data_set
from tests.unit.hf import foreign


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    return foreign.save(foreign.make("llama, tied, linear"), folder)


@pytest.fixture
def model(published: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Imports; it must be refused and leave nothing. Returns what is said."""

    def run(*options: str, source: Path = model) -> str:
        before = {p for p in tmp_path.rglob("*") if model not in p.parents}
        assert main(["import", str(source), str(tmp_path / "out"), *options]) == 2
        assert {p for p in tmp_path.rglob("*") if model not in p.parents} == before
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert "megatron-ladder import: " in output.err
        return output.err

    return run


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(model: Path, change) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architectures": ["DeepseekV3ForCausalLM"]},
            "DeepseekV3ForCausalLM is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"quantization_config": {"quant_method": "x", "bits": 4}}, "weights are quantized"),
        ({"sliding_window": 32}, "sliding_window is 32, which Llama does not have"),
        (
            {"layer_types": ["chunked_attention"] + ["full_attention"] * 3},
            "layer_types has chunked_attention, full_attention",
        ),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": 32,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
            },
            "model_type ministral does not go with MistralForCausalLM",
        ),
        ({"rope_parameters": foreign.YARN | {"truncate": False}}, "truncate is false"),
        ({"rope_parameters": foreign.YARN | {"factor": None}}, "factor is None"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is dynamic",
        ),
        (
            {"rope_parameters": foreign.LLAMA3 | {"high_freq_factor": 8.0}},
            "high_freq_factor is 8.0, not 4.0",
        ),
        ({"num_hidden_layers": 5}, "missing model.layers.4.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, "not in this model model.layers.3."),
        (
            {"intermediate_size": 40},
            "misshaped model.layers.0.mlp.gate_proj.weight is [48, 32], not [40, 32]",
        ),
        ({"vocab_size": 149}, "tokenizer.json has 150 tokens, the model's vocab_size is 149"),
    ],
)
def test_models_that_are_not_supported(model: Path, refused, changes: dict, said: str) -> None:
    edit_config(model, **changes)
    assert said in refused()


def test_links_are_refused_before_anything_is_read(
    model: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "notes.txt").symlink_to(__file__)

    def read(*_: object, **__: object) -> None:
        raise AssertionError("it is read")

    monkeypatch.setattr(import_model, "read_hf_config", read)
    assert "notes.txt" in refused()


def test_a_model_that_names_no_end(model: Path, refused) -> None:
    edit_config(model, eos_token_id=None)
    (model / "generation_config.json").write_text("{}")
    assert "neither config.json nor generation_config.json has an eos_token_id" in refused()
    (model / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    assert "generation_config.json cannot be read: eos_token_id is ['</s>']" in refused()
    (model / "generation_config.json").write_text('{"eos_token_id": 100000}')
    assert "the eos_token_id 100,000 is none of the model's" in refused()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(model: Path, refused, value: float) -> None:
    edit_tensors(model, lambda t: t["model.layers.2.mlp.up_proj.weight"][3].fill_(value))
    assert "model.layers.2.mlp.up_proj.weight holds NaN or infinite values" in refused()


def test_large_weights_are_numbers(model: Path, tmp_path: Path, capsys) -> None:
    """A sum that overflows is no reason to refuse."""
    edit_tensors(model, lambda t: t["model.norm.weight"].fill_(3e38))
    assert main(["import", str(model), str(tmp_path / "out")]) == 0
    assert "k parameters, " in (said := capsys.readouterr().out)  # of so small a model
    assert "kB of float32): " in said


def test_weights_of_several_dtypes(model: Path, refused) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(model, lambda t: t.update({name: t[name].bfloat16()}))
    assert "have different dtypes: torch.bfloat16, torch.float32" in refused()


def test_weights_of_other_kinds(model: Path, refused) -> None:
    edit_tensors(model, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    assert "model.norm.weight is I8" in refused()


def test_a_file_that_is_cut_short(model: Path, refused) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is damaged or cut short" in refused()
    path.write_bytes(b"")
    assert "model.safetensors is damaged or cut short" in refused()


def test_pickles_are_not_opened(model: Path, refused) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    said = refused()
    assert "only pytorch_model.bin: loading such a file can run any code" in said
    (model / "pytorch_model.bin").unlink()
    assert "has no weights" in refused()


def test_an_index_that_names_missing_or_foreign_files(model: Path, refused) -> None:
    (model / "model.safetensors").rename(model / "a.safetensors")
    index = model / "model.safetensors.index.json"
    for name in ("b.safetensors", "../a.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert "which model.safetensors.index.json names, is missing" in refused()
    index.write_text("[]")
    assert "is not an index" in refused()


def test_an_index_that_disagrees_with_the_files(model: Path, refused) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, model / "a.safetensors")
    save_file({name: tensors[name] for name in names[9:]}, model / "b.safetensors")
    right = dict.fromkeys(names[:9], "a.safetensors") | dict.fromkeys(names[9:], "b.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": right | {"model.extra.weight": "a.safetensors"}}))
    said = refused()
    assert (
        f"a.safetensors has model.extra.weight according to {index}, but not according to {model}/a.safe"
        in said
    )
    index.write_text(json.dumps({"weight_map": {k: v for k, v in right.items() if k != names[9]}}))
    said = refused()
    assert (
        f"b.safetensors has {names[9]} according to {model}/b.safetensors, but not according to {index}"
        in said
    )
    index.write_text(json.dumps({"weight_map": right | {names[0]: "b.safetensors"}}))
    assert (
        f"a.safetensors has {names[0]} according to {model}/a.safetensors, but not according to {index}"
        in refused()
    )


def test_folders_that_are_no_models(model: Path, tmp_path: Path, refused) -> None:
    assert "does not exist" in refused(source=tmp_path / "nothing")
    (model / "config.json").write_text("{")
    assert "is not a model's configuration" in refused()
    (model / "config.json").unlink()
    assert "holds no config.json" in refused()


def test_an_output_in_use(model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert main(["import", str(model), str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("layers", ["last:5", "0,4", "1,1", "-1,2"])
def test_ladder_layers_that_are_not_there(refused, layers: str) -> None:
    assert "ladder_layers" in refused(f"--ladder-layers={layers}")


def test_ladder_layers_by_word() -> None:
    assert parse_layers("all") is None
    assert parse_layers("last:16") == 16
    assert parse_layers("3,1") == (3, 1)


@pytest.mark.parametrize("given", ["last", "last:x", "1;2", ""])
def test_ladder_layers_that_are_no_list(refused, given: str) -> None:
    assert f"--ladder-layers {given}: give last:N" in refused(f"--ladder-layers={given}")


@pytest.mark.parametrize("given", ["auto", "auto:", "auto:x", "auto:0", "auto:-1"])
def test_automatic_layers_without_a_number(refused, tmp_path: Path, given: str) -> None:
    sample = write_data_set(tmp_path / "data")
    assert "give --sample DATA" in refused(f"--ladder-layers={given}")
    assert "another tokenizer" in refused(f"--ladder-layers={given}", "--sample", str(sample))


def test_automatic_layers_are_those_that_cost_least(model: Path, tmp_path: Path, refused) -> None:
    tokenizer = (model / "tokenizer.json").read_bytes()
    sample = write_data_set(tmp_path / "data", vocab_size=foreign.VOCAB, tokenizer=tokenizer)
    assert "give auto:N" in refused("--ladder-layers=auto:x", "--sample", str(sample))
    assert "4 layers" in refused("--ladder-layers=auto:5", "--sample", str(sample))
    out = tmp_path / "out"
    how = ["--ladder-layers=auto:2", "--sample", str(sample)]
    assert main(["import", str(model), str(out), *how]) == 0
    alone = saved_staleness(out).alone
    best = tuple(sorted(sorted(range(4), key=lambda i: alone[i])[:2]))
    assert load_config(out / "config.json").model.ladder_layers == best
    # Training chooses by the same figures.
    config, _ = parse_train(
        ["--preset", "adapt", "--init-from", str(out), "--ladder-layers", "auto:3"]
    )
    assert config.model.ladder_layers == saved_staleness(out).choose(3)


def test_tensor_parallel_sizes_that_do_not_divide() -> None:
    from megatron_ladder.config import ParallelConfig, check_layout
    from megatron_ladder.errors import UserError
    from megatron_ladder.hf.from_hf import to_model_config

    config = to_model_config(foreign.make("qwen3, tied").config, Path("config.json"))
    with pytest.raises(UserError, match="tensor_model_parallel_size 4"):
        check_layout(config, ParallelConfig(tensor_model_parallel_size=4))
