"""Instruction data: what is trained on is the assistant's words, and the end after them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from data_prep import cli
from data_prep.dataset import tokenize
from data_prep.errors import UserError
from data_prep.parts import plan
from data_prep.read import templates
from data_prep.read.chat import Chat, pieces_of
from data_prep.read.templates import load_template

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


# --- the same as transformers ---

LLAMA = """\
{{ bos_token }}{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As Qwen's: calls of tools beside content that may be null or absent.
TOOLS = """\
{%- if tools %}{{ raise_exception('no tools were given') }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- if message.reasoning_content %}{{ '\\n<think>' + message.reasoning_content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n' + (call.function | tojson(sort_keys=true)) }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""
# Prints whatever content is.
PRINTS = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PARTS = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}
{% if 'image' in part or part.type == 'image' %}<|image|>{% elif 'text' in part %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# The end of a turn is marked, and not the line's end after it; what comes before the answer is not.
MARKS = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Less than a turn: not the end, and the tool's words too.
MARKS_OTHERS = """\
{% for message in messages %}{{ '<|im_start|>' }}{{ message.role }}{{ '\\n' }}
{%- if message.role in ('assistant', 'tool') %}
{%- generation -%}{{ message.content }}{%- endgeneration -%}
{%- else %}{{ message.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"""
DATE = "{{ 'Today: ' + strftime_now('%d %b %Y') + '<|im_end|>' }}" + TEMPLATE
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": "Graz <&>", "n": None}},
}
WITH_CALL = [
    {"role": "user", "content": "How warm?", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21", "name": None},
    {"role": "assistant", "content": "21 degrees.", "reasoning": "It said 21."},
]
IN_PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "How warm", "image": None}]},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "21"}, {"type": "text", "text": "!"}],
    },
]


@pytest.fixture(scope="module")
def make_oracle(chat_tokenizer):
    """transformers' tokenizer with a template."""
    from transformers import PreTrainedTokenizerFast

    def make(template: Any) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(chat_tokenizer),
            chat_template=template,
            bos_token="<|endoftext|>",  # noqa: S106
            eos_token="<|im_end|>",  # noqa: S106
        )

    return make


def chat_of(template: Any, folder: Path) -> Chat:
    """As the command makes it of a folder with this template."""
    config = {"chat_template": template, "bos_token": "<|endoftext|>", "add_bos_token": True}
    config["eos_token"] = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_template(folder / "tokenizer.json", None, "2026-11-27")
    return Chat(("messages",), loaded, "<|none|>")


TALKS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "llama": (LLAMA, TALK),
    "calls of tools": (TOOLS, WITH_CALL),
    "parts": (PARTS, IN_PARTS),
    "text, where parts may be": (PARTS, TALK),
    "marks": (MARKS, TALK),
    "marks others": (MARKS_OTHERS, [*TALK, {"role": "tool", "content": "21"}]),
}


def _without_nulls(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{key: value for key, value in part.items() if value is not None} for part in content]


@pytest.mark.parametrize("name", TALKS)
def test_the_text_is_that_of_transformers(make_oracle, tmp_path, name: str) -> None:
    template, talk = TALKS[name]
    pieces, problem = pieces_of([talk], chat_of(template, tmp_path))
    assert problem is None
    text = "".join(text for text, _ in pieces)
    if (
        template is PARTS
    ):  # rows of tables have all keys; transformers takes a null image for an image
        plain = [{**m, "content": _without_nulls(m["content"])} for m in talk]
        assert "<|image|>" not in text
        talk = plain
    oracle = make_oracle(template).apply_chat_template(talk, tokenize=False)
    assert text == oracle.rstrip("\n")
    assert "None" not in text.replace('"n": null', "") and "{'" not in text


@pytest.mark.parametrize("name", ["marks", "marks others"])
def test_what_is_trained_on_is_what_the_template_marks(
    chat_tokenizer, make_oracle, tmp_path, name: str
) -> None:
    """transformers' mask of the assistant's tokens."""
    template, talk = TALKS[name]
    (tmp_path / "tokenizer.json").write_bytes(chat_tokenizer.read_bytes())
    chat_of(template, tmp_path)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n")
    run(file, tmp_path / "tokenizer.json", tmp_path / "out", "--chat-field", "messages")
    oracle = make_oracle(template).apply_chat_template(
        talk, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.fromfile(tmp_path / "out" / "train.bin", "<u2").tolist()
    mask = np.fromfile(tmp_path / "out" / "train.mask", np.uint8).tolist()
    count = len(ids) - 1  # EOD is ours, the last end of a line the template's
    assert ids[:-1] == oracle["input_ids"][:count]
    assert mask[:-1] == oracle["assistant_masks"][:count] and 0 < sum(mask) < count
    # The end of the document is trained on as what is before it.
    assert mask[-1] == mask[-2]


def test_a_conversation_that_begins_with_the_assistant(tmp_path) -> None:
    """transformers' mask goes on to the end where a marked text ends in the first token."""
    talk = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "and B"}]
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.content }}{% endif %}{% endfor %}"
    )
    pieces, _ = pieces_of([talk], chat_of(template, tmp_path))
    assert pieces == [("A", True), ("<|im_start|>and B", False)]


