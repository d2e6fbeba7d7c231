"""The oracle against two others: transformers' Llama, and the paper's recurrence written out."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from megatron_ladder.config import STALE, ModelConfig
from megatron_ladder.hf import LadderConfig, LadderForCausalLM
from megatron_ladder.hf.modelling.configuration_ladder import LADDERS, ladder_layer_indices
from megatron_ladder.hf.standard import standard_config
from tests.unit.hf import tiny


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [None, tiny.LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_standard_is_llama(groups, tied, rope):
    ours = tiny.model(
        residual="standard",
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )
    llama = LlamaForCausalLM(standard_config(ours.config)).eval()
    llama.load_state_dict(ours.state_dict())
    ids = tiny.tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    labels = ids.clone()
    labels[0, :8] = -100  # no prediction from padding

    results = [m(ids, attention_mask=mask, labels=labels) for m in (ours, llama)]
    real = mask.bool()
    torch.testing.assert_close(
        results[0].logits[real], results[1].logits[real], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(results[0].loss, results[1].loss)
    for result in results:
        result.loss.backward()
    theirs = dict(llama.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"sliding_window": 6, "rope_parameters": tiny.YARN}, MistralForCausalLM),
        (tiny.WINDOWS | {"qkv_bias": True}, Qwen2ForCausalLM),
        (tiny.WINDOWS | {"qk_norm": True, "rope_parameters": tiny.YARN}, Qwen3ForCausalLM),
    ],
)
def test_standard_with_windows_is_theirs(changes, theirs):
    ours = tiny.model(**(changes | {"residual": "standard"}))
    model = theirs(standard_config(ours.config)).eval()
    model.load_state_dict(ours.state_dict())
    ids = tiny.tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 7] = -100  # no prediction from padding
    results = [m(ids, attention_mask=mask, labels=labels) for m in (ours, model)]
    real = mask.bool()
    torch.testing.assert_close(*(r.logits[real] for r in results), atol=1e-5, rtol=1e-5)
    for result in results:
        result.loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = [m.generate(ids, attention_mask=mask, **options) for m in (ours, model)]
    assert torch.equal(*tokens)
    assert len(tokens[0][1, 40:].unique()) > 3
    # What the window and YaRN change is far above the tolerances.
    full = LadderForCausalLM(
        tiny.config(residual="standard", qkv_bias=ours.config.qkv_bias, qk_norm=ours.config.qk_norm)
    ).eval()
    full.load_state_dict(ours.state_dict())
    assert (full(ids).logits[1] - ours(ids).logits[1]).abs().max() > 0.05


def recurrence(weights, config: LadderConfig, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one unpadded sequence from x_k = x_{k-1} + h_k(norm_k(x_{k-s})), k = 1..2L.

    s = 2 in a ladder layer (x_{-1} = x_0 = the embedding), 1 in a standard one. In parallel models h_k is
    attention and MLP of one layer together, k = 1..L, and s = 2 in a parallel-ladder layer. With residual
    scaling h_k is multiplied. Written from the paper: one head at a time, the causal softmax spelled out,
    RoPE by complex numbers.
    """
    d = config.head_dim
    angles = torch.outer(
        torch.arange(len(ids)), 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x, name):
        if "layers." in name and not config.layer_norms:
            return x
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rope(x):
        pairs = torch.complex(x[:, : d // 2], x[:, d // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=1)

    def attention(x, prefix):
        q, k, v = (x @ weights[f"{prefix}.{n}_proj.weight"].T for n in "qkv")
        ratio = config.num_attention_heads // config.num_key_value_heads
        heads = []
        for head in range(config.num_attention_heads):
            own, shared = slice(head * d, head * d + d), head // ratio * d
            keys, values = k[:, shared : shared + d], v[:, shared : shared + d]
            scores = rope(q[:, own]) @ rope(keys).T / d**0.5
            future = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ values)
        return torch.cat(heads, dim=1) @ weights[f"{prefix}.o_proj.weight"].T

    def mlp(x, prefix):
        gate, up = (x @ weights[f"{prefix}.{n}_proj.weight"].T for n in ("gate", "up"))
        return (gate * torch.sigmoid(gate) * up) @ weights[f"{prefix}.down_proj.weight"].T

    def experts(x, prefix):
        """One token at a time, one expert at a time."""
        outputs = []
        for token in x:
            scores = {e: token @ row for e, row in enumerate(weights[f"{prefix}.gate.weight"])}
            bias = dict.fromkeys(scores, 0.0)
            total = sum(score.exp() for score in scores.values())
            if config.scoring_func == "sigmoid":
                scores = {e: 1 / (1 + (-score).exp()) for e, score in scores.items()}
                if config.expert_bias:
                    bias = dict(enumerate(weights[f"{prefix}.gate.e_score_correction_bias"]))
            else:
                scores = {e: score.exp() / total for e, score in scores.items()}
            best = sorted(scores, key=lambda e: -(scores[e] + bias[e]))
            chosen = best[: config.num_experts_per_tok]
            norm_of = sum(scores[e] for e in chosen)
            if not config.norm_topk_prob or (len(chosen) == 1 and config.scoring_func == "sigmoid"):
                norm_of = 1.0
            parts = [scores[e] / norm_of * mlp(token, f"{prefix}.experts.{e}") for e in chosen]
            if config.shared_expert_intermediate_size:
                parts.append(mlp(token, f"{prefix}.shared_experts"))
            outputs.append(sum(parts))
        return torch.stack(outputs)

    def after_attention(x, prefix):
        return (experts if f"{prefix}.gate.weight" in weights else mlp)(x, prefix)

    def scale(layer, which):
        n = 2 * config.num_hidden_layers
        fixed = {"none": 1, "1/n": 1 / n, "1/sqrt-n": n**-0.5}.get(config.residual_scaling)
        return fixed or weights[f"model.layers.{layer}.residual_scales"][which]

    embedding = weights["model.embed_tokens.weight"][ids]
    if config.residual in ("parallel", "parallel-ladder"):
        count = config.num_hidden_layers
        stale = [] if config.residual == "parallel" else config.ladder_layers or range(count)
        states = {-1: embedding, 0: embedding}
        for i in range(count):
            prefix = f"model.layers.{i}"
            n = norm(states[i - 1 if i in stale else i], f"{prefix}.input_layernorm.weight")
            both = attention(n, f"{prefix}.self_attn") + after_attention(n, f"{prefix}.mlp")
            states[i + 1] = states[i] + scale(i, 0) * both
        x = states[count]
    else:
        ladder = config.ladder_layers
        count = config.num_hidden_layers
        if ladder is None:
            ladder = range(count) if config.residual == "ladder" else []
        elif isinstance(ladder, int):
            ladder = range(count - ladder, count)
        states = {-1: embedding, 0: embedding}
        for k in range(1, 2 * count + 1):
            layer, is_mlp = divmod(k - 1, 2)
            prefix = f"model.layers.{layer}"
            read = states[k - 2 if layer in ladder else k - 1]
            if is_mlp:
                out = after_attention(
                    norm(read, f"{prefix}.post_attention_layernorm.weight"), f"{prefix}.mlp"
                )
            else:
                out = attention(
                    norm(read, f"{prefix}.input_layernorm.weight"), f"{prefix}.self_attn"
                )
            states[k] = states[k - 1] + scale(layer, int(is_mlp)) * out
        x = states[2 * count]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


@pytest.mark.parametrize("kind", {**tiny.KINDS, **tiny.SCALED, **tiny.EXPERTS})
def test_residual_kinds_are_the_papers(kind):
    model = tiny.model(**(tiny.KINDS | tiny.SCALED | tiny.EXPERTS)[kind])
    ids = tiny.tokens(1, 12)[0]
    weights = {n: t.detach().double().requires_grad_() for n, t in model.state_dict().items()}
    expected = recurrence(weights, model.config, ids)
    logits = model(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected.float(), atol=1e-4, rtol=1e-4)

    F.cross_entropy(expected[:-1], ids[1:]).backward()
    model(ids[None], labels=ids[None]).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # the router's bias, and experts without tokens
            assert weights[name].grad is None, name
            continue
        torch.testing.assert_close(
            parameter.grad, weights[name].grad.float(), atol=1e-5, rtol=1e-3, msg=name
        )


def test_residual_kinds_differ():
    ids = tiny.tokens(1, 12)
    base = tiny.model(residual="standard")
    logits = []
    for changes in tiny.KINDS.values():
        other = LadderForCausalLM(tiny.config(**changes)).eval()
        other.load_state_dict(base.state_dict(), strict=False)
        logits.append(other(ids).logits)
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("none", [0, []])
@pytest.mark.parametrize(("kind", "other"), LADDERS.items())
def test_without_ladder_layers_it_is_the_other_kind(none, kind, other):
    standard = tiny.model(residual=other)
    ladder = tiny.model(residual=kind, ladder_layers=none)
    ladder.load_state_dict(standard.state_dict())
    ids = tiny.tokens()
    assert torch.equal(ladder(ids).logits, standard(ids).logits)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_cached_generation_is_uncached(kind):
    model = tiny.model(**tiny.KINDS[kind])
    ids = tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert cached.shape == (2, 29)
    assert torch.equal(cached, uncached)
    assert len(set(cached[0, 9:].tolist())) > 3, "a model that repeats itself proves little"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny.model(residual="ladder")
    ids = tiny.tokens(1, 10)
    padding = tiny.tokens(1, 5)
    parts = [padding, ids] if side == "left" else [ids, padding]
    mask = torch.cat([torch.full_like(part, int(part is ids)) for part in parts], dim=1)
    padded = model(torch.cat(parts, dim=1), attention_mask=mask).logits
    assert padded.isfinite().all()
    alone = model(ids).logits
    torch.testing.assert_close(padded[mask.bool()], alone[0], atol=1e-4, rtol=1e-4)


def test_chunks_through_the_cache_and_the_last_logits():
    model = tiny.model(residual="ladder")
    ids = tiny.tokens(2, 12)
    whole = model(ids).logits
    first = model(ids[:, :5])
    second = model(ids[:, 5:], past_key_values=first.past_key_values, logits_to_keep=2)
    assert first.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(second.logits, whole[:, -2:], atol=1e-4, rtol=1e-4)


def test_hidden_states_and_embeddings_in():
    model = tiny.model(residual="ladder")
    ids = tiny.tokens()
    out = model(ids, output_hidden_states=True, use_cache=False)
    assert out.past_key_values is None
    assert len(out.hidden_states) == tiny.LAYERS + 1
    embeddings = model.model.embed_tokens(ids)
    assert torch.equal(out.hidden_states[0], embeddings)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(inputs_embeds=embeddings).logits, out.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 3))


