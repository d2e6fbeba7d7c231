"""The time of layers with experts: compute, all-to-alls, and which hides behind which. Modelled.

As in planner.py compute and link are two resources that work at the same time, and the link runs
collectives one after another, in the order in which they are started. Of a layer with experts also the
order inside of a sub-module counts (docs/design/overlap.md#experts).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ladder.config import PARALLEL, STALE, Residual
from pretrain.config.train import TrainConfig
from pretrain.plan.experts import Rows, local_experts, rows_of
from pretrain.plan.links import GPUS_PER_NODE
from pretrain.plan.planner import BF16, FP32, Hardware, Submodule

TILE = 128
"""Rows that a GEMM works on together. Those of an expert fill half a tile too few, on average."""
STREAMS = 4
"""Transformer Engine runs a GEMM for each expert, four at a time."""
# Kernels of megatron-core 0.16's router (scores, choice, counts, loss for the balance) and of the moves of
# rows before dispatch, in forward. After combine: zeros, the sum, the addition.
ROUTER_KERNELS, PERMUTE_KERNELS, SUM_KERNELS = 14, 6, 3
SCORES_PASSES = 8
"""How often the router reads or writes a score of each expert for each token, in fp32."""


@dataclass(frozen=True)
class Part:
    """Compute between two places where a collective starts, or is waited for, in seconds."""

    forward_s: float = 0.0
    backward_s: float = 0.0


@dataclass(frozen=True)
class ExpertLayer:
    """The times of one layer's experts for one micro-batch, in seconds."""

    route: Part
    """Norm, router, and the rows in the order of their experts."""
    first: Part
    """Received rows in the order of this rank's experts, and the experts' first GEMMs."""
    rest: Part
    """SwiGLU, the second GEMMs, the rows in the order in which they came."""
    shared: Part
    total: Part
    """The sum of each token's outputs, and its addition to the state."""
    counts_s: float
    """The ranks tell each other how many rows they send, and wait for it."""
    dispatch_s: float
    combine_s: float
    shared_waits: bool
    """The shared expert gathers and scatters over tensor-parallel ranks, and waits for it."""

    def without_exchanges(self) -> "ExpertLayer":
        return replace(self, counts_s=0.0, dispatch_s=0.0, combine_s=0.0)


def all_to_all_seconds(hardware: Hardware, nbytes: float, ranks: int) -> float:
    """Seconds of an all-to-all, in which a rank sends or receives `nbytes`, its own part among them.

    Ranks are numbered so that those of a node are neighbours: of the others up to seven are in the same
    node. What goes to them, and what goes to other nodes, goes at the same time.
    """
    near = min(ranks, GPUS_PER_NODE)
    inside = hardware.in_a_node.seconds(nbytes * (near - 1) / ranks)
    between = hardware.between_nodes.seconds(nbytes * (ranks - near) / ranks)
    return max(inside, between)


def expert_layer(config: TrainConfig, hardware: Hardware) -> ExpertLayer:
    """The times of one layer's experts on the fullest rank.

    - Experts' GEMMs: 2 operations for each weight and row, the rows of an expert rounded up to whole tiles.
      They take no less than reading the weights once, and the weights' gradients no less than reading and
      writing these, in fp32. A kernel for each expert, STREAMS of them at a time.
    - Router: a GEMM, and scores through memory. Moves of rows: each is read and written, before dispatch,
      twice around the experts where a rank has several, and summed after combine.
    - The shared expert as an MLP, over tensor-parallel ranks.
    """
    model, parallel, experts = config.model, config.parallel, config.model.experts
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    h, width = model.hidden_size, experts.expert_size(model.ffn_hidden_size)
    rows, groups = rows_of(config, hardware.expert_imbalance), local_experts(config)
    padded = experts.moe_pad_expert_input_to_capacity
    several = groups > 1

    def moved(elements: float, kernels: int) -> Part:
        memory_s = hardware.memory_s(BF16 * elements) + kernels * hardware.kernel_s
        return Part(memory_s, 2 * memory_s)

    def gemm(flops: float) -> Part:
        return Part(seconds := hardware.gemm_s(flops), 2 * seconds)

    def grouped(weights: int) -> Part:
        in_tiles = tiles(rows, groups, even=padded)
        flops_s = hardware.gemm_s(2.0 * in_tiles * weights)
        kernels_s = math.ceil(groups / STREAMS) * hardware.kernel_s
        once_s = max(flops_s, hardware.memory_s(BF16 * groups * weights)) + kernels_s
        gradient_s = max(flops_s, hardware.memory_s(2 * FP32 * groups * weights)) + kernels_s
        return Part(once_s, once_s + gradient_s)

    count = experts.num_moe_experts or 0
    own_norm = model.layer_norms and model.residual not in PARALLEL  # those have attention's
    scores = SCORES_PASSES * rows.routed * count * FP32 / BF16
    route = (
        gemm(2.0 * rows.routed * h * count),
        moved(2 * h * rows.routed * own_norm + scores, own_norm + ROUTER_KERNELS),
        moved(2 * h * rows.sent, PERMUTE_KERNELS),
    )
    sorting = moved(2 * h * rows.received, 2) if several else Part()
    shared = Part()
    if (size := experts.moe_shared_expert_intermediate_size) is not None:
        tokens = rows.routed * tp
        shared = added(gemm(2.0 * tokens * 3 * h * size / tp), moved(3 * tokens * size / tp, 3))
    message = BF16 * h * rows.exchanged
    weights_s = all_to_all_seconds(hardware, FP32 * rows.exchanged, ep)
    return ExpertLayer(
        route=added(*route),
        first=added(sorting, grouped(2 * h * width)),
        rest=added(moved(3 * width * rows.received, 1), grouped(h * width), sorting),
        shared=shared,
        total=moved(3 * h * (rows.sent + rows.routed), SUM_KERNELS),
        counts_s=0.0 if padded else all_to_all_seconds(hardware, FP32 * count, ep),
        dispatch_s=all_to_all_seconds(hardware, message, ep) + weights_s,
        combine_s=all_to_all_seconds(hardware, message, ep),
        shared_waits=tp > 1 and shared != Part(),
    )


