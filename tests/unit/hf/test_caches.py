"""Generation through transformers' caches gives what it gives without one."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.unit.hf import tiny

NEW = 20
KINDS = tiny.KINDS | {"windows": tiny.WINDOWS}


def cache_of(kind: str, model, length: int):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length)


@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["ladder", "parallel", "last 2", "parallel-ladder", "windows"])
def test_generation_through_each_cache(kind, attention, how):
    """A batch of two lengths, the shorter padded on its left."""
    model = tiny.model(**KINDS[kind])
    model.set_attn_implementation(attention)
    ids = tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = how | {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "disable_compile": True}
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert len(set(uncached[0, 9:].tolist())) > 3, "a model that repeats itself proves little"
    for cache in ("dynamic", "static"):
        cached = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
        assert torch.equal(cached, uncached), cache
    alone = model.generate(ids[1:, 4:], **options)
    assert torch.equal(alone[0, 5:], uncached[1, 9:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["ladder", "windows"])
def test_chunks_through_the_cache(kind, cache, padded):
    """A prompt given in pieces of any size, the last of one token."""
    model = tiny.model(**KINDS[kind])
    ids = tiny.tokens(2, 16)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    past, parts, begin = cache_of(cache, model, 20), [], 0
    for size in (5, 7, 3, 1):
        end = begin + size
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end] if padded else None,
            position_ids=positions[:, begin:end] if padded else None,
            past_key_values=past,
        )
        assert out.past_key_values is past
        parts.append(out.logits)
        begin = end
    assert int(past.get_seq_length()) == 16
    chunked = torch.cat(parts, 1)
    real = mask.bool()
    torch.testing.assert_close(chunked[real], whole[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_prefills_in_chunks(cache):
    model = tiny.model(residual="ladder")
    ids = tiny.tokens(2, 17)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"cache_implementation": cache, "disable_compile": True}
    whole = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), whole)
