"""Data sets: folders checked before work starts, and their sequences (sequences.py) as batches.

Which sequence a rank reads is a function of the step alone, so a resumed run, at any layout, goes on
with the next one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_ladder.errors import UserError
from pretrain.blends import check_blends
from pretrain.config import TrainConfig
from pretrain.files import write_atomically
from pretrain.stopping import obey_parent_alone

Batch = dict[str, torch.Tensor]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataFolder:
    """One data set folder whose manifest and files agree."""

    path: Path
    manifest: dict[str, Any]

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.manifest["tokenizer"]

    @property
    def name(self) -> str:
        return self.path.name

    def tokens(self, split: str) -> int:
        return self.manifest["splits"].get(split, {}).get("tokens", 0)

    def prefix(self, split: str) -> str:
        return str(self.path / split)


def open_folder(path: Path) -> DataFolder:
    """Reads a folder's manifest and checks that its files are those the manifest describes."""
    manifest_path = path / "manifest.json"
    if not path.is_dir():
        raise UserError(
            f"data set {path} does not exist: make it with `megatron-ladder data tokenize`"
        )
    if not manifest_path.is_file():
        raise UserError(
            f"{path} holds no manifest.json: it is not a finished data set of "
            "`megatron-ladder data tokenize`"
        )
    try:
        manifest = json.loads(manifest_path.read_text())
        if manifest["format"] != "megatron-ladder-data" or manifest["version"] != 1:
            raise UserError(
                f"{manifest_path}: format {manifest['format']} version {manifest['version']} is not "
                "one this version reads: tokenize again"
            )
        folder = DataFolder(path, manifest)
        manifest["tokenizer"]["sha256"], manifest["tokenizer"]["eod_id"]  # must be there
        for split, facts in manifest["splits"].items():
            for ending in ("bin", "idx", "mask"):
                if ending == "mask" and "mask_bytes" not in facts:
                    continue
                file = path / f"{split}.{ending}"
                size = file.stat().st_size if file.is_file() else -1
                if size != facts[f"{ending}_bytes"]:
                    found = "is missing" if size < 0 else f"has {size:,} bytes"
                    raise UserError(
                        f"{file} {found}; the manifest says {facts[f'{ending}_bytes']:,}: the data "
                        "set is damaged, copy or tokenize it again"
                    )
            _check_index(path / split, facts, manifest["dtype"])
        return folder
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{manifest_path} is not a data set's manifest: {error!r}") from error


def _check_index(prefix: Path, facts: dict[str, Any], dtype: str) -> None:
    """Refuses an .idx that does not describe its .bin (docs/reference/formats.md has the layout)."""
    with prefix.with_suffix(".idx").open("rb") as file:
        header = file.read(34)
        sequences = int.from_bytes(header[18:26], "little")
        file.seek(34)
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
    codes = {"int32": 4, "uint16": 8}
    if header[:9] != b"MMIDIDX\x00\x00" or header[17] != codes.get(dtype):
        raise UserError(f"{prefix}.idx is not the index of {dtype} tokens: tokenize again")
    tokens, width = int(lengths.sum(dtype=np.int64)), np.dtype(dtype).itemsize
    if len(lengths) != sequences or tokens * width != facts["bin_bytes"]:
        raise UserError(
            f"{prefix}.idx describes {tokens:,} tokens but {prefix}.bin holds "
            f"{facts['bin_bytes'] // width:,}: the files are of different data sets, tokenize again"
        )


def with_vocab_size(config: TrainConfig) -> TrainConfig:
    """Filled in from the first data set, where it is not given."""
    if config.model.vocab_size is not None or not config.data.paths:
        return config
    vocab_size = open_folder(config.data.paths[0]).tokenizer["vocab_size"]
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def open_data(config: TrainConfig) -> list[DataFolder]:
    """The run's data sets, refused when they do not fit each other, the model or the lengths."""
    if not config.data.paths:
        raise UserError("no data: give --data.paths FOLDER made by `megatron-ladder data tokenize`")
    check_blends(config)
    folders = [open_folder(path) for path in config.data.paths]
    first = folders[0]
    for other in folders[1:]:
        if other.tokenizer["sha256"] != first.tokenizer["sha256"]:
            raise UserError(
                f"{other.path} and {first.path} were tokenized with different tokenizers: ids mean "
                "different things; tokenize one of them again"
            )
    vocab_size = first.tokenizer["vocab_size"]
    if config.model.vocab_size is not None and vocab_size > config.model.vocab_size:
        raise UserError(
            f"{first.path} has a vocabulary of {vocab_size:,} ids, the model only "
            f"model.vocab_size {config.model.vocab_size:,}: raise it or use the model's tokenizer"
        )
    needed = config.data.seq_length + 1
    for folder in folders:
        if folder.tokens("train") < needed:
            raise UserError(
                f"{folder.path}: the train split has {folder.tokens('train'):,} tokens, one sequence "
                f"takes data.seq_length + 1 = {needed:,}: add text or lower data.seq_length"
            )
        if 0 < folder.tokens("validation") < needed:
            raise UserError(
                f"{folder.path}: the validation split has {folder.tokens('validation'):,} tokens, one "
                f"sequence takes data.seq_length + 1 = {needed:,}: tokenize with a larger "
                "validation fraction or lower data.seq_length"
            )
    return folders


