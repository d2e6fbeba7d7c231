"""Whether this process has one cuDNN, and that one whole.

With two, or with one that has not all of its libraries, Transformer Engine's fused attention ends in
CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED, and is not used. The graph library opens the others by name when
attention is built; the wheel of 9.20.0.48, which torch 2.12 and 2.13 pin, leaves one of them out (pytorch's
issues 187824 and 188892). megatron_ladder/one_cudnn.py sees to it that there is one.
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
    """What is wrong, what that costs and what to do."""
    found = loaded()
    two = [
        f"{len(found)} cuDNNs are loaded, of {' and '.join(str(graph.parent) for graph in found)}: "
        "Transformer Engine's fused attention fails, and something slower takes its place. Set CUDNN_HOME "
        "to the folder above torch's, or remove the other"
    ]
    return (two if len(found) > 1 else []) + [
        f"the cuDNN in {graph.parent} opens {', '.join(missing)} by name and is installed without it: "
        "Transformer Engine's fused attention fails, and something slower takes its place. "
        "pip install 'nvidia-cudnn-cu13>=9.21', or the versions of scripts/constraints-gpu.txt"
        for graph in found
        if (missing := lacking(graph))
    ]
