"""What a rank's memory holds: planned before the first step, compared with the peak, and what to turn.

Counted for Transformer Engine's layers; tests/te_stand_in holds the counting to what the layers save, and
tests/unit/pretrain/plan/test_memory.py to peaks measured on an H100. Left out: `HEADROOM`.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from megatron_ladder.config import ModelConfig, Recompute
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Recipe
from pretrain.config.train import TrainConfig

if TYPE_CHECKING:  # a command line starts without torch
    from megatron_ladder.layers.attention_choice import CoreAttention

BF16, FP32, FP8 = 2, 4, 1  # bytes
HEADROOM = 0.05
"""Of a card's memory, for what a plan leaves out. On one H100 (80 GB) CUDA's context and libraries took 0.9
GiB beside torch's memory, and peaks were up to 0.6 GiB above their plans (workspaces, short-lived outputs):
2 % together. As much again is for what was not measured: NCCL's buffers, and memory in pieces."""

Attention = Literal["te", "torch", "te-unfused", "torch-unfused", "unfused"]
"""Whose core attention, for what it keeps: Transformer Engine's or torch's, fused; or with s x s scores in
memory, TE's, torch's or megatron-core's own."""


def kept_as(taken: "CoreAttention") -> Attention:
    """The name here of what `transformer_config` has chosen."""
    if taken.keeps_scores and taken.whose != "unfused":
        return "te-unfused" if taken.whose == "te" else "torch-unfused"
    return taken.whose


# Bytes of a score: kept for backward, kept with dropout (a mask, and the softmax with it), and what its
# gradients take in one layer's backward.
SCORES: dict[Attention, tuple[int, int, int]] = {
    "te-unfused": (BF16, 2 * BF16 + 1, 2 * BF16),
    "torch-unfused": (FP32, 2 * FP32 + 1, 2 * FP32),
    "unfused": (FP32 + BF16, FP32 + BF16 + 1, 2 * FP32 + BF16),
}
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
    """Kept for backward by the layers, scores in memory among them."""
    logits: float
    """While the loss is computed; 0 where one layer's backward takes more, later."""
    backward: float
    """Of one layer: what is computed again, and the gradients of scores; 0 where the logits take more."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def attention_bytes(
    model: ModelConfig, seq_length: int, attention: Attention, *, again: bool, masked: bool = False
) -> float:
    """Kept for a token from attention's linear to the next one, by all heads.

    Of numbers in bf16, w for all heads' queries and kv for keys:
        fused     queries, keys, values (copied) and output                       2 w + 2 kv
        unfused   keys and values are repeated for the heads of their group      4 w
                  by torch in fp32                                               7 w
                  by megatron-core with a head for each key: a view as above     6 w
    Fused, 4 B a head of log-sums, and with masks keys and values repeated for the heads of their group;
    unfused, SCORES.

    Args:
        masked: documents are apart.
        again: it is computed again in backward, and keeps what it takes and gives: its values are a view
            of all that the linear gives, 3 w + 3 kv, and there are no log-sums.
    """
    heads, keys = model.num_attention_heads, model.kv_heads * model.head_dim
    width = heads * model.head_dim
    if again:
        return BF16 * 3 * (width + keys)
    if attention in ("te", "torch"):
        return BF16 * 2 * (width + (width if masked else keys)) + FP32 * heads
    numbers = {"te-unfused": 4, "torch-unfused": 7, "unfused": 6 if keys == width else 4}
    scores = SCORES[attention][1 if model.attention_dropout else 0]
    return BF16 * numbers[attention] * width + scores * heads * seq_length


def activation_bytes(
    model: ModelConfig,
    *,
    tokens: int,
    seq_length: int,
    tp: int,
    sp: bool,
    recompute: Recompute,
    fp8: Fp8Recipe | None = None,
    attention: Attention = "te",
    masked: bool = False,
) -> float:
    """Kept for backward by one layer, for one micro-batch, on one GPU.

    For a token, of numbers in bf16, after the counting of arXiv 2205.05198, section 4, without dropout:
        the inputs of the two norms                           2 h
        the norms' outputs, inputs of the first linears       2 h
        attention                                             `attention_bytes`
        the MLP's first output, and SwiGLU's                  3 ffn
    The first two are not divided by tp without sequence parallelism. A parallel layer has one norm.
    "selective" computes attention again, and drops scores where they are in memory; fused attention has
    none, and keeps less than what "selective" does.

    In FP8 the inputs of linears are kept in FP8, the parallel layer's shared one twice and gathered;
    attention's output is kept in bf16 all the same. Delayed scaling keeps it in FP8, beside the bf16 of
    fused attention.

    Full recomputation keeps a layer's input with megatron-core's layers; this project's recompute a
    sub-module at a time and keep each one's input and its norm's; the former in FP8, where scales are of
    blocks for both directions of the GEMMs.
    """
    h, ffn = model.hidden_size, model.ffn_hidden_size
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
    again = recompute == "selective"
    rest = (
        attention_bytes(model, seq_length, attention, again=again, masked=masked)
        + (2 * BF16 + number) * ffn
    )
    if fp8 == "delayed":
        kept_by_attention = attention in ("te", "torch") and not again
        rest += (
            (FP8 - (0 if kept_by_attention else BF16)) * model.num_attention_heads * model.head_dim
        )
    return tokens * (inputs + outputs + rest / tp)


def stage_parameters(config: TrainConfig, *, first: bool, last: bool) -> float:
    """Weights of a pipeline stage on one GPU; a tied table counts on both ends, once without stages."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = (model.num_parameters(embeddings=False) - model.hidden_size) / pp / tp
    table = model.padded_vocab_size * model.hidden_size / tp
    tied = model.share_embeddings_and_output_weights and pp == 1
    return layers + table * (int(first) + int(last and not tied))


