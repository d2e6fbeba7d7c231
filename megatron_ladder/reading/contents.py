"""Reads what a checkpoint has beside its index and its tensors."""

import json
import logging
from pathlib import Path
from typing import Any

from megatron_ladder.reading.index import Place
from megatron_ladder.reading.plain_files import NotData, open_plain
from megatron_ladder.reading.saved import SavedTensor, read_saved

logger = logging.getLogger(__name__)

COMMON, FORMAT = "common.pt", "metadata.json"
_FORMATS = (
    {"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    # megatron-core 0.16
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    },
)
_LARGEST_COMMON = 2**28


def check_format(folder: Path) -> None:
    """Refuses metadata.json if it says what is never written. megatron-core chooses by it how to read."""
    try:
        file, _ = open_plain(folder, FORMAT)
    except FileNotFoundError:
        return  # megatron-core says it
    with file:
        content = file.read(4096)
    try:
        said = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise NotData(f"{FORMAT} is not what was written") from error
    if said not in _FORMATS:
        raise NotData(f"{FORMAT} names another format than torch_dist")


def read_common(folder: Path) -> Any:
    """What megatron-core 0.16 stores beside the tensors, with `SavedTensor` for small tensors.

    Raises:
        NotData: common.pt holds something else than data.
        OSError: it is missing or cannot be read.
    """
    file, size = open_plain(folder, COMMON)
    with file:
        if size > _LARGEST_COMMON:
            raise NotData(f"{COMMON} has {size:,} bytes")
        return _named(COMMON, read_saved, file, 0, size)


def object_at(file: Any, name: str, place: Place) -> Any:
    """The object with this name at a place of an open file. Raises NotData."""
    if place.length > _LARGEST_COMMON:
        raise NotData(f"{place.file}: {name} has {place.length:,} bytes")
    value = _named(f"{place.file}: {name}", read_saved, file, place.begin, place.length)
    return _without_pickles(value, name) if "_extra_state/" in name else value


def _named(what: str, read: Any, *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except NotData as error:
        raise NotData(f"{what} {error}") from error


def _without_pickles(value: Any, name: str) -> Any:
    """The extra state of layers without pickles, which Transformer Engine stores as bytes.

    Such bytes are of recipes that keep nothing from one step to the next, or from before the scales were
    stored as numbers (te/scales.py). No tensor is a layer without state.
    """
    kept = []
    for state in value if type(value) is list else [value]:
        is_numbers = type(state) is SavedTensor and (state.dtype == "float32" or 0 in state.shape)
        if not is_numbers and state is not None:
            logger.warning("%s is a pickle. It is not read: these scales of FP8 start afresh", name)
        kept.append(state if is_numbers else None)
    return kept
