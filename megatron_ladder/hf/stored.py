"""Tensors of a Hugging Face folder's safetensors files, read when they are asked for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ladder.errors import UserError

INDEX = "model.safetensors.index.json"
# Of safetensors' names, those of weights that are not quantized.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `tensor[:]` reads it. The file's pages go with what was read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, all_of_it: slice) -> Tensor:
        assert all_of_it == slice(None)
        with safe_open(self.path, "pt") as file:
            tensor = file.get_tensor(self.name)
        # A sum shows NaN and Inf at a fraction of what looking at each would cost.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not tensor.isfinite().all():
            raise UserError(f"{self.path}: {self.name} holds NaN or infinite values")
        return tensor


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, by name; their headers are read and checked, their data is not.

    Raises:
        UserError: no safetensors files, one that is missing or damaged, or weights of another kind.
    """
    found: dict[str, StoredTensor] = {}
    for path in _files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{path}: {name} is {part.get_dtype()}: weights in F32, F16 or BF16 are "
                            "read, quantized ones are not"
                        )
                    shape, dtype = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                    found[name] = StoredTensor(path, name, shape, dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short: {error}") from error
    return found


def _files(folder: Path) -> list[Path]:
    """The files that hold the model: one, or those that an index names."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise UserError(
                f"{folder} has no safetensors files, only {pickled[0]}: loading such a file can run "
                "any code that is in it. Convert it to safetensors first"
            )
        raise UserError(f"{folder} has no weights: no model.safetensors and no {INDEX}")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({folder / str(name) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors files: {error!r}") from error
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{file}, which {index.name} names, is missing")
    return files