def memory_plan(config: TrainConfig, dp: int, attention: Attention = "te") -> MemoryPlan:
    """The fuller of the first and the last pipeline stage.

    A parameter takes 2 B in bf16, 4 B of fp32 gradient, and 12 B of the distributed optimizer (fp32
    copy, Adam's two moments; 8 B with those in bf16) over dp. Activations by `activation_bytes` for the
    micro-batches in flight: 1F1B's pp on the first stage, 1 + (pp - 1) / (pp vpp) times as many
    interleaved. Beside them, whichever is more: logits on the last stage, in bf16, in fp32, and where
    megatron-core's loss is compiled their exponentials; or what one layer's backward computes again, and
    gradients of scores.
    """
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, sp = parallel.num_chunks, parallel.sequence_parallel
    seq_length = config.data.seq_length
    tokens = config.micro_batch_size * seq_length
    recipe = config.fp8.recipe
    masked = not config.data.attend_across_documents
    mask = BF16 * tokens * seq_length if masked else 0  # one for all layers of a micro-batch

    def layer(recompute: Recompute) -> float:
        return activation_bytes(
            model,
            tokens=tokens,
            seq_length=seq_length,
            tp=tp,
            sp=sp,
            recompute=recompute,
            fp8=recipe,
            attention=attention,
            masked=masked,
        )

    backward = layer("none") if config.recompute == "full" else 0.0
    if config.recompute == "selective":
        backward = max(0.0, layer("none") - layer("selective"))
    if attention in SCORES:
        backward += SCORES[attention][2] * tokens * seq_length * model.num_attention_heads / tp
    logit = BF16 + (FP32 if config.deterministic else 2 * FP32)
    logits = logit * tokens * model.padded_vocab_size / tp
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
        chunk = model.num_layers / (pp * vpp) * layer(config.recompute) + mask
        weights, copies = BF16 * parameters, 0.0
        if recipe:
            linears = stage_parameters(config, first=False, last=False) * in_fp8 / model.num_layers
            copies = 2 * FP8 * FP8_WEIGHT_SCALES[recipe] * linears
            if config.fp8.primary_weights:  # not beside weights in bf16, but in place of them
                weights -= BF16 * linears
        at_the_loss = last and logits > backward
        plans.append(
            MemoryPlan(
                weights=weights,
                fp8_weights=copies,
                gradients=FP32 * parameters,
                optimizer=state * parameters / dp,
                activations=in_flight * chunk,
                logits=logits if at_the_loss else 0.0,
                backward=0.0 if at_the_loss else backward,
            )
        )
    return max(plans, key=lambda plan: plan.total)


