from dataclasses import replace

import pytest

from megatron_ladder.config import ModelConfig, ParallelConfig, check_layout
from megatron_ladder.errors import UserError
from megatron_ladder.fields.windows import attention_length, layer_windows

YARN = {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0}
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=200,
)


@pytest.mark.parametrize(
    ("residual", "ladder_layers", "kinds"),
    [
        ("standard", None, "ssss"),
        ("ladder", None, "llll"),
        ("parallel", None, "pppp"),
        ("ladder", 0, "ssss"),
        ("ladder", 1, "sssl"),
        ("ladder", 4, "llll"),
        ("ladder", (0, 2), "lsls"),
        ("ladder", (3,), "sssl"),
    ],
)
def test_each_layer_has_its_residual_kind(residual, ladder_layers, kinds) -> None:
    model = replace(MODEL, residual=residual, ladder_layers=ladder_layers)
    assert "".join(kind[0] for kind in model.layer_residuals()) == kinds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "model.num_layers is 0"),
        ({"num_query_groups": 0}, "model.num_query_groups is 0"),
        ({"hidden_size": 66}, "model.hidden_size 66 is not a multiple"),
        ({"hidden_size": 12}, "RoPE needs an even number"),
        ({"num_query_groups": 3}, "not a multiple of model.num_query_groups 3"),
        ({"residual": "stale"}, "choose one of standard, ladder, parallel"),
        ({"ladder_layers": 5}, "0 to 4"),
        ({"ladder_layers": -1}, "0 to 4"),
        ({"ladder_layers": (4,)}, "numbered 0 to 3"),
        ({"ladder_layers": (1, 1)}, "at most once"),
        ({"residual": "parallel", "ladder_layers": 2}, "model.residual is parallel"),
        ({"sliding_window": 0}, "model.sliding_window is 0"),
        ({"sliding_window_layers": 2}, "model.sliding_window is not"),
        ({"sliding_window": 8, "sliding_window_layers": 5}, "sliding_window_layers 5.* 0 to 4"),
        ({"sliding_window": 8, "sliding_window_layers": (1, 1)}, "at most once"),
        ({"rope_scaling_type": "yarn"}, "rope_scaling_factor is None"),
        ({"rope_scaling_factor": 0.0}, "rope_scaling_factor is 0.0: it must be a number above 0"),
        ({"rotary_base": 0.0}, "rotary_base is 0.0: it must be a number above 0"),
        ({"rope_scaling_type": "yarn", "rope_scaling_factor": 0.5}, "rope_scaling_factor is 0.5"),
        (YARN | {"rope_beta_slow": 40.0}, "rope_beta_slow is 40.0"),
        (YARN | {"rope_beta_fast": float("nan")}, "rope_beta_fast nan"),
        (YARN | {"rotary_base": 1.0}, "rotary_base is 1.0"),
        (YARN | {"rope_attention_factor": 0.0}, "rope_attention_factor is 0.0"),
        (YARN | {"rope_attention_factor": float("inf")}, "rope_attention_factor is inf"),
        ({"rope_beta_fast": 16.0}, "it is llama3"),
        ({"rope_attention_factor": 1.0}, "it is llama3"),
        ({"rope_original_max_position_embeddings": 64}, "goes with a model.rope_scaling_factor"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message) -> None:
    with pytest.raises(UserError, match=message):
        replace(MODEL, **change)


@pytest.mark.parametrize(
    ("layers", "windows"),
    [(None, "wwww"), (0, "----"), (1, "---w"), ((0, 2), "w-w-")],
)
def test_each_layer_has_its_window(layers, windows) -> None:
    model = replace(MODEL, sliding_window=8, sliding_window_layers=layers)
    assert layer_windows(model) == tuple(8 if w == "w" else None for w in windows)
    assert layer_windows(MODEL) == (None,) * 4


