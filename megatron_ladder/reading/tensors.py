"""Reads the tensors that `saved.py` describes."""

from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from megatron_ladder.reading.plain_files import NotData
from megatron_ladder.reading.saved import ITEM_BYTES, SavedTensor, count, read_saved


def read_tensor(file: BufferedReader, begin: int, length: int) -> Tensor:
    """The tensor that `torch.save` has written into a part of a file; it takes at most `length` bytes.

    Raises:
        NotData: something else is there.
    """
    saved = read_saved(file, begin, length)
    if type(saved) is not SavedTensor:
        raise NotData("has something else where a tensor belongs")
    return tensor_at(file, saved)


def tensor_at(file: BufferedReader, saved: SavedTensor) -> Tensor:
    """Reads a tensor's elements. Raises NotData when the file has become shorter."""
    dtype: torch.dtype = getattr(torch, saved.dtype)
    size = count(saved.shape) * ITEM_BYTES[saved.dtype]
    if size == 0:
        return torch.empty(saved.shape, dtype=dtype)
    elements = bytearray(size)
    file.seek(saved.begin)
    if file.readinto(elements) != size:
        raise NotData("ends too early")
    return torch.frombuffer(elements, dtype=dtype).view(saved.shape)


def with_tensors(value: Any, file: BufferedReader) -> Any:
    """A value of `read_saved`, with its tensors read."""
    if type(value) is SavedTensor:
        return tensor_at(file, value)
    if type(value) is dict:
        return {key: with_tensors(x, file) for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_tensors(x, file) for x in value)
    return value
