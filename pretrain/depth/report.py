"""Measures the layers of one model, or of two side by side, and writes the report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_ladder.errors import UserError
from pretrain.config.places import found_from
from pretrain.config.train import load_config
from pretrain.convert.plain_model import PlainModel, is_hf_folder, load_plain_model
from pretrain.data.checks import check_ids
from pretrain.data.folders import DataFolder, open_folder
from pretrain.data.sample import check_tokenizer, held_out_split, sample_sequences
from pretrain.depth import plots
from pretrain.depth.maps import map_errors, states_after_layers
from pretrain.depth.measured import (
    Measured,
    as_text,
    growth_in_words,
    layer_table,
    measure,
    rule_table,
)
from pretrain.files import write_atomically
from pretrain.model.staleness import save_staleness
from pretrain.report.pages import labels, render

DEFAULT_LENGTH = 256


def write_depth_report(
    paths: list[Path],
    data: Path | None = None,
    output_dir: Path | None = None,
    count: int = 16,
    length: int | None = None,
) -> Path:
    """Writes index.html, PNGs and depth.json, and prints the table of layers.

    The staleness of a standard model is saved too, for `auto:N`: for a run in the run's folder, for a
    Hugging Face folder in the output folder, if it is the first model.

    Args:
        paths: one model or two: runs, checkpoints or Hugging Face folders.
        data: a data set made with their tokenizer; None: the first data set of the first model's run.
        output_dir: None: `depth` in the first model's folder.
        count: sequences to measure on; fewer if the held-out split has fewer.
        length: tokens in each sequence; None: 256, or the shortest context of the models if that is less.

    Returns:
        The path of index.html.

    Raises:
        UserError: a model or the data cannot be read, they do not fit each other, or there is too
            little data.
    """
    plains = [load_plain_model(path) for path in paths]
    folder = _data(plains, data)
    sequences = _sequences(plains, folder, count, length)
    output_dir = output_dir or plains[0].path / "depth"
    output_dir.mkdir(parents=True, exist_ok=True)
    count, length = len(sequences), sequences.shape[1] - 1
    words = f"{folder.path}, {held_out_split(folder)}: {count} sequences of {length} tokens"

    models = [
        measure(plain, label, sequences, words)
        for plain, label in zip(plains, labels(paths), strict=True)
    ]
    maps = _maps(plains, sequences) if len(plains) > 1 else None
    pictures = _pictures(models, maps)
    facts = {"data": words, "models": [asdict(model) for model in models], "maps": maps}
    write_atomically(output_dir / "depth.json", json.dumps(facts, indent=1) + "\n")
    for name, png in pictures.items():
        write_atomically(output_dir / f"{name}.png", png)
    page = output_dir / "index.html"
    write_atomically(page, _page(models, words, pictures, maps))
    _save_staleness(plains, models, output_dir)
    for model in models:
        print(f"\n{model.label}: loss {model.loss:.4f} nats a token; {words}")
        print(f"{model.label}: {growth_in_words(model)}")
        for table in (layer_table(model), rule_table(model)):
            if table:
                print(as_text(table), end="\n\n")
    return page


def _data(plains: list[PlainModel], data: Path | None) -> DataFolder:
    first = plains[0]
    for other in plains[1:]:
        if other.tokenizer["sha256"] != first.tokenizer["sha256"]:
            raise UserError(
                f"{first.path} and {other.path} have different tokenizers, so the same text gives "
                "different tokens, and their layers cannot be compared: give models with the same tokenizer"
            )
    if data is None:
        own: tuple[Path, ...] = ()
        if not is_hf_folder(first.path):
            own = found_from(first.path, load_config(first.path / "config.json")).data.paths
        if not own or not own[0].is_dir():
            why = f"its data set, {own[0]}, is not there" if own else "it has none of its own"
            raise UserError(
                f"there is no data to measure {first.path} on ({why}): give --data FOLDER"
            )
        data = own[0]
    folder = open_folder(data)
    check_tokenizer(folder, first.tokenizer_file, first.path)
    assert first.config.vocab_size is not None
    check_ids([folder], first.config.vocab_size)
    return folder


def _sequences(
    plains: list[PlainModel], folder: DataFolder, count: int, length: int | None
) -> Tensor:
    longest = min(plain.config.max_position_embeddings for plain in plains)
    length = min(DEFAULT_LENGTH, longest) if length is None else length
    if count < 1 or length < 2:
        raise UserError(
            "--sequences must be at least 1, and --seq-length at least 2: a sequence is cut in two halves"
        )
    if length > longest:
        raise UserError(
            f"--seq-length {length} is longer than max_position_embeddings {longest}: give a smaller one"
        )
    sequences = sample_sequences(folder, count, length)
    if len(plains) > 1 and len(sequences) < 2:
        raise UserError(
            f"there is only one sequence of {length} tokens from {folder.path}, but maps between two "
            "models are fitted on half of the sequences and measured on the others: raise --sequences, "
            "lower --seq-length or give more text"
        )
    return sequences


def _maps(plains: list[PlainModel], sequences: Tensor) -> dict[str, Any]:
    first, second = (
        states_after_layers(plain.model, sequences.to(plain.device)) for plain in plains
    )
    return {
        "errors": map_errors(first, second),
        "fitted_on_tokens": sequences[::2, 1:].numel(),
        "hidden_size": second.shape[-1],
    }


def _pictures(models: list[Measured], maps: dict[str, Any] | None) -> dict[str, bytes]:
    pictures = {
        "contributions": plots.draw_contributions(models),
        "growth": plots.draw_growth(models),
        "skip_effects": plots.draw_skip_effects(models),
        "skip_outputs": plots.draw_skip_outputs(models),
        "staleness": plots.draw_staleness(models),
    }
    if ruled := [model for model in models if model.conversion.rules]:
        pictures["rules"] = plots.draw_rules(ruled)
    if maps:
        pictures["maps"] = plots.draw_maps(models[0], models[1], maps["errors"])
    return pictures


def _page(
    models: list[Measured], data: str, pictures: dict[str, bytes], maps: dict[str, Any] | None
) -> str:
    return render(
        "depth/depth.html.jinja",
        models=[(model, layer_table(model), rule_table(model)) for model in models],
        data=data,
        pictures=pictures,
        maps=maps,
    )


def _save_staleness(plains: list[PlainModel], models: list[Measured], output_dir: Path) -> None:
    for plain, model in zip(plains, models, strict=True):
        is_run = not is_hf_folder(plain.path)
        if model.conversion.staleness and (is_run or plain is plains[0]):
            save_staleness(plain.path if is_run else output_dir, model.conversion.staleness)
