"""Loss on a data set, against what is worked out another way."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ladder.errors import UserError
from pretrain.data.folders import open_folder
from pretrain.evaluation.documents import Documents, Texts, open_split
from pretrain.evaluation.perplexity import measure_perplexity
from pretrain.evaluation.positions import ratio_stderr
from tests.data_sets import write_data_set
from tests.unit.hf import tiny
from tests.unit.pretrain.evaluation import eval_models

DOCUMENTS, LENGTH = 11, 9  # 99 tokens; the model's context is 128


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    path = write_data_set(
        tmp_path / "data",
        vocab_size=tiny.VOCAB,
        validation_documents=DOCUMENTS,
        document_length=LENGTH,
    )
    return open_split(open_folder(path), "validation")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny.model(residual="ladder")


def stream(documents: Documents) -> torch.Tensor:
    raw = Path(documents.folder.prefix("validation") + ".bin").read_bytes()
    return torch.from_numpy(np.concatenate([[2], np.frombuffer(raw, np.uint16)]).astype(np.int64))


def test_what_fits_one_window_is_one_forward_pass(model, documents: Documents) -> None:
    ids = stream(documents)
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).item()
    found = measure_perplexity(model, documents, 128, batch_size=4)
    assert found["metrics"]["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["metrics"]["loss_stderr"] is None  # of one window
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert found["tokens"] == 99
    assert found["documents"] == DOCUMENTS
    nats, text_bytes = 99 * expected, 99 * 4  # as the manifest says
    assert found["metrics"]["bits_per_byte"] == pytest.approx(nats / text_bytes / math.log(2))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("seq_length", [10, 33, 1])
def test_windows_one_by_one(model, documents: Documents, seq_length: int, batch_size: int) -> None:
    """Batches hold full windows and a shorter last one: what pads it must not count."""
    ids = stream(documents)
    sums, counts = [], []
    for start in range(0, 99, seq_length):
        window = ids[start : start + seq_length + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        sums.append(F.cross_entropy(logits, window[1:], reduction="sum").item())
        counts.append(len(window) - 1)
    assert sum(counts) == 99
    found = measure_perplexity(model, documents, seq_length, batch_size)
    assert found["metrics"]["loss"] == pytest.approx(sum(sums) / 99, abs=1e-5)
    expected = ratio_stderr(np.array(sums), np.array(counts))
    assert found["metrics"]["loss_stderr"] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_knows_nothing_has_the_vocabularys_logarithm(documents: Documents) -> None:
    uniform = tiny.model(residual="ladder")
    torch.nn.init.zeros_(uniform.lm_head.weight)
    facts = documents.folder.manifest["splits"]["validation"]
    facts["text_bytes"] = 88  # a byte a token, EOD aside
    metrics = measure_perplexity(uniform, documents, 20, 4)["metrics"]
    assert metrics["loss"] == pytest.approx(math.log(tiny.VOCAB))
    assert metrics["loss_stderr"] == pytest.approx(0, abs=1e-6)
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(tiny.VOCAB) * 99 / 88)


def test_trained_tokens_alone(model, documents: Documents) -> None:
    trained = np.random.default_rng(0).integers(0, 2, 99).astype(np.uint8)
    Path(documents.folder.prefix("validation") + ".mask").write_bytes(trained.tobytes())
    ids = stream(documents)
    with torch.no_grad():
        losses = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
    expected = losses[torch.from_numpy(trained).bool()].mean().item()
    found = measure_perplexity(model, documents, 128, 1)
    assert found["metrics"]["trained_loss"] == pytest.approx(expected, abs=1e-5)
    assert found["metrics"]["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert found["trained_tokens"] == trained.sum()
    # Of some documents: their own part of the mask.
    some = replace(documents, numbers=np.array([2, 5]))
    assert (
        some.trained().tolist() == trained.reshape(11, 9)[[2, 5]].reshape(-1).astype(bool).tolist()
    )


def test_documents_are_drawn_whole(documents: Documents) -> None:
    some = documents.at_most(40, seed=3)
    assert len(some) == 4
    assert some.tokens == len(some.ids()) == 36
    assert some.numbers.tolist() == sorted(some.numbers)
    assert some.numbers.tolist() == documents.at_most(40, seed=3).numbers.tolist()
    assert some.numbers.tolist() != documents.at_most(40, seed=4).numbers.tolist()
    whole = stream(documents)[1:].reshape(11, 9)
    assert some.ids().tolist() == whole[some.numbers].reshape(-1).tolist()
    assert documents.at_most(99, seed=3) is documents
    with pytest.raises(UserError, match=r"9 tokens, more than --max-tokens 8"):
        documents.at_most(8, seed=3)


def test_bytes_of_decoded_documents_are_those_the_manifest_counted(bpe, tmp_path: Path) -> None:
    source = eval_models.write_texts(tmp_path / "text.jsonl")
    folder = open_folder(eval_models.tokenize(source, bpe, tmp_path / "data"))
    for split in ("train", "validation"):
        whole = open_split(folder, split)
        texts = Texts(whole)
        assert all(texts[i] in eval_models.texts() for i in range(len(texts)))
        counted = sum(len(text.encode()) for text in texts)
        assert counted == whole.text_bytes() == folder.manifest["splits"][split]["text_bytes"]
        some = replace(whole, numbers=whole.numbers[1:3])
        assert some.text_bytes() == sum(len(texts[i].encode()) for i in (1, 2))


def test_standard_error_of_equal_windows_is_the_means() -> None:
    means = np.array([1.0, 2.0, 4.0, 7.0])
    expected = means.std(ddof=1) / 2
    assert ratio_stderr(means * 10, np.full(4, 10)) == pytest.approx(expected)
    assert ratio_stderr(np.array([1.0]), np.array([1])) is None


def test_splits_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    data = open_folder(write_data_set(tmp_path / "data", validation_documents=0))
    with pytest.raises(UserError, match="nothing in its validation split: give --split train"):
        open_split(data, "validation")
    with pytest.raises(UserError, match="test split"):
        open_split(data, "test")
    (tmp_path / "data" / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match="is not the tokenizer the data set was made with"):
        Texts(open_split(data, "train"))
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert "validation" not in manifest["splits"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train_sentencepiece(tmp_path_factory.mktemp("tokenizer"), "bpe")
