"""Which files to read: local ones, or any that fsspec can open."""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

from data_prep.errors import UserError
from data_prep.files import real_place
from data_prep.json_files import read_json
from data_prep.left_out import LeftOut, ending_of

COMPRESSION = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
}
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
# Archives, and compressions that are not read. Their bytes are no text.
PACKED = (
    *(".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst"),
    *(".lz4", ".lzma", ".lzo", ".br", ".snappy", ".z"),
)
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
    """None, gzip, zstd, bzip2 or xz."""
    bytes: int
    """0 too where a web server does not say it."""
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


def _on_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def find_sources(
    inputs: tuple[Any, ...],
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    left_out: LeftOut | None = None,
) -> list[Source]:
    """The input files, in a fixed order.

    Args:
        inputs: files, folders searched recursively, or patterns (`data/*.jsonl`), local or as URLs;
            or folders that Hugging Face's `datasets` saved.
        include: file name patterns to take from folders and patterns, read as plain text when their
            ending is not a known one; empty takes the known endings of folders.
        exclude: patterns of whole paths to leave out of folders and patterns.
        left_out: counts what is in the folders and is not read, without what the user's patterns
            leave out.

    Raises:
        UserError: an input does not exist or is given twice, nothing is left, or there is nothing to
            include or exclude from.
    """
    if not inputs:
        raise UserError(
            "no input: give files or folders (before --include, which takes all words after it)"
        )
    patterns = Patterns(include, exclude, LeftOut() if left_out is None else left_out)
    by_input = [
        list((_remote if is_remote(given) else _local)(given, patterns))
        for given in map(str, inputs)
    ]
    if (include or exclude) and not patterns.searched:
        raise UserError(
            "--include and --exclude choose among the files of folders and of patterns, and no input here "
            "is one: leave the option out, or give a folder, or a pattern in quotes"
        )
    found = _each_once(by_input, patterns.left_out)
    # An empty file on the web is found when it is read.
    if found and not any(source.bytes or _on_web(source.path) for source in found):
        if len(found) == 1:
            raise UserError(f"the input file {found[0].path} is empty")
        raise UserError(f"all {len(found)} input files are empty, {found[0].path} among them")
    return found


def _each_once(by_input: list[list[Source]], left_out: LeftOut) -> list[Source]:
    """The files of all inputs. Where a folder or a pattern has a file and a link to it, one of them.

    Raises:
        UserError: a file is given twice.
    """
    found: list[Source] = []
    seen: dict[str, tuple[int, str]] = {}
    for number, sources in enumerate(by_input):
        for source in sources:
            place = source.path if source.remote else real_place(source.path)
            other, path = seen.get(place, (number, None))
            if path is None:
                seen[place] = (number, source.path)
                found.append(source)
            elif other == number and path != source.path:
                left_out.add("links to files that are read", 0)
            else:
                as_other = "" if path == source.path else f", as {path} too"
                raise UserError(
                    f"input {source.path} is given twice{as_other}: its documents would count double"
                )
    return found


def open_source(source: Source, block_bytes: int = 4 << 20) -> BinaryIO:
    """The file's bytes as they are stored. A remote file is asked for blocks of `block_bytes`."""
    if not source.remote:
        return Path(source.path).open("rb")
    filesystem, name = _filesystem(source.path)
    # A block size of 0 makes fsspec read the file as one stream.
    return filesystem.open(name, "rb", block_size=block_bytes if source.seekable else 0)


@dataclass(frozen=True)
class Patterns:
    """Which files of a folder, or of a pattern, are read."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    left_out: LeftOut
    searched: list[str] = field(default_factory=list)
    """The inputs from which files were chosen."""

    def takes(self, path: str) -> bool:
        """Whether the user's patterns, where there are any, leave the file in."""
        name = path.rsplit("/", 1)[-1]
        if any(fnmatch.fnmatch(path, pattern) for pattern in self.exclude):
            return False
        return not self.include or any(fnmatch.fnmatch(name, pattern) for pattern in self.include)

    def chosen(self, sizes: dict[str, int], folder: str) -> list[str]:
        """The paths to read, of all the paths in a folder.

        Args:
            sizes: bytes of each file, by its path.

        Raises:
            UserError: there are none.
        """
        found, other = [], LeftOut()
        self.searched.append(folder)
        for path, size in sizes.items():
            name = path.rsplit("/", 1)[-1]
            if name in (REPORT, DROPPED) or not self.takes(path):
                continue
            kind, called = _named(name)[0], _unreadable(name)
            if called or (kind is None and not self.include):
                other.add(called or ending_of(name), size)
            else:
                found.append(path)
        self.left_out.add_all(other)
        if not found:
            patterns = ", ".join(self.include or (f"*{ending}" for ending in KINDS))
            there = f", but {other}" if other else ""
            raise UserError(
                f"folder {folder} holds no file named like {patterns}{there}: give --include PATTERN"
            )
        return found

    def matched(self, pattern: str, paths: Iterable[str], folders: set[str]) -> list[str]:
        """The paths to read, of those that match a pattern.

        Raises:
            UserError: there are none.
        """
        kept, other, unwanted = [], LeftOut(), 0
        self.searched.append(pattern)
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            if path in folders:
                if "**" not in pattern:  # else it matches the files in the folder too
                    other.add("folders that a pattern matches", 0)
            elif name in (REPORT, DROPPED) or not self.takes(path):
                unwanted += 1
            elif called := _unreadable(name):
                other.add(called, 0)
            else:
                kept.append(path)
        self.left_out.add_all(other)
        if not kept:
            there = f" but {other}, which are not read" if other else ""
            if unwanted:
                there += (
                    f"; {unwanted:,} files are left out, by --include or --exclude, or as `data clean` "
                    "wrote them about what it dropped"
                )
            raise UserError(f"no file matches {pattern}{there}")
        return kept


