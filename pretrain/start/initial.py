"""Training that starts from another model's weights: an imported one, or another run's."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_ladder import rope
from megatron_ladder.config import PARALLEL, ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.fields import check_fields
from megatron_ladder.json_files import read_json
from megatron_ladder.reading.plain_files import refuse_links
from pretrain.config.train import TrainConfig, differences, load_config
from pretrain.data.folders import DataFolder, has_ids_of, kept_facts
from pretrain.files import write_atomically
from pretrain.run.checkpoint_files import written_files
from pretrain.run.folder import (
    INITIAL,
    backbone_of,
    find_checkpoint,
    latest_checkpoint,
    started_from,
)
from pretrain.start.first_rank import by_first_of_groups

logger = logging.getLogger(__name__)

# Fields of the model that may differ from the saved model: no tensor's name or shape depends on them.
FREE = (
    "residual",
    "ladder_layers",
    "desync_interval",
    "max_position_embeddings",
    "init_method_std",
    "attention_dropout",
    "hidden_dropout",
    "experts.moe_router_load_balancing_type",
    "experts.moe_aux_loss_coeff",
    "experts.moe_router_bias_update_rate",
    "experts.moe_expert_capacity_factor",
    "experts.moe_pad_expert_input_to_capacity",
)
# Fields that may differ, too, where the context is longer than the saved model's.
ROPE = (
    "rotary_base",
    "rope_scaling_factor",
    "rope_scaling_type",
    "rope_original_max_position_embeddings",
    "rope_beta_fast",
    "rope_beta_slow",
    "rope_attention_factor",
)


def initial_model(init_from: Path) -> ModelConfig:
    """The model of a run or of a checkpoint.

    Raises:
        UserError: `init_from` is neither, or a side-tuned run, whose checkpoints have a side network alone.
    """
    config = load_config(find_checkpoint(init_from) / "config.json")
    if config.side.is_on:
        raise UserError(
            f"init_from {init_from} is side-tuned: its checkpoints hold a side network, and no other "
            f"training starts from one. Its backbone, as it was, is {backbone_of(_run_of(init_from))}"
        )
    return _settled(config.model)


def _settled(model: ModelConfig) -> ModelConfig:
    """With YaRN's original context as a number: else it would follow max_position_embeddings."""
    if model.rope_scaling_type != "yarn":
        return model
    return replace(model, rope_original_max_position_embeddings=rope.original_context(model))


def original_model(init_from: Path) -> ModelConfig:
    """The model of a run or of a checkpoint, without the change that `import --ladder-layers` made.

    Raises:
        UserError: `init_from` is neither a run nor a checkpoint.
    """
    initial_model(init_from)  # refuses others
    checkpoint = find_checkpoint(init_from)
    config = load_config(checkpoint / "config.json")
    if config.data.paths:  # a trained run, not an import: this is the model it was trained as
        return _settled(config.model)
    # The configurations of transformers' own architectures have neither field: they are standard models.
    path = checkpoint.parents[1] / "imported" / "config.json"
    original = read_json(path, "a model's configuration")
    check_fields(original, path)
    layers = original.get("ladder_layers")
    return replace(
        _settled(config.model),
        residual=original.get("residual", "standard"),
        ladder_layers=tuple(layers) if isinstance(layers, list) else layers,
    )


def initial_checkpoint(init_from: Path) -> Path:
    """`find_checkpoint` by rank 0 for all: it looks at each file of the checkpoint. Called by all ranks.

    Raises:
        UserError: on every rank: there is no checkpoint, or it is damaged.
    """
    return by_first_of_groups(lambda: find_checkpoint(init_from))


def starting_from(config: TrainConfig, init_from: Path, *, unmodified: bool) -> TrainConfig:
    """`config` (a preset's) with the model of a run.

    The sequence length is shortened to the model's context length where it is longer.

    Args:
        unmodified: take the model as it was before `import --ladder-layers` changed it.
    """
    model = original_model(init_from) if unmodified else initial_model(init_from)
    length = min(config.data.seq_length, model.max_position_embeddings)
    return replace(
        config, model=model, init_from=init_from, data=replace(config.data, seq_length=length)
    )


def going_on(config: TrainConfig, init_from: Path, output_dir: Path | None) -> TrainConfig | None:
    """`config` with the model and the sequence length of the run in `output_dir`, where that has its own
    checkpoints and the folder that it started from is gone; else None.
    """
    if init_from.exists() or output_dir is None or latest_checkpoint(output_dir) is None:
        return None
    own = load_config(output_dir / "config.json")
    data = replace(config.data, seq_length=own.data.seq_length)
    return replace(config, model=own.model, init_from=init_from, data=data)


