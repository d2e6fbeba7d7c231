"""No .idx makes a command end in a traceback, or read outside of its .bin."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dataset.inspect import Inspect, inspect
from data_prep.dataset.shards import read_document
from data_prep.dataset.verify import Verify, verify
from data_prep.errors import UserError as DataError
from megatron_ladder.errors import UserError
from pretrain.data.folders import open_folder
from tests.data_sets import write_data_set
from tests.fuzz.growth import bounded_memory
from tests.fuzz.mutations import odd_bytes

AT_ONCE = 5
SEEDS = st.integers(0, 2**63)


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    with bounded_memory():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without the checksum of its index: what is checked is what the index says."""
    path = write_data_set(
        tmp_path_factory.mktemp("idx") / "data", train_documents=5, validation_documents=0
    )
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["splits"]["train"]["idx_sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture(scope="module")
def right(data: Path) -> bytes:
    return (data / "train.idx").read_bytes()


def check(data: Path, index: bytes, right: bytes) -> None:
    (data / "train.idx").write_bytes(index)
    try:
        open_folder(data)
    except UserError:
        accepted = False
    else:
        accepted = True
    # Everything in an index but the lengths follows from them, and these must add up.
    if accepted and index != right:
        assert len(index) == len(right)
        lengths = np.frombuffer(index, "<i4", 5, 34)
        assert (lengths > 0).all() and lengths.sum() == 5 * 64
        assert index[:34] == right[:34]
        assert (np.frombuffer(index, "<i8", 5, 54) == 2 * (lengths.cumsum() - lengths)).all()
        assert index[94:] == right[94:]
    for document in range(5 if len(index) == len(right) else 0):
        try:
            ids = read_document(data / "train", document, "uint16", 5)
        except DataError:
            assert not accepted
        else:
            assert 0 < len(ids) <= 5 * 64


@given(SEEDS)
def test_changed_indexes(data: Path, right: bytes, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(AT_ONCE):
        index = odd_bytes(rng, right)
        check(data, index, right)


@given(SEEDS)
def test_indexes_of_the_right_size(data: Path, right: bytes, seed: int) -> None:
    """Sizes agree, so that what is inside is looked at."""
    rng = random.Random(seed)
    for _ in range(AT_ONCE):
        index = bytearray(right)
        for _ in range(rng.choice((1, 2, 3))):
            kind, at = rng.choice(
                (("<i4", 34 + 4 * rng.randrange(5)), ("<i8", 54 + 8 * rng.randrange(11)))
            )
            old = int(np.frombuffer(index, kind, 1, at)[0])
            bits = 8 * np.dtype(kind).itemsize
            new = rng.choice(
                (0, 1, -1, old + 1, old - 1, -old, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)))
            )
            index[at : at + bits // 8] = (new % 2**bits).to_bytes(bits // 8, "little")
        check(data, bytes(index), right)


@given(st.binary(max_size=400))
def test_any_bytes(data: Path, right: bytes, index: bytes) -> None:
    check(data, index, right)
    check(data, right[:34] + index, right)


@given(SEEDS)
def test_data_commands(data: Path, right: bytes, seed: int) -> None:
    (data / "train.idx").write_bytes(odd_bytes(random.Random(seed), right))
    for command in (lambda: inspect(Inspect(data, document=-1)), lambda: verify(Verify(data, 1))):
        try:
            command()
        except DataError:
            continue
