"""Instruction data: what is trained on is the assistant's words, and the end after them."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_prep import cli
from data_prep.parts import plan
from data_prep.read.chat import Chat, pieces_of

TEMPLATE = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def chat_tokenizer(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    model = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    model.train_from_iterator(texts, vocab_size=400, special_tokens=special)
    model.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def run(source: Path, tokenizer: Path, out: Path, *options: str) -> dict:
    argv = ["tokenize", str(source), "--tokenizer", str(tokenizer), "--output-dir", str(out)]
    assert cli.main([*argv, "--validation-fraction", "0", *options]) == 0
    return json.loads((out / "manifest.json").read_text())


def trained_text(out: Path, tokenizer: Path, dtype: str = "<u2") -> list[str]:
    """Of each document, the tokens that are trained on, decoded."""
    ids = np.fromfile(out / "train.bin", dtype)
    mask = np.fromfile(out / "train.mask", np.uint8)
    assert len(ids) == len(mask)
    model = tokenizers.Tokenizer.from_file(str(tokenizer))
    eod = model.token_to_id("<|endoftext|>")
    ends = np.flatnonzero(ids == eod) + 1
    return [
        model.decode(i[m == 1].tolist(), skip_special_tokens=False)
        for i, m in zip(np.split(ids, ends)[:-1], np.split(mask, ends)[:-1], strict=True)
    ]


def test_the_assistants_turns_are_trained_on(chat_tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "SMALLEST_BYTES", 1000)
    unfinished = [*TALK, {"role": "user", "content": "Thanks"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in [TALK, unfinished] * 10))
    out = tmp_path / "out"
    manifest = run(file, chat_tokenizer, out, "--chat-field", "messages", "--workers", "2")
    turns = "Four.<|im_end|>\nYes.<|im_end|>"
    # The end is trained on after the assistant's last word, and not after the user's.
    expected = [turns + "<|endoftext|>", turns + "\n"] * 10
    assert trained_text(out, chat_tokenizer) == expected
    facts = manifest["splits"]["train"]
    assert facts["mask_bytes"] == facts["tokens"] == (out / "train.mask").stat().st_size
    assert facts["trained_tokens"] == np.fromfile(out / "train.mask", np.uint8).sum()
    model = tokenizers.Tokenizer.from_file(str(chat_tokenizer))
    ids = np.fromfile(out / "train.bin", "<u2")
    first = ids[: np.flatnonzero(ids == model.token_to_id("<|endoftext|>"))[0]].tolist()
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert model.decode(first, skip_special_tokens=False) == whole.rstrip("\n")


def test_pieces_of_a_conversation() -> None:
    chat = Chat(("messages",), json.dumps([TEMPLATE, {}]), "<|endoftext|>")
    pieces, problem = pieces_of([TALK], chat)
    assert problem is None
    assert [text for text, trained in pieces if trained] == [
        "Four.<|im_end|>\n",
        "Yes.<|im_end|>",
    ]
    assert pieces[0][0].endswith("<|im_start|>assistant\n") and not pieces[0][1]
    own_end = Chat(("messages",), json.dumps([TEMPLATE, {}]), "<|im_end|>")
    assert pieces_of([TALK], own_end)[0][-1] == ("Yes.", True)  # EOD comes by itself
    for bad, why in (
        ("hello", "no list of messages"),
        ([{"role": "user"}], "without role or content"),
        (TALK[:2], "no message of the assistant"),
    ):
        assert why in str(pieces_of([bad], chat)[1])
    forgetful = "{{ messages[-1]['content'] }}"
    changed = pieces_of([TALK], Chat(("messages",), json.dumps([forgetful, {}]), ""))
    assert "changes the text of a turn when other turns follow" in str(changed[1])
    refusing = "{{ raise_exception('roles must alternate') }}"
    refused = pieces_of([TALK], Chat(("messages",), json.dumps([refusing, {}]), ""))
    assert "roles must alternate" in str(refused[1])
    prying = "{{ ''.__class__.__mro__ }}"
    assert pieces_of([TALK], Chat(("messages",), json.dumps([prying, {}]), ""))[1]


def test_prompt_and_answer(chat_tokenizer, tokenizer, tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": "Two plus two? ", "answer": "Four."}, {"text": "Sure? ", "answer": "Yes."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(file, chat_tokenizer, tmp_path / "out", "--answer-field", "answer")
    assert trained_text(tmp_path / "out", chat_tokenizer) == [
        "Four.<|endoftext|>",
        "Yes.<|endoftext|>",
    ]
    run(file, tokenizer, tmp_path / "sp", "--answer-field", "answer")  # SentencePiece can do it
    mask = np.fromfile(tmp_path / "sp" / "train.mask", np.uint8)
    assert 0 < mask.sum() < len(mask) and mask[-1] == 1


def test_what_cannot_be_meant(chat_tokenizer, tokenizer, jsonl, tmp_path, refused) -> None:
    base = ["tokenize", jsonl, "--output-dir", tmp_path / "out", "--tokenizer"]
    assert "needs a tokenizer.json" in refused(*base, tokenizer, "--chat-field", "messages")
    assert "not both" in refused(
        *base, chat_tokenizer, "--chat-field", "messages", "--answer-field", "x"
    )
    assert "needs --chat-field" in refused(*base, chat_tokenizer, "--chat-template", "x")
    no = tmp_path / "tokenizer.json"
    no.write_bytes(chat_tokenizer.read_bytes())
    assert "has no chat template beside it" in refused(*base, no, "--chat-field", "messages")
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    message = refused(*base, chat_tokenizer, "--chat-field", "messages", "--chat-template", broken)
    assert "is not valid" in message
    message = refused(*base, chat_tokenizer, "--chat-field", "messages")
    assert "lines has the field 'messages'; they have id, text: give --chat-field NAME" in message
