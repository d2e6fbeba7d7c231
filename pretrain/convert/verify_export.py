"""Whether an exported folder is the run's model: the logits of both, compared.

The exported side is the folder as it was written, its files of code included. The run's side is
megatron-core's GPTModel with local layers. Both are in fp32, with the weights rounded as they were
exported, so that a folder in bf16 is held to the same tolerance.

The exported side runs on the CPU. So does the run's side, unless there is a GPU: megatron-core's
models then run on it.
"""

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from megatron_ladder import cpu_platform
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.stored import stored_tensors
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    destroy_model_parallel,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.convert.weights import CheckpointTensor
from pretrain.run.checkpoint import checkpoint_names

# Of the logits' standard deviation. Measured: rounding in fp32 alone gives 4e-6 (the tests' models) to
# 1e-5 (a 1.2 G model of 16 layers); a row of one matrix 5 % too large 7e-3, one layer that reads the
# wrong state 3.
TOLERANCE = 1e-4
LENGTH = 64  # tokens, in one sequence
_PACKAGE = "exported_model"


def verify_export(
    folder: Path,
    weights: Mapping[str, CheckpointTensor],
    model: ModelConfig,
    dtype: torch.dtype | None,
) -> str:
    """Compares a folder that `export_folder` wrote with what it was written from.

    The exported model is loaded whole where it fits: in fp32, within three quarters of the memory that
    is available. Else, as the run's model always, it has one layer in memory at a time, beside the
    vocabulary's tables.

    Args:
        folder: complete; its files are loaded, and code among them is run.
        weights: of the checkpoint, by megatron-core's names.
        model: of the run, with `vocab_size` set.
        dtype: of the exported weights; None: each has the checkpoint's.

    Returns:
        What was found, to print.

    Raises:
        UserError: the logits differ by more than TOLERANCE.
    """
    whole = 4 * model.num_parameters() < 0.75 * psutil.virtual_memory().available
    exported = exported_logits(folder, sample(model), whole=whole)
    expected = run_logits(weights, model, dtype, sample(model))
    difference = (exported - expected).abs().max().item()
    relative = difference / max(expected.std().item(), torch.finfo(torch.float32).tiny)
    how = "whole" if whole else "layer by layer"
    found = (
        f"the largest difference of logits is {difference:.1e}, {relative:.1e} of their standard "
        f"deviation ({LENGTH} tokens, fp32, {how})"
    )
    if not relative <= TOLERANCE:  # NaN is no agreement
        raise UserError(
            f"the exported model gives other logits than the run: {found}; at most {TOLERANCE:.0e} is "
            "rounding. Nothing was written. This is no mistake of yours: report it with the run's "
            f"config.json, torch {torch.__version__} and transformers {transformers.__version__}; "
            "another transformers version may do"
        )
    return f"verified: {found}"


def sample(model: ModelConfig) -> Tensor:
    """Token ids, [1, LENGTH] or the context if that is shorter; the same for every model of a size."""
    assert model.vocab_size is not None
    length = min(LENGTH, model.max_position_embeddings)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def exported_logits(folder: Path, tokens: Tensor, *, whole: bool) -> Tensor:
    """Of the folder, [1, length, vocabulary], fp32.

    Args:
        whole: loaded by `from_pretrained`; else its files are read a layer at a time.
    """
    transformers_logging.disable_progress_bar()
    with _model_class(folder) as model_class:
        if whole:
            model = model_class.from_pretrained(folder, dtype=torch.float32)
        else:
            config = model_class.config_class.from_pretrained(folder)
            with torch.device("meta"):
                model = model_class(config)
            # RoPE's frequencies: no file holds them.
            for name, module in list(model.named_modules()):
                if any(True for _ in module.buffers(recurse=False)):
                    model.set_submodule(name, type(module)(config))
            stored = stored_tensors(folder)
            _load_by_layers(
                model,
                model.model.layers,
                "model.layers.",
                {name: functools.partial(_read, tensor) for name, tensor in stored.items()},
            )
            model.tie_weights()
        return model.eval()(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def run_logits(
    weights: Mapping[str, CheckpointTensor],
    model: ModelConfig,
    dtype: torch.dtype | None,
    tokens: Tensor,
) -> Tensor:
    """Of megatron-core's GPTModel with weights rounded to `dtype`, if any: [1, length, vocabulary]."""
    with _one_rank():
        config = transformer_config(model, ParallelConfig(), impl="local")
        config.use_cpu_initialization = True  # else parameters are made on a GPU that is there
        (gpt,) = build_gpt_model(model, config, "local", device=torch.device("meta"))
        device = torch.cuda.current_device()
        makes = {}
        for name, key in checkpoint_names(gpt).items():
            which: Any = slice(None)
            if name.startswith("decoder.layers."):
                which = int(name.split(".")[2])
            makes[name] = functools.partial(_read, weights[key], which, dtype, device)
        _load_by_layers(gpt, gpt.decoder.layers, "decoder.layers.", makes)
        tokens = tokens.to(device)
        positions = torch.arange(tokens.shape[1], device=device)[None]
        return gpt.eval()(tokens, positions, None)[..., : model.vocab_size].cpu()


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
    """Gives a model on meta its weights: a layer's when it runs, and only for then.

    Args:
        prefix: of the layers' names in the model.
        makes: what gives each parameter, by its name in the model.
    """
    outside = {name: make() for name, make in makes.items() if not name.startswith(prefix)}
    _assign(model, outside, [n for n, _ in model.named_parameters() if not n.startswith(prefix)])

    def load(number: int, layer: nn.Module, _: Any) -> None:
        own = f"{prefix}{number}."
        weights = {n.removeprefix(own): make() for n, make in makes.items() if n.startswith(own)}
        _assign(layer, weights, [name for name, _ in layer.named_parameters()])

    def unload(layer: nn.Module, *_: Any) -> None:
        layer.to("meta")

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(load, number))
        layer.register_forward_hook(unload)


def _assign(module: nn.Module, weights: dict[str, Tensor], names: list[str]) -> None:
    # Tied tables have two names, and named_parameters gives the first.
    missing, unknown = set(names) - weights.keys(), weights.keys() - set(names)
    assert not missing and not unknown, (missing, unknown)
    module.load_state_dict(weights, strict=False, assign=True)


@contextmanager
def _model_class(folder: Path) -> Iterator[Any]:
    """The class that the folder's config.json names: transformers' own, or that of its files.

    transformers' Auto classes would not run the folder's files in a process that has imported
    `megatron_ladder.hf`, as this one; and they would copy them to the user's cache.
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
    """megatron-core's groups of one rank; those that are there already, or made for this."""
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
