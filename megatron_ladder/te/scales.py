"""Stores the scales of delayed scaling in checkpoints as numbers.

Transformer Engine stores them as a pickle, and by default refuses to load it. So a run in FP8 with delayed
scaling could be resumed only with an environment variable that lets any pickle run any code. The other
recipes keep nothing from one step to the next. Imported only where Transformer Engine is installed.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor
from transformer_engine.pytorch import LayerNormLinear, Linear
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.ops import BasicOperation


def store_scales_as_numbers(model: Any) -> None:
    """Changes the extra state that the linears of `model` store in checkpoints and load from them.

    Norms and attention are not in FP8 here. Their extra state is empty.
    """
    for module in model.modules():
        if isinstance(module, Linear | LayerNormLinear):
            module.get_extra_state = partial(_state, module)
            module.set_extra_state = partial(_set_state, module)
        elif isinstance(module, TransformerEngineBaseModule | BasicOperation):
            module.get_extra_state = _nothing
            module.set_extra_state = _ignore


@contextlib.contextmanager
def scales_kept(chunks: list[Any]) -> Iterator[None]:
    """Within the `with`, forward passes leave no trace in the scales and their histories.

    Transformer Engine notes the maxima of every forward pass, also where there is no backward.
    """
    linears = [
        m for chunk in chunks for m in chunk.modules() if isinstance(m, Linear | LayerNormLinear)
    ]
    before = {
        linear: [x.clone() for x in _scales(linear)]
        for linear in linears
        if "scaling_fwd" in linear.fp8_meta
    }
    yield
    for linear in linears:
        if "scaling_fwd" not in linear.fp8_meta:
            continue
        # One that had none before, before the first step, begins with scales of 1 and empty histories.
        fresh = [
            (torch.ones_like, torch.zeros_like)[i % 2](x) for i, x in enumerate(_scales(linear))
        ]
        for x, kept in zip(_scales(linear), before.get(linear, fresh), strict=True):
            x.copy_(kept)


def _nothing() -> Tensor:
    return torch.empty(0)


def _ignore(_: Tensor) -> None:
    pass


def _scales(linear: Any) -> list[Tensor]:
    """Scales and their histories of maxima: those of inputs, weight and output, then those of gradients."""
    found = linear.fp8_meta["scaling_fwd"], linear.fp8_meta["scaling_bwd"]
    return [x for state in found for x in (state.scale, state.amax_history)]


def _state(linear: Any) -> Tensor:
    if "scaling_fwd" not in linear.fp8_meta:  # before the first step
        return _nothing()
    return torch.cat([x.detach().flatten().float().cpu() for x in _scales(linear)])


def _set_state(linear: Any, state: Tensor) -> None:
    if state.numel() == 0:
        return
    with torch.no_grad(), get_fp8_context(linear.config):
        linear.init_fp8_metadata(num_gemms=1)
    scales = _scales(linear)
    parts = state.split([x.numel() for x in scales])
    for scale, part in zip(scales, parts, strict=True):
        scale.copy_(part.view_as(scale))