def _unreadable(name: str) -> str | None:
    """How to call files of this name, if they hold no text: archives; and ._NAME, which macOS writes beside
    NAME on other file systems and into archives, with Finder's data about it."""
    if name.startswith("._"):
        return "._*"
    return ending_of(name) if _named(name)[2] else None


def _local(given: str, patterns: Patterns) -> Iterator[Source]:
    path = Path(given.removeprefix("file://"))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            named = read_json(path / "dataset_dict.json", "a saved dataset's splits").get("splits")
            splits = [str(split) for split in named] if isinstance(named, list) else []
            raise UserError(
                f"{path} is a saved dataset with the splits {', '.join(splits)}: give {path}/SPLIT"
            )
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            names = _saved_dataset(path / "state.json")
            files = {str(path / name): (path / name).stat() for name in names}
        else:
            files = _files_in(path, patterns.left_out)
            sizes = {name: status.st_size for name, status in files.items()}
            files = {name: files[name] for name in patterns.chosen(sizes, str(path))}
    elif path.is_file():
        files = {str(path): path.stat()}
    elif glob.has_magic(given):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (takes absolute patterns)
        folders = {name for name in found if Path(name).is_dir()}
        kept = patterns.matched(given, found, folders)
        files = {name: Path(name).stat() for name in kept if Path(name).is_file()}
        if broken := len(kept) - len(files):
            patterns.left_out.add("broken links", 0, broken)
        if not files:
            raise UserError(f"no file matches {given} but {broken:,} broken links")
    else:
        raise UserError(f"input {given} does not exist")
    for name, status in files.items():
        yield _source(name, status.st_size, str(status.st_mtime_ns))


def _files_in(folder: Path, left_out: LeftOut) -> dict[str, os.stat_result]:
    """All files in a folder, sorted. Links to files are followed, links to folders are not."""

    def refuse(error: OSError) -> None:
        raise error

    found = {}
    for place, folders, names in os.walk(folder, onerror=refuse):
        for path in (Path(place) / name for name in names):
            try:
                found[path] = path.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                if path.is_symlink():  # else it went away
                    left_out.add("broken links", 0)
        for name in folders:
            if (Path(place) / name).is_symlink():
                left_out.add("links to folders", 0)
    regular = {path: status for path, status in found.items() if stat.S_ISREG(status.st_mode)}
    if other := len(found) - len(regular):
        left_out.add("no regular files", 0, other)
    return {str(path): regular[path] for path in sorted(regular)}


def _saved_dataset(state: Path) -> list[str]:
    """The files that `datasets`' save_to_disk wrote, in order."""
    what = "the state.json of a saved dataset"
    files = read_json(state, what).get("_data_files")
    files = files if isinstance(files, list) else [None]
    names: list[Any] = [one.get("filename") if isinstance(one, dict) else None for one in files]
    if not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{state} is not {what}: _data_files must be a list of files, each with a filename"
        )
    return names


def _remote(given: str, patterns: Patterns) -> Iterator[Source]:
    filesystem, name = _filesystem(given)
    web = _on_web(given)  # a web server lists no folders
    try:
        if not web and glob.has_magic(name):
            found = filesystem.glob(name, detail=True)
            folders = {path for path, info in found.items() if info.get("type") == "directory"}
            kept = patterns.matched(given, found, folders)
            found = {path: found[path] for path in kept}
        elif not web and filesystem.isdir(name):
            found = filesystem.find(name, detail=True)
            sizes = {path: found[path].get("size") or 0 for path in sorted(found)}
            found = {k: found[k] for k in patterns.chosen(sizes, given)}
        else:
            found = {name: filesystem.info(name)}
    except FileNotFoundError:
        raise UserError(f"input {given} does not exist") from None
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"input {given} cannot be read: {error}") from error
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


def _named(name: str) -> tuple[Kind | None, str | None, bool]:
    """What a file's name says: its kind, its compression, and whether it is packed in a way that is not
    read. Endings count in capitals too. Of a URL on the web the name is that of its path; where that has no
    known ending it may be in the query (`?file=a.jsonl`)."""
    if _on_web(name):
        by_path = _named(urlsplit(name).path)
        if any(by_path):
            return by_path
    inner = Path(name.rsplit("/", 1)[-1].lower())
    if compression := COMPRESSION.get(inner.suffix):
        inner = Path(inner.stem)
    return KINDS.get(inner.suffix), compression, inner.suffix in PACKED


def _source(path: str, size: int, version: str, web: bool = False) -> Source:
    kind, compression, packed = _named(path)
    if (name := path.rsplit("/", 1)[-1]) in (REPORT, DROPPED):
        raise UserError(
            f"{path} was written by `data clean` about documents that it dropped: leave {name} out, or "
            "give the folder, or a pattern in quotes"
        )
    if packed:
        raise UserError(
            f"{path} is an archive, or packed in a way that is not read: unpack it, or pack its files "
            "with zstd, gzip, bzip2 or xz"
        )
    if compression and kind in ("parquet", "arrow"):
        raise UserError(f"{path}: unpack it first; parquet and arrow files are compressed inside")
    # A parquet file's table of contents is at its end.
    seekable = not web or kind == "parquet"
    return Source(path, kind or "text", compression, size, version, seekable)
