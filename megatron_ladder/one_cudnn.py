"""Torch's cuDNN for Transformer Engine too, where torch brought one along.

Transformer Engine asks CUDNN_HOME first, then the system, and Python's packages last, and finds the
libraries that cuDNN is made of by their names alone. On a machine with a cuDNN of its own that one would
come beside torch's: they take each other's libraries, and fused attention ends, without a word, in
CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED (seen on an H100, 9.14 beside torch's 9.19).
"""

import contextlib
import ctypes
import os
from importlib.util import find_spec
from pathlib import Path


def load_torchs() -> None:
    """Sets CUDNN_HOME and loads what lies there, so that each name is found loaded.

    Before Transformer Engine is imported. Nothing where that is not installed, where torch brought no
    cuDNN, and where the user has said which one it shall be.
    """
    nvidia = find_spec("nvidia")
    if nvidia is None or find_spec("transformer_engine") is None:
        return
    for folder in nvidia.submodule_search_locations or ():
        home = Path(folder, "cudnn")
        libraries = sorted(home.glob("lib/libcudnn*.so.*"))
        if not libraries:
            continue
        if os.environ.get("CUDNN_HOME", str(home)) != str(home) or "CUDNN_PATH" in os.environ:
            return
        os.environ["CUDNN_HOME"] = str(home)
        for library in libraries:
            with contextlib.suppress(OSError):  # Transformer Engine says what it cannot load
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return
