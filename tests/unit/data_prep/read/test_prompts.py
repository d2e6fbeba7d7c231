"""Instruction data whose prompt is made of several fields by a template."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import cli
from data_prep.errors import UserError
from data_prep.read.chat import Chat, filled, pieces_of, prompt_fields

PROMPT = "English: {source}\nDraft {{{n}}}: {draft}\nBetter: "
TRIPLETS = [
    {"source": f"word {i}", "draft": f"{{source}} mot {i} {{", "reference": f"parole {i}", "n": "1"}
    for i in range(20)
]


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")  # an editor's end of the last line is not the prompt's
    return file


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "triplets.jsonl"
    file.write_text("".join(json.dumps(triplet) + "\n" for triplet in TRIPLETS))
    return file


def run(source: Path, tokenizer: Path, out: Path, *options: object) -> Path:
    argv = ["tokenize", source, "--tokenizer", tokenizer, "--output-dir", out, *options]
    assert cli.main([*map(str, argv), "--validation-fraction", "0"]) == 0
    return out


def test_the_fields_of_a_prompt() -> None:
    assert prompt_fields(PROMPT) == ("source", "n", "draft")
    assert prompt_fields("{a.b}{c}{a.b}") == ("a.b", "c")
    assert filled(PROMPT, TRIPLETS[0]) == "English: word 0\nDraft {1}: {source} mot 0 {\nBetter: "
    for wrong, why in {
        "no field": "names no field",
        "{}": "nothing else",
        "{a!r}": "nothing else",
        "{a:>9}": "nothing else",
        "{a": "expected '}'",
        "a}": "Single '}'",
    }.items():
        with pytest.raises(UserError, match=why):
            prompt_fields(wrong)


def test_the_same_bytes_as_of_prompts_that_were_written_before(
    prompt, lines, tokenizer, tmp_path
) -> None:
    """Ids and mask, from JSON lines and from a table."""
    quick = ("--engine", "reference", "--workers", "1")
    how = ("--prompt-template", prompt, "--answer-field", "reference", *quick)
    out = run(lines, tokenizer, tmp_path / "out", *how)
    rendered = tmp_path / "rendered.jsonl"
    rows = [
        {
            "text": f"English: {t['source']}\nDraft {{1}}: {t['draft']}\nBetter: ",
            "a": t["reference"],
        }
        for t in TRIPLETS
    ]
    rendered.write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = run(rendered, tokenizer, tmp_path / "same", "--answer-field", "a", *quick)
    pq.write_table(pa.Table.from_pylist(TRIPLETS), tmp_path / "triplets.parquet")
    table = run(tmp_path / "triplets.parquet", tokenizer, tmp_path / "table", *how)
    for name in ("train.bin", "train.idx", "train.mask"):
        assert (
            (out / name).read_bytes() == (same / name).read_bytes() == (table / name).read_bytes()
        )
    mask = np.fromfile(out / "train.mask", np.uint8)
    assert 0 < mask.sum() < len(mask)
    # What is recorded; a data set without a template is recorded as it always was.
    chat = json.loads((out / "manifest.json").read_text())["options"]["chat"]
    assert chat["prompt"] == PROMPT
    assert chat["fields"] == ["source", "n", "draft", "reference"]
    assert "prompt" not in json.loads((same / "manifest.json").read_text())["options"]["chat"]


def test_a_field_that_is_no_text_makes_a_bad_line(prompt) -> None:
    chat = Chat(("source", "n", "draft", "reference"), None, "", PROMPT)
    assert pieces_of(["a", "1", None, "b"], chat) == ([], "field 'draft' is no string")


def test_what_cannot_be_meant(prompt, lines, tokenizer, tmp_path, refused) -> None:
    base = ["tokenize", lines, "--tokenizer", tokenizer, "--output-dir", tmp_path / "out"]
    template, answer = ("--prompt-template", prompt), ("--answer-field", "reference")
    assert "needs --answer-field" in refused(*base, *template)
    assert "leave out --text-field" in refused(*base, *template, *answer, "--text-field", "source")
    assert "messages are rendered by --chat-template" in refused(
        *base, *template, "--chat-field", "m"
    )
    assert "--prompt-template FILE makes a prompt of several fields" in refused(
        *base, *answer, "--text-field", "source", "draft"
    )
    assert "{draft} is the answer" in refused(*base, *template, "--answer-field", "draft")
    assert "No such file" in refused(*base, "--prompt-template", tmp_path / "no", *answer)
    prompt.write_bytes(b"{source} \xff")
    assert "is no text in UTF-8" in refused(*base, *template, *answer)
    prompt.write_text("{source} {mt}")
    message = refused(*base, *template, *answer)
    assert "no line has the field 'mt'" in message
    assert "give in --prompt-template another NAME" in message
    prompt.write_text("{source")
    assert f"--prompt-template {prompt}: expected" in refused(*base, *template, *answer)
    plain = tmp_path / "plain.txt"
    plain.write_text("hello\n")
    base[1] = plain
    assert "plain.txt is plain text" in refused(*base, *answer)
