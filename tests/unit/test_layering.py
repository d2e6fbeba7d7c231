"""Who may import whom: packages, the rooms in them, and no files in a circle. See CONTRIBUTING.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.imports import circles, import_graph

ROOT = Path(__file__).parents[2]
OURS = {"megatron_ladder", "pretrain", "data_prep", "slurm"}
# What is not installed with them: no package may import it.
NOT_INSTALLED = {"benchmarks", "measuring", "tests", "scripts"}
# What the library's packages may import besides the standard library.
MAY_IMPORT: dict[str, set[str]] = {
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
}
MAY_IMPORT_OF_OURS = {
    "megatron_ladder": {"megatron_ladder"},
    "pretrain": {"pretrain", "megatron_ladder"},
    "data_prep": {"data_prep"},
    "slurm": {"slurm"},
}
# The rooms of each package, and the files that are in none, from the lowest to the highest: each imports
# only what stands before it.
ROOMS = {
    "megatron_ladder": "errors json_files free_memory reading one_cudnn fields config rope fp8 "
    "cpu_platform losses collectives te layers te.layers inference specs mcore_compat "
    "side mcore_checkpoints megatron_lm hf.modelling hf.files hf vllm",
    "pretrain": "files processes ranks pictures sizes config data index optim model run watch "
    "plan start.going_on start loop convert evaluation report sweep.fits sweep inference inference.server "
    "depth bench commands cli __main__",
    "data_prep": "errors version files json_files left_out progress broken_pipe read parts encode dataset "
    "clean cli __main__",
    "slurm": "errors files jobs submit watch cli",
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
        used = {i for i in imports(file) & (OURS | NOT_INSTALLED) if (name, i) not in EXCEPTIONS}
        assert used <= MAY_IMPORT_OF_OURS[package], name


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_the_library_imports_only_what_it_needs(package: str) -> None:
    allowed = MAY_IMPORT[package]
    for file in files(package):
        if package == "megatron_ladder" and {"te", "hf", "vllm"} & set(
            file.relative_to(ROOT).parts
        ):
            continue
        used = imports(file) - set(sys.stdlib_module_names)
        assert used <= allowed, f"{file.name}: {sorted(used - allowed)}"


def test_exported_modelling_files_need_only_torch_and_transformers() -> None:
    for name in (
        "configuration_ladder.py",
        "modeling_ladder.py",
        "mlp_ladder.py",
        "modeling_side.py",
        "rotary_ladder.py",
    ):
        file = ROOT / "megatron_ladder" / "hf" / "modelling" / name
        used = imports(file) - set(sys.stdlib_module_names)
        assert used <= {"torch", "transformers"}, name


@pytest.mark.parametrize(
    "module",
    [
        "data_prep.cli",
        "slurm.cli",
        "pretrain.cli",
        "pretrain.commands.index",
        "pretrain.commands.train",
        "pretrain.commands.submit",
    ],
)
def test_command_lines_start_without_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = import_graph(ROOT, OURS)
    assert len(graph) > 200
    assert circles(graph) == []
    measuring = import_graph(ROOT / "benchmarks", {"measuring"})
    assert len(measuring) > 10
    assert circles(measuring) == []


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_no_import_goes_up(package: str) -> None:
    order = ROOMS[package].split()

    def place(module: str) -> int:
        """Of the room, or the file on the package's floor, that a module is in."""
        name = module.removeprefix(package + ".")
        found = [room for room in order if f"{name}.".startswith(room + ".")]
        assert found, f"{module} is in no room of ROOMS"
        return order.index(max(found, key=len))

    for module, imported in import_graph(ROOT, {package}).items():
        for other in sorted(imported - {package}):
            if module != package:
                assert place(other) <= place(module), f"{module} imports {other}, which is above it"


def test_circles_and_imports_are_found(tmp_path: Path) -> None:
    """Type-checking imports and those inside functions count too."""
    for name, source in {
        "__init__": "",
        "a": "def f():\n    from p.room import b\n",
        "room/__init__": "",
        "room/b": "if TYPE_CHECKING:\n    from p.room.c import C\n",
        "room/c": "from ..a import f\nimport json\n",
    }.items():
        file = tmp_path / "p" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    graph = import_graph(tmp_path, {"p"})
    assert graph["p.a"] == {"p.room", "p.room.b"}
    assert graph["p.room.c"] == {"p.a"}
    assert circles(graph) == [["p.a", "p.room.b", "p.room.c"]]
