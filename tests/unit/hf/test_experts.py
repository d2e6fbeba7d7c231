"""Mixtures of experts in exported folders: transformers' own models, names, fields, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM

from megatron_ladder.errors import UserError
from megatron_ladder.hf import LadderConfig
from megatron_ladder.hf.convert import hf_to_megatron, written_dtype
from megatron_ladder.hf.export import model_card
from megatron_ladder.hf.from_hf import read_hf_config, to_model_config
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.standard import (
    fused,
    needs_code,
    published_name,
    standard_config,
    with_our_names,
)
from megatron_ladder.hf.table import stacked_axes
from tests.unit.hf import tiny

HERE = Path("config.json")
STANDARD = {"residual": "standard", **tiny.FOUR}
THEIRS = {
    "mixtral": (
        STANDARD | {"sliding_window": 6, "intermediate_size": 24, "moe_intermediate_size": None},
        MixtralForCausalLM,
    ),
    "qwen3-moe": (STANDARD | {"qk_norm": True, "mlp_only_layers": [2]}, Qwen3MoeForCausalLM),
    "qwen3-moe, weights of all": (
        STANDARD | {"qk_norm": True, "norm_topk_prob": False, "sliding_window": 6},
        Qwen3MoeForCausalLM,
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_standard_mixture_is_theirs(name: str) -> None:
    """Logits, loss, gradients and greedy generation."""
    changes, theirs = THEIRS[name]
    ours = tiny.model(**changes)
    assert not needs_code(ours.config, own_tokenizer=True)
    config = standard_config(ours.config)
    assert to_model_config(config, HERE) == to_model_config(ours.config, HERE)
    model = theirs(config).eval()
    parts = {key: lambda p=p: p for key, p in ours.state_dict().items()}
    model.load_state_dict({key: make() for key, make in fused(parts).items()})
    ids = tiny.tokens(2, 20)
    results = [m(ids, labels=ids) for m in (ours, model)]
    torch.testing.assert_close(*(r.logits for r in results), atol=1e-5, rtol=1e-5)
    for result in results:
        result.loss.backward()
    grads = {
        key: lambda p=p: torch.zeros_like(p) if p.grad is None else p.grad
        for key, p in ours.named_parameters()
    }
    found = {key: make() for key, make in fused(grads).items()}
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, atol=1e-5, rtol=1e-4, msg=key)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(*(m.generate(ids, **options) for m in (ours, model)))


# Of the published config.json, what makes the model.
PUBLISHED = {
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_in_transformers(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_hf_config(tmp_path)
    model = to_model_config(config, HERE)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == sum(p.numel() for p in theirs.parameters())
    again = to_model_config(standard_config(to_hf_config(model, 2)), HERE)
    assert again == model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1, whose weight would always be 1"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of 8 experts"),
        ({"attention_bias": True}, "attention_bias is set"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    changes: dict, said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Mixtral-8x7B"] | changes))
    with pytest.raises(UserError, match=said):
        to_model_config(read_hf_config(tmp_path), HERE)


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "ladder"},
        {"shared_expert_intermediate_size": 8},
        {"scoring_func": "sigmoid"},
        {"mlp_only_layers": [0]},  # Mixtral has no such layers
        {"norm_topk_prob": False},
        {"qkv_bias": True},
        {"qk_norm": True, "sliding_window": 6, "layer_types": tiny.WINDOWS["layer_types"]},
    ],
)
def test_what_transformers_has_not_travels_with_code(changes: dict) -> None:
    assert needs_code(tiny.config(**(STANDARD | changes)), own_tokenizer=False)


@pytest.mark.parametrize("kind", tiny.EXPERTS)
def test_nothing_is_lost_on_the_way_to_training_and_back(kind: str) -> None:
    ours = tiny.config(**tiny.EXPERTS[kind])
    again = to_hf_config(to_model_config(ours, HERE), 2)
    again.bos_token_id = 1
    assert again.to_dict() == ours.to_dict()


def test_where_each_experts_weights_are() -> None:
    """By hand: [layer, expert] of one tensor, or, if some layers have an MLP, [expert] of a layer's own."""
    model = tiny.model(residual="ladder", shared_expert_intermediate_size=40, **tiny.FOUR)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    megatron = hf_to_megatron(weights, model.config, 512)
    fc1 = megatron["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    fc2 = megatron["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    assert (fc1.shape, fc2.shape) == ((4, 4, 48, 32), (4, 4, 32, 24))
    expert = "model.layers.2.mlp.experts.3."
    assert torch.equal(fc1[2, 3, :24], weights[f"{expert}gate_proj.weight"])
    assert torch.equal(fc1[2, 3, 24:], weights[f"{expert}up_proj.weight"])
    assert torch.equal(fc2[2, 3], weights[f"{expert}down_proj.weight"])
    shared = megatron["decoder.layers.mlp.shared_experts.linear_fc1.weight"][1]
    assert torch.equal(shared[40:], weights["model.layers.1.mlp.shared_experts.up_proj.weight"])
    router = megatron["decoder.layers.mlp.router.weight"]
    assert torch.equal(router[0], weights["model.layers.0.mlp.gate.weight"])

    model = tiny.model(residual="ladder", mlp_only_layers=[0], **tiny.FOUR)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    megatron = hf_to_megatron(weights, model.config, 512)
    own = megatron["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"]
    assert torch.equal(own[3, :24], weights[f"{expert}gate_proj.weight"])
    mlp = megatron["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(mlp[:48], weights["model.layers.0.mlp.gate_proj.weight"])
    axes = {name: stacked_axes(name) for name in megatron}
    assert {name for name, count in axes.items() if count} == {
        f"decoder.layers.{i}.mlp.experts.experts.linear_fc{n}.weight"
        for i in (1, 2, 3)
        for n in (1, 2)
    }
    assert stacked_axes("decoder.layers.mlp.experts.experts.linear_fc1.weight") == 2
    assert stacked_axes("decoder.layers.mlp.router.weight") == 1


def test_published_names() -> None:
    ours, theirs = "model.layers.3.mlp.", "model.layers.3.block_sparse_moe."
    names = {
        f"{ours}gate.weight": f"{theirs}gate.weight",
        f"{ours}experts.7.gate_proj.weight": f"{theirs}experts.7.w1.weight",
        f"{ours}experts.7.down_proj.weight": f"{theirs}experts.7.w2.weight",
        f"{ours}experts.7.up_proj.weight": f"{theirs}experts.7.w3.weight",
        "model.layers.3.self_attn.q_proj.weight": "model.layers.3.self_attn.q_proj.weight",
    }
    for name, published in names.items():
        assert published_name(name, "mixtral") == published
        assert published_name(name, "qwen3_moe") == published_name(name, "ladder") == name
    assert with_our_names(dict.fromkeys(names.values(), 0), "mixtral").keys() == names.keys()
    with pytest.raises(ValueError, match="gate_up_proj holds all experts of a layer"):
        with_our_names({"model.layers.0.mlp.experts.gate_up_proj": 0}, "qwen3_moe")


def test_the_routers_bias_keeps_its_dtype() -> None:
    bias, other = (
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.gate.weight",
    )
    assert written_dtype(bias, torch.float32, torch.bfloat16) == torch.float32
    assert written_dtype(other, torch.float32, torch.bfloat16) == torch.bfloat16
    assert written_dtype(other, torch.float32, None) == torch.float32


def test_the_router_computes_in_fp32_in_bf16_models() -> None:
    """Scores that differ by less than bf16 can tell are told apart."""
    gate = (
        tiny.model(residual="ladder", **(tiny.FOUR | {"num_experts_per_tok": 1}))
        .model.layers[0]
        .mlp.gate
    )
    gate.bfloat16()
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 2**-6
    for best in range(4):  # of equal scores it would always be the same
        with torch.no_grad():
            gate.weight.fill_(1.0)
            gate.weight[best, 0] = 1 + 2**-7
        weights = gate(x)
        assert weights.dtype == torch.float32
        assert weights.nonzero().tolist() == [[0, best]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5 of num_experts 4"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"expert_bias": True}, "expert_bias goes with scoring_func sigmoid"),
        ({"scoring_func": "sigmoid", "norm_topk_prob": False}, "norm_topk_prob false with softmax"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny.config(residual="ladder", **(tiny.FOUR | changes))


def test_the_model_card_knows_the_experts() -> None:
    config = tiny.config(residual="ladder", shared_expert_intermediate_size=8, **tiny.FOUR)
    card = model_card(config, torch.bfloat16, {}, with_code=True)
    assert (
        "each layer has 4 experts in place of the MLP, of which each token goes to\n2, and one more"
        in card
    )
    assert (
        "| experts | 4, 2 a token |\n| expert width | 24 |\n| shared expert's width | 8 |" in card
    )
    assert "| MLP width" not in card
    some = tiny.config(residual="ladder", mlp_only_layers=[0], **tiny.FOUR)
    card = model_card(some, torch.bfloat16, {}, with_code=True)
    assert "layers 1, 2, 3 (from 0) have 4 experts" in card
    assert "| MLP width | 48 |" in card
    assert "xpert" not in model_card(LadderConfig(), torch.bfloat16, {}, with_code=True)
