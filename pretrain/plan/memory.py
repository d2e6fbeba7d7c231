"""Plans the memory of a rank before the first step.

The plan counts Transformer Engine's layers. tests/te_stand_in compares it with what the layers save, and
tests/unit/pretrain/plan/test_memory.py with peaks measured on an H100. HEADROOM is for what it leaves out.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from megatron_ladder.config import PARALLEL, ModelConfig, Recompute
from megatron_ladder.fields.stages import chunks_of_stages, layers_of_stages
from megatron_ladder.fp8 import Fp8Recipe
from pretrain.config.train import TrainConfig
from pretrain.plan.experts import (
    buffer_bytes,
    expert_ranks,
    has_experts,
    kept_bytes,
    routed_parameters,
    rows_of,
)
from pretrain.plan.side import share_of_layers, side_parameters

if TYPE_CHECKING:  # because the command line starts without torch
    from megatron_ladder.layers.attention.choice import CoreAttention

BF16, FP32, FP8 = 2, 4, 1  # bytes
HEADROOM = 0.05
"""The share of a card's memory for what a plan leaves out. On one H100 (80 GB) CUDA's context and libraries
took 0.9 GiB in addition to torch's memory, and peaks were up to 0.6 GiB above their plans (workspaces,
short-lived outputs): 2 % together. The rest is for what was not measured: NCCL's buffers, and fragmented
memory."""

Attention = Literal["te", "torch", "te-unfused", "torch-unfused", "unfused"]
"""The core attention, by what it keeps in memory. te and torch: fused, Transformer Engine's or torch's.
With s x s scores in memory: te-unfused, torch-unfused, and unfused, which is megatron-core's own."""


def kept_as(taken: "CoreAttention") -> Attention:
    """The name, in this module, of the core attention that `transformer_config` has chosen."""
    if taken.keeps_scores and taken.whose != "unfused":
        return "te-unfused" if taken.whose == "te" else "torch-unfused"
    return taken.whose


