"""Sequences to train on. megatron-core's GPTDataset cuts and packs documents into them; this module adds
documents that do not attend to each other, fill-in-the-middle and loss masks.

megatron-core decides which documents a sequence holds, by index files in the run's folder. What is added
depends on the sequence's number and the seed alone, so that a resumed run reads the same sequences.
"""

import logging
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from pretrain.config.train import TrainConfig
from pretrain.data.blends import blends
from pretrain.data.fim import FillInTheMiddle, fill_in_the_middle
from pretrain.data.folders import DataFolder, labels
from pretrain.data.manifests import SPLITS
from pretrain.data.phased import PhasedSequences

Blend = tuple[list[str], list[float] | None]


@dataclass
class SequencesConfig(GPTDatasetConfig):
    """megatron-core's configuration, and three fields of this project."""

    documents_apart: bool = False
    fim: FillInTheMiddle | None = None
    bos_id: int | None = None
    """What documents begin with; None: with their text."""
    names: dict[str, str] = field(default_factory=dict)
    """The data sets' names, by the path that megatron-core has of them."""


class Sequences(GPTDataset):
    """A GPTDataset that makes its own items; megatron-core's class draws and caches the indices.

    The tensors of an item have the shape [seq_length]: `tokens`, `labels` and `position_ids` int64,
    `loss_mask` float32 (1 where the label is trained on, else 0). With documents_apart also `documents`
    int32: a number for each token that is the same within a document and different between documents.
    """

    config: SequencesConfig

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        assert idx is not None
        length = self.config.sequence_length + 1
        pieces = self._pieces(int(idx))
        texts = [self.dataset.get(document, offset, count) for document, offset, count in pieces]
        if self._mask is not None:
            trained = np.concatenate([self._trained(*piece) for piece in pieces])
        else:
            if self.config.fim is not None and self.index_split == Split.train:
                texts = self._filled_in(int(idx), texts, pieces)
            trained = np.ones(length, np.float32)
        tokens = torch.from_numpy(np.concatenate(texts)[:length].astype(np.int64))
        loss_mask = trained[1:].astype(np.float32)
        item = {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "position_ids": torch.arange(length - 1),
        }
        if self.config.documents_apart:
            documents = np.repeat(np.arange(len(texts), dtype=np.int32), list(map(len, texts)))[
                :length
            ]
            # A document's first token is not a label: the token before it belongs to another document.
            loss_mask = loss_mask * (documents[1:] == documents[:-1])
            item["documents"] = torch.from_numpy(documents[:-1])
        item["loss_mask"] = torch.from_numpy(loss_mask)
        return item

    def _pieces(self, idx: int) -> list[tuple[int, int, int]]:
        """The parts of documents that make up a sequence and one token more, which is the last label.

        Each is (document, its first token in the document, number of tokens).
        """
        place = self.shuffle_index[idx]
        (first, begin), (last, end) = self.sample_index[place], self.sample_index[place + 1]
        pieces = []
        for position in range(first, last + 1):
            document = int(self.document_index[position])
            start = int(begin) if position == first else 0
            size = int(self.dataset.sequence_lengths[document])
            stop = int(end) + 1 if position == last else size
            pieces.append((document, start, stop - start))
        return pieces

    @cached_property
    def _mask(self) -> np.ndarray | None:
        """For each token of the data set whether it is trained on, uint8; None when all tokens are."""
        path = Path(f"{self.dataset.path_prefix}.mask")
        return np.memmap(path, np.uint8, "r") if path.is_file() else None

    def _trained(self, document: int, offset: int, count: int) -> np.ndarray:
        """`_mask` of `count` tokens of a document, from its token `offset` on."""
        assert self._mask is not None
        width = self.dataset.index.dtype_size
        first = int(self.dataset.index.sequence_pointers[document]) // width + offset
        return self._mask[first : first + count]

    def _filled_in(
        self, idx: int, texts: list[np.ndarray], pieces: list[tuple[int, int, int]]
    ) -> list[np.ndarray]:
        """Rearranges documents for fill-in-the-middle. EOD stays at a document's end, BOS at its beginning.

        The added tokens make the sequence longer; the caller cuts off what no longer fits.
        """
        fim = self.config.fim
        assert fim is not None
        name = zlib.crc32(self.config.names[str(self.dataset.path_prefix)].encode())
        rng = np.random.default_rng((self.config.random_seed, name, idx))
        changed = []
        for text, (document, offset, count) in zip(texts, pieces, strict=True):
            ends = offset + count == self.dataset.sequence_lengths[document]
            body = len(text) - int(ends)
            first = int(offset == 0 and self.config.bos_id is not None)
            middle = fim.rearranged(text[first:body], rng)
            changed.append(np.concatenate([text[:first], middle, text[body:]]))
        return changed


class _ManifestTokenizer:
    """What megatron-core's GPTDataset needs of a tokenizer. It encodes nothing: the data is tokens."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.eod = facts["eod_id"]
        self.pad = -1  # no token has this id: documents are packed, and there is no padding
        self.vocab_size = facts["vocab_size"]
        # megatron-core makes it part of the names of cached index files.
        self.unique_identifiers = OrderedDict(sha256=facts["sha256"])


def train_sequences(config: TrainConfig, folders: list[DataFolder], cache: Path) -> Dataset:
    """The sequences of the whole run, blended, in the order of training.

    Args:
        cache: the folder of index files; the first rank makes those that are missing.
    """
    planned = blends(config, folders)
    weighed = [
        (f.prefix("train"), w) for f, w in zip(folders, planned[0].weights, strict=True) if w
    ]
    blend = ([prefix for prefix, _ in weighed], [weight for _, weight in weighed])
    samples = config.train_steps * config.global_batch_size
    start = _build(config, folders, "train", blend, samples, cache)
    if not config.data.phases:
        return start

    def epoch(number: int, seed: int) -> Dataset:
        once = ([folders[number].prefix("train")], None)
        return _build(replace(config, seed=seed), [folders[number]], "train", once, None, cache)

    return PhasedSequences(start, planned, config, cache, epoch)


def validation_sequences(
    config: TrainConfig, folders: list[DataFolder], cache: Path
) -> dict[str, Dataset]:
    """Each data set's validation split, every sequence once, by the data set's label.

    Data sets without a validation split are left out.
    """
    return {
        label: _build(
            config, [folder], "validation", ([folder.prefix("validation")], None), None, cache
        )
        for label, folder in zip(labels(folders), folders, strict=True)
        if folder.tokens("validation")
    }


def _build(
    config: TrainConfig,
    folders: list[DataFolder],
    split: str,
    blend: Blend,
    samples: int | None,
    cache: Path,
) -> Dataset:
    index = SPLITS.index(split)
    dataset_config = SequencesConfig(
        random_seed=config.seed,
        sequence_length=config.data.seq_length,
        blend_per_split=[blend if i == index else None for i in range(3)],
        path_to_cache=str(cache),
        tokenizer=_ManifestTokenizer(folders[0].tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        documents_apart=not config.data.attend_across_documents,
        fim=fill_in_the_middle(config, folders[0]),
        bos_id=folders[0].tokenizer.get("bos_id"),
        names={folder.prefix(split): folder.name for folder in folders},
    )
    sizes = [samples if i == index else None for i in range(3)]
    # Otherwise the builder logs its whole configuration for every split.
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    return BlendedMegatronDatasetBuilder(Sequences, sizes, lambda: True, dataset_config).build()[
        index
    ]
