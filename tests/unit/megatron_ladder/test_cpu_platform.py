"""In a process of its own: what `enable` changes is for the life of a process."""

import ast
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")

# One for all tests: starting it takes seconds.
CODE = """
import logging, torch
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads
from megatron_ladder import cpu_platform

# As if they were Transformer Engine's, which need a GPU.
optimizer.Adam = optimizer.USING_PYTORCH_OPTIMIZER = clip_grads.l2_norm_impl = None
logging.basicConfig(level=logging.INFO, format="%(message)s")
assert cpu_platform.enable()
found = {}

x = torch.ones(2, device="cuda") + torch.tensor([1.0, 2.0], device=torch.device("cuda", 0))
found["devices"] = [x.device.type, x.to("cuda").cuda().device.type]
found["type"] = torch.zeros(1).type()
found["current"] = str(torch.cuda.current_device())

with torch.device("meta"):
    made = [torch.empty(1), torch.arange(3), torch.ones(2), torch.tensor(1.0), torch.randn(2)]
found["meta"] = [t.is_meta for t in made]

found["adam"] = [optimizer.Adam is torch.optim.AdamW, optimizer.USING_PYTORCH_OPTIMIZER]
found["norm"] = clip_grads.l2_norm_impl.__module__

once = torch.ones
cpu_platform.enable()
found["as before"] = once is torch.ones
print(found)
"""


@pytest.fixture(scope="module")
def ran() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def found(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return ast.literal_eval(ran.stdout)


def test_cuda_means_cpu(found: dict[str, Any]) -> None:
    assert found["devices"] == ["cpu", "cpu"]
    assert (found["type"], found["current"]) == ("torch.cuda.FloatTensor", "cpu")


def test_device_contexts_still_work(found: dict[str, Any]) -> None:
    """transformers loads models under `torch.device("meta")`."""
    assert found["meta"] == [True] * 5


def test_the_optimizer_is_torchs(found: dict[str, Any]) -> None:
    """Where Transformer Engine is installed too: a login node."""
    assert found["adam"] == [True, True]
    assert found["norm"] == "megatron.core.utils"


def test_enabling_twice_is_enabling_once(found: dict[str, Any]) -> None:
    assert found["as before"]


def test_it_says_so_in_the_log(ran: subprocess.CompletedProcess[str]) -> None:
    assert "the CPU stands in" in ran.stderr
