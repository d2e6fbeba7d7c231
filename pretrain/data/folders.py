"""Opens data set folders, checks their files, and copies their manifests and tokenizers to a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import read_json, short
from pretrain.data.index_file import check_index
from pretrain.data.manifests import MOST_BYTES, check_manifest
from pretrain.files import sha256, write_atomically
from pretrain.ranks import is_first_rank


@dataclass(frozen=True)
class DataFolder:
    """One data set folder whose manifest and files agree."""

    path: Path
    manifest: dict[str, Any]
    first_name: str = ""
    """In a run: the folder's name when the run began to train on it. "": not known."""

    @property
    def has_tokenizer(self) -> bool:
        """False only in a run whose model was imported without one."""
        return self.manifest["tokenizer"] is not None

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Raises UserError when there is none."""
        if not self.has_tokenizer:
            raise UserError(
                f"{self.path.parents[1]} has no tokenizer, because the model's folder had none: copy its "
                "tokenizer.json into that folder and import it again"
            )
        return self.manifest["tokenizer"]

    @property
    def name(self) -> str:
        return self.first_name or self.path.name

    def split(self, name: str) -> dict[str, Any]:
        """What the manifest says of a split; {} when the data set has none of that name."""
        return self.manifest["splits"].get(name, {})

    def tokens(self, split: str) -> int:
        return self.split(split).get("tokens", 0)

    def validates(self, seq_length: int) -> bool:
        """Whether the validation split has a sequence of `seq_length` tokens and the one after them."""
        return self.tokens("validation") > seq_length

    def prefix(self, split: str) -> str:
        return str(self.path / split)


def open_folder(path: Path) -> DataFolder:
    """Reads a folder's manifest and checks that its files are those the manifest describes.

    Raises:
        UserError: the folder does not exist, is not a data set, or its files do not fit the manifest.
    """
    if path.name in ("", ".."):  # `.` and the like: it gets the folder's name
        path = path.resolve()
    manifest_path = path / "manifest.json"
    if not path.is_dir():
        raise UserError(
            f"data set {path} does not exist: make it with `megatron-ladder data tokenize`, or give its "
            "new folder if it has been moved"
        )
    if not manifest_path.is_file():
        raise UserError(
            f"{path} holds no manifest.json: it is not a finished data set of "
            "`megatron-ladder data tokenize`"
        )
    manifest = read_json(manifest_path, "a data set's manifest", MOST_BYTES)
    if manifest.get("format") != "megatron-ladder-data" or manifest.get("version") != 1:
        raise UserError(
            f"{manifest_path} is not a data set's manifest of version 1: its format is "
            f"{short(manifest.get('format'))}, version {short(manifest.get('version'))}: tokenize again"
        )
    check_manifest(manifest, str(manifest_path))
    folder = DataFolder(path, manifest)
    for split, facts in manifest["splits"].items():
        for ending in ("bin", "idx", "mask"):
            if ending == "mask" and "mask_bytes" not in facts:
                continue
            file = path / f"{split}.{ending}"
            size = file.stat().st_size if file.is_file() else -1
            if size != facts[f"{ending}_bytes"]:
                found = "is missing" if size < 0 else f"has {size:,} bytes"
                raise UserError(
                    f"{file} {found}; the manifest says {facts[f'{ending}_bytes']:,} bytes: the "
                    "data set is damaged, copy or tokenize it again"
                )
        if facts.get("mask_bytes", facts["tokens"]) != facts["tokens"]:
            raise UserError(
                f"{path / split}.mask has {facts['mask_bytes']:,} bytes, one for each of "
                f"{facts['tokens']:,} tokens is needed: tokenize again"
            )
    if is_first_rank():  # these files are read from start to end
        file = path / folder.tokenizer["file"]
        if not file.is_file() or sha256(file) != folder.tokenizer["sha256"]:
            raise UserError(
                f"{file} is not the tokenizer that the data set was made with, or is missing: copy the "
                "data set again"
            )
        for split, facts in manifest["splits"].items():
            check_index(path / split, facts, manifest["dtype"])
    return folder


def has_ids_of(data: DataFolder, file: Path) -> bool:
    """Whether a data set was made with this tokenizer.

    A tokenizer.json may put another token before a text than the data set's does: `export` writes what
    training began documents with. The text's own ids are the same.
    """
    if data.tokenizer["sha256"] == sha256(file):
        return True
    theirs = data.path / data.tokenizer["file"]
    if not theirs.is_file() or {file.suffix, theirs.suffix} != {".json"}:
        return False
    return _text_alone(theirs) == _text_alone(file)


def same_ids(one: DataFolder, other: DataFolder) -> bool:
    """Whether the same id stands for the same token in two data sets."""
    if one.tokenizer["sha256"] == other.tokenizer["sha256"]:
        return True
    file = other.path / other.tokenizer["file"]
    ends_alike = one.tokenizer["eod_id"] == other.tokenizer["eod_id"]
    return ends_alike and file.is_file() and has_ids_of(one, file)


def _text_alone(path: Path) -> dict[str, Any]:
    fields = read_json(path, "a tokenizer.json", MOST_BYTES)
    return {k: v for k, v in fields.items() if k not in ("post_processor", "padding", "truncation")}


def keep_facts(run_dir: Path, folders: list[DataFolder]) -> None:
    """Copies manifests and tokenizers into the run's folder, so that exporting needs no data sets.

    The copy of the manifest has a field more, `name`: the data set keeps it when its folder is renamed.
    """
    for number, folder in enumerate(folders):
        target = run_dir / "data" / str(number)
        manifest = json.dumps({**folder.manifest, "name": folder.name}, indent=2) + "\n"
        copy = target / "manifest.json"
        if copy.is_file() and copy.read_text() == manifest:
            continue  # a start before has made it
        target.mkdir(parents=True, exist_ok=True)
        file = folder.tokenizer["file"]
        write_atomically(target / file, (folder.path / file).read_bytes())
        # The manifest comes last: once it is there, the copy is complete.
        write_atomically(copy, manifest)


def kept_facts(run_dir: Path, paths: tuple[Path, ...] = ()) -> list[DataFolder]:
    """The copies that `keep_facts` made of each data set: manifest and tokenizer, no tokens.

    Args:
        run_dir: the run's folder.
        paths: data.paths of the run's configuration. Older versions kept the names only there.

    Raises:
        UserError: there are none.
    """
    files = sorted((run_dir / "data").glob("[0-9]*/manifest.json"), key=_number)
    if not files:
        raise UserError(f"{run_dir} holds no data/0/manifest.json: is the run's folder complete?")
    kept = []
    for number, file in enumerate(files):
        manifest = read_json(file, "a data set's manifest", MOST_BYTES)
        check_manifest(manifest, str(file), kept=True)
        name = manifest.pop("name", paths[number].name if number < len(paths) else "")
        kept.append(DataFolder(file.parent, manifest, name))
    return kept


def _number(manifest: Path) -> int:
    name = manifest.parent.name
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise UserError(f"{manifest.parent} is no folder of a run: remove it")
    return int(name)


def labels(folders: list[DataFolder]) -> list[str]:
    """A name for each data set; of several with the same name the later ones get a number."""
    found: list[str] = []
    for folder in folders:
        label, number = folder.name, 1
        while label in found:
            number += 1
            label = f"{folder.name}-{number}"
        found.append(label)
    return found


def unigram_loss(folder: DataFolder, split: str = "validation") -> float:
    """The entropy, in nats a token, of the frequencies of tokens in the split.

    No model that ignores context can have a lower loss on the split.
    """
    tokens = np.memmap(folder.prefix(split) + ".bin", dtype=folder.manifest["dtype"], mode="r")
    counts = np.zeros(folder.tokenizer["vocab_size"], dtype=np.int64)
    for start in range(0, len(tokens), 1 << 24):  # 16M tokens at a time
        some = tokens[start : start + (1 << 24)]
        if len(some) and not 0 <= int(some.min()) <= int(some.max()) < len(counts):
            raise UserError(
                f"{folder.prefix(split)}.bin holds ids that are not in the vocabulary of "
                f"{len(counts):,}: see `megatron-ladder data verify {folder.path}`"
            )
        counts += np.bincount(some, minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
