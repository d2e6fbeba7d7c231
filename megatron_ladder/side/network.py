"""The side network: small transformer blocks. Each reads a state of the backbone through a gate."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_ladder.side.config import TEMPERATURE


class Linear(torch.nn.Linear):
    """A linear without bias that every tensor-parallel rank has whole."""

    def __init__(self, config: Any, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
        torch.nn.init.normal_(self.weight, std=config.init_method_std)
        _sum_with_sequence_parallelism(self.weight, config)


class Rung(MegatronModule):
    """The gate before a block: mu h_side + (1 - mu) Down(h), mu = sigmoid(alpha / T) (section 3.2)."""

    def __init__(self, config: Any, hidden_size: int) -> None:
        super().__init__(config=config)
        self.down = Linear(config, hidden_size, config.hidden_size)
        self.gate = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        _sum_with_sequence_parallelism(self.gate, config)

    def forward(self, side: Tensor, state: Tensor) -> Tensor:
        """The block's input, [s, b, h / r].

        Args:
            side: the side network's state, [s, b, h / r].
            state: the backbone's, after the layer, [s, b, h].
        """
        mu = torch.sigmoid(self.gate / TEMPERATURE)
        return mu * side + (1 - mu) * self.down(state)


class SideNetwork(MegatronModule):
    """This rank's part of the side network, beside one chunk of the backbone.

    With sequence parallelism all shapes have s/tp instead of s.

    Args:
        blocks: of `build_gpt_model` with `blocks_only`: a block for each layer of the backbone's chunk.
        kept: the layers of the whole backbone that have a block, from 0.
        hidden_size: the backbone's.
        first: with the projection of the embedding.
        last: with the final up-projection.
    """

    def __init__(
        self,
        blocks: GPTModel,
        kept: tuple[int, ...],
        hidden_size: int,
        *,
        first: bool,
        last: bool,
    ) -> None:
        config = blocks.decoder.config
        super().__init__(config=config)
        own = [layer for layer in blocks.decoder.layers if layer.layer_number - 1 in kept]
        blocks.decoder.layers = torch.nn.ModuleList(own)
        blocks.decoder.num_layers_per_pipeline_rank = len(own)
        self.kept = kept
        self.layers = tuple(layer.layer_number - 1 for layer in own)
        """Those of `kept` in this chunk."""
        small = config.hidden_size
        self.first = Linear(config, hidden_size, small) if first else None
        self.rungs = torch.nn.ModuleList([Rung(config, hidden_size) for _ in own])
        self.blocks = blocks
        self.up = Linear(config, small, hidden_size) if last else None
        self._states: list[Tensor] = []
        for number, layer in enumerate(own):
            hook = partial(weakly(self._through_gate), number)
            layer.register_forward_pre_hook(hook, with_kwargs=True)

    def forward(self, x: Tensor, states: list[Tensor], documents: Any = None) -> Tensor:
        """Runs the blocks of this chunk.

        Args:
            x: the first chunk's embedding, [s, b, h]; or the side network's state from the stage before,
                [s, b, h / r].
            states: the backbone's after each of `layers`, [s, b, h].
            documents: of the micro-batch, where they do not attend to each other.

        Returns:
            The side network's state, [s, b, h / r]; of the last chunk the up-projection of it, [s, b, h].
        """
        self._states = states
        self.blocks.set_input_tensor(x if self.first is None else self.first(x))
        x = self.blocks(None, None, None, packed_seq_params=documents)
        self._states = []
        return x if self.up is None else self.up(x)

    def _through_gate(self, number: int, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["hidden_states"] = self.rungs[number](kwargs["hidden_states"], self._states[number])
        return args, kwargs

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The tensors of all blocks are stacked in the order of the layers, without the dropped ones."""
        assert not sharded_offsets
        state: dict[str, Any] = {}
        group = parallel_state.get_tensor_model_parallel_group()
        for name, module in (("first", self.first), ("up", self.up)):
            if module is not None:
                state |= sharded_state_dict_default(
                    module, f"{prefix}{name}.", (), metadata, tp_group=group
                )
        for number, layer in enumerate(self.layers):
            place = [(0, self.kept.index(layer), len(self.kept))]
            modules: tuple[tuple[str, Any], ...] = (
                ("rungs", self.rungs[number]),
                ("blocks.decoder.layers", self.blocks.decoder.layers[number]),
            )
            for name, module in modules:
                own = f"{prefix}{name}.{number}."
                part = module.sharded_state_dict(own, place, metadata)
                replace_prefix_for_sharding(part, own, f"{prefix}{name}.")
                state |= part
        return state


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object, for a hook of a module that the object refers to."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        found = reference()
        assert found is not None, "the side network of this model is gone"
        return found(*args)

    return call


def _sum_with_sequence_parallelism(parameter: Any, config: Any) -> None:
    """With sequence parallelism each rank has a part of the sequence, so the gradient of a weight that
    every rank has is partial. This attribute makes megatron-core sum it over the tensor-parallel ranks."""
    parameter.sequence_parallel = config.sequence_parallel
