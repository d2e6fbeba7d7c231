"""Checks that an exported folder holds the run's model, by comparing the logits of both.

The exported side is the folder as it was written, with the code in it. The run's side is megatron-core's
GPTModel with local layers. Both compute in fp32, with the weights rounded to the exported dtype, so that
the same tolerance serves for a folder in bf16.

The exported side runs on the CPU. The run's side does too, unless there is a GPU: megatron-core's models
then run on it.
"""

import functools
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from megatron_ladder import cpu_platform
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.free_memory import memory_here
from megatron_ladder.hf.files.stored import stored_tensors
from megatron_ladder.hf.model_config import NO_SIDE
from megatron_ladder.hf.standard import fused, with_our_names
from megatron_ladder.mcore_compat import (
    LadderConfig,
    build_gpt_model,
    destroy_model_parallel,
    initialize_model_parallel,
    transformer_config,
)
from megatron_ladder.side.config import SideConfig
from megatron_ladder.side.model import side_tuned
from pretrain.convert.weights import CheckpointTensor
from pretrain.run.checkpoint import checkpoint_names

# The largest difference of logits, in shares of their standard deviation. Measured: fp32 rounding alone
# gives 4e-6 (the tests' models) to 1e-5 (a model of 1.2G parameters and 16 layers); one row of one matrix
# that is 5 % too large gives 7e-3; one layer that reads the wrong state gives 3.
TOLERANCE = 1e-4
LENGTH = 64  # tokens in the one sequence that is compared
_PACKAGE = "exported_model"


def verify_export(
    folder: Path,
    weights: Mapping[str, CheckpointTensor],
    model: ModelConfig,
    dtype: torch.dtype | None,
    side: SideConfig = NO_SIDE,
) -> str:
    """Compares a folder that `export_folder` wrote with the weights that it was written from.

    The exported model is loaded as a whole if it fits, in fp32, into three quarters of the available
    memory. If it does not fit, one layer at a time is in memory, beside the embedding and output tables.
    The run's model is always run one layer at a time.

    Args:
        folder: the complete folder; its files are loaded, and the code in it is run.
        weights: the checkpoint's weights, by megatron-core's names.
        model: the run's model, with `vocab_size` set.
        dtype: the dtype of the exported weights; None: each has that of the checkpoint.
        side: of the run's side network.

    Returns:
        A text to print that says how large the difference is.

    Raises:
        UserError: the logits differ by more than TOLERANCE.
    """
    whole = 4 * model.num_parameters() < 0.75 * memory_here()
    exported = exported_logits(folder, sample(model), whole=whole)
    expected = run_logits(weights, model, dtype, sample(model), side)
    difference = (exported - expected).abs().max().item()
    relative = difference / max(expected.std().item(), torch.finfo(torch.float32).tiny)
    how = "whole" if whole else "layer by layer"
    found = (
        f"the largest difference of logits is {difference:.1e}, {relative:.1e} of their standard "
        f"deviation ({LENGTH} tokens, fp32, {how})"
    )
    if not relative <= TOLERANCE:  # written so that NaN fails too
        raise UserError(
            f"the exported model's logits differ from the run's: {found}; rounding gives at most "
            f"{TOLERANCE:.0e}. Nothing was written. This is a bug, not your mistake: report it with the "
            f"run's config.json, torch {torch.__version__} and transformers {transformers.__version__}. "
            "Another version of transformers may work"
        )
    return f"verified: {found}"


