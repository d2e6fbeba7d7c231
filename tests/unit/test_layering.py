"""Who may import whom; see CONTRIBUTING.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"megatron_ladder", "pretrain", "data_prep", "slurm"}
# What each package may import besides the standard library; None: anything.
MAY_IMPORT: dict[str, set[str] | None] = {
    "megatron_ladder": {"megatron_ladder", "megatron", "torch"},
    "megatron_ladder/te": {
        "megatron_ladder",
        "megatron",
        "torch",
        "transformer_engine",
        "transformer_engine_torch",
    },
    "megatron_ladder/hf": {"megatron_ladder", "torch", "transformers", "safetensors", "tokenizers"}
    | {"huggingface_hub", "jinja2", "sentencepiece", "tqdm", "numpy"},
    # Runs in vLLM's environment, without megatron-core.
    "megatron_ladder/vllm": {"megatron_ladder", "torch", "vllm"},
    "pretrain": None,
    "data_prep": None,
    "slurm": None,
}
MAY_IMPORT_OF_OURS = {
    "megatron_ladder": {"megatron_ladder"},
    "pretrain": {"pretrain", "megatron_ladder"},
    "data_prep": {"data_prep"},
    "slurm": {"slurm"},
}
# The one command's dispatcher, and what checks commands of all packages before they are submitted.
EXCEPTIONS = {
    ("pretrain/cli.py", "data_prep"),
    ("pretrain/cli.py", "slurm"),
    ("pretrain/commands/submit.py", "data_prep"),
    ("pretrain/commands/submit.py", "slurm"),
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(OURS))
def test_packages_import_only_those_below_them(package: str) -> None:
    for file in files(package):
        name = str(file.relative_to(ROOT))
        used = {i for i in imports(file) & OURS if (name, i) not in EXCEPTIONS}
        assert used <= MAY_IMPORT_OF_OURS[package], name


@pytest.mark.parametrize(
    "package",
    ["megatron_ladder", "megatron_ladder/te", "megatron_ladder/hf", "megatron_ladder/vllm"],
)
def test_the_library_imports_only_what_it_needs(package: str) -> None:
    allowed = MAY_IMPORT[package]
    assert allowed is not None
    for file in files(package):
        if package == "megatron_ladder" and {"te", "hf", "vllm"} & set(
            file.relative_to(ROOT).parts
        ):
            continue
        used = imports(file) - set(sys.stdlib_module_names)
        assert used <= allowed, f"{file.name}: {sorted(used - allowed)}"


def test_exported_modelling_files_need_only_torch_and_transformers() -> None:
    for name in ("configuration_ladder.py", "modeling_ladder.py"):
        file = ROOT / "megatron_ladder" / "hf" / name
        used = imports(file) - set(sys.stdlib_module_names)
        assert used <= {"torch", "transformers"}, name


@pytest.mark.parametrize(
    "module", ["data_prep.cli", "slurm.cli", "pretrain.cli", "pretrain.commands"]
)
def test_command_lines_start_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_every_folder_has_its_line_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = [
        "megatron_ladder",
        "megatron_ladder/te",
        "megatron_ladder/hf",
        "pretrain",
        "pretrain/bench",
        "pretrain/depth",
        "pretrain/evaluation",
        "data_prep",
        "slurm",
        "tests",
    ]
    for folder in [*folders, "benchmarks", "docs", "scripts"]:
        assert re.search(rf"^\s*{re.escape(Path(folder).name)}/ ", readme, re.M), folder


def test_files_are_small() -> None:
    for package in OURS:
        for file in files(package):
            assert len(file.read_text().splitlines()) <= 400, file