def test_rows_of_tables_are_read_as_json_lines(chat_tokenizer, tmp_path) -> None:
    """In a table all calls have the arguments of all tools, and null for those of others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    talks = []
    for arguments in ({"town": "Graz"}, {"from": "EUR", "to": "USD"}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        talks.append({"messages": [TALK[0], TALK[1], {"role": "assistant", "tool_calls": [call]}]})
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    pq.write_table(pa.Table.from_pylist(talks), table)
    template = tmp_path / "t.jinja"
    template.write_text(TOOLS)
    argv = ["--chat-field", "messages", "--chat-template", str(template)]
    for file in (lines, table):
        run(file, chat_tokenizer, tmp_path / file.suffix, *argv)
    ids = [(tmp_path / end / "train.bin").read_bytes() for end in (".jsonl", ".parquet")]
    assert ids[0] == ids[1]


def test_marks_inside_what_a_template_keeps(tmp_path) -> None:
    """In a macro or in a variable, where transformers counts from the wrong place."""
    template = (
        "{% macro say(m) %}{% generation %}{{ m }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ m.role }}: {% set said = say(m.content) %}"
        "{{ said if m.role == 'assistant' else m.content }};{% endfor %}"
    )
    pieces, _ = pieces_of([TALK], chat_of(template, tmp_path))
    assert [text for text, trained in pieces if trained] == ["Four.", "Yes."]
    assert "".join(text for text, _ in pieces).startswith("system: Be brief.;user: Two")


def test_the_end_that_is_cut_keeps_its_mark(tmp_path) -> None:
    """Where documents end with the template's own end token: EOD is trained on if that was marked."""
    for template, marked in ((MARKS, True), (MARKS_OTHERS, False)):
        chat = Chat(("messages",), chat_of(template, tmp_path).template, "<|im_end|>")
        pieces, _ = pieces_of([TALK], chat)
        assert pieces[-1][1] == marked
        assert "".join(text for text, _ in pieces).endswith("Yes.")


def test_content_in_parts_for_a_template_that_takes_text_alone(tmp_path) -> None:
    as_text = [{**m, "content": "".join(p["text"] for p in m["content"])} for m in IN_PARTS]
    for template in (LLAMA, PRINTS, TEMPLATE):
        chat = chat_of(template, tmp_path)
        assert pieces_of([IN_PARTS], chat) == pieces_of([as_text], chat)
        assert pieces_of([IN_PARTS], chat)[1] is None


