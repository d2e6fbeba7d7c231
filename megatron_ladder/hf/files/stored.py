"""Reads and writes safetensors files one tensor at a time, so that few tensors are in memory."""

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_word, read_json

logger = logging.getLogger(__name__)

MOST_INDEX_BYTES = 256 << 20  # it lists every tensor
INDEX = "model.safetensors.index.json"
# safetensors' names of the dtypes of weights that are not quantized.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Parts of names that wrappers of a module add: those of torch.compile, DDP (and DeepSpeed), FSDP, and
# activation checkpointing. Who saves the wrapper's state_dict stores them.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# RoPE's frequencies and tables. Old versions of transformers, and other trainers, stored these buffers.
# transformers computes them from the configuration and ignores the stored ones, whatever their dtype.
_COMPUTED = re.compile(r"(^|\.)rotary_(pos_)?emb\.\w*(inv_freq|cos|sin)(_cached)?$")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. `tensor[:]` reads it.

    The file is memory-mapped as long as the tensor that was read exists, or until another file is read.
    `tensor[:]` raises UserError when a value is NaN or infinite.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, all_of_it: slice) -> Tensor:
        assert all_of_it == slice(None)
        facts = self.path.stat()
        tensor = _opened(self.path, facts.st_ino, facts.st_mtime_ns).get_tensor(self.name)
        if not is_finite(tensor):
            raise UserError(f"{self.path}: {self.name} holds NaN or infinite values")
        return tensor


@functools.lru_cache(maxsize=1)
def _opened(path: Path, inode: int, modified_ns: int) -> Any:
    """The file, which stays open until another is read, or one that took its place. To parse the header of
    a file with thousands of tensors takes as long as reading many of them."""
    return safe_open(path, "pt").__enter__()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. It checks the minimum and maximum: one pass, without a copy."""
    lowest, highest = torch.aminmax(tensor.reshape(-1))
    return bool(lowest.isfinite() and highest.isfinite())


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All weights in a folder's safetensors files, by name. Only the headers of the files are read here.

    The names are without what wrappers of modules add, such as `_orig_mod.` of torch.compile. Buffers that
    transformers computes (RoPE's) are left out.

    Raises:
        UserError: there are no safetensors files, a file is missing or damaged, a weight is not F32, F16 or
            BF16, two weights have the same name, or the index does not agree with the files.
    """
    files, weight_map = _files(folder)
    found: dict[str, StoredTensor] = {}
    left_out: list[str] = []
    for path in files:
        names: set[str] = set()
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (`file` is not a dictionary)
                    names.add(name)
                    if _COMPUTED.search(name):
                        left_out.append(name)
                        continue
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{path}: {name} is {part.get_dtype()}: weights must be F32, F16 or BF16. "
                            "Quantized weights are not supported"
                        )
                    shape, dtype = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                    plain = ".".join(p for p in name.split(".") if p not in _WRAPPERS)
                    if plain in found:
                        raise UserError(
                            f"{found[plain].name} in {found[plain].path} and {name} in {path} are both "
                            f"{plain}: remove one of them"
                        )
                    found[plain] = StoredTensor(path, name, shape, dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short: {error}") from error
        if weight_map is not None:
            _check_index(folder / INDEX, weight_map, path, names)
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        logger.info(
            "%s: %s%s not read: the model computes RoPE from its configuration",
            *(folder, left_out[0], f"{more} are" if more else " is"),
        )
    return found


def _check_index(index: Path, weight_map: dict[str, str], path: Path, names: set[str]) -> None:
    """Raises UserError when a file does not contain exactly the tensors that the index names for it.

    transformers needs neither RoPE's buffers nor the `lm_head.weight` of a tied model. Some trainers write
    the index of the model that they began with, which names them. A model that needs its `lm_head.weight`
    misses it later (convert.py).
    """
    named = {name for name, file in weight_map.items() if file == path.name}
    named, names = (
        {
            name
            for name in some
            if not _COMPUTED.search(name) and not name.endswith("lm_head.weight")
        }
        for some in (named, names)
    )
    for wrong, where, not_where in (
        (sorted(named - names), index, path),
        (sorted(names - named), path, index),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(
                f"{path.name} has {wrong[0]}{more} according to {where}, but not according to {not_where}"
            )


def safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a safetensors file. The tensors' data must follow in this order, without gaps.

    safetensors' own writer needs all tensors of a file at once, so it is not used.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        facts = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**facts, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must be aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def weight_files(folder: Path) -> list[str]:
    """The names of the files that a folder's index names; without an index there is one file."""
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    return sorted(set(_weight_map(folder / INDEX).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    found = read_json(index, "an index of safetensors files", MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not all(is_word(name) for name in found.values()):
        raise UserError(
            f"{index} is not an index of safetensors files: it needs a weight_map of tensors to files"
        )
    return found


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The model's files, and the weight map of the index. Without an index there is one file, and None."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():
        return [single], None
    if not index.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise UserError(
                f"{folder} has no safetensors files, only {pickled[0]}: loading such a file can run "
                "any code that is in it. Convert it to safetensors first"
            )
        if any(folder.glob("consolidated*.safetensors")):
            raise UserError(
                f"{folder} has weights in Mistral's own format only (consolidated*.safetensors): copy the "
                f"model-*.safetensors and {INDEX} of the same model there"
            )
        raise UserError(f"{folder} has no weights: no model.safetensors and no {INDEX}")
    weight_map = _weight_map(index)
    files = sorted({folder / name for name in weight_map.values()})
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{file}, which {index.name} names, is missing")
    return files, weight_map
