"""torch's AdamW under megatron-core's distributed optimizer: without Transformer Engine and apex."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def use_fused_kernel(optimizer: Any) -> None:
    """One pass over parameters, gradients and moments, in place of one an operation.

    Said in each group, as megatron-core gives AdamW no such argument, and as loading a checkpoint puts the
    groups' options back that it was written with.
    """
    for chained in _adams(optimizer):
        for group in chained.optimizer.param_groups:
            group["fused"] = True


@contextlib.contextmanager
def loading_optimizer(optimizer: Any) -> Iterator[None]:
    """Load a checkpoint into the optimizer inside this: it mends megatron-core for AdamW.

    AdamW keeps a `step` tensor for every parameter, which megatron-core's distributed optimizer
    reads before it exists, then does not find among the loaded tensors, and then makes one tensor
    shared by all parameters. With TE's or apex's fused Adam there is nothing to mend.
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
        chained._set_main_param_and_optimizer_states = _keeping_step(chained)
    yield
    for chained in adams:
        del chained._set_main_param_and_optimizer_states
        for parameter, state in chained.optimizer.state.items():
            # AdamW adds 1 to it in place: shared, it would count every parameter. The fused kernel reads it
            # where the parameter is.
            state["step"] = state["step"].to(parameter.device, copy=True)
    use_fused_kernel(optimizer)


def _adams(optimizer: Any) -> list[Any]:
    return [o for o in optimizer.chained_optimizers if isinstance(o.optimizer, torch.optim.AdamW)]


def _keeping_step(chained: Any) -> Callable[[Any, dict[str, Any]], None]:
    """The optimizer's own setter of one parameter's state, which leaves `step` as it is."""
    set_states = chained._set_main_param_and_optimizer_states

    def set_states_but_step(model_param: Any, tensors: dict[str, Any]) -> None:
        step = chained._get_main_param_and_optimizer_states(model_param)["step"]
        set_states(model_param, {"step": step, **tensors})

    return set_states_but_step
