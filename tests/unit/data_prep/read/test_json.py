"""JSON that is not an object a line. That it gives the same documents: test_same_document.py."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.read.documents import read_documents
from data_prep.read.json_values import JsonValues, shape_of
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import find_sources

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},\n é\ud83d'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('a"]}\\'), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(VALUES, max_size=6),
    st.lists(st.dictionaries(st.text('a{"'), VALUES, max_size=2), max_size=6),
    st.sampled_from([None, 0, 2]),
    st.lists(st.integers(1, 200), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_values_wherever_chunks_end(
    elements: list, objects: list[dict], indent: int | None, cuts: list[int]
) -> None:
    """Against json, which wrote them."""
    one_by_one = "\n ".join(json.dumps(o, indent=indent) for o in objects)
    for array, text, wanted in (
        (True, " " + json.dumps(elements, indent=indent) + "\n after", elements),
        (False, one_by_one + "\n", objects),
    ):
        data = text.encode()
        edges = [0, *sorted({c for c in cuts if c < len(data)}), len(data)]
        cut = JsonValues(array=array, longest=10_000)
        found: list[bytes | None] = []
        rest = b""
        for begin, end in itertools.pairwise(edges):
            if cut.ended:
                rest += data[begin:end]
            else:
                values, after = cut.feed(data[begin:end])
                found += values
                rest += after
        assert [json.loads(value or b"") for value in found] == wanted
        assert rest == (b"\n after" if array else b"")
        if array:
            assert cut.newlines == text.removesuffix("\n after").count("\n")


def test_shapes() -> None:
    for head, shape in {
        b'{"text": "a"}\n{"text": "b"}\n': "lines",
        b"": "lines",
        b'{\n{"text": "b"}\n': "lines",  # a line that was cut short
        b'{\n  "text": "a"\n}': "objects",
        b'\xef\xbb\xbf\r\n{ \r\n"text": "a"': "objects",
        b"{\n}\n": "objects",
        b' \n [\n{"text"': "array",
    }.items():
        assert shape_of(head) == shape, head


def read(path: Path, content: str, bad: BadLines, **reading: object) -> list[str]:
    path.write_text(content)
    (source,) = find_sources((path,))
    return list(read_documents(source, Reading(**reading), bad, lambda _: None))


def test_what_is_wrong_in_an_array_is_named(tmp_path) -> None:
    path, bad = tmp_path / "a.json", BadLines(10)
    rows = ['{"text": "one"}', "5", '{"text": "%s"}' % ("x" * 200), '{"text": 5}', "{x}", ""]
    content = "[\n" + ",\n".join([*rows, '{"text": "two"}']) + '\n]\n{"text": "three"}\n{y}\n'
    assert read(path, content, bad, max_document_bytes=100) == ["one", "two", "three"]
    assert bad.examples == [
        f"{path}: value 3: a value of more than --max-document-bytes 100",
        f"{path}: value 2: not a JSON object",
        f"{path}: value 4: field 'text' is no string",
        f"{path}: value 5: not JSON: unexpected character, expected a string key: "
        "line 1 column 2 (char 1)",
        f"{path}:{len(content.splitlines())}: not JSON: unexpected character, expected a string key: "
        "line 1 column 2 (char 1)",
    ]


def test_json_that_is_cut_short(tmp_path) -> None:
    """What is there is used, and then the file is named."""
    path = tmp_path / "a.json"
    whole = json.dumps([{"text": "one"}, {"text": "two"}], indent=1)
    for content in (whole[:-2], whole[:-20], whole.replace("[", "", 1).replace(",", "\n")[:-20]):
        path.write_text(content)
        (source,) = find_sources((path,))
        found: list[str] = []
        texts = read_documents(source, Reading(), BadLines(0), lambda _: None)
        with pytest.raises(UserError, match="is cut short: its JSON has no end"):
            found.extend(texts)
        assert found == ["one"], content


def test_a_broken_first_line_stays_one_bad_line(tmp_path) -> None:
    bad = BadLines(1)
    assert read(tmp_path / "a.jsonl", '{\n{"text": "one"}\n{"text": "two"}\n', bad) == [
        "one",
        "two",
    ]
    assert bad.count == 1


def test_what_python_reads_and_other_parsers_refuse(tmp_path) -> None:
    """Numbers that are none, and a tab as it is in a string. What Python refuses is a bad line."""
    bad = BadLines(3)
    content = '{"text": "one", "n": [NaN, -Infinity, 1e999]}\n{"text": "a\tb"}\n{"text": "x" "y"}\n'
    digits, deep = "9" * 5000, "[" * 5000 + "NaN" + "]" * 5000
    content += f'{{"n": {digits}, "text": ""}}\n{{"n": {deep}}}\n'
    assert read(tmp_path / "a.jsonl", content, bad) == ["one", "a\tb"]
    assert [example.split(": ")[0].rsplit(":")[-1] for example in bad.examples] == ["3", "4", "5"]


def test_what_follows_the_last_object_is_a_bad_line(tmp_path) -> None:
    path, bad = tmp_path / "a.json", BadLines(1)
    assert read(path, '{\n "text": "one"\n}\njunk\n', bad) == ["one"]
    assert bad.examples[0].startswith(f"{path}: value 2: not JSON: ")
    bad = BadLines(1)
    assert read(path, '{\n "text": "one"\n} junk {\n "text": "two"\n}\n', bad) == ["one"]
    assert bad.count == 1


def test_a_field_that_is_there_once_has_the_right_name(tmp_path) -> None:
    """Whatever it holds: other lines without it are bad lines, and nobody asks for another name."""
    path = tmp_path / "a.jsonl"
    for first in ('{"text": null}', '{"text": 5}', '{"text": "one"}'):
        content = f"{first}\n" + '{"other": 1}\n' * 20
        bad = BadLines(100)
        assert len(read(path, content, bad)) + bad.count == 21
        with pytest.raises(UserError, match="more than --max-bad-lines 12 lines cannot be used"):
            read(path, content, BadLines(12))
    for others in (3, 20):
        with pytest.raises(UserError, match="no line has the field 'text'; they have other"):
            read(path, '{"other": 1}\n' * others, BadLines(100))
    with pytest.raises(UserError, match="none of the first 13 lines has the field 'text'"):
        read(path, '{"other": 1}\n' * 20, BadLines(12))
    with pytest.raises(UserError, match="more than --max-bad-lines 2 lines"):  # too few to say
        read(path, '{"other": 1}\n' * 20, BadLines(2))