def check_initial(config: TrainConfig, folders: list[DataFolder]) -> None:
    """Refuses initial weights that do not fit the model, and data made with another tokenizer.

    Raises:
        UserError: the weights, the teacher or the tokenizer do not fit; it names what differs.
    """
    if config.init_from is None:
        if config.side.is_on:
            raise UserError(
                "side.reduction: a side network stands beside a model that exists: give --init-from RUN"
            )
        return
    resumed = config.branch_from is not None or (
        config.output_dir is not None and latest_checkpoint(config.output_dir) is not None
    )
    if resumed and not config.adapt.distillation_weight and not config.init_from.exists():
        return  # its weights are read no more
    if resumed and config.adapt.distillation_weight:
        _check_unchanged(config)
    theirs = initial_model(config.init_from)
    changed = differences(theirs, _settled(config.model))
    is_longer = config.model.max_position_embeddings > theirs.max_position_embeddings
    free = (*FREE, *ROPE) if is_longer else FREE
    wrong = {f"model.{name}": pair for name, pair in changed.items() if name not in free}
    if (theirs.residual in PARALLEL) != (config.model.residual in PARALLEL):  # other norms
        wrong["model.residual"] = (theirs.residual, config.model.residual)
    if wrong:
        detail = "; ".join(f"{name}: {a} there, {b} here" for name, (a, b) in wrong.items())
        if not wrong.keys() - {f"model.{name}" for name in ROPE}:
            detail += (
                ". RoPE may change only with a context longer than that model's, "
                f"{theirs.max_position_embeddings:,} tokens: model.max_position_embeddings"
            )
        raise UserError(
            f"init_from {config.init_from} holds a model that differs from this run's: {detail}"
        )
    if config.adapt.distillation_weight:
        teacher = original_model(config.init_from)
        if config.data.seq_length > teacher.max_position_embeddings:
            raise UserError(
                f"adapt.distillation_weight: data.seq_length {config.data.seq_length:,} is beyond the "
                f"teacher's context, {teacher.max_position_embeddings:,} tokens: shorten it, or leave "
                "distillation out"
            )
        if teacher.layer_residuals() == config.model.layer_residuals():
            raise UserError(
                "adapt.distillation_weight: the model is the same as its teacher, the unmodified model: "
                "change some layers with --ladder-layers, or leave distillation out"
            )
    source = kept_facts(_run_of(config.init_from))[0]
    if not source.has_tokenizer:  # the sizes fit: checks.py
        return
    if not has_ids_of(folders[0], source.path / source.tokenizer["file"]):
        raise UserError(
            f"{folders[0].path} was tokenized with another tokenizer than that of {config.init_from}, "
            "so the same ids stand for different tokens: tokenize the text with "
            f"{source.path / source.tokenizer['file']}"
        )
    _warn_of_another_beginning(config.init_from, source, folders[0])


def _warn_of_another_beginning(init_from: Path, source: DataFolder, data: DataFolder) -> None:
    """Allowed, as models can learn it; but seldom meant."""
    theirs, ours = (folder.tokenizer.get("bos_id") for folder in (source, data))
    if theirs == ours or ("bos_id" not in source.tokenizer and not source.manifest["splits"]):
        return  # the same; or imported before this was recorded
    words = "with the token {}".format
    logger.warning(
        "%s was made of texts that begin %s, the documents of %s begin %s: tokenize them %s --add-bos",
        init_from,
        "with no BOS token" if theirs is None else words(theirs),
        data.path,
        "with none" if ours is None else words(ours),
        "with" if ours is None else "without",
    )


def keep_initial(config: TrainConfig, *, is_resumed: bool) -> None:
    """Copies the files of an imported model (RUN/imported) into the new run's folder: export needs them.

    Also notes in RUN/initial.json which weights the run starts from: the folder of init_from may be moved,
    or get newer checkpoints. A resumed run of an older version has no such note: it is not known.
    """
    assert config.output_dir is not None
    if config.init_from is None or not config.init_from.is_dir():
        return
    checkpoint = find_checkpoint(config.init_from)
    imported, mine = checkpoint.parents[1] / "imported", config.output_dir / "imported"
    if imported.is_dir() and not mine.is_dir():
        new = mine.with_name(".imported.tmp")
        shutil.rmtree(new, ignore_errors=True)
        refuse_links(imported, home=checkpoint.parents[1])
        shutil.copytree(imported, new)
        new.rename(mine)
    if config.side.is_on:  # it was kept when the run began
        checkpoint = find_checkpoint(backbone_of(config.output_dir))
    files = written_files(checkpoint)
    if files and not is_resumed:
        facts = {"checkpoint": checkpoint.name, "files": files}
        write_atomically(config.output_dir / INITIAL, json.dumps(facts, indent=1) + "\n")


def _check_unchanged(config: TrainConfig) -> None:
    """Refuses a teacher that is not the one that a resumed run began with."""
    assert config.output_dir is not None and config.init_from is not None
    kept = started_from(config.output_dir)
    now = find_checkpoint(config.init_from)
    if kept and kept["files"] != written_files(now):
        raise UserError(
            f"init_from {config.init_from}: its newest checkpoint, {now.name}, has other weights than the "
            f"teacher that the run in {config.output_dir} began with ({kept['checkpoint']}): give that "
            "checkpoint's folder"
        )


def _run_of(init_from: Path) -> Path:
    return find_checkpoint(init_from).parents[1]
