"""In processes of their own: what `enable` changes is for the life of a process."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")

ENABLED = "import torch; from megatron_ladder import cpu_platform; assert cpu_platform.enable(); "


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENABLED + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cuda_means_cpu() -> None:
    code = """
x = torch.ones(2, device="cuda") + torch.tensor([1.0, 2.0], device=torch.device("cuda", 0))
print(x.device, x.to("cuda").cuda().device, torch.zeros(1).type(), torch.cuda.current_device())
"""
    assert run(code) == "cpu cpu torch.cuda.FloatTensor cpu"


def test_device_contexts_still_work() -> None:
    """transformers loads models under `torch.device("meta")`."""
    code = """
with torch.device("meta"):
    made = [torch.empty(1), torch.arange(3), torch.ones(2), torch.tensor(1.0), torch.randn(2)]
print([t.is_meta for t in made])
"""
    assert run(code) == str([True] * 5)


def test_enabling_twice_is_enabling_once() -> None:
    assert run("a = torch.ones; cpu_platform.enable(); print(a is torch.ones)") == "True"


def test_it_says_so_in_the_log() -> None:
    code = "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s'); "
    code = ENABLED.replace("import torch; ", "import torch; " + code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert "the CPU stands in" in done.stderr