def test_messages_that_cannot_be_used(tmp_path) -> None:
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for messages, why in (
        ([user, {"role": "assistant", "content": None}], "content that is null"),
        ([user, {"role": "assistant", "content": None, "tool_calls": []}], "content that is null"),
        ([{"role": "user", "content": [image]}, said], "a part that is no text: 'image_url'"),
        ([{"role": "user", "content": 4}, said], "neither text nor a list of parts"),
        ([{"role": None, "content": "x"}, said], "without role"),
        (["Hi", said], "no object"),
        ([{"from": "human", "value": "x"}, said], "content: it has from, value"),
    ):
        for template in (LLAMA, PRINTS, PARTS):
            assert why in str(pieces_of([messages], chat_of(template, tmp_path))[1])
    marks_nothing = pieces_of([[user]], chat_of(MARKS, tmp_path))
    assert "marks nothing to train on" in str(marks_nothing[1])
    silent = pieces_of([[user, said]], chat_of("{{ '' }}", tmp_path))
    assert "gives the assistant no text" in str(silent[1])


def test_a_template_that_fails_makes_a_bad_line(chat_tokenizer, tmp_path, capsys) -> None:
    """With file and line; the others are used."""
    rows = [
        [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "Yes."}]
        for i in range(9)
    ]
    rows[4] = [
        rows[4][0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": "x"}]},
    ]
    rows[6] = [{"role": "user", "content": "x", "n": 0}, rows[6][1]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content if m.content is defined else "
        "m.tool_calls[0].function + 1 }}{{ 1 // m.n if m.n is defined }}\n{% endfor %}"
    )
    argv = ["--chat-field", "messages", "--chat-template", str(template)]
    manifest = run(file, chat_tokenizer, tmp_path / "out", *argv)
    assert manifest["splits"]["train"]["documents"] == 7
    shown = capsys.readouterr().out
    assert f"{file}: line 5: the chat template: TypeError: " in shown.replace(":5:", ": line 5:")
    assert "ZeroDivisionError" in shown


def test_named_templates(chat_tokenizer, make_oracle, tmp_path, refused, capsys) -> None:
    (tmp_path / "tokenizer.json").write_bytes(chat_tokenizer.read_bytes())
    tools = "{{ raise_exception('tools only') }}"
    named = [{"name": "tool_use", "template": tools}, {"name": "default", "template": TEMPLATE}]
    pieces, _ = pieces_of([TALK], chat_of(named, tmp_path))
    oracle = make_oracle(named).apply_chat_template(TALK, tokenize=False)
    assert "".join(text for text, _ in pieces) == oracle.rstrip("\n")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n")
    tokenizer = tmp_path / "tokenizer.json"
    run(file, tokenizer, tmp_path / "out", "--chat-field", "messages")
    assert "other chat templates: tool_use" in capsys.readouterr().out
    base = ["tokenize", file, "--tokenizer", tokenizer, "--output-dir", tmp_path / "new"]
    base += ["--chat-field", "messages", "--chat-template"]
    assert "tools only" in refused(*base, "tool_use")
    assert "it has default, tool_use" in refused(*base, "rag")
    without = [{"name": "rag", "template": TEMPLATE}, named[0]]
    with pytest.raises(UserError, match=r"none is named default: .* rag, tool_use"):
        chat_of(without, tmp_path)
    with pytest.raises(UserError, match="neither text nor a list"):
        chat_of([{"template": "x"}], tmp_path)
    # In files, as transformers saves several now.
    (tmp_path / "chat_template.jinja").write_text(LLAMA)
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text(MARKS)
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, tokenize=False)
    pieces, _ = pieces_of([TALK], chat_of(named, tmp_path))
    assert "".join(text for text, _ in pieces) == oracle
    assert json.loads(load_template(tokenizer, Path("rag"), ""))[0] == MARKS


