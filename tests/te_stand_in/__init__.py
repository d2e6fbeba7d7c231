"""Transformer Engine's own layers, in Python, on kernels that are plain PyTorch here: kernels.py.

They need the package with its extension, and no GPU; where there is a GPU, tests/gpu is to be run.
"""

from importlib.util import find_spec

import pytest
import torch

MARKS = [
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="no Transformer Engine"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run tests/gpu"),
]
