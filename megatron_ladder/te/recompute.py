"""Recomputation of what ran in FP8: in FP8 again, with the scales of the first time.

Backward runs outside Transformer Engine's autocast, so that a sub-module which is computed again there
(recompute.py) would be computed in bf16, silently. megatron-core's own recomputation calls TE's
checkpoint, which does what this does. Imports Transformer Engine only once something runs in FP8.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Fp8Region:
    """One call of a sub-module in FP8, or in what precision the layer runs in; made when it is called."""

    def __init__(self) -> None:
        self._recipe: Any = None
        # On a machine with Transformer Engine megatron-core has imported it.
        if "transformer_engine.pytorch" not in sys.modules:
            return
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

        if manager.is_fp8_enabled():
            self._recipe, self._group = manager.get_fp8_recipe(), manager.get_fp8_group()
            self._holds_first = manager.quantization_state.is_first_fp8_module

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the first time: weights are quantised for backward too, delayed scales are kept."""
        if self._recipe is None:
            yield
            return
        from transformer_engine.pytorch.distributed import activation_recompute_forward

        with activation_recompute_forward(activation_recompute=True, recompute_phase=False):
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Around the second time, in backward; gradients are recorded inside only.

        With delayed scaling the backward of a model's first FP8 module, the last to run, finds the
        next step's scales of all gradients: no other call may.
        """
        if self._recipe is None:
            yield
            return
        from transformer_engine.pytorch import fp8_autocast
        from transformer_engine.pytorch.distributed import activation_recompute_forward
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

        with (
            activation_recompute_forward(activation_recompute=True, recompute_phase=True),
            fp8_autocast(enabled=True, fp8_recipe=self._recipe, fp8_group=self._group),
        ):
            manager.quantization_state.is_first_fp8_module = self._holds_first
            yield