def test_scores_of_windows_are_counted() -> None:
    """Of each layer the scores that no mask removes, next to those of full attention."""
    model = replace(MODEL, sliding_window=8, sliding_window_layers=1)
    for length in (4, 8, 20):
        full, window = length**2 / 2, sum(min(i - 0.5, 8) for i in range(1, length + 1))
        share = (3 * full + window) / (4 * full)
        assert attention_length(model, [length]) == pytest.approx(share * length)
        assert attention_length(model, [length] * 3) == pytest.approx(share * length)
        assert attention_length(MODEL, [length]) == length
    # Documents of 4 and 20 tokens: 8 and 200 scores, of which a window leaves 8 and 8 * 20 - 32.
    scores = 3 * (8 + 200) + 8 + 128
    assert attention_length(model, [4, 20]) == pytest.approx(2 * scores / 4 / 24)
    assert attention_length(MODEL, [4, 20]) == pytest.approx((16 + 400) / 24)


@pytest.mark.parametrize(
    ("change", "tp", "name"),
    [
        ({}, 3, "num_attention_heads 4"),
        ({}, 4, "num_query_groups 2"),
        ({"num_query_groups": 4, "ffn_hidden_size": 190}, 4, "ffn_hidden_size 190"),
        (
            {"hidden_size": 48, "num_attention_heads": 12, "num_query_groups": 12},
            3,
            "padded vocabulary 256",
        ),
    ],
)
def test_what_tensor_parallelism_cannot_cut_is_refused(change, tp, name) -> None:
    with pytest.raises(UserError, match=f"model.{name} is not divisible by .* {tp}"):
        check_layout(replace(MODEL, **change), ParallelConfig(tensor_model_parallel_size=tp))


def test_ranks_that_do_not_fit_the_layout_are_refused() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=4)
    assert parallel.data_parallel_size(8) == 2
    with pytest.raises(UserError, match=r"6 ranks do not divide into TP 4 x PP 1 x CP 1 = 4"):
        parallel.data_parallel_size(6)


@pytest.mark.parametrize(
    ("stages", "layers", "message"),
    [
        ({"pipeline_model_parallel_size": 3}, 8, "num_layers 8 do not divide"),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 8},
            8,
            r"\(first stage: 8, last stage: even\)",
        ),
        (
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 4},
            8,
            "2 layers of a pipeline stage do not divide into .* 4 parts",
        ),
    ],
)
def test_layers_that_stages_cannot_share_are_refused(stages, layers, message) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(replace(MODEL, num_layers=layers), ParallelConfig(**stages))


@pytest.mark.parametrize(
    ("stages", "layers"),
    [
        ({"pipeline_model_parallel_size": 4}, 8),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}, 8),
        ({"pipeline_model_parallel_size": 4, "num_layers_in_last_pipeline_stage": 2}, 8),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4}, 8),
    ],
)
def test_even_and_uneven_stages_are_taken(stages, layers) -> None:
    check_layout(replace(MODEL, num_layers=layers), ParallelConfig(**stages))


def test_desync_and_sequence_parallelism_exclude_each_other() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    with pytest.raises(UserError, match="do not share their residual states"):
        check_layout(replace(MODEL, residual="desync"), parallel)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("residual", ["standard", "ladder", "parallel"])
def test_parameters_are_those_of_the_exported_model(residual, tied) -> None:
    from megatron_ladder.hf.model_config import to_hf_config
    from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM

    model = replace(MODEL, residual=residual, share_embeddings_and_output_weights=tied)
    config = to_hf_config(model)
    config.vocab_size = model.padded_vocab_size
    plain = LadderForCausalLM(config)
    assert model.num_parameters() == sum(p.numel() for p in plain.parameters())
    matmuls = sum(m.weight.numel() for m in plain.modules() if type(m).__name__ == "Linear")
    assert model.num_matmul_parameters() == matmuls


def test_paper_shapes_have_the_papers_parameter_counts() -> None:
    """1.2B and 3.5B with tied embeddings (arXiv 2501.06589, section 4.1)."""
    from pretrain.config.presets import PRESETS

    for name, billions in (("paper-1b", 1.2), ("paper-3b", 3.5)):
        assert round(PRESETS[name]().model.num_parameters() / 1e9, 1) == billions


def test_the_exported_configuration_chooses_the_same_layers() -> None:
    from megatron_ladder.hf.modelling.configuration_ladder import ladder_layer_indices

    for layers in (None, 0, 2, 4, (0, 2), (3,)):
        ours = replace(MODEL, ladder_layers=layers).layer_residuals()
        chosen = tuple(i for i, kind in enumerate(ours) if kind == "ladder")
        assert ladder_layer_indices("ladder", layers, 4) == chosen
