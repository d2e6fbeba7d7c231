"""A model of generation's time: sub-modules in prefill and decode, and the passes made of them.

Nothing here is measured. A GEMM takes as long as its operations, or as its bytes need to go through memory,
whichever is longer; every kernel takes a fixed time besides. So decode takes as long as reading the weights
and the cache, and the kernels' fixed times; prefill takes as long as its operations. A hidden collective is
assumed not to slow computation.
"""

from dataclasses import dataclass, replace

from megatron_ladder.config import ModelConfig
from pretrain.config.presets import llama_3_8b, llama_3_70b
from pretrain.plan.links import NVLINK, PRESETS
from pretrain.plan.planner import BF16, DEVICES, Hardware, Submodule, pass_seconds

# Two constants from the paper's own no-comm rates (arXiv 2501.06589, 70B, batch 1: 38.24, 69.04 and 110.59
# tokens/s at TP 2, 4 and 8). The part that grows with a GPU's share of the weights is read at 0.91 of the
# H100's 3.35 TB/s. The other part is 41.7 us a layer, divided here among the 13 kernels counted below.
MEMORY_EFFICIENCY = 0.91
KERNEL_S = 3.2e-6
# Attention: norm, q-k-v, RoPE, cache, attention, joining its parts, projection, add. MLP: norm, gate and
# up, SwiGLU, down, add.
ATTENTION_KERNELS, MLP_KERNELS = 8, 5

PROMPT, NEW_TOKENS = 1024, 512  # the paper's


@dataclass(frozen=True)
class Shape:
    """A model as the paper lays it out: `tp` H100s."""

    model: ModelConfig
    tp: int


SHAPES = {
    "8b": Shape(llama_3_8b().model, 8),
    "70b": Shape(llama_3_70b().model, 8),
    "405b": Shape(
        replace(
            llama_3_8b().model,
            num_layers=126,
            hidden_size=16384,
            ffn_hidden_size=53248,
            num_attention_heads=128,
            num_query_groups=8,
        ),
        16,
    ),
}
PHASES = ("prefill", "decode")
KINDS = ("standard", "parallel", "ladder", "no-comm")
BUILT = ("ladder, 8-bit sums", "ladder, in two parts", "parallel, half-batches")
"""Those of `alternatives` that the benchmark can run."""


@dataclass(frozen=True)
class Pass:
    """One pass through a model's layers, on one of `tp` GPUs. Times in seconds, modelled."""

    attention_s: float
    mlp_s: float
    all_reduce_s: float
    half_all_reduce_s: float
    """The time of an all-reduce of half as many bytes."""
    num_layers: int

    def seconds(self, kind: str) -> float:
        """The layers' time; see `pass_seconds` for what each kind waits for."""
        parts = Submodule(self.attention_s, 0.0), Submodule(self.mlp_s, 0.0)
        return pass_seconds([kind] * self.num_layers, *parts, self.all_reduce_s)[0]

    def hidden_share(self, kind: str) -> float:
        """The share of standard's exposed time that this kind hides. Standard exposes all of it."""
        computed = self.seconds("no-comm")
        return 1 - (self.seconds(kind) - computed) / (self.seconds("standard") - computed)


def modelled_pass(
    shape: Shape, phase: str, *, batch: int, link: str, cache_reads: float = 1.0
) -> Pass:
    """The pass over the paper's prompt, or over one token of each sequence in the middle of the generation.

    Args:
        link: a name in links.PRESETS.
        cache_reads: how often the KV cache goes through memory; flash decoding reads it once.
    """
    new = PROMPT if phase == "prefill" else 1
    context = PROMPT if phase == "prefill" else PROMPT + NEW_TOKENS // 2
    attention, mlp = submodule_seconds(
        shape.model, batch=batch, new=new, context=context, tp=shape.tp, cache_reads=cache_reads
    )
    message = BF16 * batch * new * shape.model.hidden_size
    sum_seconds = PRESETS[link].for_ranks(shape.tp).all_reduce_seconds
    sums = sum_seconds(message), sum_seconds(message / 2)
    return Pass(attention, mlp, *sums, shape.model.num_layers)


