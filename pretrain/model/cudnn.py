"""Checks that this process has loaded only one cuDNN, and that this one has all of its libraries.

Otherwise Transformer Engine's fused attention fails with CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED and is not
used. cuDNN's graph library opens the other libraries by name when attention is built. The wheel of
9.20.0.48, which torch 2.12 and 2.13 pin, lacks one of them (pytorch's issues 187824 and 188892).
megatron_ladder/one_cudnn.py makes sure that only one cuDNN is loaded.
"""

import mmap
import re
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_OPENED = re.compile(rb"libcudnn_\w+\.so")


def loaded() -> list[Path]:
    """The cuDNN graph libraries that this process has loaded: one for each cuDNN.

    torch loads one. Transformer Engine loads another if there is one in CUDNN_HOME or CUDA_HOME. The list
    is empty without a CUDA build of torch, before torch is imported, and on systems other than Linux, which
    have no /proc/self/maps.
    """
    if not _MAPS.exists():
        return []
    paths = {line.split(maxsplit=5)[-1] for line in _MAPS.read_text().splitlines()}
    return sorted(Path(path) for path in paths if "/libcudnn_graph.so" in path)


def lacking(graph: Path) -> list[str]:
    """The libraries that a graph library opens by name and that are missing in its folder."""
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        named = {name.decode() for name in _OPENED.findall(text)}
    return sorted(name for name in named if not list(graph.parent.glob(f"{name}*")))


def problems() -> list[str]:
    """A message for each problem: what is wrong, what it costs and what to do; [] when there is none."""
    found = loaded()
    two = [
        f"{len(found)} cuDNNs are loaded, of {' and '.join(str(graph.parent) for graph in found)}: "
        "Transformer Engine's fused attention fails, and slower attention is used instead. Set CUDNN_HOME "
        "to the folder above torch's, or remove the other cuDNN"
    ]
    return (two if len(found) > 1 else []) + [
        f"the cuDNN in {graph.parent} opens {', '.join(missing)} by name and is installed without it: "
        "Transformer Engine's fused attention fails, and slower attention is used instead. Do: "
        "pip install 'nvidia-cudnn-cu13>=9.21', or install the versions of scripts/constraints-gpu.txt"
        for graph in found
        if (missing := lacking(graph))
    ]
