"""Makes a data set from the Python files and C++ headers of this machine, by data_prep."""

import subprocess
import sys
from pathlib import Path

from megatron_ladder.errors import UserError

FILES = ("*.py", "*.pyi", "*.h", "*.hpp", "*.cuh", "*.inl")
TOKENIZER_BYTES = 8_000_000


def places() -> list[Path]:
    """Folders of this machine with such files. No folder is inside another one."""
    folders = [sys.prefix, sys.base_prefix, "/usr/include", "/usr/local/cuda", *sys.path[1:]]
    here = Path(__file__).parents[3]
    found = {p.resolve() for p in map(Path, folders) if p.is_dir()}
    found = {p for p in found if p != here}
    return sorted(p for p in found if not any(other in p.parents for other in found))


def make(folders: list[Path], work: Path, vocab_size: int) -> Path:
    """Each file is a document, without exact duplicates. 2 % of the documents, by their hash, are held out.

    Args:
        work: the folder for the cleaned text, the tokenizer and the data set. A data set that is there is
            used again.

    Raises:
        UserError: data_prep has failed, and has printed the reason.
    """
    data, clean, tokenizer = work / "data", work / "clean", work / "tokenizer"
    if (data / "manifest.json").exists():
        return data
    work.mkdir(parents=True, exist_ok=True)
    text = [*map(str, folders), "--include", *FILES]
    tolerant = ["--max-bad-lines", "100000"]  # files that are not UTF-8
    _data_prep("clean", *text, "--exact-dedup", *tolerant, "--output-dir", str(clean))
    size = ["--vocab-size", str(vocab_size), "--max-training-bytes", str(TOKENIZER_BYTES)]
    _data_prep("train-tokenizer", str(clean), *size, "--output-dir", str(tokenizer))
    model = ["--tokenizer", str(tokenizer / "tokenizer.model")]
    _data_prep(
        *("tokenize", str(clean), *model, "--validation-fraction", "0.02"),
        *("--output-dir", str(data)),
    )
    return data


def _data_prep(*words: str) -> None:
    command = [sys.executable, "-m", "data_prep", *words]
    if subprocess.run(command).returncode:  # noqa: S603 (a list)
        raise UserError(f"data_prep {words[0]} of the text failed: see above")
