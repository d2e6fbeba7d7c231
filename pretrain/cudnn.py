"""Whether the cuDNN of this process is whole.

Its graph library opens others by name when attention is built. The wheel of 9.20.0.48, which torch 2.12 and
2.13 pin, leaves one of them out (pytorch's issues 187824 and 188892): Transformer Engine's fused attention
then ends in CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED, and is not used.
"""

import mmap
import re
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_OPENED = re.compile(rb"libcudnn_\w+\.so")


def loaded() -> list[Path]:
    """The cuDNN graph libraries that this process has mapped: one for each cuDNN in it.

    torch brings one along, and Transformer Engine another where CUDNN_HOME or CUDA_HOME has one. Empty
    without a CUDA build of torch, before torch is imported, and where the system does not say (Linux does).
    """
    if not _MAPS.exists():
        return []
    paths = {line.split(maxsplit=5)[-1] for line in _MAPS.read_text().splitlines()}
    return sorted(Path(path) for path in paths if "/libcudnn_graph.so" in path)


def lacking(graph: Path) -> list[str]:
    """The libraries that a graph library names and that are not beside it."""
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        named = {name.decode() for name in _OPENED.findall(text)}
    return sorted(name for name in named if not list(graph.parent.glob(f"{name}*")))


def problems() -> list[str]:
    """Of each cuDNN that is not whole: what is missing, what that costs and what to do."""
    return [
        f"the cuDNN in {graph.parent} opens {', '.join(missing)} by name and is installed without it: "
        "Transformer Engine's fused attention fails, and something slower takes its place. "
        "pip install 'nvidia-cudnn-cu13>=9.21', or the versions of scripts/constraints-gpu.txt"
        for graph in loaded()
        if (missing := lacking(graph))
    ]