def tiles(rows: Rows, groups: int, *, even: bool) -> float:
    """The rows of all of a rank's experts, those of each rounded up to whole tiles.

    Args:
        groups: experts of the rank.
        even: all have as many.
    """
    if even:
        return groups * math.ceil(rows.received / groups / TILE) * TILE
    return rows.received + groups * TILE / 2


def added(*parts: Part) -> Part:
    return Part(sum(p.forward_s for p in parts), sum(p.backward_s for p in parts))


# A step of a pass: compute, the start of a collective, or the wait for it; the collective's name; seconds
# in forward and in backward.
_What = Literal["compute", "start", "wait"]
_Step = tuple[_What, str, float, float]
_MIRRORED: dict[_What, _What] = {"compute": "compute", "start": "wait", "wait": "start"}


@dataclass(frozen=True)
class _Sub:
    """A sub-module: compute, and the collectives of its input and of its output."""

    hides: bool
    before: Part
    arrive: tuple[float, float]
    """Of the input: in forward, and its gradient's in backward."""
    weight_gradient_s: float
    """In backward, while the input's gradient is on its way."""
    first: Part
    """Before the middle, where the collectives of the neighbours are waited for, and started."""
    rest: Part
    leave: tuple[float, float]
    after: Part
    """While the output is on its way."""
    landed: Part
    again_s: float = 0.0
    """In backward the input is gathered once more, for the weight's gradient."""
    counts_s: float = 0.0
    after_waits: bool = False

    @property
    def compute(self) -> Part:
        """All of it."""
        weight_gradient = Part(0.0, self.weight_gradient_s)
        return added(self.before, weight_gradient, self.first, self.rest, self.after, self.landed)


def experts_pass_seconds(
    layers: Sequence[tuple[Residual, bool]],
    attention: Submodule,
    mlp: Submodule,
    experts: ExpertLayer,
    collective_s: float,
    *,
    recompute: bool = False,
) -> tuple[float, float]:
    """Forward and backward time of a stack of layers, of which some have experts, for one micro-batch.

    A ladder layer: in the middle of each sub-module, after its first linear, the output of the one before
    is waited for, and the input of the next is started. So dispatch hides behind core attention, and
    combine behind the shared expert and the next layer's first linear. A parallel-ladder layer is one
    sub-module, with its middle between attention and experts: dispatch hides behind the experts of the
    layer before, combine behind the attention of the next. Standard and parallel layers wait for everything
    at once. Backward is the same in the opposite order.

    With full recomputation megatron-core's standard layer runs its whole forward again, its all-to-alls
    too; this project's layers compute again.

    Args:
        layers: the residual kind of each layer, and whether it has experts.
        attention, mlp: the compute of one layer's sub-modules.
        collective_s: the time of an all-reduce of a residual state; with tensor parallelism there is
            sequence parallelism, so each is a reduce-scatter and an all-gather of half the time.
        recompute: full recomputation.

    Returns:
        Seconds of forward and of backward.
    """
    half_s = collective_s / 2
    subs = []
    for residual, has_experts in layers:
        hides = residual in STALE
        first = _dense(attention, hides, half_s)
        second = _routed(experts, hides) if has_experts else _dense(mlp, hides, half_s)
        subs += [_joined(first, second, has_experts)] if residual in PARALLEL else [first, second]
    all_standard = all(residual == "standard" for residual, _ in layers)
    if not collective_s and not experts.dispatch_s:  # nothing waits
        forward_s = sum(sub.compute.forward_s for sub in subs)
        again_s = forward_s if recompute else 0.0
        return forward_s, sum(sub.compute.backward_s for sub in subs) + again_s
    steps = _steps(subs, collective_s, shared_first=all_standard)
    forward_s = _seconds((what, name, forward) for what, name, forward, _ in steps)
    again = recompute and not all_standard
    backward_s = _seconds(
        (_MIRRORED[what], name, backward + forward if again and what == "compute" else backward)
        for what, name, forward, backward in reversed(steps)
    )
    return forward_s, backward_s + (forward_s if recompute and all_standard else 0.0)


