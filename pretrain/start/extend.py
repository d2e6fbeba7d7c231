"""`train --preset extend`: the context of a model that exists is made longer, by what RoPE is given."""

import argparse
from dataclasses import replace

from megatron_ladder import rope
from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.run.folder import latest_checkpoint
from pretrain.start.initial import initial_model


def with_longer_context(config: TrainConfig, seq_length: int, options: list[str]) -> TrainConfig:
    """`config`, which has the model to start from, with the context that the options ask for.

    Without another rotary base RoPE is stretched by the new context over the old one. A scaling that the
    model has is stretched further; a model that has none gets YaRN, or the type that is asked for.

    Args:
        config: the defaults of all options. Its sequence length may be shortened to the old context.
        seq_length: the sequence length where no option gives one.
        options: of the command line. They are read here, since they decide other options' defaults.

    Raises:
        UserError: the context would not be longer, or RoPE is scaled in another way already.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data.seq-length", "--data.seq_length", type=int, dest="seq_length")
    name = "max_position_embeddings"
    parser.add_argument("--model.max-position-embeddings", f"--model.{name}", type=int, dest=name)
    parser.add_argument("--model.rotary-base", "--model.rotary_base", type=float, dest="base")
    parser.add_argument("--model.rope-scaling-type", "--model.rope_scaling_type", dest="kind")
    asked, _ = parser.parse_known_args(options)
    seq_length = asked.seq_length or seq_length
    context = asked.max_position_embeddings or seq_length
    old = config.model.max_position_embeddings
    if context <= old:
        raise UserError(
            f"--preset extend: the context of {config.init_from} is {old:,} tokens already, this run's "
            f"would be {context:,}: give a longer --data.seq-length"
        )
    model = replace(config.model, max_position_embeddings=context)
    if asked.kind is not None or asked.base is None:
        model = _stretched(model, old, asked.kind)
    seq_length = min(seq_length, context)
    return replace(config, model=model, data=replace(config.data, seq_length=seq_length))


def _stretched(model: ModelConfig, old: int, kind: str | None) -> ModelConfig:
    """A model whose RoPE is stretched by its context over `old`, the context before.

    Args:
        kind: the type of scaling; None: that of the model, or YaRN.
    """
    factor, own = model.rope_scaling_factor, model.rope_scaling_type
    if factor is not None and kind not in (None, own):
        raise UserError(
            f"--model.rope-scaling-type {kind}: RoPE of the model to extend is scaled by {own} already, "
            f"and is stretched further by that: leave the option out"
        )
    kind = own if factor is not None else kind or "yarn"
    original: int | None = old
    if kind not in ("llama3", "yarn"):
        original = None
    elif factor is not None:
        original = model.rope_original_max_position_embeddings  # the first context, not the last
    return replace(
        model,
        rope_scaling_type=kind,  # type: ignore[arg-type] # tyro refuses others
        rope_scaling_factor=(factor or 1.0) * model.max_position_embeddings / old,
        rope_original_max_position_embeddings=original,
    )


def extension(config: TrainConfig) -> str:
    """What becomes of the context of the model to start from, for people; "" where nothing does."""
    if config.init_from is None or not config.init_from.exists():
        return ""
    if config.output_dir is not None and latest_checkpoint(config.output_dir) is not None:
        return ""  # the run has begun; the other model may be gone
    before, model = initial_model(config.init_from), config.model
    if before.max_position_embeddings >= model.max_position_embeddings:
        return ""
    words = (
        f"Context: {before.max_position_embeddings:,} -> {model.max_position_embeddings:,} tokens, trained "
        f"with sequences of {config.data.seq_length:,}. RoPE: {rope_in_words(before)}"
    )
    now = rope_in_words(model)
    return words + (" stays" if now == rope_in_words(before) else f" -> {now}")


def rope_in_words(model: ModelConfig) -> str:
    words = f"base {model.rotary_base:,.10g}"
    if model.rope_scaling_factor is None:
        return words
    words += f" with {model.rope_scaling_type} scaling by {model.rope_scaling_factor:g}"
    if model.rope_scaling_type == "linear":
        return words
    return words + f" of a context of {rope.original_context(model):,}"