# Bytes for each score: kept for backward; kept for backward with dropout (a mask and the softmax as well);
# and taken by the gradients of scores in one layer's backward.
SCORES: dict[Attention, tuple[int, int, int]] = {
    "te-unfused": (BF16, 2 * BF16 + 1, 2 * BF16),
    "torch-unfused": (FP32, 2 * FP32 + 1, 2 * FP32),
    "unfused": (FP32 + BF16, FP32 + BF16 + 1, 2 * FP32 + BF16),
}
# Bytes of a number in FP8 with its share of a scale: one scale for a tensor; an fp32 scale for 128 numbers
# (for weights 128 x 128); or a byte for 32 numbers.
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
    """Kept for backward by the layers, including scores in memory."""
    logits: float
    """Taken while the loss is computed; 0 when one layer's backward, which comes later, takes more."""
    backward: float
    """Taken by one layer's backward: what it recomputes, and the gradients of scores. 0 when the logits
    take more."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def attention_bytes(
    model: ModelConfig,
    seq_length: int,
    attention: Attention,
    *,
    again: bool,
    apart: bool = False,
    cp: int = 1,
) -> float:
    """Bytes that all heads keep for a token between attention's first linear and its second.

    The count of numbers in bf16, where w is the width of all heads' queries and kv that of all keys:
        fused     queries, keys, values (copied) and output                        2 w + 2 kv
        unfused   the same, with keys and values repeated for their group's heads  4 w
                  torch's, in fp32                                                 7 w
                  megatron-core's, if each head has its own keys: values are a     6 w
                  view of the linear's whole output, which is kept
    Fused attention also keeps 4 bytes of log-sums for each head, and with documents apart a copy of the
    output. Unfused attention also keeps scores (SCORES): with documents apart those of a document's own
    tokens.

    With context parallelism Transformer Engine keeps a rank's own keys and values. Other attention keeps
    those of all ranks: kv times cp. Torch's repeats them for their group's heads where there is a mask
    (attention/core.py): with windows kv becomes w; with context parallelism each chunk has its own copies,
    of the keys up to its end, and kv becomes w (2 cp + 1) / 2. The count is of a layer that has a window.

    Args:
        seq_length: tokens of a sequence; where documents are apart, of the longest one.
        apart: documents do not attend to each other.
        again: attention is computed again in backward. It keeps its inputs and its output: 3 w + 3 kv, as
            values are a view of the linear's whole output. There are no log-sums.
    """
    heads = model.num_attention_heads
    width = heads * model.head_dim
    keys: float = model.kv_heads * model.head_dim
    if again:
        return BF16 * 3 * (width + keys)
    if attention in ("te", "torch"):
        window = model.sliding_window is not None and model.sliding_window < seq_length
        if attention == "torch" and model.kv_heads < heads and (cp > 1 or window):
            keys = width * ((2 * cp + 1) / 2 if cp > 1 else 1)
        elif attention == "torch":
            keys *= cp
        return BF16 * (2 * (width + keys) + width * apart) + FP32 * heads
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
    apart: bool = False,
    halves: bool = False,
    cp: int = 1,
    ffn: int | None = None,
) -> float:
    """Bytes that one layer keeps for backward, for one micro-batch, on one GPU.

    The count of numbers in bf16 for a token, as in arXiv 2205.05198, section 4, without dropout:
        the inputs of the two norms                             2 h
        the norms' outputs, which the first linears read        2 h
        attention                                               `attention_bytes`
        the outputs of the MLP's first linear and of SwiGLU     3 ffn
    The first two are divided by tp only with sequence parallelism. A layer of a parallel kind has one norm.
    With learned scales (skipinit) what a layer adds is kept too, as much as the inputs of its norms.
    Without norms the first linears read, and keep, the states themselves.
    Two halves of a micro-batch keep as much as the whole.
    "selective" computes attention again and does not keep scores in memory. Fused attention has no scores,
    and keeps less than "selective" does.

    In FP8 the inputs of linears are kept in FP8; the input that a parallel layer's two linears share is
    kept twice, and gathered. Attention's output is kept in bf16 even so. With delayed scaling it is kept in
    FP8, and fused attention keeps it in bf16 as well.

    With full recomputation a layer of megatron-core (standard, not in halves) keeps its input. This
    project's layers recompute one sub-module at a time. They keep each sub-module's input and the input of
    its norm. In FP8 they keep the former in FP8, except those of parallel kinds; with scales of blocks they
    keep it twice, for both directions of the GEMMs.

    Args:
        ffn: the width of the MLP; None: the model's. Of experts that of the shared one, or 0: what the
            others keep comes in addition (experts.py).
    """
    gathered = model.residual in PARALLEL and ffn is None  # with experts it is gathered again
    h, ffn = model.hidden_size, model.ffn_hidden_size if ffn is None else ffn
    cut = tp if sp else 1
    parallel, own_layers = model.residual in PARALLEL, halves or not model.is_standard
    norms = 1 if parallel else 2
    learned = model.residual_scaling == "skipinit"
    inputs: float = BF16 * norms * h * (model.layer_norms + learned) / cut
    outputs = BF16 * norms * h / (1 if sp and gathered else cut)
    number = FP8 * FP8_SCALES[fp8] if fp8 else BF16
    in_fp8 = number * 2 * h / (1 if parallel else cut)
    if recompute == "full":
        if fp8 and own_layers and not parallel:
            outputs = in_fp8 * (1 if fp8 in ("delayed", "tensorwise") else 2)
        return tokens * (inputs + outputs if own_layers else inputs / norms)
    if fp8:
        outputs = in_fp8
    again = recompute == "selective"
    rest = (
        attention_bytes(model, seq_length, attention, again=again, apart=apart, cp=cp)
        + (2 * BF16 + number) * ffn
    )
    if fp8 == "delayed":
        # The second linear keeps it in place of the output in bf16, unless attention keeps that very one.
        shared = attention in ("te", "torch") and not again and not apart
        rest += (FP8 - (0 if shared else BF16)) * model.num_attention_heads * model.head_dim
    return tokens * (inputs + outputs + rest / tp)


def stage_layers(config: TrainConfig) -> list[int]:
    """The number of layers of each pipeline stage."""
    return layers_of_stages(config.model.num_layers, config.parallel)


def layer_parameters(config: TrainConfig, *, experts: bool = False) -> float:
    """The number of parameters of a layer on one GPU, without routed experts.

    Args:
        experts: of a layer that has experts.
    """
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    h, of = model.hidden_size, model.experts
    mlp = 3 * h * model.ffn_hidden_size
    have = of.layers(model.num_layers)
    all_mlps = sum(
        of.layer_weights(h, model.ffn_hidden_size, active=False) if e else mlp for e in have
    )
    others = (model.num_parameters(embeddings=False) - h - all_mlps) / model.num_layers
    if not experts:
        return (others + mlp) / tp
    shared = 3 * h * (of.moe_shared_expert_intermediate_size or 0)
    router = h * (of.num_moe_experts or 0)  # whole on each rank
    return (others + shared) / tp + router


def stage_parameters(config: TrainConfig, stage: int) -> tuple[float, float]:
    """The number of parameters of a pipeline stage on one GPU: all but routed experts', and theirs.

    A tied embedding table counts on the first and on the last stage; without stages it counts once.
    """
    model, parallel = config.model, config.parallel
    pp = parallel.pipeline_model_parallel_size
    table = model.padded_vocab_size * model.hidden_size / parallel.tensor_model_parallel_size
    tied = model.share_embeddings_and_output_weights and pp == 1
    tables = int(stage == 0) + int(stage == pp - 1 and not tied)
    layers, with_experts = stage_layers(config)[stage], layers_with_experts(config, stage)
    own = (layers - with_experts) * layer_parameters(config)
    own += with_experts * layer_parameters(config, experts=True)
    return own + table * tables, with_experts * routed_parameters(config)


def layers_with_experts(config: TrainConfig, stage: int) -> int:
    """The number of a pipeline stage's layers that have experts."""
    have = config.model.experts.layers(config.model.num_layers)
    chunks = chunks_of_stages(config.model.num_layers, config.parallel)
    return sum(have[number] for chunk in chunks[stage] for number in chunk)


