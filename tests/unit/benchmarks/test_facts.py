"""benchmarks/measuring/facts.py, and that what records a decoder leaves it alone."""

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from measuring import facts
from megatron_ladder.layers.attention_choice import CoreAttention
from pretrain.bench.recorder import Recorder


def test_a_recorder_that_is_closed_leaves_the_decoder_as_it_was() -> None:
    """Its hooks wait for the device at every sub-module: on a GPU a decoder that kept them was slow."""
    hooked = torch.nn.Module()
    hooked.linear_qkv = hooked.linear_fc1 = torch.nn.Linear(2, 2)
    layer = SimpleNamespace(self_attention=hooked, mlp=hooked)
    decoder: Any = SimpleNamespace(
        model=SimpleNamespace(residual="ladder"), block=SimpleNamespace(layers=[layer])
    )
    found = Recorder(decoder, 0)
    assert hooked._forward_pre_hooks and hooked.linear_qkv._forward_hooks
    found.close()
    assert not any(
        (hooked._forward_pre_hooks, hooked._forward_hooks, hooked.linear_qkv._forward_hooks)
    )


def test_attention_is_what_transformer_engine_says_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    class TEDotProductAttention(torch.nn.Module):
        pass

    model = torch.nn.Module()
    assert facts.attention_of(model) == "none"
    model.core_attention = torch.nn.Identity()
    taken_of_torch = CoreAttention("torch", "cuDNN")
    model.core_attention.config = SimpleNamespace(core_attention=taken_of_torch)
    assert facts.attention_of(model) == "torch: cuDNN"
    model.core_attention = TEDotProductAttention()
    taken = dict.fromkeys(("use_flash_attention", "use_fused_attention", "use_unfused_attention"))
    te: Any = ModuleType("dot_product_attention")
    te._attention_backends = taken
    name = "transformer_engine.pytorch.attention.dot_product_attention"
    monkeypatch.setitem(sys.modules, name, te)
    assert "not asked" in facts.attention_of(model)
    taken["use_unfused_attention"] = True
    assert "UNFUSED" in facts.attention_of(model)
    taken.update(use_fused_attention=True, fused_attention_backend="F16_arbitrary_seqlen")
    assert facts.attention_of(model) == "Transformer Engine: cuDNN F16_arbitrary_seqlen"


def test_clock_and_power_are_asked_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program that answers when there is load, or never."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    load = tmp_path / "load"

    def run() -> None:
        load.touch()
        time.sleep(0.01)

    program = tmp_path / "nvidia-smi"
    answers = f"while [ ! -e {load} ]; do sleep 0.01; done; [ $2 = GPU-1234 ] && echo 1755, 640.5"
    program.write_text(f"#!/bin/sh\n{answers}\n")
    program.chmod(0o755)
    assert facts.under_load(run) == {"sm_clock_mhz": 1755, "power_w": 640.5}
    monkeypatch.setattr(facts, "PATIENCE_S", 0.1)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    assert facts.under_load(run) == {}
    program.unlink()
    assert facts.under_load(run) == {}
    assert facts.read_load("1755, [N/A]") == {}
