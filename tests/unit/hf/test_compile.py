"""torch.compile: decoding through a static cache is one graph, compiled once for all positions."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from tests.unit.hf import tiny


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("ladder", "sdpa"),
        pytest.param("parallel", "sdpa", marks=pytest.mark.slow),
        ("last 2", "eager"),
        ("parallel-ladder 0 and 2", "sdpa"),
    ],
)
def test_decoding_is_one_graph(kind, attention):
    torch._dynamo.reset()
    model = tiny.model(**tiny.KINDS[kind], rope_parameters=tiny.LLAMA3)
    model.set_attn_implementation(attention)
    ids = tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)

    @torch.no_grad()
    def decode(step):
        """Six tokens; the logits of each, [batch, 6, vocabulary]."""
        cache = StaticCache(config=model.config, max_cache_len=16)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        seen = mask
        logits = []
        for _ in range(6):
            token = out.logits[:, -1:].argmax(-1)
            seen = torch.cat([seen, torch.ones_like(token)], 1)
            out = step(
                token,
                attention_mask=full(seen),
                position_ids=seen.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
            logits.append(out.logits)
        return torch.cat(logits, 1)

    def full(seen):
        """As long as the cache, that the shape stays; places not filled yet are behind the causal mask."""
        return torch.nn.functional.pad(seen, (0, 16 - seen.shape[1]))

    expected = decode(model)
    assert len(expected.argmax(-1).unique()) > 3
    torch.testing.assert_close(decode(compiled), expected, atol=1e-5, rtol=1e-5)
    assert graphs.frame_count == 1, "one graph, no break, no recompilation as the position moves"


def test_the_whole_forward_is_one_graph():
    torch._dynamo.reset()
    model = tiny.model(residual="ladder")
    ids = tiny.tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, expected = (m(ids, labels=ids, use_cache=False).loss for m in (compiled, model))
    torch.testing.assert_close(loss, expected)
    assert torch._dynamo.explain(model)(ids, use_cache=False).graph_break_count == 0
