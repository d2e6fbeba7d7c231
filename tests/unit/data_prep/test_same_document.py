"""The same documents give the same tokens, however their files are written."""

import bz2
import gzip
import io
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.dataset.shards import read_document
from data_prep.parts.plan import plan_parts
from data_prep.read.documents import read_segment
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import find_sources
from tests.unit.data_prep.conftest import hugging_face

Way = Callable[[list[str]], bytes]
BOM = "\ufeff".encode()


def lines(docs: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in docs).encode()


def in_utf8(docs: list[str]) -> bytes:
    return "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in docs).encode()


def with_nan(docs: list[str]) -> bytes:
    """Python writes what is no JSON."""
    scores = (math.nan, math.inf, -math.inf, 0.5)
    rows = [{"score": scores[i % 4], "text": text} for i, text in enumerate(docs)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def with_half_a_character(docs: list[str]) -> bytes:
    """In a field that is not the text."""
    return "".join(json.dumps({"title": "\ud83d", "text": text}) + "\n" for text in docs).encode()


def nulls_first(docs: list[str]) -> bytes:
    return b'{"url": "u", "text": null}\n' * 200 + lines(docs)


def absent_first(docs: list[str]) -> bytes:
    """As Spark leaves nulls out; fewer than --max-bad-lines."""
    return b'{"url": "u"}\n' * 50 + lines(docs)


def array(docs: list[str]) -> bytes:
    return json.dumps([{"text": text, "tags": [1, {"a": []}]} for text in docs]).encode()


def printed(docs: list[str]) -> bytes:
    return json.dumps([{"text": text, "tags": ["]", "}"]} for text in docs], indent=2).encode()


def rows(docs: list[str]) -> bytes:
    """An array whose last line alone would be a line of JSON."""
    return ("[\n" + ",\n".join(json.dumps({"text": text}) for text in docs) + "\n]").encode()


def objects(docs: list[str]) -> bytes:
    """As jq prints them."""
    return "".join(json.dumps({"text": text}, indent=2) + "\n" for text in docs).encode()


def crlf(way: Way) -> Way:
    return lambda docs: way(docs).replace(b"\n", b"\r\n")


def marked(way: Way) -> Way:
    return lambda docs: BOM + way(docs)


def one_by_one(way: Way) -> Way:
    """Files put one behind the other, each with its byte order mark."""
    return lambda docs: b"".join(marked(way)([text]) for text in docs)


def packed(way: Way, pack: Callable[[bytes], bytes], padding: int = 0) -> Way:
    """In two members, with zeros behind each."""

    def write(docs: list[str]) -> bytes:
        raw = way(docs)
        middle = len(raw) // 2
        zeros = b"\0" * padding
        return pack(raw[:middle]) + zeros + pack(raw[middle:]) + zeros

    return write


def table(kind: pa.DataType, *, encoded: bool = False) -> Callable[[list[str]], pa.Table]:
    def make(docs: list[str]) -> pa.Table:
        values: list = docs
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            values = [text.encode() for text in docs]
        column = pa.array(values, kind)
        return pa.table({"text": column.dictionary_encode() if encoded else column})

    return make


def parquet(make: Callable[[list[str]], pa.Table]) -> Way:
    def write(docs: list[str]) -> bytes:
        out = io.BytesIO()
        pq.write_table(make(docs), out, row_group_size=2)
        return out.getvalue()

    return write


def arrow(make: Callable[[list[str]], pa.Table], writer: Callable) -> Way:
    def write(docs: list[str]) -> bytes:
        out, data = io.BytesIO(), make(docs)
        with writer(out, data.schema) as file:
            file.write_table(data, max_chunksize=2)
        return out.getvalue()

    return write


OF_RECORDS: dict[str, Way] = {
    "a.jsonl": lines,
    "utf8.ndjson": in_utf8,
    "CAPITALS.JSONL": lines,
    "crlf.jsonl": crlf(lines),
    "mark.jsonl": marked(lines),
    "marks.jsonl": one_by_one(lines),
    "nan.jsonl": with_nan,
    "half.jsonl": with_half_a_character,
    "nulls.jsonl": nulls_first,
    "absent.jsonl": absent_first,
    "array.json": array,
    "array-mark.json": marked(array),
    "printed.json": printed,
    "printed-crlf.json": crlf(printed),
    "rows.json": rows,
    "objects.json": objects,
    "objects-crlf-mark.json": marked(crlf(objects)),
    "a.jsonl.gz": packed(lines, gzip.compress),
    "zeros.jsonl.gz": packed(lines, gzip.compress, 1536),
    "array.json.gz": packed(printed, gzip.compress),
    "a.jsonl.zst": packed(lines, zstandard.compress),
    "array.json.zstd": packed(array, zstandard.compress),
    "a.jsonl.bz2": packed(lines, bz2.compress),
    "a.jsonl.xz": packed(lines, lzma.compress, 8),
    "a.parquet": parquet(table(pa.string())),
    "large.parquet": parquet(table(pa.large_string())),
    "bytes.parquet": parquet(table(pa.binary())),
    "large-bytes.parquet": parquet(table(pa.large_binary())),
    "encoded.parquet": parquet(table(pa.string(), encoded=True)),
    "encoded-bytes.parquet": parquet(table(pa.binary(), encoded=True)),
    "stream.arrow": arrow(table(pa.string()), pa.ipc.new_stream),
    "file.arrow": arrow(table(pa.binary()), pa.ipc.new_file),
}


def plain(docs: list[str]) -> bytes:
    return "".join(text + "\n" for text in docs).encode()


OF_LINES: dict[str, Way] = {
    "a.txt": plain,
    "crlf.txt": crlf(plain),
    "mark.txt": marked(crlf(plain)),
    "a.TXT.GZ": packed(crlf(plain), gzip.compress, 512),
    "a.text.xz": packed(plain, lzma.compress),
    "a.txt.zst": packed(marked(plain), zstandard.compress),
}

# Any characters of UTF-8, and often those that files are made of.
ANY = st.text(st.characters(codec="utf-8") | st.sampled_from('\n\r\t"\\{}[], \u2028\x85\ufeff'))
# In a plain text file a document has no characters that end a line there, or that make it binary.
IN_A_LINE = ANY.map(lambda text: "".join(c for c in text if c not in "\n\r\0").lstrip("\ufeff"))


def read(file: Path, content: bytes, part_bytes: int, **reading: object) -> list[str]:
    """The documents of a file that is cut into parts, without the empty ones."""
    file.write_bytes(content)
    bad = BadLines(50 if file.name == "absent.jsonl" else 0)
    found = []
    for part in plan_parts(
        find_sources((file,)), reading.get("text_documents", "file"), part_bytes
    ):
        for segment in part.segments:
            for texts in read_segment(segment, Reading(**reading), bad, lambda _: None):
                found += texts
    return [text for text in found if text]


@pytest.mark.parametrize("name", OF_RECORDS)
@given(docs=st.lists(ANY.filter(bool), min_size=1, max_size=6), part_bytes=st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_records(name: str, docs: list[str], part_bytes: int, tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("file") / name
    assert read(file, OF_RECORDS[name](docs), part_bytes) == docs


@pytest.mark.parametrize("name", OF_LINES)
@given(docs=st.lists(IN_A_LINE.filter(bool), min_size=1, max_size=6), part_bytes=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_plain_text(name: str, docs: list[str], part_bytes: int, tmp_path_factory) -> None:
    """By lines; all of them as one document; and as paragraphs, with an empty line between them."""
    file, way = tmp_path_factory.mktemp("file") / name, OF_LINES[name]
    assert read(file, way(docs), part_bytes, text_documents="line") == docs
    assert read(file, way(docs), part_bytes) == ["".join(text + "\n" for text in docs)]
    # White space of other kinds makes no empty line in bytes: bytes.strip knows ASCII's alone.
    solid = [text for text in docs if text.encode().strip()]
    between = [line for text in solid for line in (text, "")]
    found = read(file, way(between), part_bytes, text_documents="paragraph")
    assert found == [text + "\n" for text in solid]


def test_tokens(texts: list[str], tmp_path: Path) -> None:
    """Through the command, against the tokenizer's own library."""
    model = hugging_face(tmp_path / "tokenizer.json")
    reference = tokenizers.Tokenizer.from_file(str(model))
    eod = reference.token_to_id("<|endoftext|>")
    in_lines = [text.replace("\n", " ") for text in texts]
    for kind, docs, ways in (("file", texts, OF_RECORDS), ("line", in_lines, OF_LINES)):
        folder, out = tmp_path / kind, tmp_path / f"{kind}.out"
        folder.mkdir()
        for name, way in ways.items():
            (folder / name).write_bytes(way(docs))
        argv = ["tokenize", folder, "--tokenizer", model, "--output-dir", out, "--workers", 1]
        argv += ["--text-documents", kind, "--validation-fraction", 0, "--engine", "reference"]
        assert cli.main([str(a) for a in argv]) == 0
        facts = json.loads((out / "manifest.json").read_text())
        counts = {Path(one["path"]).name: one["documents"] for one in facts["sources"]}
        assert counts == dict.fromkeys(ways, len(docs))
        wanted = [[*reference.encode(text).ids, eod] for text in docs]
        count = facts["splits"]["train"]["documents"]
        found = [read_document(out / "train", n, facts["dtype"], count) for n in range(count)]
        for number, name in enumerate(counts):
            ids = found[number * len(docs) : (number + 1) * len(docs)]
            assert [one.tolist() for one in ids] == wanted, name
