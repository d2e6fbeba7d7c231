"""FP8 recipes: what each asks of machine and model, and megatron-core's words for it. None is run."""

from dataclasses import replace

import pytest
import torch

from megatron_ladder import fp8 as module
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import CAPABILITIES, Fp8Config, check_fp8, check_machine, missing
from megatron_ladder.mcore_compat import transformer_config
from pretrain.config.presets import PRESETS
from pretrain.start.preflight import preflight
from tests.data_sets import write_data_set

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=200,
)
TP2 = ParallelConfig(tensor_model_parallel_size=2)


def gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cuda: str | None = "13.0"
) -> None:
    """A machine with Transformer Engine and such a GPU, or none, and a torch built for this CUDA."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU of the test")


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [
        (None, []),
        ((8, 0), []),  # A100
        ((8, 9), ["delayed", "tensorwise"]),
        ((9, 0), ["delayed", "tensorwise", "blockwise"]),  # H100
        ((10, 0), ["delayed", "tensorwise", "blockwise", "mxfp8"]),
        ((12, 0), ["delayed", "tensorwise", "blockwise"]),  # Transformer Engine refuses mxfp8 there
    ],
)
def test_a_gpu_can_do_what_its_generation_has(monkeypatch, capability, recipes) -> None:
    gpu(monkeypatch, capability)
    assert [recipe for recipe in CAPABILITIES if not missing(recipe)] == recipes
    for recipe in set(CAPABILITIES) - set(recipes):
        with pytest.raises(UserError, match=rf"fp8.recipe {recipe} needs a GPU of compute cap"):
            check_machine(Fp8Config(recipe), "transformer_engine")


@pytest.mark.parametrize("cuda", ["12.8", "12.4", None])
def test_blockwise_needs_cublas_12_9(monkeypatch, cuda) -> None:
    gpu(monkeypatch, (9, 0), cuda)
    assert not missing("tensorwise")
    with pytest.raises(UserError, match=f"needs a torch built for CUDA 12.9 or .* CUDA {cuda}"):
        check_machine(Fp8Config("blockwise"), "transformer_engine")
    gpu(monkeypatch, (9, 0), "12.10")
    check_machine(Fp8Config("blockwise"), "transformer_engine")


def test_transformer_engine_is_needed(monkeypatch) -> None:
    check_machine(Fp8Config(), "local")
    gpu(monkeypatch, (9, 0))
    check_machine(Fp8Config("delayed"), "transformer_engine")
    with pytest.raises(UserError, match="transformer_impl is local: set it to auto"):
        check_machine(Fp8Config("delayed"), "local")
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the transformer-engine package"):
        check_machine(Fp8Config("delayed"), "local")


@pytest.mark.parametrize(
    ("fp8", "change", "says"),
    [
        (Fp8Config("tensorwise", -1), {}, "the model has 4 layers"),
        (Fp8Config("tensorwise", 2, 3), {}, "the model has 4 layers"),
        (Fp8Config(None, 1), {}, "need an fp8.recipe"),
        (Fp8Config(primary_weights=True), {}, "need an fp8.recipe"),
        (Fp8Config("mxfp8", primary_weights=True), {}, "mxfp8 is not supported"),
        (Fp8Config("delayed", 1), {}, "cannot leave some in bf16"),
        (Fp8Config("delayed"), {"precision": "fp32"}, "needs precision bf16 .it is fp32."),
        (Fp8Config("delayed"), {"tokens": 24}, "micro_batch_size, 24, is not a multiple of 16"),
        (Fp8Config("mxfp8"), {"tokens": 16}, "micro_batch_size, 16, is not a multiple of 32"),
        (Fp8Config("delayed"), {"model": {"hidden_size": 72}}, "hidden_size, 72, is not"),
        (Fp8Config("delayed"), {"model": {"layer_norms": False}}, "model.layer_norms is off"),
        (Fp8Config("delayed"), {"model": {"kv_channels": 6}}, "keys and values of a rank, 24,"),
        (
            Fp8Config("delayed"),
            {"model": {"ffn_hidden_size": 208}},
            "ffn_hidden_size of a rank, 104",
        ),
    ],
)
def test_what_fp8_gemms_cannot_do_is_refused(fp8, change, says) -> None:
    model = replace(MODEL, **change.pop("model", {}))
    given = {"precision": "bf16", "tokens": 64} | change
    with pytest.raises(UserError, match=says):
        check_fp8(fp8, model, TP2, **given)


def test_halves_give_a_gemm_half_the_tokens() -> None:
    halves = replace(TP2, tp_overlap="halves")
    given = {"model": MODEL, "precision": "bf16"}
    check_fp8(Fp8Config("delayed"), parallel=halves, tokens=32, **given)
    check_fp8(Fp8Config("delayed"), parallel=TP2, tokens=16, **given)
    with pytest.raises(
        UserError, match=r"/ 2 .of parallel.tp_overlap halves., 8, is not a mul.* 16"
    ):
        check_fp8(Fp8Config("delayed"), parallel=halves, tokens=16, **given)
    halves = replace(halves, sequence_parallel=True)
    given["model"] = replace(MODEL, hidden_size=128)
    check_fp8(Fp8Config("blockwise"), parallel=halves, tokens=512, **given)
    with pytest.raises(UserError, match=r"/ tensor_model_parallel_size, 64, is not a mul.* 128"):
        check_fp8(Fp8Config("blockwise"), parallel=halves, tokens=256, **given)


@pytest.mark.parametrize(
    ("recipe", "tokens", "hidden_size", "says"),
    [
        ("blockwise", 128, 128, "tensor_model_parallel_size, 64, is not a multiple of 128"),
        ("blockwise", 256, 192, "hidden_size, 192, is not a multiple of 128"),
        ("mxfp8", 32, 64, "tensor_model_parallel_size, 16, is not a multiple of 32"),
        ("tensorwise", 16, 64, ""),
        ("blockwise", 256, 128, ""),
    ],
)
@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_whole_blocks_are_gathered(residual, recipe, tokens, hidden_size, says) -> None:
    model = replace(MODEL, hidden_size=hidden_size, residual=residual)
    parallel = replace(TP2, sequence_parallel=True)
    check_fp8(Fp8Config(recipe), replace(model, residual="parallel"), parallel, "bf16", tokens)
    check_fp8(Fp8Config(recipe), model, TP2, "bf16", tokens)
    if not says:
        check_fp8(Fp8Config(recipe), model, parallel, "bf16", tokens)
        return
    with pytest.raises(UserError, match=says):
        check_fp8(Fp8Config(recipe), model, parallel, "bf16", tokens)


def test_eights_are_gathered() -> None:
    model, parallel = replace(MODEL, residual="standard"), replace(TP2, sequence_parallel=True)
    four = replace(parallel, tensor_model_parallel_size=4)
    with pytest.raises(UserError, match="parallel_size, 4, is not a multiple of 8"):
        check_fp8(Fp8Config("tensorwise"), replace(model, num_query_groups=4), four, "bf16", 16)


def test_what_they_can_is_not() -> None:
    for recipe in CAPABILITIES:
        check_fp8(Fp8Config(recipe), MODEL, TP2, "bf16", tokens=64)
    check_fp8(Fp8Config("tensorwise", 1, 3), MODEL, TP2, "bf16", tokens=16)
    check_fp8(Fp8Config(), MODEL, TP2, "fp32", tokens=7)


def test_megatron_cores_fields() -> None:
    plain = transformer_config(MODEL, ParallelConfig(), precision="bf16")
    assert plain.fp8 is None
    for recipe, number_format in (
        ("delayed", "hybrid"),
        ("tensorwise", "hybrid"),
        ("blockwise", "e4m3"),
        ("mxfp8", "e4m3"),
    ):
        made = transformer_config(MODEL, ParallelConfig(), precision="bf16", fp8=Fp8Config(recipe))
        assert (made.fp8, made.fp8_recipe) == (number_format, recipe)
        assert not made.first_last_layers_bf16
    some = Fp8Config("tensorwise", num_layers_at_end_in_bf16=1)
    made = transformer_config(MODEL, ParallelConfig(), precision="bf16", fp8=some)
    assert made.first_last_layers_bf16
    assert (made.num_layers_at_start_in_bf16, made.num_layers_at_end_in_bf16) == (0, 1)


def test_a_run_is_refused_before_it_starts(tmp_path) -> None:
    data = write_data_set(tmp_path / "data", vocab_size=400)
    base = PRESETS["debug"]()
    config = replace(
        base,
        data=replace(base.data, paths=(data,)),
        output_dir=tmp_path / "run",
        precision="bf16",
        fp8=Fp8Config("delayed"),
    )
    with pytest.raises(UserError, match=r"fp8\.recipe delayed needs"):
        preflight(config, 1)
    assert not (tmp_path / "run").exists()
