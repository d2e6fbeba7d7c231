"""Weights there and back, against a layout written out by hand and megatron-core's own RoPE."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_ladder.hf.convert import hf_to_megatron, megatron_to_hf
from megatron_ladder.hf.modelling.rotary_ladder import rope_cos_sin, rotate
from tests.unit.hf import tiny

PADDED = 512
KINDS = tiny.KINDS | tiny.EXPERTS
CASES = [
    *(
        (kind, tied, groups)
        for kind in tiny.KINDS
        for tied in (True, False)
        for groups in (1, 2, 4)
    ),
    *((kind, True, 2) for kind in tiny.EXPERTS),
]


def parameters(model):
    """Without the tied head, which is the embedding."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("kind", "tied", "groups"), CASES)
def test_round_trip_is_bit_exact(kind, tied, groups):
    model = tiny.model(**KINDS[kind], tie_word_embeddings=tied, num_key_value_heads=groups)
    weights = parameters(model)
    megatron = hf_to_megatron(weights, model.config, PADDED)
    assert ("output_layer.weight" in megatron) is not tied
    norm = "pre_mlp_layernorm.weight" if "expert" in kind else "mlp.linear_fc1.layer_norm_weight"
    assert any(name.endswith(norm) for name in megatron) is ("parallel" not in kind)
    again = dict(megatron_to_hf(megatron, model.config))
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(again[name], tensor), name
    # bf16 passes through; a tied head in the state does no harm
    state = model.to(torch.bfloat16).state_dict()
    for name, tensor in hf_to_megatron(state, model.config, PADDED).items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == megatron[name].shape


def test_layout_of_megatron_tensors():
    """Where each row goes, head by head."""
    model = tiny.model(tie_word_embeddings=False)  # 4 query heads, 2 groups, head_dim 8
    weights = parameters(model)
    megatron = hf_to_megatron(weights, model.config, PADDED)
    qkv = megatron["decoder.layers.self_attention.linear_qkv.weight"]
    assert qkv.shape == (4, 64, 32)
    for layer in range(4):
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (weights[f"{prefix}{n}_proj.weight"].split(8) for n in "qkv")
        rows = [q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]
        assert torch.equal(qkv[layer], torch.cat(rows))
        fc1 = megatron["decoder.layers.mlp.linear_fc1.weight"][layer]
        assert torch.equal(fc1[:48], weights[f"model.layers.{layer}.mlp.gate_proj.weight"])
        assert torch.equal(fc1[48:], weights[f"model.layers.{layer}.mlp.up_proj.weight"])
        for ours, theirs in (
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
            ("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
            ("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
        ):
            assert torch.equal(
                megatron[f"decoder.layers.{ours}"][layer], weights[f"model.layers.{layer}.{theirs}"]
            )
    assert torch.equal(megatron["decoder.final_layernorm.weight"], weights["model.norm.weight"])
    for ours, theirs in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        assert megatron[ours].shape == (PADDED, 32)
        assert torch.equal(megatron[ours][: tiny.VOCAB], weights[theirs])
        assert not megatron[ours][tiny.VOCAB :].any()


@pytest.mark.parametrize("scaled", [False, True])
def test_rope_pairs_the_same_channels_as_megatron(scaled):
    """So no row of linear_qkv moves within a head."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    if scaled:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = tiny.config(hidden_size=256, max_position_embeddings=16384, rope_parameters=rope)
    positions = torch.arange(0, 16384, 97)
    embedding = RotaryEmbedding(
        config.head_dim,
        rotary_percent=1.0,
        rotary_base=5e5,
        rope_scaling=scaled,
        rope_scaling_factor=8.0,
        use_cpu_initialization=True,
    )
    angles = embedding.get_freqs_non_repeated(16384)[positions]
    x = torch.randn(len(positions), 2, 4, config.head_dim)  # megatron: [length, batch, heads, d]
    theirs = apply_rotary_pos_emb(
        x,
        torch.cat((angles, angles), dim=-1)[:, None, None],
        config=SimpleNamespace(
            apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
        ),
        cp_group=SimpleNamespace(),  # not used here, and made by default
    )
    cos, sin = rope_cos_sin(config, positions[None], torch.float32)
    ours = rotate(x.permute(1, 2, 0, 3), cos, sin).permute(2, 0, 1, 3)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_errors_name_the_tensors():
    model = tiny.model(residual="ladder")
    config = model.config
    good = hf_to_megatron(parameters(model), config, PADDED)

    with pytest.raises(ValueError, match=r"missing decoder.final_layernorm.weight$"):
        megatron_to_hf({k: v for k, v in good.items() if "final" not in k}, config)
    with pytest.raises(ValueError, match=r"not in this model decoder.layers.mlp.bias$"):
        megatron_to_hf(good | {"decoder.layers.mlp.bias": torch.zeros(1)}, config)
    fc2 = "decoder.layers.mlp.linear_fc2.weight"
    with pytest.raises(ValueError, match=r"linear_fc2.weight is \[3, 32, 48\], not \[4, 32, 48\]"):
        megatron_to_hf(good | {fc2: good[fc2][:3]}, config)
    embedding = "embedding.word_embeddings.weight"
    with pytest.raises(ValueError, match="499 rows"):
        megatron_to_hf(good | {embedding: good[embedding][:499]}, config)
    with pytest.raises(ValueError, match="missing embedding"):
        megatron_to_hf({}, config)

    weights = parameters(model)
    with pytest.raises(ValueError, match="padded_vocab_size 499"):
        hf_to_megatron(weights, config, 499)
    with pytest.raises(ValueError, match=r"post_attention_layernorm.weight"):
        hf_to_megatron(weights, tiny.config(residual="parallel-ladder"), PADDED)
    tied = tiny.config(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        hf_to_megatron(weights, tied, PADDED)