def memory_plan(
    config: TrainConfig, dp: int, attention: Attention = "te", longest: int | None = None
) -> MemoryPlan:
    """The memory of the pipeline stage that takes most.

    A parameter takes 2 bytes in bf16, 4 bytes for its fp32 gradient, and 12 bytes / dp in the distributed
    optimizer: an fp32 copy and Adam's two moments (8 bytes with moments in bf16, or of a matrix with Muon),
    and 4 bytes more with an average of the weights. With context parallelism dp cp ranks share it, and a
    rank has the tokens of a sequence over cp.

    Activations are those of `activation_bytes`, for all micro-batches in flight. On the first stage these
    are pp micro-batches in 1F1B, and 1 + (pp - 1) / (pp vpp) times as many in the interleaved schedule.

    In addition there is the larger of two: the logits on the last stage, in bf16 and in fp32, and their
    exponentials if megatron-core's loss is compiled; or what one layer's backward recomputes, and the
    gradients of scores.

    Routed experts are divided over their own ranks (EP), and their optimizer's state over those that have
    the same ones. Activations are those of the fullest rank (experts.py). One layer's backward takes
    buffers for rows on their way besides.

    With a side network its parameters alone have gradients and a state of the optimizer. Its blocks keep
    activations, and its down-projections the backbone's states. Where its first weights are pruned by the
    backbone's gradients, the backward for that keeps the backbone's activations, if these are more.

    Args:
        longest: tokens of the longest document, where they are apart (attended.py). A token has no more
            scores than that: the sum of squares of a micro-batch's documents is at most `longest` times
            its tokens. None: a document may be as long as a sequence.
    """
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, sp = parallel.num_chunks, parallel.sequence_parallel
    cp = parallel.context_parallel_size
    tokens = config.micro_batch_size * config.data.seq_length // cp
    longest = longest or config.data.seq_length
    recipe, side = config.fp8.recipe, config.side
    # One mask for all layers: a rank's two chunks, with the keys up to the end of each.
    masks = attention == "torch" and cp > 1
    mask = BF16 * masks * (2 * cp + 1) * (config.data.seq_length / (2 * cp)) ** 2

    def layer(recompute: Recompute, of: ModelConfig = model, ffn: int | None = None) -> float:
        return activation_bytes(
            of,
            tokens=tokens,
            seq_length=longest,
            tp=tp,
            sp=sp,
            recompute=recompute,
            fp8=recipe,
            attention=attention,
            apart=not config.data.attend_across_documents,
            halves=parallel.tp_overlap == "halves",
            cp=cp,
            ffn=ffn,
        )

    def expert_layer(recompute: Recompute) -> float:
        shared = layer(recompute, ffn=model.experts.moe_shared_expert_intermediate_size or 0)
        if recompute == "full" and model.is_standard:
            return shared
        rows = rows_of(config)
        return shared + kept_bytes(model, rows, recomputed=recompute == "full")

    most_kept = expert_layer if has_experts(model) else layer
    backward = most_kept("none") if config.recompute == "full" else 0.0
    if config.recompute == "selective":
        backward = max(0.0, layer("none") - layer("selective"))
    if has_experts(model):
        backward += buffer_bytes(model, rows_of(config))
    if attention in SCORES:
        backward += SCORES[attention][2] * tokens * longest * model.num_attention_heads / tp
    logit = BF16 + (FP32 if config.deterministic else 2 * FP32)
    logits = logit * tokens * model.padded_vocab_size / tp
    state = FP32 + 2 * (BF16 if config.optimizer.moments == "bf16" else FP32)
    if config.optimizer.ema_decay is not None:
        state += FP32
    most = config.num_microbatches(dp) * vpp
    not_in_fp8 = config.fp8.num_layers_at_start_in_bf16 + config.fp8.num_layers_at_end_in_bf16
    layers = stage_layers(config)
    plans = []
    for stage in {0, min(1, pp - 1), pp - 1}:  # of the stages between, the first has most in flight
        warm_up = (pp - 1 - stage) * (1 if vpp == 1 else 2) + (vpp - 1) * pp
        in_flight = min(warm_up + 1, most)
        shared, routed = stage_parameters(config, stage)
        parameters = trained = shared + routed
        with_experts = layers_with_experts(config, stage)
        chunk = (layers[stage] - with_experts) / vpp * layer(config.recompute)
        if with_experts:
            chunk += with_experts / vpp * expert_layer(config.recompute)
        if side.is_on:
            trained = side_parameters(config, stage, layers[stage])
            blocks = layers[stage] * share_of_layers(config) / vpp
            states = BF16 * tokens * model.hidden_size / (tp if sp else 1)
            kept = blocks * (layer("none", side.model(model)) + states)
            chunk = max(chunk, kept) if side.start == "fisher" else kept
            parameters += trained
        of_layers = (layers[stage] - with_experts) * layer_parameters(config)
        of_layers += with_experts * layer_parameters(config, experts=True)
        states, of_experts = state * (trained - routed), state * routed
        if config.optimizer.optimizer == "muon":  # it has one moment
            states -= FP32 * of_layers
        weights, copies = BF16 * parameters, 0.0
        if recipe:
            linears = (of_layers + routed) * (1 - not_in_fp8 / model.num_layers)
            copies = 2 * FP8 * FP8_WEIGHT_SCALES[recipe] * linears
            if config.fp8.primary_weights:  # the FP8 weights replace those in bf16
                weights -= BF16 * linears
        at_the_loss = stage == pp - 1 and logits > backward
        plans.append(
            MemoryPlan(
                weights=weights,
                fp8_weights=copies,
                gradients=FP32 * trained,
                optimizer=states / (dp * cp)
                + of_experts / (expert_ranks(config, dp) if routed else 1),
                activations=in_flight * chunk + mask,
                logits=logits if at_the_loss else 0.0,
                backward=0.0 if at_the_loss else backward,
            )
        )
    return max(plans, key=lambda plan: plan.total)


def in_words(plan: MemoryPlan) -> str:
    """The plan's total and its parts in GiB, the largest first, without parts of 0."""
    parts = {field.name: getattr(plan, field.name) for field in fields(plan)}
    ordered = sorted((p for p in parts.items() if p[1]), key=lambda part: -part[1])
    listed = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in ordered)
    return f"{plan.total / 2**30:.2f} GiB ({listed})"


def room(card_bytes: float) -> float:
    """The bytes of a card that a plan may use: all but HEADROOM."""
    return (1 - HEADROOM) * card_bytes


def is_planned(config: TrainConfig) -> bool:
    """Whether `memory_plan` holds for this run: in bf16, not for desync, and not for experts in FP8."""
    experts_in_fp8 = has_experts(config.model) and config.fp8.recipe is not None
    return config.precision == "bf16" and config.model.residual != "desync" and not experts_in_fp8
