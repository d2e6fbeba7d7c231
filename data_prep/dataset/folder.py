"""Opens a data set's folder. docs/reference/formats.md describes its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset.manifest import MOST_BYTES, check_manifest
from data_prep.dataset.shards import HEADER_BYTES, index_bytes
from data_prep.encode.encoders import Encoder, open_encoder, sha256
from data_prep.errors import UserError
from data_prep.json_files import read_json, short


@dataclass(frozen=True)
class DataSet:
    """A folder with a manifest; its files may be damaged."""

    path: Path
    manifest: dict[str, Any]

    @property
    def tokenizer(self) -> Path:
        return self.path / self.manifest["tokenizer"]["file"]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.manifest["dtype"]).newbyteorder("<")

    def file(self, split: str, ending: str) -> Path:
        return self.path / f"{split}.{ending}"

    def wrong_sizes(self) -> list[str]:
        """Files that are missing or have other sizes than the manifest says."""
        problems = []
        for split, facts in self.manifest["splits"].items():
            for ending in ("bin", "idx", "mask"):
                if (wanted := facts.get(f"{ending}_bytes")) is None:
                    continue
                file = self.file(split, ending)
                if not file.is_file():
                    problems.append(f"{file} is missing")
                elif (size := file.stat().st_size) != wanted:
                    problems.append(f"{file} has {size:,} bytes, the manifest says {wanted:,}")
            count = facts["documents"]
            if facts["idx_bytes"] != (wanted := index_bytes(count)):
                file = self.file(split, "idx")
                problems.append(f"{file}: {count:,} documents take {wanted:,} bytes of index")
        return problems

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of each document, int32 [documents]; mapped, not read."""
        count = self.manifest["splits"][split]["documents"]
        return np.memmap(self.file(split, "idx"), "<i4", "r", HEADER_BYTES, (count,))

    def open_encoder(self) -> Encoder:
        """The tokenizer that the data set was made with.

        Raises:
            UserError: it is missing, or another one.
        """
        if (
            not self.tokenizer.is_file()
            or sha256(self.tokenizer) != self.manifest["tokenizer"]["sha256"]
        ):
            raise UserError(f"{self.tokenizer} is not the tokenizer the data set was made with")
        # A tokenizer.json does not say which token ends documents: the manifest has its id.
        eod = None
        if self.tokenizer.suffix == ".json":
            import tokenizers

            file = tokenizers.Tokenizer.from_file(str(self.tokenizer))
            eod = file.id_to_token(self.manifest["tokenizer"]["eod_id"])
        return open_encoder(self.tokenizer, eod)


def open_data_set(path: Path) -> DataSet:
    """Reads the manifest only.

    Raises:
        UserError: not a data set.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(f"{path} is not a data set: it holds no manifest.json")
    manifest = read_json(file, "a data set's manifest", MOST_BYTES)
    if manifest.get("format") != "megatron-ladder-data" or manifest.get("version") != 1:
        raise UserError(
            f"{file} is not a data set's manifest of version 1: its format is "
            f"{short(manifest.get('format'))}, version {short(manifest.get('version'))}"
        )
    check_manifest(manifest, str(file))
    return DataSet(path, manifest)
