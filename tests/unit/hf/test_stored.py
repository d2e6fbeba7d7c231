"""Tensors read one at a time from safetensors files."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_ladder.hf.files.stored import stored_tensors


def test_a_file_that_took_anothers_place_is_read_anew(tmp_path: Path) -> None:
    """A file stays open from one tensor to the next."""
    for value in (1.0, 7.0):
        save_file({"w": torch.full((2,), value), "v": torch.zeros(2)}, tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "model.safetensors")
        assert stored_tensors(tmp_path)["w"][:].tolist() == [value] * 2
        assert stored_tensors(tmp_path)["v"][:].tolist() == [0.0] * 2
