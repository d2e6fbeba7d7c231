"""Checks that a checkpoint's files are as they were written, by sizes and SHA-256 in manifest.json."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.reading.plain_files import NotData, open_plain, plain_size
from pretrain.files import sync, write_atomically

MANIFEST = "manifest.json"
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
    """Writes a checkpoint's manifest.json, then waits until all files are on disk.

    Args:
        facts: of files whose checksums are known from writing them. The other files are read here.
    """
    others = sums(path for path in sorted(folder.iterdir()) if path.name not in facts)
    content = {**_FORMAT, "files": dict(sorted((facts | others).items()))}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def written_files(folder: Path) -> Facts | None:
    """What a checkpoint's manifest says of its files; None: it has none."""
    manifest = folder / MANIFEST
    return json.loads(manifest.read_text())["files"] if manifest.is_file() else None


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
        with open_plain(folder, MANIFEST)[0] as file:
            files: Facts = json.loads(file.read().decode())["files"]
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is not a manifest: {str(error)[:200]!r}"
    return ""


def refuse_damaged(folder: Path, *, read: bool) -> None:
    """Raises UserError when a checkpoint's files are not those that were written."""
    if what := damage(folder, read=read):
        raise UserError(damaged_message(folder, what))


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
