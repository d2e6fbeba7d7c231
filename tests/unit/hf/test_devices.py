"""`device_map`: layers that do not fit one place, by accelerate."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.hf import tiny


@pytest.mark.parametrize("kind", ["ladder", "parallel", "last 2", "parallel-ladder"])
@pytest.mark.parametrize("tied", [False, True])
def test_auto_spreads_whole_layers(kind, tied, tmp_path):
    """`auto`, with memory for three quarters of the model: the rest is read from disk at its turn."""
    model = tiny.model(**tiny.KINDS[kind], tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * 4 for p in model.parameters())
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": size * 3 // 4},
        offload_folder=tmp_path / "disk",
    )
    places = spread.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert {f"model.layers.{i}" for i in range(tiny.LAYERS)} <= places.keys(), "a layer was split"
    ids = tiny.tokens()
    with torch.no_grad():
        torch.testing.assert_close(spread(ids).logits, model(ids).logits, atol=0, rtol=0)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(spread.generate(ids, **options), model.generate(ids, **options))


def test_both_states_travel_with_the_layers(tmp_path):
    """Layers of two groups: what accelerate hands each layer are two different states, and the mask."""
    model = tiny.model(residual="ladder")
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(tiny.LAYERS)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    moved = []
    for layer in spread.model.layers:
        before = layer._hf_hook.pre_forward

        def recording(module, *args, before=before, **kwargs):
            args, kwargs = before(module, *args, **kwargs)
            moved.append((args, kwargs))
            return args, kwargs

        layer._hf_hook.pre_forward = recording
    ids = tiny.tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        logits = spread(ids, attention_mask=mask).logits
        assert torch.equal(logits, model(ids, attention_mask=mask).logits)
    assert len(moved) == tiny.LAYERS
    for (a, m, _cos, _sin, attention_mask), kwargs in moved:
        assert a.shape == m.shape == (2, 16, 32)
        assert attention_mask.shape == (2, 1, 16, 16)
        assert kwargs["past_key_values"] is not None
    assert all(not torch.equal(a, m) for (a, m, *_), _ in moved[1:])