def _dense(sub: Submodule, hides: bool, half_s: float) -> _Sub:
    # Of the first linear: as long as its forward, and its input's gradient.
    first_s = sub.weight_gradient_s
    return _Sub(
        hides=hides,
        before=Part(),
        arrive=(half_s, half_s),
        weight_gradient_s=first_s,
        first=Part(first_s, first_s),
        rest=Part(sub.forward_s - first_s, sub.backward_s - 2 * first_s),
        leave=(half_s, half_s),
        again_s=half_s,
        after=Part(),
        landed=Part(),
    )


def _routed(experts: ExpertLayer, hides: bool) -> _Sub:
    return _Sub(
        hides=hides,
        before=experts.route,
        arrive=(experts.dispatch_s, experts.dispatch_s),
        weight_gradient_s=0.0,
        first=experts.first,
        rest=experts.rest,
        leave=(experts.combine_s, experts.combine_s),
        after=experts.shared,
        landed=experts.total,
        counts_s=experts.counts_s,
        after_waits=experts.shared_waits,
    )


def _joined(attention: _Sub, second: _Sub, has_experts: bool) -> _Sub:
    """Attention, and MLP or experts, of one input and with one output.

    An MLP shares attention's collectives, and the gathered input is kept. Experts have their own besides,
    and their gradient's start after the whole backward of attention.
    """
    (gather_s, scatter_s), (reduce_s, gather_back_s) = attention.arrive, attention.leave
    arrive, leave = second.arrive, second.leave
    return replace(
        second,
        arrive=(arrive[0] + gather_s * has_experts, arrive[1] + scatter_s * has_experts),
        weight_gradient_s=0.0 if has_experts else attention.weight_gradient_s,
        first=added(
            *(attention.first, attention.rest),
            Part(0.0, attention.weight_gradient_s * has_experts),
        ),
        rest=added(second.first, second.rest, Part(0.0, second.weight_gradient_s)),
        leave=(leave[0] + reduce_s * has_experts, leave[1] + gather_back_s * has_experts),
        again_s=attention.again_s * has_experts,
    )


def _steps(subs: Sequence[_Sub], collective_s: float, *, shared_first: bool) -> list[_Step]:
    """A pass, step by step.

    Args:
        shared_first: the shared expert runs before dispatch, as in megatron-core's own layer.
    """
    steps: list[_Step] = []
    landing: tuple[int, _Sub] | None = None  # the output that is on its way
    started = False  # the input of the next sub-module is on its way
    gradients: dict[str, float] = {}  # seconds in backward of what is under way

    def compute(part: Part) -> None:
        steps.append(("compute", "", part.forward_s, part.backward_s))

    def start(name: str, forward_s: float, backward_s: float) -> None:
        steps.append(("start", name, forward_s, 0.0))
        gradients[name] = backward_s

    def wait(name: str) -> None:  # here backward starts
        steps.append(("wait", name, 0.0, gradients.pop(name)))

    def land() -> None:
        if landing is not None:
            number, sub = landing
            wait(f"input {number} again")
            wait(f"output {number}")
            compute(sub.landed)

    def begin(sub: _Sub, number: int) -> None:
        compute(sub.before)
        if sub.counts_s:
            start(f"counts {number}", sub.counts_s, 0.0)
            wait(f"counts {number}")
        start(f"input {number}", *sub.arrive)

    def after(sub: _Sub, number: int) -> None:
        if sub.after_waits:
            start(f"shared {number}", collective_s, 1.5 * collective_s)
            wait(f"shared {number}")
        compute(sub.after)

    for number, sub in enumerate(subs):
        if not sub.hides:
            land()
            landing = None
            if shared_first:
                after(sub, number)
        if not started:
            begin(sub, number)
        started = False
        steps.append(("compute", "", 0.0, sub.weight_gradient_s))
        start(f"input {number} again", 0.0, sub.again_s)
        wait(f"input {number}")
        compute(sub.first)
        if sub.hides:
            land()
            following = subs[number + 1] if number + 1 < len(subs) else None
            if following is not None and following.hides:
                begin(following, number + 1)
                started = True
        compute(sub.rest)
        start(f"output {number}", *sub.leave)
        if not shared_first:
            after(sub, number)
        landing = (number, sub)
    land()
    return steps


def _seconds(steps: Iterable[tuple[str, str, float]]) -> float:
    """Runs steps on the two resources. A collective that takes no time waits for nothing."""
    compute = link = 0.0
    done: dict[str, float] = {}
    for what, name, seconds in steps:
        if what == "compute":
            compute += seconds
        elif what == "start":
            if seconds:
                link = max(link, compute) + seconds
            done[name] = link if seconds else compute
        else:
            compute = max(compute, done.pop(name))
    assert not done
    return max(compute, link)
