"""Reads a checkpoint's index: `.metadata`, which says where each tensor's parts are in the other files.

The format is that of torch's distributed checkpoints, as megatron-core 0.16.1 and 0.19.2 and
pretrain/convert/weights.py write it.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ladder.reading.pickles import Call, Name, Pairs, read_pickle
from megatron_ladder.reading.plain_files import NotData, open_plain, plain_size
from megatron_ladder.reading.saved import ITEM_BYTES, count, sizes

INDEX = ".metadata"

_DCP = "torch.distributed.checkpoint"
_METADATA = f"{_DCP}.metadata.Metadata"
_TENSOR = f"{_DCP}.metadata.TensorStorageMetadata"
_OBJECT = f"{_DCP}.metadata.BytesStorageMetadata"
_PROPERTIES = f"{_DCP}.metadata.TensorProperties"
_CHUNK = f"{_DCP}.metadata.ChunkStorageMetadata"
_KEY = f"{_DCP}.metadata.MetadataIndex"
_PLACE = f"{_DCP}.filesystem._StorageInfo"
_LAYOUT = "torch.serialization._get_layout"
_NAMES = frozenset(
    {
        *(_METADATA, _TENSOR, _OBJECT, _PROPERTIES, _CHUNK, _KEY, _PLACE, _LAYOUT, "torch.Size"),
        *(f"torch.{dtype}" for dtype in ITEM_BYTES),
        # What is not used here.
        f"{_DCP}.metadata.StorageMeta",
        f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
        # 0.16.1 also stores what each rank meant to write.
        *(
            f"{_DCP}.planner.{c}"
            for c in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
        ),
        "collections.OrderedDict",
        # The folder's name when it was written; since Python 3.13 the class has the second name.
        *("pathlib.PosixPath", "pathlib._local.PosixPath"),
    }
)
# The largest index that is read. A part of a tensor takes 200 to 400 bytes.
_LARGEST = 2**29
_FILE = re.compile(r"[\w.-]{1,200}\.distcp", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a file that holds what `torch.save` wrote."""

    file: str
    begin: int
    """In bytes."""
    length: int
    """In bytes."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor: a box in it, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place | None
    """None: the part has no elements, and is stored nowhere, or where another one begins."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint. Its chunks hold each element exactly once."""

    dtype: str
    """Without `torch.`"""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """What a checkpoint has, by name."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Place]
    """What is not a tensor: random states, scales of FP8; since 0.19 also the scheduler and the rest."""


def read_index(folder: Path) -> Index:
    """Reads and checks a checkpoint's index. No other file is opened: thousands of ranks may do it.

    Each element of a tensor is in one part, no byte is in two parts, and a part is not larger than the
    bytes that are named for it. `check_files` says whether these bytes are there.

    Raises:
        NotData: the index is not one, names what is no data, or contradicts itself.
        OSError: it is missing or cannot be read.
    """
    file, size = open_plain(folder, INDEX)
    with file:
        if size > _LARGEST:
            raise NotData(f"{INDEX} has {size:,} bytes; at most {_LARGEST:,} are read")
        data = file.read(_LARGEST + 1)
    try:
        return _index(read_pickle(data, _NAMES))
    except NotData as error:
        raise NotData(f"{INDEX} {error}") from error


def check_files(index: Index, folder: Path) -> None:
    """Checks that an index's files have the bytes that it names. Call it before you make whole tensors.

    Raises:
        NotData: a file is shorter, or not a file of this folder.
        OSError: a file is missing.
    """
    ends: dict[str, int] = {}
    for place in _places(index):
        ends[place.file] = max(ends.get(place.file, 0), place.begin + place.length)
    for name, end in ends.items():
        if (size := plain_size(folder, name)) < end:
            raise NotData(
                f"{INDEX} says that {name} has {end:,} bytes or more, but it has {size:,}"
            )


def _check_places(index: Index) -> None:
    before = Place("", 0, 0)
    for place in sorted(_places(index), key=lambda place: (place.file, place.begin)):
        if place.file == before.file and place.begin < before.begin + before.length:
            raise NotData(f"has two things at one place of {place.file}")
        before = place


def _places(index: Index) -> Iterator[Place]:
    yield from index.objects.values()
    for tensor in index.tensors.values():
        yield from (chunk.place for chunk in tensor.chunks if chunk.place)


def _index(read: Any) -> Index:
    content = _state(read, _METADATA, "state_dict_metadata", "storage_data")
    places = _stored_places(content["storage_data"])
    index = Index({}, {})
    for name, entry in _pairs(content["state_dict_metadata"]):
        if type(name) is not str or name in index.tensors or name in index.objects:
            raise NotData("has a name twice, or one that is no string")
        stored = places.pop(name, {})
        if type(entry) is Call and entry.name == _OBJECT:
            if list(stored) != [None]:
                raise NotData(f"does not say where {_short(name)} is stored")
            index.objects[name] = stored[None]
        else:
            index.tensors[name] = _tensor(name, entry, stored)
    if places:
        raise NotData(f"says where {_short(next(iter(places)))} is stored, which it does not have")
    _check_places(index)
    return index


def _stored_places(read: Any) -> dict[str, dict[tuple[int, ...] | None, Place]]:
    """By name of the tensor or object, and by the offsets of the part."""
    found: dict[str, dict[tuple[int, ...] | None, Place]] = {}
    for pickled, value in _pairs(read):
        key = _state(pickled, _KEY, "fqn")
        name, offset = key["fqn"], key.get("offset")
        place = _state(value, _PLACE, "relative_path", "offset", "length")
        file, begin, length = place["relative_path"], place["offset"], place["length"]
        if type(name) is not str or type(file) is not str or not _FILE.fullmatch(file):
            raise NotData(f"names a file that is none of the checkpoint's: {_short(str(file))}")
        if type(begin) is not int or type(length) is not int or begin < 0 or length <= 0:
            raise NotData(f"has no place for {_short(name)}")
        if place.get("transform_descriptors"):
            raise NotData("is of a checkpoint that is compressed or encrypted")
        parts = found.setdefault(name, {})
        offset = None if offset is None else sizes(offset)
        if offset in parts:
            raise NotData(f"says twice where a part of {_short(name)} is stored")
        parts[offset] = Place(file, begin, length)
    return found


def _tensor(name: str, read: Any, places: dict[tuple[int, ...] | None, Place]) -> StoredTensor:
    content = _state(read, _TENSOR, "properties", "size", "chunks")
    match content["properties"]:
        case Call(name=n, state=(Name(dtype), Call(name=layout, arguments=("torch.strided",)), *_)):
            if n != _PROPERTIES or layout != _LAYOUT:
                raise NotData(f"has no properties for {_short(name)}")
        case _:
            raise NotData(f"has no properties for {_short(name)}")
    dtype = dtype.removeprefix("torch.")
    if dtype not in ITEM_BYTES or type(content["chunks"]) is not list:
        raise NotData(f"has no dtype or no parts for {_short(name)}")
    shape, chunks, empty = sizes(content["size"]), list[Chunk](), list[int]()
    for chunk in content["chunks"]:
        facts = _state(chunk, _CHUNK, "offsets", "sizes")
        offsets, size = sizes(facts["offsets"]), sizes(facts["sizes"])
        if len(offsets) != len(shape) or len(size) != len(shape):
            raise NotData(f"has a part of {_short(name)} with other axes than the tensor")
        place = None
        if elements := count(size):
            place = places.pop(offsets, None)
            if place is None or place.length < elements * ITEM_BYTES[dtype]:
                raise NotData(f"says that {_short(name)} has more elements than are stored")
        else:
            empty.append(len(chunks))
        chunks.append(Chunk(offsets, size, place))
    for number in empty:  # several may be at one place, also where one with elements begins
        chunk = chunks[number]
        chunks[number] = Chunk(chunk.offsets, chunk.sizes, places.pop(chunk.offsets, None))
    if places:
        raise NotData(f"says where a part of {_short(name)} is stored, which it does not have")
    if not _fill(shape, chunks):
        raise NotData(f"has parts of {_short(name)} that overlap, or that are not the whole tensor")
    return StoredTensor(dtype, shape, tuple(chunks))


def _fill(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether the boxes hold each element of a tensor once, and nothing else.

    A box is a sum of quadrants that begin at its corners, with signs. So boxes fill a box if, and only if,
    the signed counts of their corners are those of that box. That takes one step for each corner.
    """
    if len(chunks) == 1:
        return chunks[0].sizes == shape and not any(chunks[0].offsets)
    corners: dict[tuple[int, ...], int] = {}
    whole = ((0,) * len(shape), shape, -1)
    for offsets, size, sign in (*((c.offsets, c.sizes, 1) for c in chunks), whole):
        if 0 in size:
            continue
        ends = [((o, 1), (o + s, -1)) for o, s in zip(offsets, size, strict=True)]
        for corner in itertools.product(*ends):
            at, signs = tuple(x for x, _ in corner), sign
            for _, one in corner:
                signs *= one
            corners[at] = corners.get(at, 0) + signs
    return not any(corners.values())


def _state(read: Any, kind: str, *needed: str) -> dict[str, Any]:
    """The attributes of an object of a class."""
    if type(read) is not Call or read.name != kind or read.arguments:
        raise NotData(f"has something else where a {kind.rpartition('.')[2]} belongs")
    found = {}
    for name, value in _pairs(read.state):
        if type(name) is not str or name in found:
            raise NotData(f"has an attribute of a {kind.rpartition('.')[2]} twice")
        found[name] = value
    if missing := [name for name in needed if name not in found]:
        raise NotData(f"has a {kind.rpartition('.')[2]} without {missing[0]}")
    return found


def _pairs(read: Any) -> Pairs:
    if type(read) is not Pairs:
        raise NotData("has something else where a dictionary belongs")
    return read


def _short(name: str) -> str:
    return repr(name[:100])
