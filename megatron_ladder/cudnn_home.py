"""Which cuDNN Transformer Engine loads: torch's, where torch brought one along.

Transformer Engine asks CUDNN_HOME first, then the system, and Python's packages last. On a machine that has
both, its own would come beside torch's: the two find each other's parts, and fused attention ends in
CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED, without a word (seen on an H100, 9.14 beside 9.19).
"""

import os
from importlib.util import find_spec
from pathlib import Path


def name_torchs() -> None:
    """Sets CUDNN_HOME, unless the user has said where cuDNN is. Before Transformer Engine is imported."""
    if {"CUDNN_HOME", "CUDNN_PATH"} & os.environ.keys() or (nvidia := find_spec("nvidia")) is None:
        return
    for folder in nvidia.submodule_search_locations or ():
        if any(Path(folder, "cudnn", "lib").glob("libcudnn.so*")):
            os.environ["CUDNN_HOME"] = str(Path(folder, "cudnn"))
            return
