"""A model of the time of a training step, with which `megatron-ladder bench plan` compares layouts.

Nothing here is measured. The time of an operation is its count of operations, divided by the device's peak
and an assumed efficiency, and a fixed time for each kernel. Collectives go over a modelled link (links.py).
In the model a hidden collective does not slow compute, which is too favourable for all that overlaps. Use
it to compare layouts, not to predict a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ladder.config import PARALLEL, STALE, ModelConfig, Recompute
from megatron_ladder.errors import UserError
from pretrain.plan.experts import IMBALANCE
from pretrain.plan.links import GPUS_PER_NODE, IN_A_NODE, NVLINK, PRESETS, Link, Network
from pretrain.run.metrics import peak_flops

BF16, FP32 = 2, 4  # bytes
# Kernels of a sub-module's forward. Attention: norm, q-k-v, RoPE, core attention, projection, add. MLP:
# norm, gate and up, SwiGLU, down, add.
ATTENTION_KERNELS, MLP_KERNELS = 6, 5


@dataclass(frozen=True)
class Submodule:
    """The compute time of an attention or an MLP, for one micro-batch on one GPU, in seconds."""

    forward_s: float
    backward_s: float
    weight_gradient_s: float = 0.0
    """The part of backward_s that comes after the input's gradient: the weight gradient of the first
    linear. The input gradient's collective can run at the same time."""


@dataclass(frozen=True)
class _Unit:
    """The compute between two waits: one sub-module or half of it, or several that share a collective."""

    forward_s: float
    backward_s: float
    weight_gradient_s: float = 0.0
    lag: int = 1
    """The newest output that the unit reads is that of the unit this many before it: with 1 it waits for
    the last one's collective."""
    communicates: bool = True
    gathers_again: bool = True
    """With sequence parallelism, backward gathers the input again, because it was not kept."""
    recompute_s: float = 0.0
    recompute_collectives: float = 0.0
    """Collectives that the recomputation waits for, counted in all-reduces."""


def pass_seconds(
    residuals: Sequence[str],
    attention: Submodule,
    mlp: Submodule,
    collective_s: float,
    *,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    halves: bool = False,
) -> tuple[float, float]:
    """Forward and backward time of a stack of layers for one micro-batch. A model, not a measurement.

    Compute and link are two resources that work at the same time. The link runs collectives one after
    another, in the order in which they are started. At the end of each pass all of them are complete.

    In forward, the collective of a sub-module's output is started when the sub-module ends:
        standard         waited for at once
        ladder           waited for when the sub-module after the next begins, so the next one hides it
        parallel         one for each layer, after attention and MLP, waited for at once
        parallel-ladder  the same one, waited for when the layer after the next begins
        desync-n         one for every n sub-modules, and one at the end, waited for at once
        no-comm          none
    A ladder layer's attention reads the state after the attention of the layer before, whatever that
    layer's kind. So it hides the collective of a standard layer's MLP. A standard layer waits for all.

    In backward, an input gradient's collective is started before the first linear's weight gradient (of
    parallel kinds: attention's, which comes last):
        standard, parallel       waited for after that weight gradient
        ladder, parallel-ladder  waited for after the whole backward of the sub-module (the layer) before
        desync-n                 started after the whole backward of the group, waited for at once

    In halves, a standard or parallel layer runs each of its sub-modules twice, for one half of the
    micro-batch and for the other. The collective of a half is waited for when the next sub-module of the
    same half begins, so the other half hides it, in backward too.

    With sequence parallelism each collective is a reduce-scatter and an all-gather of half the time.
    Backward gathers the input once more, and the first linear's weight gradient waits for it. Parallel
    kinds kept the gathered input.
    (In megatron-core less compute hides that; the difference favours standard.)

    With recompute="full", backward begins with the recomputed forward. This project's layers recompute
    without the output's collectives, because no gradient needs them (megatron_ladder/layers/recompute.py).
    megatron-core's standard layer, without halves, repeats the collective of attention. megatron-core also
    repeats that of the MLP, although nothing reads the result; leaving it out favours standard.
    "selective" changes nothing here: add the second forward of core attention to attention.backward_s.

    Args:
        residuals: the residual kind of each layer.
        attention, mlp: the compute of one layer's sub-modules; with `halves`, of half a micro-batch.
        collective_s: the time of one all-reduce of a residual state; with `halves`, of half a micro-batch.
        halves: standard and parallel layers run in two halves of the micro-batch.

    Returns:
        Seconds of forward and of backward.
    """
    units = _units(residuals, attention, mlp, recompute == "full", sequence_parallel, halves)
    share = 0.5 if sequence_parallel else 1.0
    reduce_s = share * collective_s
    gather_s = collective_s - reduce_s
    return _forward(units, reduce_s, gather_s), _backward(units, reduce_s, gather_s)


