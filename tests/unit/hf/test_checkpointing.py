"""Gradient checkpointing: layers run again in backward, and the gradients stay what they were."""

import pytest
import torch

from tests.unit.hf import tiny

# Named otherwise from some 5.x on; this name works in all of them.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradients_are_the_same(kind, reentrant):
    model = tiny.model(**tiny.KINDS[kind]).train()
    ids = tiny.tokens()
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(count)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    assert runs == tiny.LAYERS
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients()
    assert runs == 3 * tiny.LAYERS
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        # Reentrant checkpointing adds a state's two gradients in another order.
        torch.testing.assert_close(gradient, checkpointed[name], atol=1e-7, rtol=1e-5, msg=name)
    model.gradient_checkpointing_disable()
    gradients()
    assert runs == 4 * tiny.LAYERS


def test_without_saying_use_cache():
    """The cache is on by default; a checkpointed layer must not fill it twice."""
    model = tiny.model(residual="ladder").train()
    ids = tiny.tokens()
    plain = model(ids, labels=ids).loss
    model.gradient_checkpointing_enable()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.equal(loss, plain)
