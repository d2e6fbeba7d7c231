"""The refine task: its items, what the model writes, scores, and the command."""

import importlib.util
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF

from data_prep import cli as data_cli
from megatron_ladder.errors import UserError
from pretrain.cli import main
from pretrain.convert.model_text import load_tokenizer
from pretrain.data.folders import open_folder
from pretrain.evaluation.documents import Documents, open_split
from pretrain.evaluation.refine import _written, items_of, run_refine, told_apart
from pretrain.evaluation.results import cells, results_by_step
from tests.unit.hf import tiny
from tests.unit.pretrain.evaluation import eval_models

PROMPT = "In: {source}\nDraft: {draft}\nOut: "


def triplet(number: int) -> dict[str, str]:
    words = eval_models.WORDS.split()
    return {
        "source": " ".join(words[number % 20 : number % 20 + 3]),
        "draft": " ".join(words[number % 17 : number % 17 + 2 + number % 5]),
        "reference": " ".join(words[number % 17 : number % 17 + 5]),
    }


TRIPLETS = [triplet(number) for number in range(40)]


def tokenize(rows: list[dict], tokenizer: Path, out: Path, prompt: str = PROMPT) -> Path:
    lines, template = out.with_suffix(".jsonl"), out.with_suffix(".txt")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(prompt)
    return encode(lines, tokenizer, out, "--prompt-template", template)


def encode(lines: Path, tokenizer: Path, out: Path, *options: object) -> Path:
    """All documents in the training split."""
    argv = ["tokenize", lines, "--tokenizer", tokenizer, "--output-dir", out, *options]
    argv += ["--answer-field", "reference", "--validation-fraction", "0", "--workers", "1"]
    assert data_cli.main([*map(str, argv), "--engine", "reference"]) == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run, model (the run's export), data and its tokenizer."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    tokenizer = tiny.train_sentencepiece(folder, "bpe")
    eval_models.make_run(folder, tokenizer)
    tokenize(TRIPLETS, tokenizer, folder / "data")
    return folder


def documents_of(folder: Path) -> Documents:
    return open_split(open_folder(folder), "train")


class Speaker:
    """Stands for a model: after each prompt it writes the text that is given for it."""

    def __init__(self, texts: dict[str, str], tokenizer: Any, end: int) -> None:
        self._texts, self._tokenizer, self._end = texts, tokenizer, end
        self.config = SimpleNamespace(vocab_size=500)
        self.device = "cpu"

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = []
        for row, mask in zip(ids, attention_mask, strict=True):
            prompt = self._tokenizer.decode(row[mask == 1].tolist(), skip_special_tokens=False)
            new = self._tokenizer.encode(self._texts[prompt], add_special_tokens=False).ids
            rows.append([*row.tolist(), *new, self._end])
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[self._end] * (longest - len(row))] for row in rows])


def test_values_are_told_apart_where_there_is_one_way() -> None:
    """Against all ways to fill the template."""
    for literals in (("", "ab", ""), ("a", "b", "a", ""), ("ab", "a"), ("", "", "b")):
        values = ["".join(v) for n in range(4) for v in itertools.product("ab", repeat=n)]
        ways: dict[str, list[tuple[str, ...]]] = {}
        for filling in itertools.product(values, repeat=len(literals) - 1):
            text = literals[0] + "".join(v + t for v, t in zip(filling, literals[1:], strict=True))
            ways.setdefault(text, []).append(filling)
        for text, found in ways.items():
            if len(text) < 6:  # of longer texts some ways have longer values
                got = told_apart(text, literals)
                assert got == (list(found[0]) if len(found) == 1 else None), (literals, text)
        assert told_apart("xyz", ("a", "b")) is None
    assert told_apart("as it is", ("as it is",)) == []


def test_items_are_the_triplets(made: Path) -> None:
    documents = documents_of(made / "data")
    items = items_of(documents, None, 1)
    assert len(items) == len(documents) == len(TRIPLETS)
    triplets = [i.fields | {"reference": i.reference} for i in items]
    assert all(found in TRIPLETS for found in triplets)
    for item in items:
        assert item.text == PROMPT.format_map(item.fields)
        assert load_tokenizer(made / "tokenizer.model").decode(item.prompt, False) == item.text
    some = items_of(documents, 7, 1)
    assert len(some) == 7
    assert [items.index(item) for item in some] == sorted(items.index(item) for item in some)
    assert some != items_of(documents, 7, 2)


def test_scores_are_sacrebleus(made: Path) -> None:
    """Of a model that gives the references, and of one that gives the drafts back."""
    documents = documents_of(made / "data")
    items = items_of(documents, None, 1)
    tokenizer = load_tokenizer(made / "tokenizer.model")
    text = SimpleNamespace(tokenizer=tokenizer, end_ids=(2,))

    def result(texts: dict[str, str]) -> dict[str, Any]:
        model = Speaker(texts, tokenizer, 2)
        return run_refine(model, text, documents, 128, None, 1, 5)

    right = result({item.text: item.reference for item in items})["metrics"]
    assert (right["bleu"], right["chrf"]) == (pytest.approx(100), pytest.approx(100))
    copied = result({item.text: item.fields["draft"] for item in items})
    metrics, references = copied["metrics"], [item.reference for item in items]
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        for field in ("source", "draft"):
            texts = [item.fields[field] for item in items]
            expected = metric.corpus_score(texts, [references]).score
            assert right[f"{field}_{name}"] == metrics[f"{field}_{name}"] == pytest.approx(expected)
        assert metrics[name] == metrics[f"draft_{name}"] < 100
        assert 0 < metrics[f"{name}_stderr"] < 10
    assert metrics["cut_off"] == 0
    assert copied["examples"][0] == {
        "prompt": items[0].text,
        "written": items[0].fields["draft"],
        "reference": items[0].reference,
    }
    assert copied["signatures"]["chrf"].startswith("nrefs:1|")