def sample(model: ModelConfig) -> Tensor:
    """Random token ids: int64 [1, LENGTH], or shorter if the context is.

    Models with the same vocabulary size and context get the same ids.
    """
    assert model.vocab_size is not None
    length = min(LENGTH, model.max_position_embeddings)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def exported_logits(folder: Path, tokens: Tensor, *, whole: bool) -> Tensor:
    """The logits of the exported model: fp32 [1, length, vocab_size].

    Args:
        folder: the exported folder.
        tokens: int64 [1, length].
        whole: load the model by `from_pretrained`; else read the weights one layer at a time.
    """
    transformers_logging.disable_progress_bar()
    with _model_class(folder) as model_class:
        if whole:
            model = model_class.from_pretrained(folder, dtype=torch.float32)
        else:
            config = model_class.config_class.from_pretrained(folder)
            with torch.device("meta"):
                model = model_class(config)
            # Modules with buffers are made again on the CPU: no file holds RoPE's frequencies.
            for name, module in list(model.named_modules()):
                if any(True for _ in module.buffers(recurse=False)):
                    model.set_submodule(name, type(module)(config))
            stored = with_our_names(stored_tensors(folder), config.model_type)
            makes: Any = {name: functools.partial(_read, t) for name, t in stored.items()}
            if any(name.endswith(".experts.gate_up_proj") for name, _ in model.named_parameters()):
                makes = fused(makes)
            _load_by_layers(model, model.model.layers, "model.layers.", makes)
            model.tie_weights()
        return model.eval()(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def run_logits(
    weights: Mapping[str, CheckpointTensor],
    model: ModelConfig,
    dtype: torch.dtype | None,
    tokens: Tensor,
    side: SideConfig = NO_SIDE,
) -> Tensor:
    """The logits of megatron-core's GPTModel with weights rounded to `dtype`: fp32 [1, length, vocab_size].

    Args:
        weights: the checkpoint's weights, by megatron-core's names.
        model: the run's model, with `vocab_size` set.
        dtype: the dtype of the exported weights; None: each has that of the checkpoint.
        tokens: int64 [1, length].
        side: of the run's side network, which is in memory as a whole.
    """
    with _one_rank():
        model = side.backbone(model)  # dropout is off in any case
        config, meta = _meta_config(model), torch.device("meta")
        (gpt,) = whole = build_gpt_model(model, config, "local", device=meta)
        # Else a layer prepares the input of the next one, which has no weights yet.
        for layer in gpt.decoder.layers:
            layer.next_layer = ()
        device = torch.cuda.current_device()
        runs: Any = gpt
        if side.is_on:
            small = _meta_config(side.model(model))
            (runs,) = side_tuned(whole, model, side, ParallelConfig(), small, "local", device=meta)
            ours = {
                name: _read(weights[key], _place_of(key, name), dtype, device)
                for name, key in checkpoint_names(runs).items()
            }
            _assign(runs, ours, _names(runs))
        makes = {}
        for name, key in checkpoint_names(gpt).items():
            rounded = None if key.endswith(".expert_bias") else dtype  # convert.py
            place = _place_of(key, name)
            makes[name] = functools.partial(_read, weights[key], place, rounded, device)
        _load_by_layers(gpt, gpt.decoder.layers, "decoder.layers.", makes)
        tokens = tokens.to(device)
        positions = torch.arange(tokens.shape[1], device=device)[None]
        return runs.eval()(tokens, positions, None)[..., : model.vocab_size].cpu()


def _meta_config(model: ModelConfig) -> LadderConfig:
    config = transformer_config(model, ParallelConfig(), impl="local")
    # Otherwise parameters are made on the GPU, if there is one.
    config.use_cpu_initialization = True
    return config


def _place_of(key: str, name: str) -> Any:
    """The layer, and the expert, of a part of a stacked tensor, from its name in the model; slice(None)
    where it is not stacked.

    Args:
        key: its name in checkpoints, without these numbers.
    """
    numbers, stays = (
        [int(part) for part in some.split(".") if part.isdigit()] for some in (name, key)
    )
    return tuple(numbers[len(stays) :]) or slice(None)


def _read(
    tensor: Any,
    which: Any = slice(None),
    dtype: torch.dtype | None = None,
    device: Any = "cpu",
) -> Tensor:
    return tensor[which].to(dtype=dtype).to(device, torch.float32)


def _load_by_layers(
    model: nn.Module, layers: nn.ModuleList, prefix: str, makes: Mapping[str, Callable[[], Tensor]]
) -> None:
    """Gives weights to a model on the meta device; each layer has its own only while it runs.

    Args:
        layers: the layers, which are loaded one at a time.
        prefix: the beginning of the layers' parameter names in the model.
        makes: for each parameter's name in the model, a function that makes it.
    """
    outside = {name: make() for name, make in makes.items() if not name.startswith(prefix)}
    _assign(model, outside, [name for name in _names(model) if not name.startswith(prefix)])

    def load(number: int, layer: nn.Module, _: Any) -> None:
        own = f"{prefix}{number}."
        weights = {n.removeprefix(own): make() for n, make in makes.items() if n.startswith(own)}
        _assign(layer, weights, _names(layer))

    def unload(layer: nn.Module, *_: Any) -> None:
        layer.to("meta")

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(load, number))
        layer.register_forward_hook(unload)


def _names(module: nn.Module) -> list[str]:
    """Of its parameters and of the buffers that are stored: the bias of a router's experts is one. A tied
    table has two names, of which this gives the first."""
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    stored = module.state_dict()
    return [name for name, _ in named if name in stored]


def _assign(module: nn.Module, weights: dict[str, Tensor], names: list[str]) -> None:
    missing, unknown = set(names) - weights.keys(), weights.keys() - set(names)
    assert not missing and not unknown, (missing, unknown)
    module.load_state_dict(weights, strict=False, assign=True)


@contextmanager
def _model_class(folder: Path) -> Iterator[Any]:
    """The model class that the folder's config.json names: transformers' own, or one in the folder's files.

    transformers' Auto classes are not used: in a process that has imported `megatron_ladder.hf`, such as
    this one, they would not run the folder's files. And they would copy these to the user's cache.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" not in config:
        yield getattr(transformers, config["architectures"][0])
        return
    module, name = config["auto_map"]["AutoModelForCausalLM"].split(".")
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[_PACKAGE] = package
    try:
        yield getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
    finally:
        sys.dont_write_bytecode = writes_bytecode
        for loaded in [n for n in sys.modules if n.split(".")[0] == _PACKAGE]:
            del sys.modules[loaded]


@contextmanager
def _one_rank() -> Iterator[None]:
    """Provides megatron-core's process groups of one rank: existing ones, or new ones for this block."""
    cpu_platform.enable()
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = not parallel_state.model_parallel_is_initialized()
    try:
        if made:
            initialize_model_parallel(ParallelConfig(), seed=0)
        yield
    finally:
        if made:
            destroy_model_parallel()
        if alone:
            dist.destroy_process_group()