def test_loss_counts_labels():
    model = tiny.model(residual="ladder")
    ids = tiny.tokens()
    labels = ids.clone()
    labels[:, :6] = -100
    mean = model(ids, labels=labels).loss
    by_hand = F.cross_entropy(model(ids).logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())
    torch.testing.assert_close(mean, by_hand)
    halved = model(ids, labels=labels, num_items_in_batch=40).loss
    torch.testing.assert_close(halved, mean * 20 / 40)


def test_new_weights_are_drawn_as_llamas():
    model = LadderForCausalLM(tiny.config(residual="ladder", initializer_range=0.05))
    assert abs(model.model.layers[0].mlp.up_proj.weight.std() - 0.05) < 0.005
    assert (model.model.norm.weight == 1).all()
    parallel = LadderForCausalLM(tiny.config(residual="parallel"))
    assert not any("post_attention_layernorm" in name for name in parallel.state_dict())
    for residual, count in (("ladder", 2), ("parallel-ladder", 1)):
        skipinit = LadderForCausalLM(tiny.config(residual=residual, residual_scaling="skipinit"))
        for layer in skipinit.model.layers:
            assert layer.residual_scales.tolist() == [0.0] * count


@pytest.mark.parametrize(
    ("residual", "ladder_layers", "expected"),
    [
        ("standard", None, ()),
        ("parallel", None, ()),
        ("ladder", None, (0, 1, 2, 3)),
        ("parallel-ladder", None, (0, 1, 2, 3)),
        ("parallel-ladder", 1, (3,)),
        ("parallel-ladder", [2, 0], (0, 2)),
        ("parallel-ladder", 5, None),
        ("ladder", 0, ()),
        ("ladder", 1, (3,)),
        ("ladder", 4, (0, 1, 2, 3)),
        ("ladder", [2, 0], (0, 2)),
        ("ladder", (3,), (3,)),
        ("ladder", 5, None),
        ("ladder", -1, None),
        ("ladder", [0, 0], None),
        ("ladder", [4], None),
        ("ladder", [-1], None),
        ("standard", 2, None),
        ("parallel", [1], None),
        ("rungs", None, None),
    ],
)
def test_ladder_layers_mean_the_same_as_in_training(residual, ladder_layers, expected):
    def in_training():
        layers = tuple(ladder_layers) if isinstance(ladder_layers, list) else ladder_layers
        kinds = ModelConfig(
            num_layers=4,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            residual=residual,
            ladder_layers=layers,
        ).layer_residuals()
        return tuple(i for i, kind in enumerate(kinds) if kind in STALE)

    if expected is None:
        for reader in (
            lambda: ladder_layer_indices(residual, ladder_layers, 4),
            lambda: tiny.config(residual=residual, ladder_layers=ladder_layers),
            in_training,
        ):
            with pytest.raises(ValueError, match=r"ladder_layers|residual"):
                reader()
    else:
        assert ladder_layer_indices(residual, ladder_layers, 4) == expected
        assert in_training() == expected


