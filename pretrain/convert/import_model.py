"""Imports a Hugging Face folder: writes a run's folder with a checkpoint that training can start from.

OUT/config.json, OUT/checkpoints/step_00000000    the model, for any layout
OUT/data/0                                        its tokenizer, in the form of a data set's
OUT/imported                                      the folder's other files, for export
OUT/staleness.json                                what --ladder-layers auto:N measured
"""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import hf_to_megatron_chunks, main_dtype
from megatron_ladder.hf.end_ids import end_ids
from megatron_ladder.hf.files.output import check_unused, complete_or_absent
from megatron_ladder.hf.files.stored import stored_tensors
from megatron_ladder.hf.from_hf import read_hf_config, refuse_side, to_model_config
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.standard import with_our_names
from megatron_ladder.reading.plain_files import refuse_links
from pretrain.config.data import DataConfig
from pretrain.config.train import TrainConfig, save_config
from pretrain.convert.import_again import refuse_other_imports
from pretrain.convert.import_tokenizer import folder_with_tokenizer
from pretrain.convert.model_text import text_of_folder
from pretrain.convert.plain_model import load_plain_model
from pretrain.convert.weights_only import write_checkpoint
from pretrain.data.checks import check_ids
from pretrain.data.folders import open_folder
from pretrain.data.sample import check_tokenizer, sample_sequences
from pretrain.data.tokenizer_facts import tokenizer_facts
from pretrain.model.staleness import Staleness, measure_staleness, save_staleness
from pretrain.run.folder import checkpoint_at
from pretrain.sizes import in_units
from pretrain.start.ladder_layers import auto_count, is_auto, with_ladder_layers

# The files beside the weights that are kept, so that export can write them again.
KEPT = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "tokenizer.model")
NOT_KEPT = ("*.safetensors.index.json", "pytorch_model*")
# `auto:N` measures the layers on so many sequences of so many tokens.
SAMPLE_SEQUENCES, SAMPLE_LENGTH = 32, 1024


def import_model(
    source: Path, output_dir: Path, ladder_layers: str | None = None, sample: Path | None = None
) -> str:
    """Converts a model, one tensor at a time. The output folder appears when it is complete.

    Args:
        source: a Hugging Face folder; from_hf.py lists the supported models.
        output_dir: the folder to make. If it is this import already, nothing is done; if it holds
            something else, it is refused.
        ladder_layers: the layers to make ladder layers, with the same weights (ladder_layers.py); None
            leaves the model as it is.
        sample: for `auto:N`, a data set made with the model's tokenizer, to measure the layers on.

    Returns:
        A text to print that says what was imported.

    Raises:
        UserError: the model is not supported, incomplete or damaged, the output is in use, or
            `ladder_layers` or `sample` do not fit.
    """
    if not source.is_dir():
        raise UserError(f"{source} does not exist: give a Hugging Face model's folder")
    if not (output_dir / "config.json").is_file():  # else it may be this import
        check_unused(output_dir)
    refuse_links(source)
    hf_config = read_hf_config(source)
    refuse_side(
        hf_config, source, "it can be evaluated and can generate, but not be trained further"
    )
    model = to_model_config(hf_config, source / "config.json")
    with TemporaryDirectory() as scratch:
        home = folder_with_tokenizer(source, Path(scratch))
        return _import(source, home, hf_config, model, output_dir, ladder_layers, sample)


def _import(
    source: Path,
    home: Path | None,
    hf_config: Any,
    model: ModelConfig,
    output_dir: Path,
    ladder_layers: str | None,
    sample: Path | None,
) -> str:
    """The same, with the folder where the tokenizer can be read, if any."""
    if home is not None:
        tokenizer = tokenizer_facts(home, hf_config, source)
        if begin := text_of_folder(home, tokenizer["file"]).begin_ids:
            tokenizer["bos_id"] = begin[0]
    elif not end_ids(source):
        raise UserError(
            f"{source}: neither config.json nor generation_config.json has an eos_token_id: add the id of "
            "the token that ends a text"
        )
    else:
        tokenizer = None
    try:
        state = with_our_names(stored_tensors(source), hf_config.model_type)
        chunks = hf_to_megatron_chunks(state, to_hf_config(model), model.padded_vocab_size)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    staleness = None
    if ladder_layers is not None and is_auto(ladder_layers):
        staleness = _measured(source, model, home, tokenizer, sample)
        chosen = staleness.choose(auto_count(ladder_layers))
        ladder_layers = ",".join(map(str, chosen))
    if ladder_layers is not None:
        model = with_ladder_layers(model, ladder_layers, None)
    dtype = main_dtype(state)
    config = TrainConfig(
        model=model,
        data=DataConfig(seq_length=min(2048, model.max_position_embeddings)),
        output_dir=output_dir,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
    )
    if (output_dir / "config.json").is_file():
        with TemporaryDirectory() as kept:
            _keep_files(source, Path(kept), home, tokenizer)
            refuse_other_imports(output_dir, source, chunks, config, Path(kept))
        return f"{output_dir} is the import of {source}: nothing to do"
    with complete_or_absent(output_dir) as new:
        write_checkpoint(checkpoint_at(new, 0), chunks, config, "importing")
        save_config(config, new / "config.json")
        _keep_files(source, new, home, tokenizer)
        if staleness:
            save_staleness(new, staleness)
    parameters = sum(math.prod(tensor.shape) for tensor in state.values())
    dtypes = ", ".join(sorted({str(chunk.dtype).removeprefix("torch.") for chunk in chunks}))
    size = sum(path.stat().st_size for path in {tensor.path for tensor in state.values()})
    return (
        f"{source} ({hf_config.architectures[0]}, {in_units(parameters)} parameters, "
        f"{in_units(size, 'B')} of {dtypes}): {output_dir}, residual "
        f"{model.residual}" + (f", ladder layers {ladder_layers}" if ladder_layers else "")
    )


def _measured(
    source: Path,
    model: ModelConfig,
    home: Path | None,
    tokenizer: dict[str, Any] | None,
    sample: Path | None,
) -> Staleness:
    if sample is None:
        raise UserError(
            "--ladder-layers auto:N measures the layers: give --sample DATA, a data set made with the "
            "model's tokenizer"
        )
    data = open_folder(sample)
    if home is not None and tokenizer is not None:
        check_tokenizer(data, home / tokenizer["file"], source)
    assert model.vocab_size is not None
    check_ids([data], model.vocab_size)
    length = min(SAMPLE_LENGTH, model.max_position_embeddings)
    sequences = sample_sequences(data, SAMPLE_SEQUENCES, length)
    plain = load_plain_model(source)
    return measure_staleness(plain.model, sequences.to(plain.device), data.name)


def _keep_files(
    source: Path, new: Path, home: Path | None, tokenizer: dict[str, Any] | None
) -> None:
    """Copies the tokenizer to NEW/data/0, and the files that export needs to NEW/imported."""
    data, imported = new / "data" / "0", new / "imported"
    data.mkdir(parents=True)
    imported.mkdir()
    for pattern in KEPT:
        for path in source.glob(pattern):
            if not any(path.match(other) for other in NOT_KEPT):
                copy = imported / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    if home is not None and tokenizer is not None:
        for folder in (data, imported):
            shutil.copyfile(home / tokenizer["file"], folder / tokenizer["file"])
    manifest = {
        "format": "megatron-ladder-data",
        "version": 1,
        "tokenizer": tokenizer,
        "splits": {},
        "sources": [],
    }
    (data / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
