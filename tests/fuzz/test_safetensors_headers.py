"""No header of a safetensors file, and no index of several, makes an import end in a traceback."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import checked_hf_tensors
from megatron_ladder.hf.files.stored import INDEX, safetensors_header, stored_tensors, weight_files
from megatron_ladder.hf.model_config import to_hf_config
from tests.fuzz.growth import bounded_memory
from tests.fuzz.mutations import odd_bytes, odd_json

AT_ONCE = 5
SEEDS = st.integers(0, 2**63)
MODEL = ModelConfig(1, 8, 8, 2, vocab_size=16)
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (8, 8),
    "model.layers.0.self_attn.v_proj.weight": (8, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (8, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.norm.weight": (8,),
}


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    with bounded_memory():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors")


TENSORS = {name: torch.ones(shape) for name, shape in SHAPES.items()}
HEADER = safetensors_header(TENSORS)
DATA = b"".join(t.numpy().tobytes() for t in TENSORS.values())


def read(folder: Path) -> bool:
    """As `import` does; False: it was refused in a sentence."""
    try:
        stored = stored_tensors(folder)
        with contextlib.suppress(ValueError):  # import_model.py makes it a UserError
            checked_hf_tensors(stored, to_hf_config(MODEL))
        found = stored
        for tensor in found.values():
            tensor[:]
    except (UserError, OSError):  # commands name an OSError's file
        return False
    return True


def test_the_right_file_is_read(folder: Path) -> None:
    (folder / INDEX).unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(HEADER + DATA)
    assert read(folder)


@given(SEEDS)
def test_changed_headers(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    fields = json.loads(HEADER[8:])
    for _ in range(AT_ONCE):
        text = odd_json(rng, fields)
        text += b" " * (-len(text) % 8)
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + DATA)
        read(folder)


@given(SEEDS)
def test_changed_bytes(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(AT_ONCE):
        (folder / "model.safetensors").write_bytes(odd_bytes(rng, HEADER + DATA))
        read(folder)


@given(st.binary(max_size=200))
def test_any_bytes(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    read(folder)
    (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    read(folder)


@given(SEEDS)
def test_changed_indexes(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "a.safetensors").write_bytes(HEADER + DATA)
    right = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(SHAPES, "a.safetensors")}
    for _ in range(AT_ONCE):
        (folder / INDEX).write_bytes(odd_json(rng, right))
        read(folder)
        with contextlib.suppress(UserError):
            weight_files(folder)
    (folder / INDEX).unlink()