def test_config_round_trip(tmp_path):
    config = tiny.config(
        residual="ladder",
        ladder_layers=[1, 3],
        rope_parameters=tiny.LLAMA3,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    again = LadderConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.ladder_layer_indices() == (1, 3)
    assert LadderConfig(rope_theta=7.0).rope_parameters["rope_theta"] == 7.0


def test_config_errors():
    with pytest.raises(ValueError, match="num_key_value_heads"):
        tiny.config(num_key_value_heads=3)
    with pytest.raises(ValueError, match="residual_scaling is '1/2': choose one of none, 1/n, 1/s"):
        tiny.config(residual_scaling="1/2")
    model = tiny.model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        model(tiny.tokens())
    for wrong in ({"layer_types": ["sliding_attention"] * 4}, {"layer_types": ["chunked"] * 4}):
        with pytest.raises(ValueError, match="layer_types names"):
            tiny.config(**wrong)


def test_standard_config_keeps_every_field():
    """Nothing the ladder configuration says is lost in a standard model's export."""
    ours = tiny.config(residual="standard", rope_parameters=tiny.LLAMA3, tie_word_embeddings=True)
    llama = standard_config(ours).to_dict()
    lost = {k for k, v in ours.to_dict().items() if llama.get(k) != v}
    assert lost <= {
        "model_type",
        "residual",
        "ladder_layers",
        "residual_scaling",
        "layer_norms",
        "qkv_bias",
        "qk_norm",
        "architectures",
        *("num_experts_per_tok", "scoring_func", "norm_topk_prob", "expert_bias"),
    }
    assert LlamaConfig(**llama).rope_parameters == ours.rope_parameters
