"""`train --cuda-graph`: forward and backward of a whole step as one CUDA graph.

Captured once, it is replayed at each step without Python: for models whose kernels take less time than
launching them. All collectives start and end inside, so that ladder layers' overlap is in it. The
optimizer's step, validation and the log are outside, as they are without it.

megatron-core's FullCudaGraphWrapper does the same, but keeps its one graph in its class: a second model in
a process would be given the first one's.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch import Tensor

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.data.batches import Batch, to_device

WARM_UP_STEPS = 3
"""Steps of each start without a graph: DDP's first goes another way, and libraries make at first use what
they keep."""


def check_cuda_graph(config: TrainConfig) -> None:
    """Refuses what a graph would do wrongly, or what nobody has looked into.

    Raises:
        UserError: with the reason.
    """
    if not config.cuda_graph:
        return
    adapt = config.adapt
    reasons = {
        "desync layers in a graph are not tested": config.model.residual == "desync",
        "there is no GPU": not torch.cuda.is_available(),
        "what pipeline stages send is not captured: use one": (
            config.parallel.pipeline_model_parallel_size > 1
        ),
        f"recompute {config.recompute} puts random states back by their numbers: use none": (
            config.recompute != "none"
        ),
        "dropout in a graph is not tested: set model.hidden_dropout and model.attention_dropout to 0": (
            config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
        ),
        "fp8.primary_weights may come to lie elsewhere at an update: leave it out": (
            config.fp8.primary_weights
        ),
        "layers that are turned on later are not in it: set adapt.gradual_steps to 0": (
            adapt.gradual_steps > 0
        ),
        "distillation in a graph is not tested: set adapt.distillation_weight to 0": (
            adapt.distillation_weight > 0
        ),
        "compiled layers in a graph are not tested: leave --compile out": config.compile,
        "a replayed step has no ranges to trace: leave profile.first_step out": (
            config.profile.first_step is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"--cuda-graph: {reason}, or leave --cuda-graph out")


def use_own_stream() -> None:
    """Makes the run's work go to a stream of its own; call it before NCCL starts and the model is built.

    CUDA captures no default stream, and autograd adds up a parameter's gradient on the stream on which DDP
    was built.
    """
    torch.cuda.set_stream(torch.cuda.Stream())
    # megatron-core asks for it, where CUDA's allocator may put its memory together of pieces.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


class StepGraph:
    """Runs forward and backward of a model's steps: some as they are, then one captured, and its replays.

    Args:
        model: this rank's chunks. Weights and gradients stay where they are; only their numbers change.
    """

    def __init__(self, model: list[Any]) -> None:
        self._model = model
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[Batch] = []
        self._outputs: list[dict[str, Tensor]] = []

    def run(
        self,
        forward_backward: Callable[[list[Batch]], list[dict[str, Tensor]]],
        micro_batches: list[Batch],
    ) -> list[dict[str, Tensor]]:
        """One step's.

        Args:
            forward_backward: the same at every step; whatever else changes is in `micro_batches`.
            micro_batches: as many, and of the same shapes, at every step.

        Returns:
            What it returned, with this step's numbers: to be read before the next step.
        """
        if self._graph is None and self._steps < WARM_UP_STEPS:
            self._steps += 1
            return forward_backward(micro_batches)
        if self._graph is None:
            self._graph = self._captured(forward_backward, micro_batches)
        for held, batch in zip(self._batches, micro_batches, strict=True):
            for name, tensor in held.items():
                tensor.copy_(batch[name], non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _captured(self, forward_backward: Callable, micro_batches: list[Batch]) -> Any:
        """Launches nothing: what would be launched is written down."""
        self._batches = [
            {name: tensor.clone() for name, tensor in to_device(batch).items()}
            for batch in micro_batches
        ]
        for chunk in self._model:
            for module in chunk.modules():
                # FP8 copies of weights are made anew, in the graph's memory: validation may replace those
                # that a module holds, and this memory is given to nobody else.
                getattr(module, "_fp8_workspaces", {}).clear()
        graph = torch.cuda.CUDAGraph()
        for generator in get_all_rng_states().values():
            graph.register_generator_state(generator)  # attention asks for one, without dropout too
        # thread_local: meanwhile NCCL's and the loader's threads call what a capture may not.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = forward_backward(self._batches)
        return graph
