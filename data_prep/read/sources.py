"""Which files to read: local ones, or any that fsspec can open."""

import fnmatch
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data_prep.errors import UserError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
Kind = Literal["jsonl", "text", "parquet", "arrow"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# `data clean` writes these two beside the text that it keeps; they are not read as text.
REPORT, DROPPED = "clean-report.json", "clean-dropped.jsonl"
# Which extra of this package to install for a protocol that fsspec alone cannot read.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: str
    """As given: a local path, or a URL."""
    kind: Kind
    compression: str | None
    """None, gzip or zstd."""
    bytes: int
    version: str
    """Changes when the file does: its time of modification, or a remote object's tag."""
    seekable: bool = True
    """False: it is read from its beginning to its end. Not every web server gives ranges of a file."""

    @property
    def remote(self) -> bool:
        return is_remote(self.path)


@dataclass(frozen=True)
class Segment:
    """A file, or a range of it."""

    source: Source
    bytes: int
    """Stored bytes, roughly: for the progress bar and for parts of equal size."""
    begin: int = 0
    end: int | None = None
    """Offsets in the stored file (anywhere in lines, or where zstd frames begin), or numbers of a
    parquet file's row groups. None is the file's end."""


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def find_sources(
    inputs: tuple[Any, ...], include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> list[Source]:
    """The input files, in a fixed order.

    Args:
        inputs: files, folders searched recursively, or patterns (`data/*.jsonl`), local or as URLs;
            or folders that Hugging Face's `datasets` saved.
        include: file name patterns to take from folders, read as plain text when their ending is
            not a known one; empty takes the known endings.
        exclude: patterns of whole paths to leave out of folders.

    Raises:
        UserError: an input does not exist or is given twice, or nothing is left.
    """
    if not inputs:
        raise UserError(
            "no input: give files or folders (before --include, which takes all words after it)"
        )
    found = [
        source
        for given in map(str, inputs)
        for source in (_remote if is_remote(given) else _local)(given, include, exclude)
    ]
    seen: set[str] = set()
    for source in found:
        if source.path in seen:
            raise UserError(f"input {source.path} is given twice: its documents would count double")
        seen.add(source.path)
    if found and not sum(source.bytes for source in found):
        raise UserError(f"all {len(found)} input files are empty, {found[0].path} among them")
    return found


def open_source(source: Source) -> BinaryIO:
    """The file's bytes as they are stored."""
    if not source.remote:
        return Path(source.path).open("rb")
    filesystem, name = _filesystem(source.path)
    # A block size of 0 makes fsspec read the file as one stream.
    return filesystem.open(name, "rb", block_size=4 << 20 if source.seekable else 0)


def _local(given: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[Source]:
    path = Path(given.removeprefix("file://"))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
            raise UserError(
                f"{path} is a saved dataset with the splits {', '.join(splits)}: give {path}/SPLIT"
            )
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            files = [path / name for name in _saved_dataset(path / "state.json")]
        else:
            files = _chosen(sorted(path.rglob("*")), path, include, exclude)
    elif path.is_file():
        files = [path]
    elif glob.has_magic(given):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (takes absolute patterns)
        files = [Path(p) for p in found if Path(p).is_file()]
        if not files:
            raise UserError(f"no file matches {given}")
    else:
        raise UserError(f"input {given} does not exist")
    for file in files:
        status = file.stat()
        yield _source(str(file), status.st_size, str(status.st_mtime_ns))


def _chosen(
    files: list[Path], folder: Path, include: tuple[str, ...], exclude: tuple[str, ...]
) -> list[Path]:
    names = _wanted([str(f) for f in files if f.is_file()], str(folder), include, exclude)
    return [Path(name) for name in names]


def _wanted(
    names: list[str], folder: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> list[str]:
    known = tuple(f"*{kind}{packed}" for kind in KINDS for packed in ("", *COMPRESSION))
    patterns = include or known
    chosen = [
        name
        for name in names
        if any(fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        and name.rsplit("/", 1)[-1] not in (REPORT, DROPPED)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise UserError(
            f"folder {folder} holds no file named like {', '.join(patterns)}: give --include PATTERN"
        )
    return chosen


def _saved_dataset(state: Path) -> list[str]:
    """The files that `datasets`' save_to_disk wrote, in order."""
    try:
        return [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state} is not the state.json of a saved dataset: {error!r}") from error


def _remote(given: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[Source]:
    filesystem, name = _filesystem(given)
    web = given.startswith(("http://", "https://"))  # a web server lists no folders
    try:
        if not web and glob.has_magic(name):
            found = filesystem.glob(name, detail=True)
        elif not web and filesystem.isdir(name):
            found = filesystem.find(name, detail=True)
            kept = _wanted(sorted(found), given, include, exclude)
            found = {k: found[k] for k in kept}
        else:
            found = {name: filesystem.info(name)}
    except FileNotFoundError:
        raise UserError(f"input {given} does not exist") from None
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"input {given} cannot be read: {error}") from error
    if not found:
        raise UserError(f"no file matches {given}")
    for path in sorted(found):
        info = found[path]
        if info.get("type") == "directory":
            continue
        keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created")
        version = next((str(info[key]) for key in keys if info.get(key)), "")
        url = path if web else filesystem.unstrip_protocol(path)
        yield _source(url, info.get("size") or 0, version, web)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # here, as it takes a while, and only remote paths need it

    protocol = url.split("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        hint = f"pip install 'megatron-ladder[{extra}]'" if extra else str(error)
        raise UserError(f"{url}: {protocol}:// needs another package: {hint}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


def _source(path: str, size: int, version: str, web: bool = False) -> Source:
    name = path.rsplit("/", 1)[-1]
    compression = next((c for ending, c in COMPRESSION.items() if name.endswith(ending)), None)
    inner = Path(name).stem if compression else name
    kind = KINDS.get(Path(inner).suffix, "text")
    if compression and kind in ("parquet", "arrow"):
        raise UserError(f"{path}: unpack it first; parquet and arrow files are compressed inside")
    # A parquet file's table of contents is at its end.
    return Source(path, kind, compression, size, version, not web or kind == "parquet")
