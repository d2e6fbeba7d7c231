"""megatron-core reads the index that is written here."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep.dataset.shards import read_document, token_dtype, write_index


@given(st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=20), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_is_written_is_read(tmp_path_factory, dtype: str, wanted: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "train"
    files = [prefix.with_name(f"{i}.len") for i in range(3)]
    for i, file in enumerate(files):  # lengths come in several files
        np.array([len(ids) for ids in wanted[i * 5 : i * 5 + 5 if i < 2 else None]], "<i4").tofile(
            file
        )
    np.concatenate(wanted).astype(dtype).tofile(prefix.with_suffix(".bin"))
    digest = write_index(prefix.with_suffix(".idx"), dtype, files)
    assert digest == hashlib.sha256(prefix.with_suffix(".idx").read_bytes()).hexdigest()
    dataset = IndexedDataset(str(prefix))
    assert [dataset[i].tolist() for i in range(len(dataset))] == wanted
    assert dataset.index.dtype == np.dtype(dtype)
    ours = [read_document(prefix, i, dtype, len(wanted)).tolist() for i in range(len(wanted))]
    assert ours == wanted


def test_ids_take_two_bytes_where_they_fit() -> None:
    assert (token_dtype(65_499), token_dtype(65_500)) == ("uint16", "int32")
