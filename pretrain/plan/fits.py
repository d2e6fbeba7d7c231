"""Says, before the first step and after a failed one, whether a run fits in memory, and which options need
less."""

from dataclasses import replace

from megatron_ladder.errors import UserError
from megatron_ladder.layers.attention.choice import check_attention
from pretrain.config.train import TrainConfig
from pretrain.model.compiled import check_compile
from pretrain.model.graphs import check_cuda_graph
from pretrain.plan.memory import SCORES, Attention, in_words, is_planned, memory_plan, room


def check_memory(
    config: TrainConfig,
    world_size: int,
    card_bytes: float,
    attention: Attention = "te",
    longest: int | None = None,
) -> None:
    """Refuses a run whose plan does not fit in the memory of the fullest GPU.

    Args:
        card_bytes: the whole memory of the smallest card.
        attention, longest: as in `memory_plan`.

    Raises:
        UserError: it does not fit; with the plan, the card's memory, and the options that need less.
    """
    dp = config.parallel.data_parallel_size(world_size)
    plan = memory_plan(config, dp, attention, longest)
    if plan.total > room(card_bytes):
        raise UserError(
            f"the fullest GPU would hold {in_words(plan)}, and has {card_in_words(card_bytes)}. To need "
            f"less: {what_to_turn(config, dp, attention, longest)}"
        )


def card_in_words(card_bytes: float) -> str:
    """A card's memory, and how much of it a plan may use."""
    return (
        f"{card_bytes / 2**30:.2f} GiB, {room(card_bytes) / 2**30:.2f} of it to plan with (the rest is for "
        "CUDA's context, communication buffers and fragmented memory)"
    )


def out_of_memory(
    config: TrainConfig,
    world_size: int,
    error: Exception,
    attention: Attention = "te",
    longest: int | None = None,
) -> str:
    """The message for a user when CUDA is out of memory; it begins with the error's first sentences."""
    said = ". ".join(str(error).split(". ")[:3])
    dp = config.parallel.data_parallel_size(world_size)
    planned = ""
    if is_planned(config):
        plan = memory_plan(config, dp, attention, longest)
        planned = f"Planned for the fullest GPU: {in_words(plan)}. "
    return (
        f"{said}. {planned}To need less: {what_to_turn(config, dp, attention, longest)}. If the plan is "
        "far below the card's memory, another process uses it (see nvidia-smi), or it is fragmented (set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)"
    )


def _of_experts(config: TrainConfig) -> list[str]:
    """Options with which a rank's experts take less memory."""
    experts, ep = config.model.experts, config.parallel.expert_model_parallel_size
    if experts.num_moe_experts is None:
        return []
    advice = []
    if ep < experts.num_moe_experts:
        advice.append(
            f"--parallel.expert-model-parallel-size {2 * ep} (fewer experts on each rank; TP x CP x DP "
            "must be a multiple)"
        )
    if experts.moe_expert_capacity_factor is None:
        advice.append(
            "--model.experts.moe-expert-capacity-factor 1.25 (bounds the tokens of an expert, and drops "
            "the rest)"
        )
    return advice


def is_accepted(config: TrainConfig, context_parallel_size: int) -> bool:
    """Whether this run could start with so many context-parallel ranks."""
    parallel = replace(config.parallel, context_parallel_size=context_parallel_size)
    try:
        changed = replace(config, parallel=parallel)
        check_compile(changed)
        check_cuda_graph(changed)
        check_attention(
            *(config.attention, "transformer_engine"), documents_divided=changed.documents_divided
        )
    except UserError:
        return False
    return True


def what_to_turn(
    config: TrainConfig, dp: int, attention: Attention = "te", longest: int | None = None
) -> str:
    """The options with which a step of this run takes less memory, the cheapest first."""
    plan, parallel, side = (
        memory_plan(config, dp, attention, longest),
        config.parallel,
        config.side,
    )
    advice = []
    if side.start == "fisher" and side.is_on:
        pruned = replace(config, side=replace(side, start="magnitude"))
        saved = plan.total - memory_plan(pruned, dp, attention, longest).total
        if saved:
            advice.append(
                f"--side.start magnitude (no backward through the backbone: {saved / 2**30:.2f} GiB less)"
            )
    if config.cuda_graph:
        advice.append("no --cuda-graph (a graph keeps a step's memory during validation too)")
    if attention in SCORES:
        if attention != "torch-unfused":
            saved = plan.total - memory_plan(config, dp, "torch").total
            advice.append(f"--attention torch (no scores in memory: {saved / 2**30:.2f} GiB less)")
        if config.recompute == "none" and not side.is_on:
            selective = memory_plan(replace(config, recompute="selective"), dp, attention, longest)
            saved = plan.total - selective.total
            advice.append(
                f"--recompute selective (scores of one layer at a time: {saved / 2**30:.2f} GiB less)"
            )
    elif config.recompute == "selective":
        advice.append("--recompute none (fused attention keeps less than selective recomputation)")
    if config.micro_batch_size > 1:
        advice.append(
            f"--micro-batch-size {config.micro_batch_size // 2} (same global batch, more accumulation)"
        )
    tp = parallel.tensor_model_parallel_size
    if tp > 1 and not parallel.sequence_parallel and config.model.residual != "desync":
        advice.append("--parallel.sequence-parallel (divides norms' activations over the ranks)")
    if config.recompute != "full" and not side.is_on:
        advice.append("--recompute full (fewer activations, a third more compute)")
    advice += _of_experts(config)
    moment = plan.activations + plan.logits + plan.backward
    if plan.optimizer + plan.weights + plan.gradients > moment:
        if config.optimizer.moments == "fp32" and config.precision == "bf16":
            advice.append("--optimizer.moments bf16 (4 bytes less a parameter; changes training)")
        advice.append("more GPUs (the optimizer's state is divided over data-parallel ranks)")
    elif config.micro_batch_size == 1 and is_accepted(
        config, cp := 2 * parallel.context_parallel_size
    ):
        advice.append(
            f"--parallel.context-parallel-size {cp} (divides the tokens of each sequence)"
        )
    advice.append(
        f"--parallel.tensor-model-parallel-size {2 * tp} or more "
        f"--parallel.pipeline-model-parallel-size ({parallel.pipeline_model_parallel_size} now)"
    )
    return "; ".join(advice)
