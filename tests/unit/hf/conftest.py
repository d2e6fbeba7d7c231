"""Tokenizers and tiny models that several tests share."""

from pathlib import Path

import pytest
import torch

from tests.unit.hf.tiny import train_sentencepiece


@pytest.fixture(autouse=True)
def _same_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def sentencepiece_file(request, tmp_path_factory) -> Path:
    """A model of each kind, trained as data_prep trains."""
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer"), "bpe")
