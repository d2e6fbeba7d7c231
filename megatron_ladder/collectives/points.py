"""The tensor-parallel collectives around a sub-module, each split into a start and a wait.

A sub-module's linears do not communicate (linear.py). The layer communicates at four points:

    input_start -> input_wait -> sub-module -> output_start -> output_wait -> add to the residual

                    forward                             backward
    tensor parallel
      input         identity                            all-reduce of the input's gradient
      output        all-reduce                          identity
    with sequence parallelism
      input         all-gather                          reduce-scatter of the input's gradient
      output        reduce-scatter                      all-gather of the output's gradient

In backward the points run in the opposite order. The sub-module's first linear starts the reduction of
the input's gradient, as early as possible (linear.py). The backward of `input_start` waits for it.
Between a start and its wait a tensor is in flight: code may pass it on, but must not read it.
docs/design/overlap.md shows when each point runs, and why.

A point is a node in autograd's graph only where backward has work to do there. Each node takes as much
time in Python as a small kernel takes on the GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ladder.collectives import quantised_sum
from megatron_ladder.collectives.backward_order import natural_number, run_no_sooner_than
from megatron_ladder.collectives.flight import Flight, uncounted, used_here
from megatron_ladder.collectives.names import ALL_GATHER, REDUCE_SCATTER
from megatron_ladder.collectives.placeholder import Fp8, fp8_of, placeholder, standing_for
from megatron_ladder.collectives.ranges import named
from megatron_ladder.config import AllReduce

Group = dist.ProcessGroup
Scale = float | Tensor | None
"""What a sub-module's output is multiplied by; None: nothing (layers/norm.py)."""

# megatron-core passes a layer's outputs on unchanged, and a sub-module passes its input unchanged to its
# first linear. So the collectives of a tensor can be stored as an attribute of that tensor.
_SUBMODULE = "_submodule_collectives"


