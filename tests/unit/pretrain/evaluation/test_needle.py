"""The needle task: what its prompts are, and what models find that see all, the last tokens, or nothing."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_ladder.errors import UserError
from pretrain.convert.model_text import load_tokenizer
from pretrain.data.folders import open_folder
from pretrain.evaluation.documents import open_split
from pretrain.evaluation.needle import (
    CHOICES,
    DEPTHS,
    LENGTHS,
    SENTENCE,
    Haystack,
    Needle,
    run_needle,
)
from pretrain.evaluation.results import grid
from tests.unit.hf import tiny
from tests.unit.pretrain.evaluation import eval_models

SEQ_LENGTH = 1600
"""Of it one half and a quarter are long enough for the sentences in this tokenizer's short tokens."""


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    folder = tmp_path_factory.mktemp("haystack")
    source = eval_models.write_texts(folder / "text.jsonl", eval_models.plain_texts())
    tokenizer = eval_models.train_tokenizer(source, folder / "tokenizer")
    data = eval_models.tokenize(source, tokenizer, folder / "data")
    documents = open_split(open_folder(data), "validation")
    return Haystack(documents, load_tokenizer(tokenizer), [2])


def question(haystack: Haystack, needle: Needle) -> list[int]:
    return haystack.tokenizer.encode(SENTENCE.format(needle.key), add_special_tokens=False).ids


def test_prompts_have_their_length_and_the_needle_at_its_depth(haystack: Haystack) -> None:
    needles = haystack.needles(SEQ_LENGTH, 60, seed=1)
    lengths = sorted({needle.length for needle in needles})
    assert lengths[-1] == SEQ_LENGTH and 2 <= len(lengths) <= LENGTHS
    assert all(long == 2 * short for short, long in itertools.pairwise(lengths))
    ids = haystack.documents.ids().tolist()
    text = " ".join(map(str, ids))
    for needle in needles:
        prompt = needle.prompt.tolist()
        assert len(prompt) == needle.length
        asked = question(haystack, needle)
        assert prompt[0] == 2 and prompt[-len(asked) :] == asked
        whole = [*asked, needle.choices[needle.answer]]
        (place,) = (
            i for i in range(len(prompt)) if prompt[i : i + len(whole)] == whole
        )  # once; at the end the word is missing
        end = haystack.tokenizer.encode(".\n", add_special_tokens=False).ids
        before, after = prompt[1:place], prompt[place + len(whole + end) : -len(asked)]
        assert len(before) == round(needle.depth * len(before + after))
        assert len(before + after) >= needle.length // 2
        assert " ".join(map(str, before + after)) in text  # a piece of the split
        assert len(set(needle.choices)) == CHOICES
        for token in needle.choices:
            assert haystack.tokenizer.decode([token]).strip().isalpha()
            assert needle.key != haystack.tokenizer.decode([token]).strip()
    places = [(needle.length, needle.depth) for needle in needles]
    assert set(places) == {(n, d) for n in lengths for d in DEPTHS}  # all, equally often
    assert max(places.count(p) for p in set(places)) - min(places.count(p) for p in set(places)) < 2
    assert np.bincount([needle.answer for needle in needles], minlength=CHOICES).max() < 20


def test_items_depend_on_the_seed_alone(haystack: Haystack) -> None:
    def prompts(count: int, seed: int) -> list[list[int]]:
        return [n.prompt.tolist() for n in haystack.needles(SEQ_LENGTH, count, seed)]

    assert prompts(8, 1) == prompts(20, 1)[:8]
    assert prompts(8, 1) != prompts(8, 2)


class Copies:
    """A model that gives the token which followed the same six tokens before, among the last `sees`."""

    device = torch.device("cpu")

    def __init__(self, sees: int) -> None:
        self._sees = sees
        self.lengths: list[int] = []

    def __call__(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert logits_to_keep == 1 and not use_cache
        logits = torch.zeros(len(ids), 1, tiny.VOCAB)
        for row, tokens in enumerate(ids.tolist()):
            self.lengths.append(len(tokens))
            tokens = tokens[-self._sees :]
            for i in range(len(tokens) - 7):
                if tokens[i : i + 6] == tokens[-6:]:
                    logits[row, 0, tokens[i + 6]] = 20.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_models_that_see_all_or_the_end_or_nothing(haystack: Haystack, batch_size: int) -> None:
    def run(sees: int, count: int = 75) -> dict:
        return run_needle(Copies(sees), haystack, SEQ_LENGTH, count, 1, batch_size)

    all_of_it = run(SEQ_LENGTH)
    assert all_of_it["metrics"]["accuracy"] == all_of_it["metrics"]["exact_match"] == 1
    assert all_of_it["metrics"]["gain"] == 20
    assert all_of_it["items"] == 75 == sum(row["items"] for row in all_of_it["by_place"])
    half = run(SEQ_LENGTH // 2)
    found = {(row["length"], row["depth"]): row["accuracy"] for row in half["by_place"]}
    assert found[SEQ_LENGTH, 0.0] < 0.6 and found[SEQ_LENGTH, 0.25] < 0.6
    assert found[SEQ_LENGTH, 0.75] == found[SEQ_LENGTH, 1.0] == found[SEQ_LENGTH // 2, 0.0] == 1
    nothing = run(1, 300)["metrics"]
    assert nothing["accuracy"] == pytest.approx(0.1, abs=0.07)
    assert nothing["exact_match"] == 0
    assert nothing["gain"] == 0
    assert nothing["accuracy_stderr"] == pytest.approx(
        np.sqrt(nothing["accuracy"] * (1 - nothing["accuracy"]) / 299)
    )
    lines = grid(half).splitlines()
    assert lines[0].split()[0] == "depth" and lines[0].split()[-1] == "1,600"
    assert lines[1].split()[0] == "0%" and lines[-1].split()[-1] == "1.00"


def test_the_model_is_asked_for_the_likelihood_after_the_whole_prompt(haystack: Haystack) -> None:
    torch.manual_seed(0)
    model = tiny.model(residual="ladder", max_position_embeddings=SEQ_LENGTH)
    found = run_needle(model, haystack, SEQ_LENGTH, 6, 3, batch_size=4)
    gains = []
    for needle in haystack.needles(SEQ_LENGTH, 6, 3):
        with torch.no_grad():
            logits = model(torch.from_numpy(needle.prompt)[None]).logits[0, -1]
        nats = logits.log_softmax(0)[list(needle.choices)].tolist()
        right = nats.pop(needle.answer)
        gains.append(right - np.mean(nats))
    assert found["metrics"]["gain"] == pytest.approx(np.mean(gains), abs=1e-4)


def test_what_makes_no_needles(haystack: Haystack, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--seq-length 30: needle takes prompts of"):
        haystack.needles(30, 5, 1)
    with pytest.raises(UserError, match="give more text, or a lower --seq-length"):
        haystack.needles(100_000, 5, 1)
    monkeypatch.setattr(Haystack, "_words", lambda *_: [("one", 5)] * CHOICES)
    with pytest.raises(UserError, match="only 10 are one token of its tokenizer"):
        haystack.needles(SEQ_LENGTH, 5, 1)
