"""Checks that a checkpoint's files are as they were written, by sizes and SHA-256 in manifest.json."""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_whole, is_word, read_json
from megatron_ladder.reading.plain_files import NotData, plain_size
from pretrain.files import sync, write_atomically

MANIFEST = "manifest.json"
NO_WEIGHTS = ("optimizer.", "rng.")
"""What the names of a checkpoint's other tensors begin with."""
MOST_BYTES = 256 << 20  # it lists every file: a few for each rank
_FORMAT = {"format": "megatron-ladder-checkpoint", "version": 1}

Facts = dict[str, dict[str, Any]]
"""By file name: {"bytes": 1, "sha256": "..."}."""


def sums(paths: Iterable[Path]) -> Facts:
    """Sizes in bytes and SHA-256 checksums of files, by file name. Reads the files from start to end."""
    facts = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return facts


def write_manifest(folder: Path, facts: Facts) -> None:
    """Waits until a checkpoint's files are on disk, then writes its manifest.json.

    Args:
        facts: of files whose checksums are known from writing them. Who wrote them has synced them. The
            other files are read and synced here.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.name not in facts]
    others = sums(paths)
    for path in paths:
        sync(path)
    content = {**_FORMAT, "files": dict(sorted((facts | others).items()))}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    sync(folder)


def written_files(folder: Path) -> Facts | None:
    """What a checkpoint's manifest says of its files; None: it has none."""
    manifest = folder / MANIFEST
    return _files(manifest) if manifest.is_file() else None


def _files(manifest: Path) -> Facts:
    """Raises UserError when it is no manifest, or names files elsewhere."""
    files = read_json(manifest, "a checkpoint's manifest", MOST_BYTES).get("files")
    right = isinstance(files, dict) and all(
        is_word(name)  # it is named in messages
        and Path(name).name == name
        and isinstance(facts, dict)
        and is_whole(facts.get("bytes"), 0, 1 << 62)
        and isinstance(facts.get("sha256"), str)
        for name, facts in files.items()
    )
    if not right:
        raise UserError(
            f"{manifest} is not a manifest: `files` must have sizes and checksums by name"
        )
    return files  # type: ignore[return-value]


def damage(folder: Path, *, read: bool, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint's files, in words; "" when nothing is.

    Old checkpoints have no manifest and cannot be checked. For them it is "" too. A manifest says nothing
    of who wrote the files: megatron_ladder/reading decides what is read of them.

    Args:
        read: compare checksums too, which reads the files; False compares only sizes.
        part, parts: check only every `parts`-th file, from file number `part` on, so that ranks share the
            reading.
    """
    manifest = folder / MANIFEST
    try:
        plain_size(folder, MANIFEST)  # no pipe, no link out of the folder
        files = _files(manifest)
        for name, facts in sorted(files.items())[part::parts]:
            size = plain_size(folder, name)
            if size != facts["bytes"]:
                return f"{name} has {size:,} bytes, {facts['bytes']:,} were written"
            if read and sums([folder / name])[name] != facts:
                return f"{name} is not what was written: its SHA-256 differs"
    except NotData as error:
        return str(error)
    except FileNotFoundError as error:
        if (missing := Path(error.filename)) != manifest:
            return f"{missing.name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except UserError as error:
        return f"{MANIFEST} is not a manifest: {error}"
    return ""


def refuse_damaged(folder: Path, *, read: bool) -> None:
    """Raises UserError when a checkpoint's files are not those that were written."""
    if what := damage(folder, read=read):
        raise UserError(damaged_message(folder, what))


def refuse_newer(folder: Path) -> None:
    """Raises UserError when the installed megatron-core is too old for a checkpoint.

    megatron-core 0.19 and later write no common.pt. Older ones cannot open a checkpoint without it. (One
    that is missing although it was written is damage.)
    """
    installed = version("megatron-core")
    written = _manifest_names(folder)
    newer = "metadata.json" in written and "common.pt" not in written
    if newer and tuple(map(int, installed.split(".")[:2])) < (0, 19):
        raise UserError(
            f"{folder} was written with megatron-core 0.19 or later; {installed}, which is installed, "
            "cannot open it: use the environment that wrote it (Python 3.12 or later). Newer versions open "
            "the checkpoints of older ones"
        )


def _manifest_names(folder: Path) -> set[str]:
    """The files that a manifest names; none where it cannot be read, which `damage` says."""
    try:
        return set(written_files(folder) or {})
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def damaged_message(folder: Path, what: str) -> str:
    if folder.name == "step_00000000":  # as `import` wrote it
        return f"{folder} is damaged: {what}. Import the model again"
    return (
        f"{folder} is damaged: {what}. Give the checkpoint before it; or continue the run with "
        "`megatron-ladder train`, which sets the damaged checkpoint aside and uses the one before it"
    )


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that it is no longer used. Nothing is deleted.

    Returns:
        The new path.
    """
    aside = folder.with_name(folder.name + ".damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    folder.rename(aside)
    return aside
