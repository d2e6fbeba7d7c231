"""Makes torch's AdamW work in megatron-core's distributed optimizer.

It is used when neither Transformer Engine nor apex is installed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def use_fused_kernel(optimizer: Any) -> None:
    """Makes AdamW use its fused kernel: one pass over parameters, gradients and moments for all operations.

    The option is set in each parameter group, for two reasons: megatron-core does not pass such an argument
    to AdamW, and loading a checkpoint restores the groups' options from the time it was written.
    """
    for chained in _adams(optimizer):
        for group in chained.optimizer.param_groups:
            group["fused"] = True


@contextlib.contextmanager
def loading_optimizer(optimizer: Any) -> Iterator[None]:
    """Load a checkpoint into the optimizer inside this block: it corrects megatron-core for AdamW.

    AdamW keeps a `step` tensor for every parameter. megatron-core's distributed optimizer reads it before
    it exists, and then makes one tensor that all parameters share. With TE's or apex's fused Adam this
    block changes nothing.
    """
    adams = _adams(optimizer)
    for chained in adams:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                chained.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    yield
    for chained in adams:
        for parameter, state in chained.optimizer.state.items():
            # AdamW adds 1 in place: a shared tensor would grow by 1 for every parameter. The fused kernel
            # reads `step` on the parameter's device.
            state["step"] = state["step"].to(parameter.device, copy=True)
    use_fused_kernel(optimizer)


def _adams(optimizer: Any) -> list[Any]:
    return [o for o in optimizer.chained_optimizers if isinstance(o.optimizer, torch.optim.AdamW)]