def keep_facts(run_dir: Path, folders: list[DataFolder]) -> None:
    """Copies manifests and the tokenizer into the run's folder: exporting needs no data then."""
    for number, folder in enumerate(folders):
        target = run_dir / "data" / str(number)
        target.mkdir(parents=True, exist_ok=True)
        for name in (folder.tokenizer["file"], "manifest.json"):  # the manifest says it is complete
            write_atomically(target / name, (folder.path / name).read_bytes())


def kept_facts(run_dir: Path) -> list[DataFolder]:
    """What `keep_facts` kept of each data set: manifest and tokenizer, no tokens.

    Raises:
        UserError: nothing was kept.
    """
    paths = sorted((run_dir / "data").glob("*/manifest.json"), key=lambda p: int(p.parent.name))
    if not paths:
        raise UserError(f"{run_dir} holds no data/0/manifest.json: is the run's folder complete?")
    return [DataFolder(path.parent, json.loads(path.read_text())) for path in paths]


def check_same_data(run_dir: Path, folders: list[DataFolder]) -> None:
    """Refuses to go on with data sets that were made again since the run began."""
    if not (run_dir / "data" / "0" / "manifest.json").is_file():
        return  # a run that has not started
    kept = kept_facts(run_dir)
    if kept[0].tokenizer["sha256"] != folders[0].tokenizer["sha256"]:
        raise UserError(
            f"{folders[0].path} was tokenized with another tokenizer than the run in {run_dir} was "
            "started with: its ids mean different things; use the data set it was started with"
        )
    for before, now in zip(kept, folders, strict=False):
        if before.manifest["splits"].get("train") != now.manifest["splits"].get("train"):
            raise UserError(
                f"{now.path} holds other training text than when the run in {run_dir} began "
                f"({before.tokens('train'):,} tokens then, {now.tokens('train'):,} now): a resumed run "
                "would read some of it twice; use the data set it was started with"
            )


def unigram_loss(folder: DataFolder, split: str = "validation") -> float:
    """Entropy, in nats a token, of the split's own token counts.

    No model that ignores context can have a lower loss on the split.
    """
    tokens = np.memmap(folder.prefix(split) + ".bin", dtype=folder.manifest["dtype"], mode="r")
    counts = np.zeros(folder.tokenizer["vocab_size"], dtype=np.int64)
    for start in range(0, len(tokens), 1 << 24):  # 16M tokens at a time
        counts += np.bincount(tokens[start : start + (1 << 24)], minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def train_batches(
    dataset: Dataset,
    config: TrainConfig,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_samples: int,
) -> Iterator[Batch]:
    """This rank's micro-batches from the given position to the end of the run."""

    def indices() -> Iterator[list[int]]:
        together = config.micro_batch_size * data_parallel_size
        first = data_parallel_rank * config.micro_batch_size
        end = config.train_steps * config.global_batch_size
        for start in range(consumed_samples, end, together):
            yield list(range(start + first, start + first + config.micro_batch_size))

    loader = DataLoader(
        dataset,
        batch_sampler=_Sampler(indices),
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        worker_init_fn=obey_parent_alone,
    )
    return iter(loader)


def validation_batches(
    dataset: Any,
    config: TrainConfig,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[Batch]:
    """This rank's share of the first `eval_sequences` of a split.

    Every micro-batch is full, and their number a multiple of the pipeline's stages, as its schedules
    need; what was added for that has a loss mask of zeros.
    """
    count = min(len(dataset), config.eval_sequences or len(dataset))
    samples = [dataset[i] for i in range(data_parallel_rank, count, data_parallel_size)]
    if not samples:
        return []
    multiple = config.micro_batch_size * config.parallel.pipeline_model_parallel_size
    padding = {**samples[0], "loss_mask": torch.zeros_like(samples[0]["loss_mask"])}
    samples += [padding] * (-len(samples) % multiple)
    return [
        torch.utils.data.default_collate(samples[start : start + config.micro_batch_size])
        for start in range(0, len(samples), config.micro_batch_size)
    ]


class _Sampler:
    """A batch sampler from a generator function."""

    def __init__(self, indices: Any) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices()


_READ = ("tokens", "labels", "loss_mask", "position_ids", "documents", "teacher_logits", "scale")


def to_device(batch: Batch) -> Batch:
    """The tensors a forward pass reads, on this rank's device. All [micro_batch_size, seq_length, ...], but
    for the loss's `scale`, of training."""
    device = torch.cuda.current_device()
    return {name: batch[name].to(device, non_blocking=True) for name in _READ if name in batch}
