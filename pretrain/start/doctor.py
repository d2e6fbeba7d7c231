"""`megatron-ladder doctor`: what this machine can do, and what is missing for GPU and FP8 use."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import psutil

from pretrain.sizes import in_units

# Package, what it is needed for, how to install it.
PACKAGES = (
    ("torch", "everything", "pip install torch"),
    ("megatron-core", "everything", "pip install megatron-core"),
    ("transformers", "exported models", "pip install transformers"),
    ("tokenizers", "Hugging Face tokenizers", "pip install tokenizers"),
    ("sentencepiece", "SentencePiece tokenizers", "pip install sentencepiece"),
    ("safetensors", "exported weights", "pip install safetensors"),
    ("tensorboard", "scalars while training", "pip install tensorboard"),
    (
        "transformer-engine",
        "GPU layers and FP8",
        "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]'",
    ),
    ("flash-attn", "nothing required: Transformer Engine has attention of its own", ""),
    ("wandb", "--wandb", "pip install wandb"),
)


def run_doctor() -> int:
    """Prints a table and a summary; returns 0 when training on the CPU can work."""
    print("Machine")
    _row("python", platform.python_version())
    _row("cores, memory", f"{os.cpu_count()}, {psutil.virtual_memory().total / 2**30:.0f} GiB")
    _row("free disk here", in_units(shutil.disk_usage(Path.cwd()).free, "B"))
    shm = Path("/dev/shm")  # noqa: S108 (only its size is read, nothing is written)
    if shm.is_dir():
        size = shutil.disk_usage(shm).total
        _row(str(shm), f"{size / 2**30:.1f} GiB (memory that loader processes share)")

    print("\nPackages")
    for name, use, advice in PACKAGES:
        found = _version(name)
        missing = f"missing; needed for {use}" + (f": {advice}" if advice else "")
        _row(name, found or missing)
    _row("apex", apex_verdict())
    outside = _outside_supported_versions()
    for line in outside:
        _row("version", line)

    print("\nGPU")
    gpu_problems, fp8_problems = _gpu()

    if _version("megatron-core") and _version("torch"):
        _built_of()
        gpu_problems += _cudnn()

    cpu = not outside and _version("torch") is not None and _version("megatron-core") is not None
    print()
    print(f"Ready for CPU training: {'yes' if cpu else 'no'}.", end=" ")
    print(f"Missing for GPU: {', '.join(gpu_problems) or 'nothing'}.", end=" ")
    print(f"Missing for FP8: {', '.join(gpu_problems + fp8_problems) or 'nothing'}.")
    return 0 if cpu else 1


def apex_verdict() -> str:
    """Says which `apex` is installed, without importing it.

    PyPI's project of that name is a web toolkit. NVIDIA's apex is built from source.
    """
    found = _version("apex")
    nvidia = _has_module("amp_C") or _has_module("apex.optimizers")
    if found is None and not nvidia:
        return (
            "missing; optional (NVIDIA's, built from source): the fused Adam of Transformer Engine or "
            "of torch does the same"
        )
    if nvidia:
        return f"{found or 'found'} (NVIDIA's)"
    return (
        f"{found} is PyPI's `apex`, ANOTHER PROJECT than NVIDIA's: run `pip uninstall apex`. NVIDIA's "
        "is optional and built from source; the fused Adam of Transformer Engine or of torch does the same"
    )


def _gpu() -> tuple[list[str], list[str]]:
    """Prints what there is of GPUs; returns what is missing for a GPU, and what FP8 needs in addition."""
    if _version("torch") is None:
        return ["torch"], []
    import torch

    _row("torch built for CUDA", torch.version.cuda or "no: install a CUDA build of torch")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    _row("GPUs", ", ".join(names) or "none found: training runs on the CPU (gloo, local layers)")
    _row("collectives", ", ".join(_backends(torch)) or "none")
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set")
    _row("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    gpu = [] if names else ["a GPU" if torch.version.cuda else "a GPU and a CUDA build of torch"]
    from megatron_ladder.fp8 import CAPABILITIES, missing

    recipes = [recipe for recipe in CAPABILITIES if not missing(recipe)]
    _row("FP8 recipes", ", ".join(recipes) or "none: see the last line")
    fp8 = [] if _version("transformer-engine") else ["transformer-engine"]
    least, _ = CAPABILITIES["delayed"]
    if names and torch.cuda.get_device_capability() < least:
        fp8.append("a GPU of compute capability 8.9 or later")
    return gpu, fp8


def _built_of() -> None:
    """Prints which implementation each part of a training step would get."""
    from megatron_ladder.config import ModelConfig, ParallelConfig
    from megatron_ladder.mcore_compat import transformer_config
    from pretrain.model.fusions import adam_class, choices, over_context_ranks, table

    # Which attention kernel is chosen depends on the heads and the length: they are as in the presets.
    model = ModelConfig(
        num_layers=1,
        hidden_size=1024,
        ffn_hidden_size=128,
        num_attention_heads=16,
        num_query_groups=4,
        vocab_size=64,
    )
    config = transformer_config(model, ParallelConfig(), precision="bf16")
    print(
        "\nTraining here (bf16, deterministic off; attention of 16 heads of 64 channels, "
        f"{config.num_query_groups} key heads, {model.max_position_embeddings} tokens)"
    )
    divided = ParallelConfig(context_parallel_size=2)
    over_two = over_context_ranks(transformer_config(model, divided, precision="bf16"))
    print(table([*choices(config, adam_class()), *over_two]))


def _cudnn() -> list[str]:
    """Prints which cuDNN is loaded; returns what is missing.

    Called last: by then all packages that bring a cuDNN of their own are imported.
    """
    import torch

    from pretrain.model.cudnn import loaded, problems

    for graph in loaded():
        _row("cuDNN", f"{torch.backends.cudnn.version()} in {graph.parent}")
    found = problems()
    for problem in found:
        _row("cuDNN", problem)
    return ["one cuDNN, with all its libraries"] if found else []


def _backends(torch) -> list[str]:  # type: ignore[no-untyped-def]
    dist = torch.distributed
    return [
        name
        for name, found in (
            ("gloo", dist.is_gloo_available()),
            ("nccl", dist.is_nccl_available()),
        )
        if found
    ]


def _outside_supported_versions() -> list[str]:
    """Requirements of megatron-ladder that the installed versions do not meet."""
    from packaging.requirements import Requirement

    problems = []
    try:
        requirements = importlib.metadata.requires("megatron-ladder") or ()
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        _row("megatron-ladder", "not installed: versions are not checked")
        return []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            problems.append(f"{requirement.name} is missing: pip install '{requirement}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is not supported: needs {requirement}")
    return problems


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # the parent package is missing, or is no package
        return False


def _row(name: str, value: str) -> None:
    print(f"  {name:28} {value}")
