"""`train --plan-only`: says whether a run fits in a GPU's memory, without starting the run."""

import argparse

from megatron_ladder.config import check_layout
from megatron_ladder.errors import UserError
from pretrain.config.side import check_side_layout
from pretrain.data.checks import with_vocab_size
from pretrain.plan.attended import attended
from pretrain.plan.experts import IMBALANCE, has_experts
from pretrain.plan.fits import card_in_words, what_to_turn
from pretrain.plan.memory import Attention, in_words, is_planned, memory_plan, room
from pretrain.plan.planner import DEVICES
from pretrain.start.arguments import parse_train
from pretrain.start.extend import extension
from pretrain.start.launch import local_ranks


def plan_only(argv: list[str]) -> int:
    """Prints the planned memory of a run, the GPU's memory, and which options to change if it does not fit.

    It needs neither data nor a GPU: `--plan-only h100` names the GPU, and model.vocab_size gives the
    vocabulary size that the data's tokenizer would give.

    Args:
        argv: the options of `train`.

    Returns:
        The exit status: 0 where the run fits, 1 where it does not.

    Raises:
        UserError: the model cannot be laid out on the ranks, or its memory cannot be planned.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan-only", nargs="?")
    chosen, options = parser.parse_known_args(argv)
    config, asked = parse_train(options)
    config = with_vocab_size(config)
    if config.model.vocab_size is None:
        raise UserError("--plan-only needs model.vocab_size: give it, or data sets")
    if not is_planned(config):
        experts = " with experts" if has_experts(config.model) else ""
        raise UserError(
            "--plan-only: memory can be planned in bf16, for every residual kind but desync, and with "
            f"experts not in FP8; this run is {config.model.residual}{experts} in "
            f"{config.fp8.recipe or config.precision}"
        )
    if config.transformer_impl == "local":
        raise UserError(
            "--plan-only: memory can be planned for Transformer Engine's layers only: leave out "
            "--transformer-impl local"
        )
    check_layout(config.model, config.parallel)
    check_side_layout(config.side, config.model, config.parallel)
    name, card_bytes = _card(chosen.plan_only)
    ranks = local_ranks(config, asked)
    dp = config.parallel.data_parallel_size(ranks)
    # Over context-parallel ranks auto takes Transformer Engine's, which keeps no other rank's keys.
    ring = config.parallel.context_parallel_size > 1 and config.data.attend_across_documents
    fused: Attention = "te" if ring else "torch"
    attention: Attention = fused if config.attention == "auto" else config.attention
    works_on = attended(config)
    plan = memory_plan(config, dp, attention, works_on.longest)
    if longer := extension(config):
        print(longer)
    print(f"The fullest of {ranks} GPUs would hold {in_words(plan)}.")
    if config.side.is_on:
        trained, whole = config.side.num_parameters(config.model), config.model.num_parameters()
        print(
            f"The side network has {trained:,} parameters, all that is trained; the backbone {whole:,}."
        )
    if attention == "te" and ring:
        gathered = memory_plan(config, dp, "torch").total
        print(
            "That is with Transformer Engine's attention. Where it has no kernel, ranks gather all keys "
            f"and values: {gathered / 2**30:.2f} GiB."
        )
    elif attention in ("te", "torch"):
        with_scores = memory_plan(config, dp, "te-unfused", works_on.longest).total
        print(
            f"That is with fused attention; without it {with_scores / 2**30:.2f} GiB. `megatron-ladder "
            "doctor` says which attention this machine takes."
        )
    if has_experts(config.model):
        print(
            f"That is with a fullest expert of {IMBALANCE:g} times the mean, which a run may exceed "
            "(expert_imbalance in its log)."
        )
    if works_on.source:
        print(
            f"Scores in memory are those of documents of at most {works_on.longest:,} tokens "
            f"({works_on.source})."
        )
    print(f"{name} has {card_in_words(card_bytes)}.")
    fits = plan.total <= room(card_bytes)
    print(
        "It fits."
        if fits
        else f"It does not fit. To need less: {what_to_turn(config, dp, attention, works_on.longest)}."
    )
    return 0 if fits else 1


def _card(name: str | None) -> tuple[str, float]:
    """A GPU's name and its bytes of memory.

    Args:
        name: a name of DEVICES, whose memory is that of the data sheet; None: the GPU of this machine.

    Raises:
        UserError: there is no GPU here, or no such name.
    """
    if name is None:
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"there is no GPU here: name one with --plan-only {'|'.join(DEVICES)}")
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    if name not in DEVICES:
        raise UserError(f"--plan-only {name}: choose one of {', '.join(DEVICES)}")
    return name, DEVICES[name].memory_bytes
