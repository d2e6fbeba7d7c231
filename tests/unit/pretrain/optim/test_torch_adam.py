import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.torch_adam import loading_optimizer, use_fused_kernel


def wrapped(parameters: list[Tensor]) -> Any:
    """As megatron-core's distributed optimizer wraps AdamW, in what is read here."""
    adam = torch.optim.AdamW(parameters, lr=0.1)
    chained = SimpleNamespace(optimizer=adam, _set_main_param_and_optimizer_states=None)
    return SimpleNamespace(chained_optimizers=[chained])


def steps(optimizer: Any, count: int) -> None:
    (chained,) = optimizer.chained_optimizers
    for number in range(count):
        for parameter in chained.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        chained.optimizer.step()


def test_a_checkpoint_of_before_goes_on_with_the_fused_kernel() -> None:
    """Its groups say which kernel wrote it; its `step` is one tensor for all parameters."""
    start = [torch.ones(33), torch.ones(7)]
    old = wrapped([x.clone().requires_grad_() for x in start])
    steps(old, 3)
    (adam,) = (chained.optimizer for chained in old.chained_optimizers)
    state = copy.deepcopy(adam.state_dict())
    assert not state["param_groups"][0]["fused"]
    for of_one in state["state"].values():
        of_one["step"] = state["state"][0]["step"]

    now = [p.detach().clone().requires_grad_() for p in adam.param_groups[0]["params"]]
    new = wrapped(now)
    use_fused_kernel(new)
    (chained,) = new.chained_optimizers
    with loading_optimizer(new):
        chained.optimizer.load_state_dict(state)
    assert chained.optimizer.param_groups[0]["fused"]
    steps(old, 2)
    steps(new, 2)
    assert [float(s["step"]) for s in chained.optimizer.state.values()] == [5.0, 5.0]
    for a, b in zip(now, adam.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b)