def test_a_template_that_asks_for_the_date(
    chat_tokenizer, make_oracle, tmp_path, monkeypatch, capsys
) -> None:
    """One day for the whole data set, though the work is gone on with on another."""
    (tmp_path / "tokenizer.json").write_bytes(chat_tokenizer.read_bytes())
    pieces, _ = pieces_of([TALK], chat_of(DATE, tmp_path))
    assert pieces[0][0].startswith("Today: 27 Nov 2026<|im_end|>")

    class Day:
        now = "2026-11-27"

        @classmethod
        def today(cls) -> "Day":
            return cls()

        def isoformat(self) -> str:
            return self.now

    monkeypatch.setattr(tokenize, "date", Day)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n")
    argv = ["--chat-field", "messages"]
    manifest = run(file, tmp_path / "tokenizer.json", tmp_path / "out", *argv)
    assert json.loads(manifest["options"]["chat"]["template"])[2] == "2026-11-27"
    Day.now = "2026-11-28"
    capsys.readouterr()
    run(file, tmp_path / "tokenizer.json", tmp_path / "out", *argv)
    assert "already done" in capsys.readouterr().out
    rank = [*argv, "--rank", "0", "--world-size", "2"]
    command = ["tokenize", str(file), "--tokenizer", str(tmp_path / "tokenizer.json")]
    command += ["--output-dir", str(tmp_path / "ranks"), *rank]
    assert cli.main(command) == 0
    Day.now = "2026-11-29"
    command[command.index("--rank") + 1] = "1"
    assert cli.main(command) == 0  # the other task comes after midnight
    # The oracle's own clock: the same format gives the same words.
    today = make_oracle(DATE).apply_chat_template(TALK, tokenize=False).split("<|im_end|>")[0]
    from datetime import datetime

    assert today == "Today: " + datetime.now().strftime("%d %b %Y")


TWICE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        TWICE + TEMPLATE,
        "{{ 10 ** (10 ** messages | length) }}" + TEMPLATE,
        "{{ 'a' * (10 ** messages | length) }}" + TEMPLATE,
        "{{ messages | length | string | center(10 ** 10) }}" + TEMPLATE,
        "{% set x = namespace(y='aaaa') %}{% for i in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "RENDER_S", 0.2)
    # The kernel ends the process after RENDER_S + 1 s, and on a busy machine 2 GiB of pages take as long.
    monkeypatch.setattr(templates, "MEMORY", 256 << 20)
    chat = Chat(("messages",), json.dumps([template, {}]), "")
    with pytest.raises(UserError, match="the chat template takes more than"):
        pieces_of([TALK * 2], chat)
    pieces, problem = pieces_of([TALK], Chat(("messages",), json.dumps([TEMPLATE, {}]), ""))
    assert problem is None and pieces


def test_a_text_that_is_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MOST_CHARACTERS", 100)
    chat = Chat(("messages",), json.dumps([TEMPLATE + "{{ 'a' * 99 }}", {}]), "")
    assert pieces_of([TALK], chat) == ([], "the chat template: it writes more than 100 characters")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ 9 ** (9 ** 9) }}", "takes more than"),  # constants are computed when it is compiled
        ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "is not valid: too many"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is not valid: maximum recursion"),
        ("{% if %}", "is not valid: "),
    ],
)
def test_a_template_that_cannot_be_compiled(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_S", 0.2)
    file = tmp_path / "template.jinja"
    file.write_text(source)
    with pytest.raises(UserError, match=says):
        load_template(tmp_path / "tokenizer.json", file, "2026-11-27")


def test_files_of_a_template_that_are_something_else(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    for text, says in (
        ("[1]", "is no object of JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"chat_template": 5}', "neither text nor a list"),
        ('{"chat_template": [{"name": "default", "template": 5}]}', "neither text nor a list"),
        ('{"chat_template": {"default": [1]}}', "neither text nor a list"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=says):
            load_template(tmp_path / "tokenizer.json", None, "2026-11-27")
    config.write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        load_template(tmp_path / "tokenizer.json", None, "2026-11-27")
