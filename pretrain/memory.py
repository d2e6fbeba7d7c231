"""What a rank's memory holds: planned before the first step, compared with the peak, and what to turn.

Counted for Transformer Engine's layers with flash attention; tests/te_stand_in holds the counting to what
the layers save. Left out: CUDA's context and libraries, communication buffers, fragmentation, short-lived
outputs.
"""

from dataclasses import dataclass, fields

from megatron_ladder.config import ModelConfig, Recompute
from megatron_ladder.fp8 import Fp8Recipe
from pretrain.config import TrainConfig

BF16, FP32, FP8 = 2, 4, 1  # bytes
# Of FP8 numbers with their scales: one scale a tensor, an fp32 for 128 numbers (of weights 128 x 128), a
# byte for 32.
FP8_SCALES: dict[Fp8Recipe, float] = {
    "delayed": 1.0,
    "tensorwise": 1.0,
    "blockwise": 1 + FP32 / 128,
    "mxfp8": 1 + 1 / 32,
}
FP8_WEIGHT_SCALES = FP8_SCALES | {"blockwise": 1 + FP32 / 128**2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU at the peak of a step."""

    weights: float
    fp8_weights: float
    """The linears' weights in FP8, for both directions of their GEMMs."""
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def activation_bytes(
    model: ModelConfig,
    *,
    tokens: int,
    tp: int,
    sp: bool,
    recompute: Recompute,
    fp8: Fp8Recipe | None = None,
) -> float:
    """Kept for backward by one layer, for one micro-batch, on one GPU.

    For a token, of numbers in bf16, after the counting of arXiv 2205.05198, section 4, without dropout:
        the inputs of the two norms                           2 h
        the norms' outputs, inputs of the first linears       2 h
        queries and keys with RoPE                            h + kv
        the values, which TE's fused attention copies         kv
        attention's output, and 4 B a head of log-sums        h
        the MLP's first output, and SwiGLU's                  3 ffn
    The first two are not divided by tp without sequence parallelism. A parallel layer has one norm.
    "selective" keeps h + kv more than "none": attention's inputs, where the values are a view of queries,
    keys and values as the linear gives them. Flash attention has no s x s scores to drop, and its output is
    the next linear's input, but for delayed scaling's copy of it. Torch's attention keeps that view too.

    In FP8 the inputs of linears are kept in FP8, the parallel layer's shared one twice and gathered;
    attention's output is kept in bf16 all the same, by attention, and with delayed scaling in FP8 too.

    Full recomputation keeps a layer's input with megatron-core's layers; this project's recompute a
    sub-module at a time and keep each one's input and its norm's; the former in FP8, where scales are of
    blocks for both directions of the GEMMs.
    """
    h, ffn = model.hidden_size, model.ffn_hidden_size
    heads, kv = model.num_attention_heads, model.kv_heads * model.head_dim
    width = heads * model.head_dim  # of queries, and of attention's output
    cut = tp if sp else 1
    norms = 1 if model.residual == "parallel" else 2
    inputs: float = BF16 * norms * h / cut
    outputs = BF16 * norms * h / (1 if sp and model.residual == "parallel" else cut)
    number = FP8 * FP8_SCALES[fp8] if fp8 else BF16
    in_fp8 = number * 2 * h / (1 if model.residual == "parallel" else cut)
    if recompute == "full":
        if fp8 and model.residual == "ladder":
            outputs = in_fp8 * (1 if fp8 in ("delayed", "tensorwise") else 2)
        return tokens * (inputs / norms if model.is_standard else inputs + outputs)
    if fp8:
        outputs = in_fp8
    swiglu = number * ffn
    rest = BF16 * (2 * width + 2 * kv + 2 * ffn) + FP32 * heads + swiglu
    if recompute == "selective":
        rest += BF16 * (width + kv)
    if fp8 == "delayed":
        rest += FP8 * width - (BF16 * width if recompute == "selective" else 0)
    return tokens * (inputs + outputs + rest / tp)


def stage_parameters(config: TrainConfig, *, first: bool, last: bool) -> float:
    """Weights of a pipeline stage on one GPU; a tied table counts on both ends, once without stages."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = (model.num_parameters(embeddings=False) - model.hidden_size) / pp / tp
    table = model.padded_vocab_size * model.hidden_size / tp
    tied = model.share_embeddings_and_output_weights and pp == 1
    return layers + table * (int(first) + int(last and not tied))


def memory_plan(config: TrainConfig, dp: int) -> MemoryPlan:
    """The fuller of the first and the last pipeline stage.

    A parameter takes 2 B in bf16, 4 B of fp32 gradient, and 12 B of the distributed optimizer (fp32
    copy, Adam's two moments; 8 B with those in bf16) over dp. Activations by `activation_bytes` for the
    micro-batches in flight: 1F1B's pp on the first stage, 1 + (pp - 1) / (pp vpp) times as many
    interleaved. Logits on the last, when the loss's backward begins: their softmax in fp32, which
    becomes their gradient, and that in bf16.
    """
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, sp = parallel.num_chunks, parallel.sequence_parallel
    tokens = config.micro_batch_size * config.data.seq_length
    recipe = config.fp8.recipe

    def layer(recompute: Recompute) -> float:
        return activation_bytes(model, tokens=tokens, tp=tp, sp=sp, recompute=recompute, fp8=recipe)

    # One layer at a time is whole again while it is recomputed.
    working = layer("none") if config.recompute == "full" else 0.0
    logits = (FP32 + BF16) * tokens * model.padded_vocab_size / tp
    state = FP32 + 2 * (BF16 if config.optimizer.moments == "bf16" else FP32)
    most = config.num_microbatches(dp) * vpp
    in_fp8 = model.num_layers - (
        config.fp8.num_layers_at_start_in_bf16 + config.fp8.num_layers_at_end_in_bf16
    )
    plans = []
    for stage in {0, pp - 1}:
        first, last = stage == 0, stage == pp - 1
        warm_up = (pp - 1 - stage) * (1 if vpp == 1 else 2) + (vpp - 1) * pp
        in_flight = min(warm_up + 1, most)
        parameters = stage_parameters(config, first=first, last=last)
        chunk = model.num_layers / (pp * vpp) * layer(config.recompute)
        weights, copies = BF16 * parameters, 0.0
        if recipe:
            linears = stage_parameters(config, first=False, last=False) * in_fp8 / model.num_layers
            copies = 2 * FP8 * FP8_WEIGHT_SCALES[recipe] * linears
            if config.fp8.primary_weights:  # not beside weights in bf16, but in place of them
                weights -= BF16 * linears
        plans.append(
            MemoryPlan(
                weights=weights,
                fp8_weights=copies,
                gradients=FP32 * parameters,
                optimizer=state * parameters / dp,
                activations=in_flight * chunk + working,
                logits=logits * last,
            )
        )
    return max(plans, key=lambda plan: plan.total)


def in_words(plan: MemoryPlan) -> str:
    """Its parts, in GiB, the largest first; those of nothing left out."""
    parts = {field.name: getattr(plan, field.name) for field in fields(plan)}
    ordered = sorted((p for p in parts.items() if p[1]), key=lambda part: -part[1])
    listed = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in ordered)
    return f"{plan.total / 2**30:.2f} GiB ({listed})"


def out_of_memory(config: TrainConfig, world_size: int, error: Exception) -> str:
    """What a user reads when CUDA has no memory left; the error's first sentences say how much."""
    said = ". ".join(str(error).split(". ")[:3])
    dp = config.parallel.data_parallel_size(world_size)
    planned = ""
    if is_planned(config):
        planned = f"Planned for the fullest GPU: {in_words(memory_plan(config, dp))}. "
    return (
        f"{said}. {planned}To need less: {what_to_turn(config, dp)}. Where the plan is far below the "
        "card's memory, something else holds it (nvidia-smi), or it is in pieces "
        "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)"
    )


def is_planned(config: TrainConfig) -> bool:
    """Whether `memory_plan` counts this run: the paper's kinds in bf16."""
    return config.precision == "bf16" and config.model.residual != "desync"


def what_to_turn(config: TrainConfig, dp: int) -> str:
    """How to make a step take less memory, by this run's configuration, the cheapest first."""
    plan, parallel = memory_plan(config, dp), config.parallel
    advice = []
    if config.cuda_graph:
        advice.append("no --cuda-graph (it keeps a step's memory also while validating)")
    if config.micro_batch_size > 1:
        advice.append(
            f"--micro-batch-size {config.micro_batch_size // 2} (the global batch stays: more accumulation)"
        )
    tp = parallel.tensor_model_parallel_size
    if tp > 1 and not parallel.sequence_parallel and config.model.residual != "desync":
        advice.append("--parallel.sequence-parallel (cuts norms' activations by the ranks)")
    if config.recompute != "full":
        advice.append("--recompute full (activations for a third more compute)")
    if plan.optimizer + plan.weights + plan.gradients > plan.activations + plan.logits:
        if config.optimizer.moments == "fp32" and config.precision == "bf16":
            advice.append("--optimizer.moments bf16 (4 bytes less a parameter; another training)")
        advice.append("more GPUs (the optimizer's state is divided over data-parallel ranks)")
    advice.append(
        f"--parallel.tensor-model-parallel-size {2 * tp} or more "
        f"--parallel.pipeline-model-parallel-size ({parallel.pipeline_model_parallel_size} now)"
    )
    return "; ".join(advice)