class SubmoduleCollectives:
    """The collectives of one call of one sub-module: handles and buffers, forward and backward.

    Args:
        group: the tensor-parallel ranks.
        sequence_parallel: residual states are cut along the sequence, [s/tp, b, h].
        all_reduce: how the output is summed without sequence parallelism.
        readers: how many linears read the input.
    """

    def __init__(
        self,
        group: Group,
        sequence_parallel: bool,
        all_reduce: AllReduce = "exact",
        readers: int = 1,
    ) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel
        self._all_reduce = all_reduce
        self._readers, self._gradients = readers, 0
        self.number: int | None = None
        """The sequence number of the node with which this sub-module's backward ends."""
        self._input_shard: Tensor | None = None
        self._gathers_again = self._again_for_forward = False
        self.fp8_input: Fp8 | None = None
        """The FP8 tensor that the sub-module's first linear reads, if any. `input_start` takes it from
        here."""
        self.gradient_in_fp8: Callable[[Tensor, Group], Tensor] | None = None
        """Quantises a rank's part of the output's gradient, when the sub-module's last linear is in FP8."""
        self._input: Flight | None = None
        self.scale: Scale = None
        """What the output is multiplied by when it has come."""
        self._output: Flight | None = None
        self._partial_gradient: Tensor | None = None
        self._input_gradient: Flight | None = None
        self._output_gradient: Flight | None = None
        self._input_again: Flight | None = None

    # Forward.

    def start_input(self, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            self.fp8_input = fp8_of(x)
            return x.view_as(x)
        self._input_shard = standing_for(x.detach(), fp8_of(x))
        with named("input: start"):
            self._input = self._all_gather(x, columns=False)
        self.fp8_input = fp8_of(self._input.result)
        return self._input.result

    def wait_input(self) -> None:
        if self._input is not None:
            with named("input: wait"):
                self._input.arrive()
            self._input = None

    def start_output(self, x: Tensor) -> Tensor:
        if not self._gathers_again:
            self._input_shard = None
        with named("output: start"):
            if self.sequence_parallel:
                self._output = self._reduce_scatter(x)
            elif self._all_reduce == "int8":
                work = quantised_sum.start(uncounted(x), self.group)
                self._output = Flight(x, x, work)
            else:
                # The sum is in place: `x` is the new output of a GEMM, and no backward formula reads it.
                self._output = self._sum(x)
        return self._output.result

    def wait_output(self) -> None:
        if self._output is not None:
            with named("output: wait"):
                self._output.arrive()
            self._output = None

    # What the points of a layer ask of any sub-module's collectives.

    def arrived(self, x: Tensor) -> Tensor:
        """`input_wait` of the input `x`."""
        self.wait_input()
        return used_here(x)

    def sent(self, x: Tensor, scale: Scale) -> Tensor:
        """`output_start` of the output `x`."""
        self.scale = scale
        if self.sequence_parallel:
            x = _OutputStart.apply(x, self)
        else:
            # The sum is written to `x`'s own memory, without autograd: the gradient of `x` is the gradient
            # of the sum. `x` is not marked dirty: Transformer Engine's outputs are views, and autograd
            # allows no function to change those in place.
            self.start_output(x)
        return take_part(x, self)

    def complete(self, x: Tensor) -> Tensor:
        """`output_wait` of the output `x`."""
        if self.sequence_parallel:
            x = used_here(_OutputWait.apply(x, self))
        else:
            self.wait_output()
        return scaled(x, self.scale)

    # Backward.

    def start_input_gradient(self, grad: Tensor) -> None:
        """Starts the sum of the partial gradients, [s, b, h], over the ranks, when every linear that reads
        the input has brought its own. It may overwrite `grad`."""
        assert self._input_gradient is None, "a linear that reads the input has started its sum"
        grad = grad.contiguous()
        if self._partial_gradient is not None:
            grad = self._partial_gradient.add_(grad)
        self._gradients += 1
        if self._gradients < self._readers:
            self._partial_gradient = grad
            return
        self._partial_gradient, self._gradients = None, 0
        with named("input gradient: start"):
            start = self._reduce_scatter if self.sequence_parallel else self._sum
            self._input_gradient = start(grad)

    def wait_input_gradient(self) -> Tensor:
        assert self._input_gradient is not None, "the sub-module's backward has not run"
        flying, self._input_gradient = self._input_gradient, None
        with named("input gradient: wait"):
            return flying.arrive()

    def start_output_gradient(self, grad: Tensor) -> None:
        with named("output gradient: start"):
            if self.gradient_in_fp8 is not None:
                grad = self.gradient_in_fp8(grad, self.group)
            self._output_gradient = self._all_gather(grad)
        self.start_input_again()

    def wait_output_gradient(self) -> Tensor:
        assert self._output_gradient is not None
        flying, self._output_gradient = self._output_gradient, None
        with named("output gradient: wait"):
            return flying.arrive()

    # With sequence parallelism the gathered input, tp times the size of its shard, need not be kept for
    # backward: backward gathers it again, while other work runs.

    def gather_input_again(self, *, for_forward: bool = False) -> bool:
        """Called in forward by code that does not want to keep the gathered input for backward.

        Args:
            for_forward: backward will also run the sub-module's forward again.

        Returns:
            Whether backward will gather the input again. False when nothing was gathered, or when several
            linears read the input: the caller must then keep its input.
        """
        self._gathers_again = self._input_shard is not None and self._readers == 1
        self._again_for_forward = for_forward
        shard = self._input_shard if self._gathers_again else None
        if shard is not None and (fp8 := fp8_of(shard)) is not None:
            fp8.keep(rows=for_forward)
        return self._gathers_again

    def start_input_again(self) -> None:
        if self._gathers_again and self._input_again is None:
            assert self._input_shard is not None
            rows = self._again_for_forward
            self._input_again = self._all_gather(self._input_shard, rows=rows)

    def wait_input_again(self) -> Tensor:
        self.start_input_again()
        assert self._input_again is not None, "gather_input_again was not called"
        flying, self._input_again = self._input_again, None
        # It is gathered now, once: a recomputed sub-module keeps it for its own backward.
        self._input_shard, self._gathers_again = None, False
        return flying.arrive()

    def _sum(self, x: Tensor) -> Flight:
        work = dist.all_reduce(uncounted(x), group=self.group, async_op=True)
        return Flight(x, x, work)

    def _all_gather(self, x: Tensor, *, rows: bool = True, columns: bool = True) -> Flight:
        """Starts an all-gather of `x`; of an FP8 tensor only the layouts that will be read."""
        shape = (x.size(0) * self.group.size(), *x.shape[1:])
        if (fp8 := fp8_of(x)) is not None:
            whole, work = fp8.all_gather(self.group, rows=rows, columns=columns)
            return Flight(standing_for(placeholder(x, *shape), whole), x, work)
        x = x.contiguous()
        out = x.new_empty(shape)
        work = getattr(dist, ALL_GATHER)(uncounted(out), x, group=self.group, async_op=True)
        return Flight(out, x, work)

    def _reduce_scatter(self, x: Tensor) -> Flight:
        x = x.contiguous()
        shape = (x.size(0) // self.group.size(), *x.shape[1:])
        out = x.new_empty(shape)
        work = getattr(dist, REDUCE_SCATTER)(uncounted(out), x, group=self.group, async_op=True)
        return Flight(out, x, work)


def collectives_of(x: Tensor) -> SubmoduleCollectives | None:
    """The collectives of the sub-module whose input or output `x` is; None when it has none (one rank)."""
    return getattr(x, _SUBMODULE, None)


def take_part(x: Tensor, collectives: Any) -> Tensor:
    """Marks `x` as the input or output of the sub-module with these `collectives`, and returns `x`."""
    if collectives is not None:
        setattr(x, _SUBMODULE, collectives)
    return x


class _InputStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collectives: SubmoduleCollectives) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.collectives = collectives
        return collectives.start_input(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        # Linears return no gradient to autograd, which could copy it: it is in `collectives`.
        assert grads[0] is None, "a linear has not brought its gradient to the collectives"
        return ctx.collectives.wait_input_gradient(), None


class _OutputStart(torch.autograd.Function):
    """Used with sequence parallelism only, like `_OutputWait`.

    Without it the output's gradient needs no collective.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, collectives: SubmoduleCollectives) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.collectives = collectives
        return collectives.start_output(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        # When autograd brings a gradient, its all-gather has not started: the output was waited for
        # outside this graph. This happens when megatron-core recomputes a whole layer.
        if grads[0] is not None:
            ctx.collectives.start_output_gradient(grads[0])
        return ctx.collectives.wait_output_gradient(), None


class _OutputWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collectives: SubmoduleCollectives) -> Tensor:
        ctx.collectives = collectives
        collectives.wait_output()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.collectives.start_output_gradient(grads[0])
        return None, None


def input_start(
    x: Tensor,
    group: Group | None,
    sequence_parallel: bool,
    behind: int | None = None,
    all_reduce: AllReduce = "exact",
    readers: int = 1,
) -> Tensor:
    """Starts to bring a sub-module's normalised input to every rank.

    Args:
        x: [s, b, h], or [s/tp, b, h] with sequence parallelism. It may be the placeholder of an FP8
            tensor. Then the FP8 tensor is gathered.
        group: the tensor-parallel group. None: no communication (no-comm, for timing only).
        sequence_parallel: `x` is this rank's part of the sequence.
        behind: the `number` of the previous sub-module's collectives. Backward waits for the input's
            gradient after the whole backward of that sub-module. None: autograd chooses when.
        all_reduce: how this sub-module's output will be summed. int8 is for inference only.
        readers: how many linears read the input. Its gradient is complete after the backward of all.

    Returns:
        [s, b, h]. With sequence parallelism it is in flight until `input_wait`.
    """
    if group is None or group.size() == 1:
        return x  # if `x` is a placeholder, it still has its FP8 tensor
    assert all_reduce == "exact" or not torch.is_grad_enabled(), "int8 sums have no backward"
    collectives = SubmoduleCollectives(group, sequence_parallel, all_reduce, readers)
    x = _InputStart.apply(x, collectives)
    fp8, collectives.fp8_input = collectives.fp8_input, None
    # With sequence parallelism the layer makes these nodes at the place where they have to run (layer.py).
    if x.grad_fn is not None and not sequence_parallel:
        collectives.number = natural_number(x.grad_fn)
        if behind is not None:
            run_no_sooner_than(x.grad_fn, behind)
    return take_part(standing_for(x, fp8), collectives)


def input_wait(x: Tensor) -> Tensor:
    """Waits for the input of a sub-module.

    Args:
        x: from `input_start`.

    Returns:
        [s, b, h], complete.
    """
    collectives = collectives_of(x)
    return x if collectives is None else collectives.arrived(x)


def output_start(x: Tensor, collectives: Any, scale: Scale = None) -> Tensor:
    """Starts the sum of a sub-module's partial outputs over the ranks.

    Args:
        x: [s, b, h] partial sums. Do not use it afterwards: the sum may overwrite it.
        collectives: `collectives_of` the sub-module's input. None (one rank): `x` is complete.
        scale: what the sum is multiplied by.

    Returns:
        [s, b, h], or [s/tp, b, h] with sequence parallelism. It is in flight: read it only after
        `output_wait`.
    """
    return scaled(x, scale) if collectives is None else collectives.sent(x, scale)


def output_wait(x: Tensor) -> Tensor:
    """Waits for a sub-module's output.

    Args:
        x: from `output_start`.

    Returns:
        The sum, complete and scaled: [s, b, h], or [s/tp, b, h] with sequence parallelism.
    """
    collectives = collectives_of(x)
    return x if collectives is None else collectives.complete(x)


def scaled(x: Tensor, scale: Scale) -> Tensor:
    """`x` times the scale of a sub-module's output."""
    return x if scale is None else x * scale
