"""Training that starts from another model's weights: an imported one, or another run's."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig, differences, load_config
from pretrain.data.folders import DataFolder, kept_facts
from pretrain.data.tokenizer_facts import has_ids_of
from pretrain.run.folder import find_checkpoint

logger = logging.getLogger(__name__)

# What may differ between the two models: no tensor depends on it.
FREE = (
    "residual",
    "ladder_layers",
    "desync_interval",
    "max_position_embeddings",
    "init_method_std",
    "attention_dropout",
    "hidden_dropout",
)


def initial_model(init_from: Path) -> ModelConfig:
    """The model of a run or of a checkpoint. Raises UserError when it is none."""
    return load_config(find_checkpoint(init_from) / "config.json").model


def original_model(init_from: Path) -> ModelConfig:
    """The same without the change that `import --ladder-layers` made of it."""
    checkpoint = find_checkpoint(init_from)
    config = load_config(checkpoint / "config.json")
    if config.data.paths:  # trained as it is
        return config.model
    # transformers' own architectures have neither field.
    saved = (checkpoint.parents[1] / "imported" / "config.json").read_text(encoding="utf-8")
    original = json.loads(saved)
    layers = original.get("ladder_layers")
    return replace(
        config.model,
        residual=original.get("residual", "standard"),
        ladder_layers=tuple(layers) if isinstance(layers, list) else layers,
    )


def starting_from(config: TrainConfig, init_from: Path, *, unmodified: bool) -> TrainConfig:
    """A preset with the model of a run, whose context bounds the sequences."""
    model = original_model(init_from) if unmodified else initial_model(init_from)
    length = min(config.data.seq_length, model.max_position_embeddings)
    return replace(
        config, model=model, init_from=init_from, data=replace(config.data, seq_length=length)
    )


def check_initial(config: TrainConfig, folders: list[DataFolder]) -> None:
    """Refuses weights that do not fit the model, and data of another tokenizer.

    Raises:
        UserError: naming what differs.
    """
    if config.init_from is None:
        return
    theirs = initial_model(config.init_from)
    changed = differences(theirs, config.model)
    wrong = {f"model.{name}": pair for name, pair in changed.items() if name not in FREE}
    if (theirs.residual == "parallel") != (config.model.residual == "parallel"):
        wrong["model.residual"] = (theirs.residual, config.model.residual)
    if wrong:
        detail = "; ".join(f"{name}: {a} there, {b} here" for name, (a, b) in wrong.items())
        raise UserError(f"init_from {config.init_from} holds another model: {detail}")
    if config.adapt.distillation_weight:
        teacher = original_model(config.init_from)
        if teacher.layer_residuals() == config.model.layer_residuals():
            raise UserError(
                "adapt.distillation_weight: the model is the unmodified one that it would learn from; "
                "choose layers to be ladder layers, --ladder-layers, or leave distillation out"
            )
    source = kept_facts(_run_of(config.init_from))[0]
    if not has_ids_of(folders[0], source.path / source.tokenizer["file"]):
        raise UserError(
            f"{folders[0].path} was tokenized with another tokenizer than that of {config.init_from}: "
            f"ids mean different things; tokenize with {source.path / source.tokenizer['file']}"
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


def keep_imported(config: TrainConfig) -> None:
    """Copies what an imported model's folder held into the run's, for export."""
    assert config.output_dir is not None
    if config.init_from is None:
        return
    imported, mine = _run_of(config.init_from) / "imported", config.output_dir / "imported"
    if imported.is_dir() and not mine.is_dir():
        new = mine.with_name(".imported.tmp")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(imported, new)
        new.rename(mine)


def _run_of(init_from: Path) -> Path:
    return find_checkpoint(init_from).parents[1]
