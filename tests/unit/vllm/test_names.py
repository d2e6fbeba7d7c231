"""Each weight of an exported folder has one place in vLLM's model."""

import pytest

from megatron_ladder.vllm.names import STACKED
from megatron_ladder.vllm.supported import check_supported
from tests.unit.hf import tiny


def place(name: str) -> tuple[str, str | int | None]:
    """As vLLM's WeightsMapper takes the table: every entry that matches is applied, in turn."""
    part: str | int | None = None
    for old, (new, its_part) in STACKED.items():
        if old in name:
            name, part = name.replace(old, new, 1), its_part
    return name, part


@pytest.mark.parametrize("kind", ["ladder", "parallel", "last 2", "parallel-ladder"])
def test_every_weight_has_its_place(kind: str) -> None:
    model = tiny.model(**tiny.KINDS[kind], qkv_bias=True, qk_norm=True)
    places = [place(name) for name in model.state_dict()]
    assert len(set(places)) == len(places)
    parts: dict[str, set] = {}
    for name, part in places:
        parts.setdefault(name, set()).add(part)
    for name, found in parts.items():
        if "qkv_proj" in name:
            assert found == {"q", "k", "v"}, name
        elif "gate_up_proj" in name:
            assert found == {0, 1}, name
        else:
            assert found == {None}, name
    layer = {name.removeprefix("model.layers.0.") for name in parts if ".layers.0." in name}
    assert layer >= {
        "self_attn.qkv_proj.weight",
        "self_attn.qkv_proj.bias",
        "self_attn.q_norm.weight",
    }
    assert layer >= {"self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"}


def test_what_the_layers_do_not_have_is_refused() -> None:
    check_supported(tiny.config())
    with pytest.raises(ValueError, match="the model has experts"):
        check_supported(tiny.config(**tiny.FOUR))
    with pytest.raises(ValueError, match=r"residual_scaling is skipinit: .* Serve this model with"):
        check_supported(tiny.config(residual_scaling="skipinit"))
    with pytest.raises(ValueError, match="layer_norms is false"):
        check_supported(tiny.config(layer_norms=False))
