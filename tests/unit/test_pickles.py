"""No package loads a pickle, but for what torch makes of plain values: a folder may be a stranger's."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("megatron_ladder", "pretrain", "data_prep", "slurm", "benchmarks")
# What loads pickles, runs what it is given, or reads a checkpoint as torch and megatron-core do.
CALLS = {"eval", "exec", "compile"}
NAMES = {
    "torch": {"load"},
    "pickle": {"load", "loads", "Unpickler"},
    "yaml": {"load", "unsafe_load", "full_load"},
    "dist_checkpointing": {"load", "load_plain_tensors", "load_common_state_dict"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "joblib": {"load"},
}
CLASSES = {"FileSystemReader", "DefaultLoadPlanner"}
# Here megatron-core reads with megatron_ladder/reading. tests/distributed/test_strangers_folders.py.
ALLOWED = {
    ("pretrain/run/checkpoint.py", "dist_checkpointing.load"),
    ("megatron_ladder/mcore_checkpoints.py", "dist_checkpointing.load"),
    ("benchmarks/checkpoints/parts_of_ranks.py", "dist_checkpointing.load"),
    ("megatron_ladder/reading/in_megatron.py", "FileSystemReader"),
    # What rank 0 of the same run says, from no file.
    ("pretrain/start/first_rank.py", "pickle.loads"),
}


def loads(tree: ast.AST) -> set[str]:
    """What in a file may load a pickle."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in NAMES.get(node.value.id, ()):
                found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            of = (node.module or "").rpartition(".")[2]
            found |= {f"{of}.{n.name}" for n in node.names if n.name in NAMES.get(of, ())}
            found |= {n.name for n in node.names if n.name in CLASSES}
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.add(node.func.id)
            for keyword in node.keywords:
                says = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in ("trust_remote_code", "allow_pickle") and says is not False:
                    found.add(f"{keyword.arg}")
                if keyword.arg == "weights_only" and says is not True:
                    found.add("weights_only")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_loads_a_pickle(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        name = str(file.relative_to(ROOT))
        found = {(name, what) for what in loads(ast.parse(file.read_text()))}
        assert found <= ALLOWED, sorted(found - ALLOWED)


def test_what_would_load_one_is_found() -> None:
    code = """
import torch, numpy as np
from pickle import loads
torch.load(path, weights_only=False)
np.load(path, allow_pickle=True)
eval(text)
AutoModel.from_pretrained(folder, trust_remote_code=options.trust)
"""
    expected = {"pickle.loads", "torch.load", "weights_only", "allow_pickle", "eval"}
    assert loads(ast.parse(code)) == expected | {"trust_remote_code"}