def test_prompts_in_a_batch_are_continued_as_each_by_itself(made: Path) -> None:
    """By the likeliest token of a whole forward pass each time."""
    torch.manual_seed(3)
    model = tiny.model(residual="ladder")
    prompts = [[5, 9, 30], [7] * 40, [100, 101, 102, 103, 104, 105], [9]]
    ends, seq_length = tuple(range(400, 440)), 60
    found = _written(model, prompts, ends, seq_length, 3)
    for prompt, (got, ended) in zip(prompts, found, strict=True):
        ids, most = list(prompt), min(len(prompt) + 32, seq_length - len(prompt))
        while len(ids) < len(prompt) + most:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
        assert ended == (ids[-1] in ends)
        assert got == (ids[len(prompt) : -1] if ended else ids[len(prompt) :])
    assert {ended for _, ended in found} == {True, False}


def test_the_command_measures_a_run_and_its_export_alike(
    made: Path, tmp_path: Path, capsys
) -> None:
    options = [
        "--data",
        str(made / "data"),
        "--tasks",
        "refine",
        "--limit",
        "5",
        "--split",
        "train",
    ]
    found = []
    for name in ("run", "model"):
        argv = ["eval", str(made / name), *options, "--batch-size", "3"]
        assert main([*argv, "--output-dir", str(tmp_path / name / "evaluations")]) == 0
        (file,) = (tmp_path / name / "evaluations").glob("*.json")
        (result,) = json.loads(file.read_text())["results"]
        found.append(result)
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["examples"] == found[1]["examples"]
    assert (found[0]["items"], found[0]["split"], found[0]["seed"]) == (5, "train", 1234)
    out = capsys.readouterr().out
    assert "draft_chrf" in out and "5 items" in out and "refine, the first item: 'In: " in out
    (shown,) = results_by_step(tmp_path / "run")[0]
    assert [cell[2] for cell in cells([shown])] == [
        *("bleu", "chrf", "source_bleu", "source_chrf", "draft_bleu", "draft_chrf", "cut_off")
    ]


def test_data_without_a_template_give_the_models_scores_alone(made: Path, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"text": "a b", "reference": "b a"}) + "\n")
    data = encode(rows, made / "tokenizer.model", tmp_path / "data")
    items = items_of(documents_of(data), None, 1)
    assert {(item.text, item.reference, len(item.fields)) for item in items} == {("a b", "b a", 0)}


def test_what_is_refused(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    tokenizer = made / "tokenizer.model"
    text = tmp_path / "text"
    plain = eval_models.write_texts(tmp_path / "text.jsonl", ["a b", "c"])
    argv = ["tokenize", plain, "--tokenizer", tokenizer, "--output-dir", text]
    assert data_cli.main([*map(str, argv), "--validation-fraction", "0"]) == 0
    with pytest.raises(UserError, match="has no loss mask"):
        items_of(documents_of(text), None, 1)
    rows = [{"source": "a Draft: b", "draft": "c", "reference": "d"}] * 3
    two_ways = tokenize(rows, tokenizer, tmp_path / "two", "{source} Draft: {draft} ")
    with pytest.raises(UserError, match="cannot be told from its prompt"):
        items_of(documents_of(two_ways), None, 1)
    turns = documents_of(made / "data")
    mask = Path(turns.folder.prefix("train") + ".mask")
    before = mask.read_bytes()
    try:
        mask.write_bytes(b"\1" * 3 + before[3:])
        with pytest.raises(UserError, match="not one prompt and one answer"):
            items_of(turns, None, 1)
    finally:
        mask.write_bytes(before)
    manifest = turns.folder.manifest
    for wrong in ("{a", 7, ["{source}"]):
        changed = manifest | {"options": {"chat": {"prompt": wrong}}}
        folder = SimpleNamespace(
            path=turns.folder.path, tokenizer=turns.folder.tokenizer, manifest=changed
        )
        folder.prefix = turns.folder.prefix
        with pytest.raises(UserError, match=r"options\.chat\.prompt is no template"):
            items_of(Documents(folder, "train", turns.numbers, turns.ends), None, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="leaves no room"):
        run_refine(None, SimpleNamespace(), turns, 8, None, 1, 4)
    with pytest.raises(UserError, match="no row for it"):
        _written(Speaker({}, None, 2), [[500]], (2,), 100, 1)
    argv = ["eval", str(made / "run"), "--data", str(made / "data"), "--tasks", "refine"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(argv) == 2
    assert "pip install 'megatron-ladder[refine]'" in capsys.readouterr().err
