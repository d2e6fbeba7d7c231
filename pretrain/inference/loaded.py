"""Loads this rank's part of the model of a run or of a Hugging Face folder, at any layout."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_ladder import cpu_platform
from megatron_ladder.config import AllReduce, ModelConfig, ParallelConfig, Precision, check_layout
from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import hf_to_megatron_chunks
from megatron_ladder.hf.files.stored import stored_tensors
from megatron_ladder.hf.from_hf import read_hf_config, refuse_side, to_model_config
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.standard import with_our_names
from megatron_ladder.inference.experts import ranks_of_experts, without_capacity
from megatron_ladder.inference.sums import check_all_reduce, set_all_reduce
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.config.train import load_config
from pretrain.convert.model_text import ModelText, text_of_folder, text_of_run
from pretrain.convert.plain_model import is_hf_folder
from pretrain.data.folders import kept_facts
from pretrain.data.tokenizer_facts import tokenizer_facts
from pretrain.ranks import launched_rank, take_gpu
from pretrain.run.checkpoint import load_initial_weights
from pretrain.run.folder import find_checkpoint

# The timeout of collectives. Ranks without work exchange messages more often (engine_loop.IDLE_S).
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Found:
    """A model that can be loaded: what `find` reads of it before ranks start."""

    name: str
    path: Path
    """A Hugging Face folder, or a run's checkpoint."""
    is_hf: bool
    model: ModelConfig
    text: ModelText
    templates: Path
    """The folder of Hugging Face's files that holds the chat template, if the model has one."""


def find(path: Path, parallel: ParallelConfig, all_reduce: AllReduce = "exact") -> Found:
    """Reads a model's configuration and tokenizer, but not its weights.

    Args:
        path: a run, one of its checkpoints, or a Hugging Face folder.
        parallel: the layout to run at.
        all_reduce: how outputs are summed over the tensor-parallel ranks.

    Raises:
        UserError: `path` is neither a run nor a folder of a supported model, or the model cannot be laid
            out so, or `all_reduce` does not fit the model or the layout.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run or an exported folder")
    if is_hf_folder(path):
        hf_config = read_hf_config(path)
        refuse_side(
            hf_config,
            path,
            "the inference engines' cache has no room for it. `generate` on this folder runs it by "
            "transformers, and so does `transformers serve`",
        )
        model = to_model_config(hf_config, path / "config.json")
        facts = tokenizer_facts(path, hf_config)
        found = Found(path.name, path, True, model, text_of_folder(path, facts["file"]), path)
    else:
        checkpoint = find_checkpoint(path)
        run = checkpoint.parents[1]
        config = load_config(checkpoint / "config.json")
        if config.side.is_on:
            raise UserError(
                f"{path} is side-tuned, and the inference engines' cache has no room for a side network: "
                "`megatron-ladder export` it, and give `generate` the folder"
            )
        tp = config.parallel.tensor_model_parallel_size
        if config.model.residual == "desync" and tp != parallel.tensor_model_parallel_size:
            raise UserError(
                f"{path} was trained with desync-{config.model.desync_interval} at tensor-parallel "
                f"size {tp}, and its weights work only there: give --tensor-model-parallel-size {tp}"
            )
        data = kept_facts(run)[0]
        text = text_of_run(run, data)
        model = without_capacity(config.model)
        found = Found(run.name, checkpoint, False, model, text, run / "imported")
    check_layout(found.model, parallel, inference=True)
    check_all_reduce(all_reduce, found.model, parallel)
    return found


def load(found: Found, parallel: ParallelConfig, seed: int, all_reduce: AllReduce = "exact") -> Any:
    """Starts torch.distributed, and builds and loads this rank's part of the model.

    Under torchrun it joins the other ranks; without it, the process is the only rank. On a GPU the model is
    in bf16, on a CPU in fp32. Experts are divided over the tensor-parallel ranks.

    Raises:
        UserError: the weights are damaged or do not fit the model.
    """
    precision: Precision
    if cpu_platform.enable():
        backend, precision = "gloo", "fp32"
    else:
        take_gpu()
        backend, precision = "nccl", "bf16"
    if launched_rank():
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    experts = ranks_of_experts(found.model, parallel)
    parallel = replace(parallel, expert_model_parallel_size=experts)
    initialize_model_parallel(parallel, seed)
    config = transformer_config(found.model, parallel, precision=precision, inference=True)
    (chunk,) = build_gpt_model(found.model, config)
    if found.is_hf:
        load_hf_weights(found.path, found.model, chunk)
    else:
        load_initial_weights(found.path, {"model": chunk})
    set_all_reduce(chunk.decoder, all_reduce)
    return chunk.eval()


@torch.no_grad()
def load_hf_weights(folder: Path, model: ModelConfig, chunk: Any) -> None:
    """Copies a folder's weights into this rank's part of the model, a tensor at a time.

    Raises:
        UserError: tensors are missing or unknown, or have other shapes than the model's.
    """
    try:
        stored = with_our_names(stored_tensors(folder), read_hf_config(folder).model_type)
        parts = hf_to_megatron_chunks(stored, to_hf_config(model), model.padded_vocab_size)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    makers = {(part.name, part.place): part.make for part in parts}
    for shard in _shards(chunk):
        axes = shard.prepend_axis_num  # of layers, and of experts
        part, place = tuple(shard.global_offset[:axes]), shard.global_offset[axes:]
        size = shard.data.shape
        whole = makers[shard.key, part]()
        ranges = tuple(slice(begin, begin + n) for begin, n in zip(place, size, strict=True))
        shard.data.copy_(whole[ranges])


def _shards(chunk: Any) -> Iterator[ShardedTensor]:
    """This rank's parameters, each with its range in the whole tensor; `data` is the parameter itself."""
    state = chunk.sharded_state_dict()
    apply_factories(state)  # splits the gate and the up projection, which are one parameter
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
