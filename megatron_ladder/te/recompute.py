"""Recomputes in FP8 what ran in FP8, with the same scales.

Backward runs outside Transformer Engine's (TE's) autocast. So a sub-module that is recomputed there
(layers/recompute.py) would be computed in bf16, without an error. megatron-core's own recomputation calls
TE's checkpoint function, which does the same as this file. TE's functions are imported only when needed.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Fp8Region:
    """The precision of one call of a sub-module: FP8 with its recipe, or the layer's own.

    Make it when the sub-module is called: it reads TE's present autocast.
    """

    def __init__(self) -> None:
        self._recipe: Any = None
        # Where Transformer Engine is installed, megatron-core has imported it already.
        if "transformer_engine.pytorch" not in sys.modules:
            return
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

        if manager.is_fp8_enabled():
            self._recipe, self._group = manager.get_fp8_recipe(), manager.get_fp8_group()
            self._holds_first = manager.quantization_state.is_first_fp8_module

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Use it around the first run: it quantises weights for backward too, and keeps delayed scales."""
        if self._recipe is None:
            yield
            return
        from transformer_engine.pytorch.distributed import activation_recompute_forward

        with activation_recompute_forward(activation_recompute=True, recompute_phase=False):
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Use it around the second run, in backward. Turn gradients on only inside it.

        With delayed scaling the backward of the model's first FP8 module runs last. It computes the
        scales of all gradients for the next step. No other module's backward may do that.
        """
        if self._recipe is None:
            yield
            return
        from transformer_engine.pytorch import autocast
        from transformer_engine.pytorch.distributed import activation_recompute_forward
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

        with (
            activation_recompute_forward(activation_recompute=True, recompute_phase=True),
            autocast(enabled=True, recipe=self._recipe, amax_reduction_group=self._group),
        ):
            manager.quantization_state.is_first_fp8_module = self._holds_first
            yield
