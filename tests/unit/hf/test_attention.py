"""Each implementation of attention that transformers chooses from, and the masks it makes for them."""

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flash_attention
from transformers.masking_utils import sdpa_mask

from tests.unit.hf import tiny


def left_padded(batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    """Token ids and their mask; the last sequence starts with five tokens of padding."""
    ids = tiny.tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[-1, :5] = 0
    return ids, mask


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"qk_norm": True}])
@pytest.mark.parametrize("padded", [False, True])
def test_eager_is_sdpa(changes, padded):
    model = tiny.model(residual="ladder", **changes)
    assert model.config._attn_implementation == "sdpa"
    ids, mask = left_padded()
    mask = mask if padded else torch.ones_like(mask)
    labels = ids.masked_fill(mask == 0, -100)
    labels[-1, 5] = -100  # the prediction from padding
    results = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        assert model.config._attn_implementation == kind
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        step = model(
            ids[:, :1],
            attention_mask=torch.cat([mask, mask[:, :1] * 0 + 1], 1),
            past_key_values=out.past_key_values,
        )
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        results.append((out.logits[mask.bool()], step.logits, gradients))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def emulated_flash(query, key, value, attention_mask, query_length, is_causal, **options):
    """What flash_attention_2 computes: queries are the last of the keys, padding is looked at by none.

    Args:
        query: [batch, length, heads, head_dim]; key and value [batch, cached, fewer heads, head_dim].
        attention_mask: None when there is no padding, or [batch, cached].
    """
    assert query.shape[1] == query_length
    assert options["dropout"] == 0
    assert options["position_ids"].shape[1] == query_length
    ratio = query.shape[2] // key.shape[2]
    assert ratio == 2
    key, value = (x.repeat_interleave(ratio, dim=2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * options["softmax_scale"]
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
    assert is_causal
    before = key.shape[1] - query_length
    allowed = allowed.tril(before)[None, None]
    if (window := options["sliding_window"]) is not None:
        allowed = allowed.triu(before - window + 1)
    if attention_mask is not None:
        assert attention_mask.shape == key.shape[:2]
        allowed = allowed & attention_mask[:, None, None].bool()
    weights = scores.masked_fill(~allowed, -1e9).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", [{"residual": "ladder", "ladder_layers": 2}, tiny.WINDOWS])
def test_flash_attention_is_called_rightly(changes, name, padded, monkeypatch):
    """transformers' own caller with only the kernel emulated: there is none for the CPU."""
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", emulated_flash)
    model = tiny.model(**changes)
    assert model._supports_flash_attn
    ids, mask = left_padded()
    mask = mask if padded else None
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    results = []
    for kind in ("sdpa", name):
        model.config._attn_implementation = kind  # past the check that the package is there
        logits = model(ids, attention_mask=mask).logits
        logits = logits[mask.bool()] if padded else logits
        results.append((logits, model.generate(ids, attention_mask=mask, **options)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_masks_by_hand():
    """Two new tokens after two cached ones; the second row starts with padding."""
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        assert (module.is_causal, module.num_key_value_groups, kwargs["scaling"]) == (
            True,
            2,
            8**-0.5,
        )
        assert query.shape[1:] == (4, key.shape[2] if len(seen) < tiny.LAYERS else 2, 8)
        assert key.shape[1] == value.shape[1] == 2
        seen.append(attention_mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", sdpa_mask)
    model = tiny.model(residual="ladder")
    model.set_attn_implementation("by_hand")
    ids, padding = tiny.tokens(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    first = model(ids[:, :2], attention_mask=padding[:, :2])
    model(ids[:, 2:], attention_mask=padding, past_key_values=first.past_key_values)
    assert len(seen) == 2 * tiny.LAYERS
    for mask in seen[tiny.LAYERS :]:
        assert mask[:, 0].int().tolist() == [
            [[1, 1, 1, 0], [1, 1, 1, 1]],
            [[0, 0, 0, 0], [0, 0, 0, 1]],
        ]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_sequences_packed_by_their_positions(kind):
    model = tiny.model(residual="ladder")
    model.set_attn_implementation(kind)
    one, two = tiny.tokens(1, 6), tiny.tokens(1, 9)
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    packed = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(one).logits, model(two).logits], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    model = tiny.model(residual="ladder")
    ids = tiny.tokens()
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"must be \[batch, 17\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