def alternatives(shape: Shape, phase: str, *, batch: int, link: str) -> dict[str, float]:
    """Seconds of a pass by other ways to wait less. They are bounds: each overlap is assumed to be perfect.

    ladder, 8-bit sums    half the bytes on the link, and two more kernels a sub-module
    ladder, in two parts  every message in two parts, each with its latency
    standard, half-batches  one half's sums while the other half computes; weights are read twice
    parallel, half-batches  as before, with half as many sums
    parallel, one layer stale  one sum a layer, while the next layer computes; no such model is trained
    """
    whole = modelled_pass(shape, phase, batch=batch, link=link)
    half_s = whole.half_all_reduce_s
    extra = 2 * KERNEL_S
    quantised = replace(
        whole,
        attention_s=whole.attention_s + extra,
        mlp_s=whole.mlp_s + extra,
        all_reduce_s=half_s,
    )
    result = {
        "ladder, 8-bit sums": quantised.seconds("ladder"),
        "ladder, in two parts": replace(whole, all_reduce_s=2 * half_s).seconds("ladder"),
    }
    layers = whole.num_layers
    if batch > 1:
        half = modelled_pass(shape, phase, batch=batch // 2, link=link)
        compute_s = 2 * (half.attention_s + half.mlp_s)
        result["standard, half-batches"] = layers * max(compute_s, 4 * half_s)
        result["parallel, half-batches"] = layers * max(compute_s, 2 * half_s)
    layer_s = whole.attention_s + whole.mlp_s
    result["parallel, one layer stale"] = layers * max(layer_s, whole.all_reduce_s)
    return result


def submodule_seconds(
    model: ModelConfig, *, batch: int, new: int, context: int, tp: int, cache_reads: float = 1.0
) -> tuple[float, float]:
    """Attention's and the MLP's seconds for `new` tokens of each of `batch` sequences on an H100.

    Args:
        context: tokens of each sequence that attention reads, the new ones included. More than one
            new token is a prompt: half of its scores are masked out.
    """
    tokens = batch * new
    h, kv, ffn = model.hidden_size, model.kv_heads * model.head_dim, model.ffn_hidden_size

    def gemm(weights: float, states: float) -> float:
        """Args: weights, and for each token the numbers read and written, on one GPU."""
        return max(_HARDWARE.gemm_s(2.0 * tokens * weights), _memory_s(weights + tokens * states))

    scores = 4.0 * tokens * context * h / tp * (0.5 if new > 1 else 1.0)
    cache = 2.0 * batch * context * kv / tp * cache_reads
    core = max(_HARDWARE.attention_s(scores), _memory_s(cache + 2 * tokens * h / tp))
    norm, add = _memory_s(2 * tokens * h), _memory_s(3 * tokens * h)
    attention = gemm(h * (h + 2 * kv) / tp, h + (h + 2 * kv) / tp) + gemm(h * h / tp, h + h / tp)
    attention += core + norm + add + _memory_s(2 * tokens * (h + kv) / tp)
    mlp = gemm(2 * h * ffn / tp, h + 2 * ffn / tp) + gemm(h * ffn / tp, h + ffn / tp)
    mlp += norm + add + _memory_s(3 * tokens * ffn / tp)
    return attention + ATTENTION_KERNELS * KERNEL_S, mlp + MLP_KERNELS * KERNEL_S


def head_seconds(shape: Shape, batch: int) -> float:
    """Logits of one token of each sequence."""
    weights = shape.model.hidden_size * shape.model.padded_vocab_size / shape.tp
    return max(_HARDWARE.gemm_s(2.0 * batch * weights), _memory_s(weights)) + KERNEL_S


def generation_seconds(shape: Shape, batch: int, prefill_s: float, decode_s: float) -> float:
    """The prompts' pass and one for each further token, with the head.

    Args:
        prefill_s, decode_s: of all layers.
    """
    return prefill_s + (NEW_TOKENS - 1) * decode_s + NEW_TOKENS * head_seconds(shape, batch)


def _memory_s(numbers: float) -> float:
    """Bf16 numbers read or written."""
    return _HARDWARE.memory_s(BF16 * numbers) / MEMORY_EFFICIENCY


_HARDWARE = Hardware(DEVICES["h100"], NVLINK)