def _units(
    residuals: Sequence[str],
    attention: Submodule,
    mlp: Submodule,
    full: bool,
    sp: bool,
    halves: bool,
) -> list[_Unit]:
    units: list[_Unit] = []
    group: list[Submodule] = []  # desync's sub-modules since the last collective

    def merged(parts: Sequence[Submodule], weight_gradient_s: float = 0.0, lag: int = 1) -> _Unit:
        forward_s = sum(p.forward_s for p in parts)
        backward_s = sum(p.backward_s for p in parts)
        again_s = forward_s if full else 0.0
        return _Unit(
            *(forward_s, backward_s, weight_gradient_s, lag),
            gathers_again=False,
            recompute_s=again_s,
        )

    for residual in residuals:
        name, _, interval = residual.partition("-")
        lag = 2 if halves or residual in STALE else 1
        calls = 2 if halves else 1
        if residual in PARALLEL:
            units += [merged((attention, mlp), attention.weight_gradient_s, lag)] * calls
        elif name == "desync" and interval.isdigit() and int(interval) > 0:
            for part in (attention, mlp):
                group.append(part)
                if len(group) == int(interval):
                    units.append(merged(group))
                    group = []
        elif residual in ("standard", "ladder", "no-comm"):
            for part in (attention, mlp):
                again_s, collectives = part.forward_s, 0.0
                if residual == "standard" and not halves:
                    # The whole layer, before its MLP's backward.
                    again_s = attention.forward_s + mlp.forward_s if part is mlp else 0.0
                    # Gathering two inputs and scattering one output is 3 times half an all-reduce.
                    collectives = (1.5 if sp else 1.0) if part is mlp else 0.0
                unit = _Unit(
                    part.forward_s,
                    part.backward_s,
                    part.weight_gradient_s,
                    lag=lag,
                    communicates=residual != "no-comm",
                    recompute_s=again_s if full else 0.0,
                    recompute_collectives=collectives if full else 0.0,
                )
                units += [unit] * calls
        else:
            raise ValueError(f"no residual kind {residual!r}")
    return [*units, merged(group)] if group else units


def _forward(units: list[_Unit], reduce_s: float, gather_s: float) -> float:
    """Seconds of forward. gather_s is zero without sequence parallelism."""
    compute = link = 0.0
    ready = [0.0] * len(units)  # when each unit's input is complete

    def gather_inputs_that_read(last: int, link: float) -> float:
        """Gathers the inputs whose newest output is that of unit `last`; returns when the link is free."""
        for k in range(max(last + 1, 0), min(last + 3, len(units))):
            if k - units[k].lag == last or (last == -1 and k - units[k].lag < 0):
                link += gather_s * units[k].communicates
                ready[k] = link
        return link

    link = gather_inputs_that_read(-1, link)
    for k, unit in enumerate(units):
        compute = max(compute, ready[k]) + unit.forward_s
        link = max(link, compute) + reduce_s * unit.communicates
        link = gather_inputs_that_read(k, link)
    return max(compute, link)


def _backward(units: list[_Unit], reduce_s: float, gather_s: float) -> float:
    """Seconds of backward. gather_s is zero without sequence parallelism."""
    count = len(units)
    compute = link = 0.0
    ready = [0.0] * count  # when each unit's output gradient is complete
    again = [0.0] * count  # when each unit's input has been gathered again

    def last_reader(k: int) -> int:
        """The unit whose input gradient is the last part of the gradient of k's output.

        Backward reaches later units first. `count` when only the state after the stack reads k's output.
        """
        reader = k + 1 if k + 1 == count or units[k + 1].lag == 1 else k + 2
        return min(reader, count)

    def gather_gradients_from(reader: int, link: float) -> float:
        for k in range(min(reader, count) - 1, max(reader - 3, -1), -1):
            if last_reader(k) == reader:
                link += gather_s * units[k].communicates
                ready[k] = link
                link += gather_s * (units[k].communicates and units[k].gathers_again)
                again[k] = link
        return link

    link = gather_gradients_from(count, link)
    for k in range(count - 1, -1, -1):
        unit = units[k]
        compute = max(compute, ready[k])
        if unit.recompute_s and unit.lag == 2:  # it recomputes from its own input, gathered again
            compute = max(compute, again[k])
        if unit.recompute_collectives:
            link = max(link, compute) + unit.recompute_collectives * (reduce_s + gather_s)
            compute = link
        compute += unit.recompute_s + unit.backward_s - unit.weight_gradient_s
        link = max(link, compute) + reduce_s * unit.communicates
        link = gather_gradients_from(k, link)
        compute = max(compute, again[k]) + unit.weight_gradient_s
    return max(compute, link)


@dataclass(frozen=True)
class Device:
    """A GPU, by its data sheet."""

    name: str
    """A name that PEAK_FLOPS in pretrain/run/metrics.py has."""
    hbm_bytes_per_s: float
    memory_bytes: float
    fp8: bool = True
    """Whether it has FP8 tensor cores, with twice the bf16 peak."""

    @property
    def peak_flops(self) -> float:
        peak = peak_flops(self.name)
        assert peak is not None
        return peak


