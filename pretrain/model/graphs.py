"""`train --cuda-graph`: forward and backward of a whole step as one CUDA graph.

The graph is captured once and replayed at each step, without Python. This is for models whose kernels take
less time than their launches. All collectives start and end inside the graph, so the overlap of ladder
layers is part of it. The optimizer's step, validation and the log stay outside and do not change.

megatron-core's FullCudaGraphWrapper does the same, but keeps its one graph in its class: a second model in
the same process would replay the first model's graph.
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
"""Steps without a graph after each start of a run. DDP's first step differs from later ones, and libraries
allocate at first use what they keep."""


def check_cuda_graph(config: TrainConfig) -> None:
    """Refuses --cuda-graph where a graph would compute something wrong, or is not tested.

    Raises:
        UserError: the reason, and what to change.
    """
    if not config.cuda_graph:
        return
    adapt = config.adapt
    reasons = {
        "desync layers in a graph are not tested": config.model.residual == "desync",
        "experts in a graph are not built yet": config.model.experts.num_moe_experts is not None,
        "there is no GPU": not torch.cuda.is_available(),
        "transfers between pipeline stages are not captured: use one stage": (
            config.parallel.pipeline_model_parallel_size > 1
        ),
        f"recompute {config.recompute} puts random states back by value, and a graph cannot: use none": (
            config.recompute != "none"
        ),
        "dropout in a graph is not tested: set model.hidden_dropout and model.attention_dropout to 0": (
            config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
        ),
        "fp8.primary_weights may move weights to other memory at an update: leave it out": (
            config.fp8.primary_weights
        ),
        "ladder layers that are turned on later are not in the graph: set adapt.gradual_steps to 0": (
            adapt.gradual_steps > 0
        ),
        "distillation in a graph is not tested: set adapt.distillation_weight to 0": (
            adapt.distillation_weight > 0
        ),
        "context parallelism in a graph is not tested: set parallel.context_parallel_size to 1": (
            config.parallel.context_parallel_size > 1
        ),
        "documents' lengths would be captured: leave --data.no-attend-across-documents out": (
            not config.data.attend_across_documents
        ),
        "a graph has the micro-batches of one batch size: leave schedule.rampup_batch_size out": (
            config.schedule.rampup_batch_size is not None
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
    """Makes a new CUDA stream the current one; call it before NCCL starts and before the model is built.

    CUDA cannot capture the default stream. Autograd accumulates a parameter's gradient on the stream that
    was current when DDP was built.
    """
    torch.cuda.set_stream(torch.cuda.Stream())
    # megatron-core requires this when CUDA's allocator uses expandable segments.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


class StepGraph:
    """Runs forward and backward of steps: the first ones as usual, then one is captured and replayed.

    Args:
        model: this rank's chunks. Their weights and gradients must keep their memory addresses; only values
            may change.
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
        """Runs forward and backward of one step.

        Args:
            forward_backward: the same function at every step. All that changes is in `micro_batches`.
            micro_batches: the same number of them, with the same shapes, at every step.

        Returns:
            What `forward_backward` returns, with this step's values. The next step overwrites them.
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
        """Captures a step's kernels in a graph. Nothing is computed yet."""
        self._batches = [
            {name: tensor.clone() for name, tensor in to_device(batch).items()}
            for batch in micro_batches
        ]
        for chunk in self._model:
            for module in chunk.modules():
                # Makes the modules create their FP8 copies of weights again, in the graph's memory.
                # Validation may replace the copies that a module holds; the graph's memory stays reserved.
                getattr(module, "_fp8_workspaces", {}).clear()
        graph = torch.cuda.CUDAGraph()
        for generator in get_all_rng_states().values():
            graph.register_generator_state(generator)  # attention needs one, even without dropout
        # thread_local: NCCL's and the loader's threads make calls that are forbidden during a capture.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = forward_backward(self._batches)
        return graph
