"""Makes Transformer Engine use the cuDNN that was installed with torch.

Transformer Engine looks for cuDNN in CUDNN_HOME, then in the system, and last in Python's packages. It
finds the libraries of cuDNN by their names alone. When the system has a cuDNN too, both are loaded into one
process, and each may load the other's libraries. Fused attention then fails with
CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED, and Transformer Engine uses unfused attention without a message
(seen on an H100: 9.14 beside torch's 9.19).
"""

import contextlib
import ctypes
import os
from importlib.util import find_spec
from pathlib import Path


def load_torchs() -> None:
    """Sets CUDNN_HOME to torch's cuDNN and loads its libraries, so that each name is loaded already.

    Call it before Transformer Engine is imported. It does nothing when Transformer Engine is not installed,
    when torch was installed without cuDNN, or when the user has set CUDNN_HOME or CUDNN_PATH.
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
