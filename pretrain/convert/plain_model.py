"""Loads the model of a run or of a Hugging Face folder as one plain PyTorch module, to measure it.

The module's code is the modelling file that exported folders contain. It serves every residual kind, and
the models of other projects. So a measurement of a run also holds for its exported folder.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import (
    checked_hf_tensors,
    main_dtype,
    megatron_to_hf,
    written_dtype,
)
from megatron_ladder.hf.files.stored import stored_tensors
from megatron_ladder.hf.from_hf import read_hf_config, to_model_config
from megatron_ladder.hf.model_config import side_fields, to_hf_config
from megatron_ladder.hf.modelling.configuration_ladder import LadderConfig
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from megatron_ladder.hf.modelling.modeling_side import LadderSideConfig, LadderSideForCausalLM
from megatron_ladder.hf.standard import with_our_names
from megatron_ladder.inference.experts import without_capacity
from pretrain.config.train import load_config
from pretrain.convert.model_text import ModelText, text_of_folder, text_of_run
from pretrain.convert.weights import run_weights
from pretrain.data.folders import kept_facts
from pretrain.data.tokenizer_facts import tokenizer_facts
from pretrain.run.folder import find_checkpoint


@dataclass(frozen=True)
class PlainModel:
    """A model in evaluation mode: on the GPU in its weights' dtype, or without a GPU on the CPU in fp32."""

    name: str
    path: Path
    """The run's folder, or the Hugging Face folder."""
    config: ModelConfig
    model: LadderForCausalLM
    tokenizer: dict[str, Any]
    """The tokenizer's facts, as in a data set's manifest: file, sha256, vocab_size, eod_id."""
    tokenizer_file: Path
    text: ModelText

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_plain_model(path: Path) -> PlainModel:
    """Loads the model of a run (its newest checkpoint), of one checkpoint, or of a Hugging Face folder.

    Raises:
        UserError: `path` is none of these, or its model is not supported.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run or a Hugging Face model's folder")
    if is_hf_folder(path):
        return _from_hf(path)
    return _from_run(path)


def is_hf_folder(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder. A run has a config.json too, but no weights beside it."""
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return (path / "config.json").is_file() and has_weights


def _from_run(path: Path) -> PlainModel:
    checkpoint = find_checkpoint(path)
    run = checkpoint.parents[1]
    config = load_config(checkpoint / "config.json")
    model = one_rank_model(config.model, config.parallel.tensor_model_parallel_size, path)
    facts = kept_facts(run)[0]
    weights, hf_config = run_weights(checkpoint), to_hf_config(model, side=config.side)
    tensors = megatron_to_hf(weights, hf_config)
    return PlainModel(
        name=run.name,
        path=run,
        config=model,
        model=_build(hf_config, tensors, main_dtype(weights)),
        tokenizer=facts.tokenizer,
        tokenizer_file=facts.path / facts.tokenizer["file"],
        text=text_of_run(run, facts),
    )


def one_rank_model(model: ModelConfig, tensor_model_parallel_size: int, run: Path) -> ModelConfig:
    """The model as a single rank computes it. Of experts no token is dropped: a capacity is a part of
    training, and which tokens it drops depends on the layout.

    Raises:
        UserError: a desync model that was trained on several tensor-parallel ranks.
    """
    model = without_capacity(model)
    if model.residual != "desync":
        return model
    if tensor_model_parallel_size > 1:
        raise UserError(
            f"{run} was trained with desync-{model.desync_interval} at tensor-parallel size "
            f"{tensor_model_parallel_size}: its weights work only on that many ranks, and a Hugging Face "
            "model runs on one. Give a standard, ladder or parallel model"
        )
    return replace(model, residual="standard")  # on one rank, desync leaves out no all-reduce


def _from_hf(folder: Path) -> PlainModel:
    hf_config = read_hf_config(folder)
    model = to_model_config(hf_config, folder / "config.json")
    tokenizer = tokenizer_facts(folder, hf_config)
    ours = to_hf_config(model, side=side_fields(hf_config))
    try:
        stored = with_our_names(stored_tensors(folder), hf_config.model_type)
        tensors = checked_hf_tensors(stored, ours)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return PlainModel(
        name=folder.name,
        path=folder,
        config=model,
        model=_build(ours, ((n, t[:]) for n, t in tensors.items()), main_dtype(tensors)),
        tokenizer=tokenizer,
        tokenizer_file=folder / tokenizer["file"],
        text=text_of_folder(folder, tokenizer["file"]),
    )


def _build(
    config: LadderConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> LadderForCausalLM:
    device, dtype = ("cuda", dtype) if torch.cuda.is_available() else ("cpu", torch.float32)
    with torch.device("meta"):
        has_side = isinstance(config, LadderSideConfig)
        plain = (LadderSideForCausalLM if has_side else LadderForCausalLM)(config)
    # Each tensor is copied: it may be a view, which would keep a whole shard or all layers in memory.
    state = {
        name: tensor.to(device, written_dtype(name, torch.float32, dtype), copy=True)
        for name, tensor in tensors
    }
    missing, unknown = plain.load_state_dict(state, strict=False, assign=True)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    plain.tie_weights()
    return plain.eval().requires_grad_(False)
