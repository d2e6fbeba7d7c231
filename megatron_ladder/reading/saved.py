"""Reads what `torch.save` has written, as plain values. Tensors are described, not yet read."""

import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_ladder.reading.archives import Archive, open_archive
from megatron_ladder.reading.pickles import Call, Name, Pairs, Stored, read_pickle
from megatron_ladder.reading.plain_files import NotData

ITEM_BYTES = {
    **dict.fromkeys(("uint8", "int8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
}
"""Bytes of an element, for the dtypes of torch that a checkpoint may have."""

_STORAGES = {
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.BoolStorage": "bool",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.ShortStorage": "int16",
    "torch.FloatStorage": "float32",
    "torch.IntStorage": "int32",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    # Its number of elements is in bytes. The tensor says its dtype itself.
    "torch.storage.UntypedStorage": "uint8",
}
_TENSOR, _TENSOR_3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_SIZE, _DICT = "torch.Size", "collections.OrderedDict"
_NAMES = frozenset(
    {*_STORAGES, _TENSOR, _TENSOR_3, _SIZE, _DICT, *(f"torch.{dtype}" for dtype in ITEM_BYTES)}
)
_LARGEST_PICKLE = 2**26
_MOST_VALUES = 2_000_000
_DEEPEST = 64


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in an archive. Its elements lie in row-major order, without gaps."""

    dtype: str
    """Without `torch.`"""
    shape: tuple[int, ...]
    begin: int
    """Where its elements begin in the file, in bytes."""


def read_saved(file: BinaryIO, begin: int, length: int) -> Any:
    """The value that `torch.save` has written into a part of a file.

    Args:
        begin, length: the place in the file, in bytes.

    Returns:
        None, bool, int, float, str, bytes, lists, tuples and dictionaries of these, with `SavedTensor` for
        tensors. No tensor is larger than the archive, and no list or dictionary is there twice.

    Raises:
        NotData: it has other values.
    """
    archive = open_archive(file, begin, length)
    if (size := archive.place("data.pkl")[1]) > _LARGEST_PICKLE:
        raise NotData(f"has a pickle of {size:,} bytes")
    if "byteorder" in archive.members and archive.read("byteorder") != sys.byteorder.encode():
        raise NotData("was written on a machine with another order of bytes")
    return _Values(archive).value(read_pickle(archive.read("data.pkl"), _NAMES), 0)


class _Values:
    """Makes values of a pickle's."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._made = 0

    def value(self, read: Any, depth: int) -> Any:
        """A pickle may have one list at many places, or in itself. So the values are counted."""
        self._made += 1
        if self._made > _MOST_VALUES or depth > _DEEPEST:
            raise NotData("has more values, or more deeply nested ones, than any checkpoint")
        kind = type(read)
        if read is None or kind in (bool, int, float, str, bytes):
            return read
        if kind is list:
            return [self.value(x, depth + 1) for x in read]
        if kind is tuple:
            return tuple(self.value(x, depth + 1) for x in read)
        if kind is Pairs:
            made = {key(k): self.value(v, depth + 1) for k, v in read}
            if len(made) != len(read):
                raise NotData("has a key twice")
            return made
        if kind is Call and read.name == _SIZE and len(read.arguments) == 1:
            return self.value(read.arguments[0], depth + 1)
        if kind is Call and read.name in (_TENSOR, _TENSOR_3) and read.state is None:
            return self._tensor(*read.arguments)
        raise NotData("has a value that no checkpoint needs")

    def _tensor(self, *arguments: Any) -> SavedTensor:
        # Then: whether it needs a gradient, hooks; in version 3 its dtype; and what Python has added to it.
        stored, first, shape, strides, *_ = *arguments, None, None, None, None
        match stored:
            case Stored(("storage", Name(storage), str(name), str(), int())):
                dtype = _STORAGES.get(storage, "")
            case _:
                raise NotData("has a tensor without elements")
        if len(arguments) > 6 and type(arguments[6]) is Name:
            dtype = arguments[6].name.removeprefix("torch.")
        shape, strides = sizes(shape), sizes(strides)
        item = ITEM_BYTES.get(dtype, 0)
        begin, bytes_there = self._archive.place(f"data/{name}")
        if not item or type(first) is not int or first < 0 or not is_row_major(shape, strides):
            raise NotData("has a tensor as no checkpoint needs it")
        if (first + count(shape)) * item > bytes_there:
            raise NotData("has a tensor that is larger than its elements")
        return SavedTensor(dtype, shape, begin + first * item)


def key(read: Any) -> str | int:
    """A dictionary's key. Others could take for ever to hash."""
    if type(read) not in (str, int):
        raise NotData("has a key that is neither a string nor an integer")
    return read


def sizes(read: Any) -> tuple[int, ...]:
    """A shape, or a place in a tensor: as a tuple or as a torch.Size. At most 8 axes."""
    if (
        type(read) is Call
        and read.name == _SIZE
        and read.state is None
        and len(read.arguments) == 1
    ):
        read = read.arguments[0]
    if type(read) is not tuple or len(read) > 8 or any(type(x) is not int or x < 0 for x in read):
        raise NotData("has a shape or an offset that is not of sizes")
    return read


def count(shape: tuple[int, ...]) -> int:
    """Elements of a tensor."""
    elements = 1
    for size in shape:
        elements *= size
    return elements


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor's elements lie in order and without gaps. An axis of one may have any stride."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=False):
        if size > 1 and stride != step and 0 not in shape:
            return False
        step *= size
    return len(shape) == len(strides)
