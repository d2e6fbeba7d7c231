"""Whether a data set can be made in a folder: what is there already, and the space on its disk."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.read.sources import Source


def is_done(output_dir: Path, wanted: dict[str, Any], sources: list[Source]) -> bool:
    """Whether the folder holds this very data set. Raises UserError when it holds something else."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file: give a folder")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return False
    changed = ""
    try:
        manifest = json.loads((output_dir / "manifest.json").read_text(encoding="utf-8"))
        same = all(manifest[key] == wanted[key] for key in ("tokenizer", "dtype", "options"))
        whole = all(
            (output_dir / f"{name}.{ending}").stat().st_size == split[f"{ending}_bytes"]
            for name, split in manifest["splits"].items()
            for ending in ("bin", "idx", "mask")
            if ending != "mask" or "mask_bytes" in split
        )
        made_of = [(s["path"], s["bytes"], s["version"]) for s in manifest["sources"]]
        now = [(s.path, s.bytes, s.version) for s in sources]
        if same and whole and made_of == now:
            return True
        if [path for path, *_ in made_of] == [path for path, *_ in now]:
            edited = [b[0] for a, b in zip(made_of, now, strict=True) if a != b]
            changed = f" ({edited[0]} has changed since)" if edited else ""
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"--output-dir {output_dir} is not empty and holds something else{changed}: choose another "
        "folder, or remove it"
    )


def check_space(output_dir: Path, sources: list[Source], dtype: str, there: int) -> None:
    """Refuses a disk that is too full for the tokens: about 3.5 bytes of text make a token.

    Args:
        there: bytes of the parts that were done before, or by other ranks.
    """
    text = sum(source.bytes * (4 if source.compression else 1) for source in sources)
    # Twice, as the parts stay until they are joined.
    needed = 2 * text / 3.5 * (2 if dtype == "uint16" else 4) - there
    parent = output_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {output_dir}: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"--output-dir {output_dir}: {free / 1e6:,.0f} MB free, about {needed / 1e6:,.0f} MB needed: "
            "free space or choose another disk"
        )
