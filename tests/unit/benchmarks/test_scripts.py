"""What all benchmarks have: their line in the README, and batches without a data set."""

import ast
from dataclasses import replace
from pathlib import Path

import torch

from measuring.batches import random_batch
from pretrain.config.presets import PRESETS

FOLDER = Path(__file__).parents[3] / "benchmarks"


def test_every_script_has_its_line_in_the_readme() -> None:
    readme = (FOLDER / "README.md").read_text()
    scripts = [path for path in FOLDER.glob("**/*.py") if "__main__" in path.read_text()]
    assert len(scripts) > 15
    for script in scripts:
        if "measuring" not in script.parts:
            assert f"`{script.relative_to(FOLDER)}" in readme, script


def test_what_chooses_the_cudnn_is_imported_before_megatron_core() -> None:
    """Transformer Engine, which megatron-core imports, would load the system's cuDNN beside torch's."""
    checked = 0
    for script in FOLDER.glob("*.py"):
        imported = [
            name.split(".")[0]
            for node in ast.parse(script.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else _names(node))
        ]
        if "megatron" in imported:
            ours = {"measuring", "pretrain", "megatron_ladder"}
            first = next(name for name in imported if name in ours | {"megatron"})
            assert first in ours, script
            checked += 1
    assert checked > 2


def _names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]


def test_labels_are_the_tokens_that_follow() -> None:
    config = PRESETS["debug"]()
    model = replace(config.model, vocab_size=100)
    config = replace(config, model=model, micro_batch_size=3)
    batch = random_batch(config)
    shape = (3, config.data.seq_length)
    assert {tuple(x.shape) for x in batch.values()} == {shape}
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batch["tokens"], random_batch(config)["tokens"])
    assert batch["position_ids"][0].tolist() == list(range(shape[1]))
