"""A dense model has no routers, and its layers are not looked through at each step."""

from types import SimpleNamespace

from pretrain.model.routers import biases_of, load_balance, routers_of


def test_a_dense_model_answers_at_once() -> None:
    chunks = [SimpleNamespace(config=SimpleNamespace(num_moe_experts=None))]  # without layers
    assert routers_of(chunks) == biases_of(chunks) == []
    assert load_balance(chunks, 2) == {}