DEVICES = {
    "h100": Device("H100", 3.35e12, 80e9),
    "h200": Device("H200", 4.8e12, 141e9),
    "a100": Device("A100", 2.0e12, 80e9, fp8=False),
}


@dataclass(frozen=True)
class Hardware:
    """Devices, links, and the shares of the device's peak that are assumed to be reached."""

    device: Device
    network: Network
    link: str | None = None
    """A name in links.PRESETS, for every tensor-parallel size. None: nvswitch inside a node, two-nodes
    beyond."""
    fp8: bool = False
    """The layers' GEMMs are in FP8, at twice the peak; attention and the output head stay in bf16."""
    gemm_efficiency: float = 0.65
    attention_efficiency: float = 0.5
    kernel_s: float = 12e-6
    """What each kernel takes besides: its launch, and multiprocessors that have no work at its end. So a
    GEMM of fewer tokens, or of a thinner part of a matrix, is less efficient. From two steps measured on
    an H100 (test_against_an_h100.py): one micro-batch takes less time than two of half its size."""
    link_bandwidth: float = 1.0
    """Times the bandwidth of the published link. Its latency stays. That of other transfers in a node, and
    of experts' all-to-alls, too."""
    expert_imbalance: float = IMBALANCE
    """The tokens of a layer's fullest expert, over the mean of its experts."""

    def gemm_s(self, flops: float, *, fp8: bool = False) -> float:
        return flops / (self.device.peak_flops * self.gemm_efficiency * (2 if fp8 else 1))

    def attention_s(self, flops: float) -> float:
        return flops / (self.device.peak_flops * self.attention_efficiency)

    def memory_s(self, nbytes: float) -> float:
        return nbytes / self.device.hbm_bytes_per_s

    @property
    def in_a_node(self) -> Network:
        """Between two GPUs of a node."""
        return self._wider(IN_A_NODE.get(self.link or "", NVLINK))

    def between(self, ranks: int) -> Network:
        """Between two of so many neighbouring ranks: a node's own links, if one node has all of them."""
        is_one_node = ranks <= GPUS_PER_NODE and self.link != "two-nodes"
        return self.in_a_node if is_one_node else self.network

    @property
    def between_nodes(self) -> Network:
        """Between two GPUs of different nodes, for all-to-alls."""
        return self._wider(IN_A_NODE["zero"] if self.link == "zero" else self.network)

    def _wider(self, network: Network) -> Network:
        return replace(network, bytes_per_s=network.bytes_per_s * self.link_bandwidth)

    def link_for(self, tp: int) -> Link:
        name = self.link or ("nvswitch" if tp <= GPUS_PER_NODE else "two-nodes")
        if name not in PRESETS:
            raise UserError(f"no link {name!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[name].for_ranks(tp).with_bandwidth(self.link_bandwidth)


def submodules(
    model: ModelConfig, hardware: Hardware, *, tokens: int, seq_length: float, tp: int, sp: bool
) -> tuple[Submodule, Submodule]:
    """The compute of one layer's attention and MLP for a micro-batch of `tokens` tokens.

    - GEMMs: 2 operations for each weight and token, twice that in backward.
    - Flash attention of width w: 4 t s w operations, of which half are masked out; 2.5 times that in
      backward (five products instead of two). s is the tokens that attention works on together
      (attended.py).
    - Norm, RoPE, SwiGLU and residual add: bytes through memory, twice that in backward. Norm and add work
      on whole states, unless sequence parallelism divides them.
    - The kernels of these, twice as many in backward. Parallel kinds have one norm.
    """
    h, w, ffn = model.hidden_size, model.attention_width, model.ffn_hidden_size
    kv = model.kv_heads * model.head_dim

    def gemm(inputs: int, outputs: int) -> float:
        return hardware.gemm_s(2.0 * tokens * inputs * outputs / tp, fp8=hardware.fp8)

    def submodule(
        first: float, second: float, core: float, elements: float, kernels: int
    ) -> Submodule:
        memory = hardware.memory_s(BF16 * tokens * elements) + kernels * hardware.kernel_s
        backward = 2 * (first + second) + 2.5 * core + 2 * memory
        return Submodule(first + second + core + memory, backward, first + hardware.kernel_s)

    cut = tp if sp else 1
    # Elements that are read and written for each token.
    norm, add = 2 * h * model.layer_norms / cut, 3 * h / cut
    core = hardware.attention_s(2.0 * tokens * seq_length * w / tp)
    of_heads = 1 + model.qk_layernorm  # RoPE, and norms of queries and keys
    elements = norm + of_heads * 2 * (w + kv) / tp + add
    kernels = ATTENTION_KERNELS - (not model.layer_norms) + 2 * model.qk_layernorm
    attention = submodule(gemm(h, w + 2 * kv), gemm(w, h), core, elements, kernels)
    norms = 0 if model.residual in PARALLEL or not model.layer_norms else 1
    elements = norms * norm + 3 * ffn / tp + add
    mlp = submodule(gemm(h, 2 * ffn), gemm(ffn, h), 0.0, elements, MLP_KERNELS - 1 + norms)
    return attention, mlp