def in_words(plan: MemoryPlan) -> str:
    """Its parts, in GiB, the largest first; those of nothing left out."""
    parts = {field.name: getattr(plan, field.name) for field in fields(plan)}
    ordered = sorted((p for p in parts.items() if p[1]), key=lambda part: -part[1])
    listed = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in ordered)
    return f"{plan.total / 2**30:.2f} GiB ({listed})"


def room(card_bytes: float) -> float:
    """Bytes of a card that may be planned with: all but HEADROOM."""
    return (1 - HEADROOM) * card_bytes


def is_planned(config: TrainConfig) -> bool:
    """Whether `memory_plan` counts this run: the paper's kinds in bf16."""
    return config.precision == "bf16" and config.model.residual != "desync"


def check_memory(
    config: TrainConfig, world_size: int, card_bytes: float, attention: Attention = "te"
) -> None:
    """Refuses a run that its fullest GPU has no room for.

    Args:
        card_bytes: all of the smallest card's memory.

    Raises:
        UserError: what is planned, what there is, and what to turn.
    """
    dp = config.parallel.data_parallel_size(world_size)
    plan = memory_plan(config, dp, attention)
    if plan.total > room(card_bytes):
        raise UserError(
            f"the fullest GPU would hold {in_words(plan)}, and has {card_in_words(card_bytes)}. To need "
            f"less: {what_to_turn(config, dp, attention)}"
        )


def card_in_words(card_bytes: float) -> str:
    """Its memory, and how much of it may be planned with."""
    return (
        f"{card_bytes / 2**30:.2f} GiB, {room(card_bytes) / 2**30:.2f} of it to plan with (the rest is for "
        "CUDA's context, communication buffers and memory in pieces)"
    )


def out_of_memory(
    config: TrainConfig, world_size: int, error: Exception, attention: Attention = "te"
) -> str:
    """What a user reads when CUDA has no memory left; the error's first sentences say how much."""
    said = ". ".join(str(error).split(". ")[:3])
    dp = config.parallel.data_parallel_size(world_size)
    planned = ""
    if is_planned(config):
        planned = f"Planned for the fullest GPU: {in_words(memory_plan(config, dp, attention))}. "
    return (
        f"{said}. {planned}To need less: {what_to_turn(config, dp, attention)}. Where the plan is far "
        "below the card's memory, something else holds it (nvidia-smi), or it is in pieces "
        "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)"
    )


def what_to_turn(config: TrainConfig, dp: int, attention: Attention = "te") -> str:
    """How to make a step take less memory, by this run's configuration, the cheapest first."""
    plan, parallel = memory_plan(config, dp, attention), config.parallel
    advice = []
    if config.cuda_graph:
        advice.append("no --cuda-graph (it keeps a step's memory also while validating)")
    if attention in SCORES:
        if attention != "torch-unfused":
            saved = plan.total - memory_plan(config, dp, "torch").total
            advice.append(f"--attention torch (no scores in memory: {saved / 2**30:.2f} GiB less)")
        if config.recompute == "none":
            selective = memory_plan(replace(config, recompute="selective"), dp, attention)
            saved = plan.total - selective.total
            advice.append(
                f"--recompute selective (scores of one layer at a time: {saved / 2**30:.2f} GiB less)"
            )
    elif config.recompute == "selective":
        advice.append("--recompute none (fused attention keeps less than selective recomputation)")
    if config.micro_batch_size > 1:
        advice.append(
            f"--micro-batch-size {config.micro_batch_size // 2} (the global batch stays: more accumulation)"
        )
    tp = parallel.tensor_model_parallel_size
    if tp > 1 and not parallel.sequence_parallel and config.model.residual != "desync":
        advice.append("--parallel.sequence-parallel (cuts norms' activations by the ranks)")
    if config.recompute != "full":
        advice.append("--recompute full (activations for a third more compute)")
    moment = plan.activations + plan.logits + plan.backward
    if plan.optimizer + plan.weights + plan.gradients > moment:
        if config.optimizer.moments == "fp32" and config.precision == "bf16":
            advice.append("--optimizer.moments bf16 (4 bytes less a parameter; another training)")
        advice.append("more GPUs (the optimizer's state is divided over data-parallel ranks)")
    advice.append(
        f"--parallel.tensor-model-parallel-size {2 * tp} or more "
        f"--parallel.pipeline-model-parallel-size ({parallel.pipeline_model_parallel_size} now)"
    )
    return "; ".join(advice)
