"""A run's or a Hugging Face folder's model on this process's rank, at any layout."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
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
from megatron_ladder.hf.from_hf import read_hf_config, to_model_config
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.stored import stored_tensors
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
from pretrain.run.checkpoint import load_initial_weights
from pretrain.run.folder import find_checkpoint

# Ranks wait for each other no longer; while there is nothing to do they hear of it more often.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Found:
    """What is to be loaded: looked at before ranks start."""

    name: str
    path: Path
    """A Hugging Face folder, or a run's checkpoint."""
    is_hf: bool
    model: ModelConfig
    text: ModelText
    templates: Path
    """Where a chat template would be: a folder of Hugging Face's files."""


def find(path: Path, parallel: ParallelConfig, all_reduce: AllReduce = "exact") -> Found:
    """Reads what a model is, not its weights.

    Raises:
        UserError: it is no run and no folder of a supported model, or the layout cannot hold it, or
            `all_reduce` is not for it.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a run or an exported folder")
    if is_hf_folder(path):
        hf_config = read_hf_config(path)
        model = to_model_config(hf_config, path / "config.json")
        facts = tokenizer_facts(path, hf_config)
        found = Found(path.name, path, True, model, text_of_folder(path, facts["file"]), path)
    else:
        checkpoint = find_checkpoint(path)
        run = checkpoint.parents[1]
        config = load_config(checkpoint / "config.json")
        tp = config.parallel.tensor_model_parallel_size
        if config.model.residual == "desync" and tp != parallel.tensor_model_parallel_size:
            raise UserError(
                f"{path} was trained with desync-{config.model.desync_interval} at tensor-parallel "
                f"size {tp}: its weights give that model on {tp} ranks only"
            )
        data = kept_facts(run)[0]
        text = text_of_run(run, data)
        found = Found(run.name, checkpoint, False, config.model, text, run / "imported")
    check_layout(found.model, parallel)
    check_all_reduce(all_reduce, found.model, parallel)
    return found


def load(found: Found, parallel: ParallelConfig, seed: int, all_reduce: AllReduce = "exact") -> Any:
    """Joins torchrun's ranks, or makes a world of one, and builds this rank's part of the model.

    On GPUs in bf16, on CPUs in fp32.
    """
    precision: Precision
    if cpu_platform.enable():
        backend, precision = "gloo", "fp32"
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend, precision = "nccl", "bf16"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(parallel, seed)
    config = transformer_config(found.model, parallel, precision=precision)
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
        UserError: tensors are missing, unknown or of other shapes.
    """
    try:
        parts = hf_to_megatron_chunks(
            stored_tensors(folder), to_hf_config(model), model.padded_vocab_size
        )
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    makers = {(part.name, part.layer): part.make for part in parts}
    for shard in _shards(chunk):
        layer = shard.global_offset[0] if shard.prepend_axis_num else None
        place = shard.global_offset[shard.prepend_axis_num :]
        size = shard.data.shape
        whole = makers[shard.key, layer]()
        ranges = tuple(slice(begin, begin + n) for begin, n in zip(place, size, strict=True))
        shard.data.copy_(whole[ranges])


def _shards(chunk: Any) -> Iterator[ShardedTensor]:
    """This rank's parameters as ranges of whole tensors; their data are the parameters' own."""
    state = chunk.sharded_state_dict()
    apply_factories(state)  # a gate and an up projection, which are one parameter
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
