"""torch.compile of a model's layers, for runs in which each rank has whole layers."""

import shutil
from importlib.util import find_spec
from typing import Any

import torch

from megatron_ladder.errors import UserError
from megatron_ladder.specs import resolve_impl
from pretrain.config.train import TrainConfig


def check_compile(config: TrainConfig) -> None:
    """Refuses --compile where compiled layers would be wrong, or slower.

    Raises:
        UserError: the reason, and what to change.
    """
    if not config.compile:
        return
    parallel = config.parallel
    reasons = {
        "collectives that overlap computation cannot be compiled: use one tensor-parallel rank": (
            parallel.tensor_model_parallel_size > 1
        ),
        "gathering over context-parallel ranks is not compiled: use 1": (
            parallel.context_parallel_size > 1
        ),
        "pipeline stages are not compiled: use 1": parallel.pipeline_model_parallel_size > 1,
        f"recompute {config.recompute} is not compiled: use none": config.recompute != "none",
        "dropout would draw other numbers: set model.hidden_dropout and model.attention_dropout to 0": (
            config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
        ),
        "Transformer Engine's layers are not compiled: use --transformer-impl local": (
            resolve_impl(config.transformer_impl) == "transformer_engine"
        ),
        "documents' lengths would be compiled in: leave --data.no-attend-across-documents out": (
            not config.data.attend_across_documents
        ),
        "experts are not compiled: numbers of tokens change": (
            config.model.experts.num_moe_experts is not None
        ),
        "attention unfused cannot be compiled: use auto": config.attention == "unfused",
        f"torch.compile needs {_compiler()}, which was not found: install it": not _has_compiler(),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"--compile: {reason}, or leave --compile out")


def compile_layers(chunks: list[Any]) -> None:
    """Lets torch compile each layer into one graph at its first call; layers that are alike share a graph.

    Args:
        chunks: from `build_gpt_model`. Their parameters keep their names.
    """
    dynamo: Any = torch._dynamo
    # The layers share one function. It has a graph for each residual kind, for first, middle and last
    # layers, and for training and evaluation: more than torch's limit of 8.
    dynamo.config.recompile_limit = 64
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.compile(fullgraph=True)


def _compiler() -> str:
    return "triton" if torch.cuda.is_available() else "a C++ compiler (g++)"


def _has_compiler() -> bool:
    if torch.cuda.is_available():
        return find_spec("triton") is not None
    return any(map(shutil.which, ("g++", "clang++")))
