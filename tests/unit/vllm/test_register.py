"""The plug-in's entry point, without vLLM, which a stand-in takes the place of."""

import subprocess
import sys
import tomllib
import types
from importlib import import_module
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.unit.hf import tiny

ROOT = Path(__file__).parents[3]


def test_the_entry_point_registers_the_exported_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["megatron_ladder"].split(":")
    registered: dict[str, str] = {}
    registry = types.SimpleNamespace(register_model=registered.__setitem__)
    stand_in = types.ModuleType("vllm")
    stand_in.ModelRegistry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    getattr(import_module(module), function)()

    tiny.model(residual="ladder").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert set(registered) == set(config.architectures)
    (place,) = registered.values()
    file, name = place.split(":")
    source = ROOT / f"{file.replace('.', '/')}.py"
    assert f"\nclass {name}(" in source.read_text()


def test_neither_the_library_nor_the_plug_in_imports_vllm_or_megatron_core() -> None:
    code = (
        "import sys, megatron_ladder, megatron_ladder.hf, megatron_ladder.vllm.all_reduce;"
        "print([m for m in ('vllm', 'megatron') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
