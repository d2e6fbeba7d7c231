"""A small model as a run and as its exported folder, and text as a data set made with its tokenizer."""

import json
import random
import shutil
from pathlib import Path

import torch

from data_prep import cli as data_cli
from pretrain.convert.export import export_run
from pretrain.convert.import_model import import_model
from tests.unit.hf import tiny

WORDS = (
    "the model of a run reads tokens and writes losses import return self residual stream layer "
    "naïve 日本語 file's x=1; (step) end. text, ladder attention parallel gradient window def"
)


def texts() -> list[str]:
    """150 documents of 20 to 120 words, in lines."""
    rng = random.Random(0)
    return [
        "".join(
            rng.choice(WORDS.split()) + rng.choice(("\n", " ", " ", " ", "  "))
            for _ in range(rng.randint(20, 120))
        )
        for _ in range(150)
    ]


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return path


def tokenize(source: Path, tokenizer: Path, out: Path, *options: str) -> Path:
    argv = ["tokenize", str(source), "--tokenizer", str(tokenizer), "--output-dir", str(out)]
    argv += ["--validation-fraction", "0.3", "--workers", "1", *options]
    assert data_cli.main(argv) == 0
    return out


def make_run(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """A run of a ladder model with a SentencePiece tokenizer, and its exported folder."""
    torch.manual_seed(1)
    published = folder / "published"
    tiny.model(residual="ladder").save_pretrained(published)
    shutil.copyfile(tokenizer, published / "tokenizer.model")
    import_model(published, folder / "run")
    shutil.rmtree(folder / "run" / "imported")  # as if it had been trained here
    return folder / "run", export_run(folder / "run", folder / "model", None, "5GB")
