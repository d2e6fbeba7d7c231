import importlib.metadata
import json
from pathlib import Path

import pytest
import tokenizers

from data_prep import cli

TEXTS = [
    f"def f{i}(x):\n\tif x > {i}:\n        return x ** {i % 7}\n\n\n# naïve 日本語 🙂 {'word ' * (i % 5)}\n"
    for i in range(200)
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="session")
def tokenizer(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    argv = ["train-tokenizer", str(jsonl), "--vocab-size", "340", "--output-dir", str(folder)]
    assert cli.main(argv) == 0
    return folder / "tokenizer.model"


def hugging_face(path: Path, eod: str = "<|endoftext|>") -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[eod], show_progress=False
    )
    model.train_from_iterator(["def f(x): return x\n"], trainer)
    model.save(str(path))
    return path


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on PYTHONPATH alone: no metadata say which version it is."""
    found = importlib.metadata.Distribution.from_name

    def others(name: str) -> importlib.metadata.Distribution:
        if name == "megatron-ladder":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", others)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must fail; returns its complaint on one line."""

    def run(*argv: object) -> str:
        try:
            status: object = cli.main([str(a) for a in argv])
        except SystemExit as ended:
            status = ended.code
        output = capsys.readouterr()
        assert status == 2, output
        assert "Traceback" not in output.err
        return " ".join((output.out + output.err).replace("│", " ").split())

    return run
