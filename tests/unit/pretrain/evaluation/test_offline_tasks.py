"""Tasks of held-out text: what the items are, and what models that know all or nothing get."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ladder.errors import UserError
from pretrain.convert.model_text import load_tokenizer
from pretrain.data.folders import open_folder
from pretrain.evaluation.documents import Texts, open_split
from pretrain.evaluation.likelihood import Likelihood, TextModel, split_ids
from pretrain.evaluation.offline_tasks import (
    CONTEXT_WORDS,
    CONTINUATION_WORDS,
    MIN_CONTEXT_WORDS,
    continuation_items,
    last_word_items,
    run_task,
)
from tests.unit.hf import tiny
from tests.unit.pretrain.evaluation import eval_models

TEXTS = eval_models.texts()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train_sentencepiece(tmp_path_factory.mktemp("tokenizer"), "bpe")


def test_last_words_end_passages_of_the_text() -> None:
    items = last_word_items(TEXTS, 80, seed=1)
    assert len(items) == 80
    for item in items:
        (word,) = item.choices
        assert any(item.context + word in text for text in TEXTS)
        assert word[0] == " "
        assert word[1:].isalpha()
        assert len(word) > 3
        assert MIN_CONTEXT_WORDS <= len(item.context.split()) <= CONTEXT_WORDS
    assert items == last_word_items(TEXTS, 80, seed=1)
    assert items != last_word_items(TEXTS, 80, seed=2)
    assert len({(item.context, item.choices) for item in items}) == 80


def test_continuations_are_the_true_one_and_three_of_other_documents() -> None:
    items = continuation_items(TEXTS, 80, seed=1)
    assert len(items) == 80
    for item in items:
        assert len(set(item.choices)) == 4
        own = [text for text in TEXTS if item.context + item.choices[item.answer] in text]
        assert own
        for number, choice in enumerate(item.choices):
            assert len(choice.split()) == CONTINUATION_WORDS
            assert choice[0].isspace()
            assert len(choice.strip()) <= 256
            if number != item.answer:
                assert item.context + choice not in "\n\n".join(TEXTS)
                assert any(choice.strip() in text for text in TEXTS)
    answers = np.bincount([item.answer for item in items], minlength=4)
    assert min(answers) > 8  # anywhere
    assert items == continuation_items(TEXTS, 80, seed=1)


def test_wrong_continuations_are_of_other_documents() -> None:
    texts = [" ".join(f"{name}{i}" for i in range(60)) for name in "abc"]
    items = continuation_items(texts, 60, seed=1)
    assert len(items) == 60
    for item in items:
        names = [choice.strip()[0] for choice in item.choices]
        assert names[item.answer] == item.context[0]
        assert names.count(item.context[0]) == 1


def test_items_are_the_same_for_any_tokenizer(bpe: Path, tmp_path: Path) -> None:
    source = eval_models.write_texts(tmp_path / "text.jsonl")
    unigram = tiny.train_sentencepiece(tmp_path, "unigram")
    found = []
    for number, tokenizer in enumerate((bpe, unigram)):
        data = eval_models.tokenize(source, tokenizer, tmp_path / f"data{number}")
        texts = Texts(open_split(open_folder(data), "validation"))
        found.append((last_word_items(texts, 20, 5), continuation_items(texts, 20, 5)))
    assert found[0] == found[1]
    assert len(found[0][0]) == 20


def knows_all(pairs, _title) -> list[Likelihood]:
    """What stands in the text is certain, what does not is not."""
    true = [any(context + after in text for text in TEXTS) for context, after in pairs]
    return [Likelihood(0.0 if t else 50.0, t) for t in true]


def knows_nothing(pairs, _title) -> list[Likelihood]:
    return [Likelihood(math.log(2) * 8 * len(after.encode()), False) for _, after in pairs]


def test_a_model_that_knows_all_and_one_that_knows_nothing() -> None:
    best = run_task("continuation", TEXTS, 100, 1, knows_all)
    assert best["metrics"] == {"accuracy": 1.0, "accuracy_stderr": 0.0}
    assert best["items"] == 100
    assert best["example"]["choices"][best["example"]["answer"]]
    metrics = run_task("continuation", TEXTS, 200, 1, knows_nothing)["metrics"]
    assert metrics["accuracy"] == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 200))
    p = metrics["accuracy"]
    assert metrics["accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 199))
    word = run_task("last_word", TEXTS, 50, 1, knows_all)["metrics"]
    assert word == {"accuracy": 1.0, "accuracy_stderr": 0.0, "perplexity": 1.0}
    word = run_task("last_word", TEXTS, 50, 1, lambda pairs, _: [Likelihood(2.0, False)] * 50)
    assert word["metrics"]["perplexity"] == pytest.approx(math.exp(2))
    assert word["metrics"]["accuracy"] == 0


def test_likelihood_is_per_byte() -> None:
    """Nats alone would take the shortest."""

    def longest_is_likeliest(pairs, _title) -> list[Likelihood]:
        return [Likelihood(10.0, False) for _ in pairs]

    items = continuation_items(TEXTS, 50, 1)
    right = [
        max(range(4), key=lambda i: len(item.choices[i].encode())) == item.answer for item in items
    ]
    found = run_task("continuation", TEXTS, 50, 1, longest_is_likeliest)
    assert found["metrics"]["accuracy"] == sum(right) / 50


def test_text_that_makes_no_item_is_refused() -> None:
    for name, texts in (
        ("last_word", ["too short"] * 5),
        ("continuation", ["short"] * 5),
        ("continuation", ["one document of many words " * 20]),  # no other to take from
        ("last_word", ["没有空格的文字" * 50]),
    ):
        with pytest.raises(UserError, match=f"task {name}: none of the documents"):
            run_task(name, texts, 10, 1, knows_nothing)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_are_the_models_whatever_the_batch(bpe: Path, batch_size: int) -> None:
    torch.manual_seed(0)
    model, tokenizer = tiny.model(residual="ladder"), load_tokenizer(bpe)
    items = continuation_items(TEXTS, 12, 1)
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    pairs[::2] = [
        (context[-50:], choice) for context, choice in pairs[::2]
    ]  # some fit, some do not
    text_model = TextModel(model, tokenizer, [2], seq_length=90, batch_size=batch_size)
    found = text_model.likelihoods(pairs, "tests")
    truncated = 0
    for (context, continuation), likelihood in zip(pairs, found, strict=True):
        before, after = split_ids(tokenizer, context, continuation)
        assert tokenizer.decode(before + after, False) == context + continuation
        whole = [2, *before, *after]
        truncated += len(whole) > 91
        whole = torch.tensor(whole[-91:])
        with torch.no_grad():
            logits = model(whole[None, :-1]).logits[0]
        losses = F.cross_entropy(logits, whole[1:], reduction="none")[-len(after) :]
        assert likelihood.nats == pytest.approx(losses.sum().item(), abs=1e-3)
        best = logits[-len(after) :].argmax(-1)
        assert likelihood.is_greedy == bool((best == whole[-len(after) :]).all())
    assert 0 < truncated < len(pairs) - 5
    with pytest.raises(UserError, match="--seq-length 2"):
        TextModel(model, tokenizer, [2], 2, 1).likelihoods(pairs, "tests")


class Knows:
    """A model that is certain of every token but those at some places of a sequence."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=tiny.VOCAB + 1)

    def __init__(self, sequence: list[int], wrong: list[int]) -> None:
        self._next = torch.tensor(sequence[1:])
        self._next[[i - 1 for i in wrong]] += 1

    def model(self, ids: torch.Tensor, **_):
        logits = F.one_hot(self._next[: ids.shape[1]], tiny.VOCAB + 1).float() * 100
        return SimpleNamespace(last_hidden_state=logits[None])

    @staticmethod
    def lm_head(states: torch.Tensor) -> torch.Tensor:
        return states


def test_greedy_means_every_token_of_the_continuation_and_no_other(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    context, word = "import torch", " undecided"
    before, after = split_ids(tokenizer, context, word)
    assert len(after) > 2
    sequence = [2, *before, *after]
    first = 1 + len(before)
    for wrong, expected in (
        ([], True),
        ([first - 1], True),  # the context's last
        ([first], False),
        ([first + 1], False),
        ([len(sequence) - 1], False),
    ):
        text_model = TextModel(Knows(sequence, wrong), tokenizer, [2], 60, 1)
        (found,) = text_model.likelihoods([(context, word)], "tests")
        assert found.is_greedy == expected, wrong
        assert (found.nats < 1e-3) == expected, wrong


def test_a_token_over_the_cut_is_the_continuations(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    whole = tokenizer.encode("import", add_special_tokens=False).ids
    assert len(whole) < len("import")  # something was merged
    for cut in range(len("import")):
        before, after = split_ids(tokenizer, "import"[:cut], "import"[cut:])
        assert before + after == whole
        assert after
        assert "import"[:cut].startswith(tokenizer.decode(before, False))
