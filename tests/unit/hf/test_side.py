"""The modelling file of side-tuned models."""

import pytest
import torch
from transformers import DynamicCache

from megatron_ladder.fields.windows import layer_windows
from megatron_ladder.hf import LadderModel, LadderSideConfig, LadderSideForCausalLM
from megatron_ladder.hf.from_hf import read_hf_config, to_model_config
from megatron_ladder.hf.model_config import SLIDING
from tests.unit.hf import tiny


def model(**changes) -> LadderSideForCausalLM:
    fields = tiny.config(residual="ladder").to_dict() | {"side_reduction": 4} | changes
    built = LadderSideForCausalLM(LadderSideConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "gate" not in name or "proj" in name:
                parameter.normal_(std=0.15)
    return built


@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_through_a_cache(attention, how):
    """A batch of two lengths, the shorter padded on its left."""
    built = model(side_layers=[0, 3])
    built.set_attn_implementation(attention)
    ids = tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = how | {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "disable_compile": True}
    uncached = built.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert len(set(uncached[0, 9:].tolist())) > 3, "a model that repeats itself proves little"
    cached = built.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, uncached)
    with pytest.raises(ValueError, match="takes a DynamicCache, not a StaticCache"):
        built.generate(ids, attention_mask=mask, cache_implementation="static", **options)


def test_a_folder_with_windows_is_read_again(tmp_path):
    fields = {"sliding_window": 4, "layer_types": tiny.WINDOWS["layer_types"]}
    model(**fields).save_pretrained(tmp_path)
    found = to_model_config(read_hf_config(tmp_path), tmp_path / "config.json")
    windows = [4 if kind == SLIDING else None for kind in tiny.WINDOWS["layer_types"]]
    assert list(layer_windows(found)) == windows


def test_the_recurrence_by_hand():
    """The paper's section 3.2, written once more."""
    built = model(side_layers=[1, 2])
    ids = tiny.tokens(2, 7)
    with torch.no_grad():
        for number, block in enumerate(built.model.side.blocks):
            block.gate.fill_(0.03 * (number + 1))
        seen = []
        for layer in built.model.layers:
            layer.register_forward_hook(lambda _, __, output: seen.append(output[1]))
        logits = built(ids, use_cache=False).logits
        side = built.model.side
        s = built.model.embed_tokens(ids) @ side.first.weight.T
        for block, layer, alpha in zip(side.blocks, (1, 2), (0.03, 0.06), strict=True):
            mu = 1 / (1 + torch.exp(torch.tensor(-alpha / 0.1)))
            x = mu * s + (1 - mu) * (seen[layer] @ block.down.weight.T)
            s = alone(built, block, x)
        expected = built.lm_head(built.model.norm(s @ side.up.weight.T))
    torch.testing.assert_close(logits, expected)


def alone(built, block, x):
    """A block of the side network as the only layer of a standard model of its width."""
    config = built.config.blocks()
    config.num_hidden_layers = 1
    whole = LadderModel(config).eval()
    whole.layers[0].load_state_dict(block.layer.state_dict())
    whole.norm = torch.nn.Identity()
    return whole(inputs_embeds=x, use_cache=False).last_hidden_state


def test_a_prompt_in_pieces():
    built = model()
    ids, past, parts, begin = tiny.tokens(2, 16), DynamicCache(), [], 0
    whole = built(ids, use_cache=False).logits
    for size in (5, 7, 3, 1):
        parts.append(built(ids[:, begin : begin + size], past_key_values=past).logits)
        begin += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize(
    "fields", [{"side_reduction": 3}, {"side_layers": [2, 1]}, {"side_layers": [4]}]
)
def test_what_does_not_fit_is_refused(fields):
    with pytest.raises(ValueError, match="side_"):
        model(**fields)
