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


def plain_texts() -> list[str]:
    """150 documents of 20 to 120 words, of some fifty words in all."""
    rng = random.Random(1)
    parts = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve")
    words = sorted({rng.choice(parts) + rng.choice(parts) for _ in range(70)})
    return [" ".join(rng.choice(words) for _ in range(rng.randint(20, 120))) for _ in range(150)]


def write_texts(path: Path, some: list[str] | None = None) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some or texts()))
    return path


def train_tokenizer(source: Path, folder: Path) -> Path:
    """A tokenizer in which each word of `plain_texts` is one token."""
    argv = ["train-tokenizer", str(source), "--vocab-size", "480", "--output-dir", str(folder)]
    assert data_cli.main(argv) == 0
    return folder / "tokenizer.model"


def tokenize(source: Path, tokenizer: Path, out: Path, *options: str) -> Path:
    argv = ["tokenize", str(source), "--tokenizer", str(tokenizer), "--output-dir", str(out)]
    argv += ["--validation-fraction", "0.3", "--workers", "1", *options]
    assert data_cli.main(argv) == 0
    return out


def make_run(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """A run of a ladder model with experts in two of its layers and a SentencePiece tokenizer, and its
    exported folder."""
    torch.manual_seed(1)
    published = folder / "published"
    experts = {**tiny.FOUR, "mlp_only_layers": [0, 2]}
    tiny.model(residual="ladder", **experts).save_pretrained(published)
    shutil.copyfile(tokenizer, published / "tokenizer.model")
    import_model(published, folder / "run")
    shutil.rmtree(folder / "run" / "imported")  # as if it had been trained here
    return folder / "run", export_run(folder / "run", folder / "model", None, "5GB")
