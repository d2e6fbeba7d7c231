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
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from pretrain.config.train import TrainConfig
from pretrain.data.blends import blends, stretches
from pretrain.data.fim import FillInTheMiddle, fill_in_the_middle
from pretrain.data.folders import DataFolder
from pretrain.data.manifests import SPLITS
from pretrain.data.phased import PhasedSequences

Blend = tuple[list[str], list[float] | None]

MADE = "made.json"
"""In the folder of index files; written last: all files are there, and from what they were made."""


@dataclass
class SequencesConfig(GPTDatasetConfig):
    """megatron-core's configuration, and fields of this project."""

    documents_apart: bool = False
    fim: FillInTheMiddle | None = None
    bos_id: int | None = None
    """What documents begin with; None: with their text."""
    names: dict[str, str] = field(default_factory=dict)
    """The data sets' names, by the path that megatron-core has of them."""
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the manifests say of the split, and `dtype`, by the same path."""


class Sequences(GPTDataset):
    """A GPTDataset that makes its own items; megatron-core's class draws and caches the indices.

    The tensors of an item have the shape [seq_length]: `tokens`, `labels` and `position_ids` int64,
    `loss_mask` float32 (1 where the label is trained on, else 0). With documents_apart also `documents`
    int32: a number for each token that is the same within a document and different between documents.
    """

    config: SequencesConfig

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        """megatron-core's reader of a split. Once the index files are made, it opens two files, and reads
        nothing: what it needs to know of them is in the manifest."""
        assert isinstance(config, SequencesConfig)
        if not config.fast_cache_load:
            return GPTDataset.build_low_level_dataset(dataset_path, config)
        facts = config.splits[dataset_path]
        return IndexedDataset(
            dataset_path,
            fast_cache_load=True,
            sequences_per_dataset=(facts["documents"], facts["documents"] + 1),
            dtype_code=DType.code_from_dtype(np.dtype(facts["dtype"]).type),
        )

    def _get_num_tokens_per_epoch(self) -> int:
        """megatron-core would read the lengths of all documents, at each call of `len`."""
        assert self.dataset_path is not None
        return self.config.splits[self.dataset_path]["tokens"]

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
        if self.shuffle_index is None:  # defer_npy_index_mmap: mapped where and when they are used
            for name in ("document_index", "sample_index", "shuffle_index"):
                setattr(self, name, _mapped(getattr(self, f"path_to_{name}")))
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


def _mapped(path: str) -> np.ndarray:
    """An index file. Where it has been deleted, the next start makes the files again."""
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        (Path(path).parent / MADE).unlink(missing_ok=True)
        raise


class _ManifestTokenizer:
    """What megatron-core's GPTDataset needs of a tokenizer. It encodes nothing: the data is tokens."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.eod = facts["eod_id"]
        self.pad = -1  # no token has this id: documents are packed, and there is no padding
        self.vocab_size = facts["vocab_size"]
        # megatron-core makes it part of the names of cached index files.
        self.unique_identifiers = OrderedDict(sha256=facts["sha256"])


class _Builder(BlendedMegatronDatasetBuilder):
    """Opens data sets whose index files are made. megatron-core's class has all ranks wait for each other
    for each data set; here only some ranks open any."""

    @staticmethod
    def build_generic_dataset(
        cls: Any, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any
    ) -> Any:
        return cls(*args)


def train_sequences(
    config: TrainConfig, folders: list[DataFolder], cache: Path, *, made: bool = False
) -> Dataset:
    """The sequences of the whole run, blended, in the order of training.

    Args:
        cache: the folder of index files.
        made: the index files are there: nothing is looked up or made, and any rank may call it alone.
            Otherwise the files that are missing are made; all ranks of torch's process group call it.
    """
    start = first_blend(config, folders, cache, made=made)
    if made and isinstance(start, BlendedDataset):
        for name in ("dataset_index", "dataset_sample_index"):
            setattr(start, name, _mapped(getattr(start, f"path_to_{name}")))
    parts = stretches(config, folders)
    if len(parts) == 1:
        return start

    def epoch(number: int, seed: int) -> Dataset:
        one = (replace(config, seed=seed), folders[number], "train", None, cache)
        return one_split(*one, made=made)

    return PhasedSequences(start, parts, config, cache, epoch, made=made)


def first_blend(
    config: TrainConfig, folders: list[DataFolder], cache: Path, *, made: bool
) -> Dataset:
    """The sequences that are drawn when the run begins: of the whole run, by the blend that it begins with.

    Args:
        made: nothing is made or looked up: the index files are there when the first sequence is read.
    """
    weights = blends(config, folders)[0].weights
    weighed = [(f.prefix("train"), w) for f, w in zip(folders, weights, strict=True) if w]
    blend = ([prefix for prefix, _ in weighed], [weight for _, weight in weighed])
    return _build(config, folders, "train", blend, config.drawn_samples, cache, made)


def one_split(
    config: TrainConfig,
    folder: DataFolder,
    split: str,
    samples: int | None,
    cache: Path,
    *,
    made: bool,
) -> Dataset:
    """At least so many sequences of a data set's split; None: every sequence once. `made` as above."""
    return _build(config, [folder], split, ([folder.prefix(split)], None), samples, cache, made)


def _build(
    config: TrainConfig,
    folders: list[DataFolder],
    split: str,
    blend: Blend,
    samples: int | None,
    cache: Path,
    made: bool,
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
        fast_cache_load=made,
        defer_npy_index_mmap=made,
        documents_apart=not config.data.attend_across_documents,
        fim=fill_in_the_middle(config, folders[0]),
        bos_id=folders[0].tokenizer.get("bos_id"),
        names={folder.prefix(split): folder.name for folder in folders},
        splits={
            folder.prefix(split): {**folder.split(split), "dtype": folder.manifest["dtype"]}
            for folder in folders
        },
    )
    sizes = [samples if i == index else None for i in range(3)]
    # Otherwise the builder logs its whole configuration for every split.
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    builder = _Builder if made else BlendedMegatronDatasetBuilder
    return builder(Sequences, sizes, lambda: True, dataset_config).build()[index]
