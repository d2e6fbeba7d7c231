"""`train --plan-only`: whether a run fits in a GPU's memory, said without starting it."""

import argparse

from megatron_ladder.config import check_layout
from megatron_ladder.errors import UserError
from pretrain.data.checks import with_vocab_size
from pretrain.plan.memory import (
    Attention,
    card_in_words,
    in_words,
    is_planned,
    memory_plan,
    room,
    what_to_turn,
)
from pretrain.plan.planner import DEVICES
from pretrain.start.arguments import parse_train
from pretrain.start.launch import local_ranks


def plan_only(argv: list[str]) -> int:
    """Prints the plan of `train`'s options, the card, and what to turn where it does not fit.

    Neither data nor a GPU need be there: `--plan-only h100` names one, model.vocab_size stands for the
    data's tokenizer.

    Returns:
        The exit status: 0 where it fits, 1 where it does not.

    Raises:
        UserError: what cannot be laid out or planned.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan-only", nargs="?")
    chosen, options = parser.parse_known_args(argv)
    config, asked = parse_train(options)
    config = with_vocab_size(config)
    if config.model.vocab_size is None:
        raise UserError("--plan-only needs model.vocab_size: give it, or data sets")
    if not is_planned(config):
        raise UserError(
            f"--plan-only: memory is planned in bf16, of all kinds but desync; this run is "
            f"{config.model.residual} in {config.precision}"
        )
    if config.transformer_impl == "local":
        raise UserError(
            "--plan-only: memory is planned of Transformer Engine's layers, not of local ones"
        )
    check_layout(config.model, config.parallel)
    name, card_bytes = _card(chosen.plan_only)
    ranks = local_ranks(config, asked)
    dp = config.parallel.data_parallel_size(ranks)
    # What `auto` takes, and TE has no fused attention for masks.
    masked = not config.data.attend_across_documents
    attention: Attention = "torch" if config.attention == "auto" else config.attention
    if masked and attention == "te":
        attention = "te-unfused"
    plan = memory_plan(config, dp, attention)
    print(f"The fullest of {ranks} GPUs would hold {in_words(plan)}.")
    if attention in ("te", "torch"):
        with_scores = memory_plan(config, dp, "te-unfused").total
        print(
            f"With fused attention; {with_scores / 2**30:.2f} GiB without (`megatron-ladder doctor` says "
            "which one it takes)."
        )
    print(f"{name} has {card_in_words(card_bytes)}.")
    fits = plan.total <= room(card_bytes)
    print(
        "It fits."
        if fits
        else f"It does not fit. To need less: {what_to_turn(config, dp, attention)}."
    )
    return 0 if fits else 1


def _card(name: str | None) -> tuple[str, float]:
    """A GPU's name and bytes of memory: the one here, or as its data sheet has it."""
    if name is None:
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"there is no GPU here: name one, --plan-only {'|'.join(DEVICES)}")
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    if name not in DEVICES:
        raise UserError(f"--plan-only {name}: choose one of {', '.join(DEVICES)}")
    return name, DEVICES[name].memory_bytes
