"""The linears' GEMM: order of its backward, and accumulation into DDP's buffer."""

import pytest
import torch

from megatron_ladder.layers.linear import _Gemm


class Collectives:
    """Stands for a sub-module's: takes the input's gradient, and gathers nothing."""

    def __init__(self, weight) -> None:
        self.weight, self.gradient = weight, None

    def gather_input_again(self) -> bool:
        return False

    def start_input_gradient(self, grad) -> None:
        assert self.weight.grad is None  # started before the weight's gradient exists
        self.gradient = grad


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_and_accumulation(fused: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 4, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(3, 4))
    weight.main_grad = torch.ones(3, 4)
    weight.grad_added_to_main_grad = False
    grad = torch.randn(5, 2, 3)
    collectives = Collectives(weight)
    output = _Gemm.apply(x, weight, collectives, fused)
    torch.testing.assert_close(output, x @ weight.t())
    output.backward(grad)
    torch.testing.assert_close(collectives.gradient, grad @ weight)
    assert x.grad is None  # it goes on with the collective
    expected = grad.flatten(0, 1).t() @ x.flatten(0, 1)
    if fused:
        torch.testing.assert_close(weight.main_grad, 1 + expected)
        assert weight.grad_added_to_main_grad
    else:
        torch.testing.assert_close(weight.grad, expected)


def test_a_frozen_weight_costs_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    collectives = Collectives(weight)
    x = torch.randn(5, 2, 4, requires_grad=True)
    _Gemm.apply(x, weight, collectives, False).sum().backward()
    assert weight.grad is None
    assert collectives.gradient is not None
