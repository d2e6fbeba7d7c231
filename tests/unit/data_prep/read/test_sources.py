"""Where text may lie, and what is wrong with it."""

import bz2
import gzip
import http.server
import json
import lzma
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import cli
from data_prep.parts import plan, pool
from data_prep.parts.plan import plan_parts
from data_prep.read.parquet import read_rows
from data_prep.read.reading import BadLines, Reading
from data_prep.read.records import in_utf8
from data_prep.read.sources import find_sources

Serve = Callable[..., str]


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


@pytest.fixture
def tokenize(tokenizer: Path, tmp_path: Path, capsys) -> Callable[..., tuple[int, str, dict]]:
    """Runs it; returns the status, what was printed, and the manifest."""

    def run(*inputs: object, options: tuple = (), out: str = "out") -> tuple[int, str, dict]:
        argv = ["tokenize", *inputs, "--tokenizer", tokenizer, "--output-dir", tmp_path / out]
        argv += ["--validation-fraction", 0, "--workers", 1, *options]
        status = cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        manifest = tmp_path / out / "manifest.json"
        facts = json.loads(manifest.read_text()) if manifest.is_file() else {}
        return status, " ".join((captured.out + captured.err).split()), facts

    return run


class Handler(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes]
    ranges: bool
    failures: int  # of GET, before it works
    asked: list[str]

    def _reply(self, body: bool) -> None:
        data = self.files.get(self.path)
        kind = type(self)
        if body:
            kind.asked.append(self.headers.get("Range", ""))
        if data is None or (body and kind.failures > 0):
            kind.failures -= data is not None
            self.send_error(404 if data is None else 500)
            return
        wanted = self.headers.get("Range", "")
        if self.ranges and wanted.startswith("bytes="):
            first, last = wanted.removeprefix("bytes=").split("-")
            some = data[int(first) : int(last or len(data)) + 1]
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {first}-{int(first) + len(some) - 1}/{len(data)}"
            )
            data = some
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_GET(self) -> None:
        self._reply(True)

    def do_HEAD(self) -> None:
        self._reply(False)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers = []

    def start(files: dict[str, bytes], *, ranges: bool = True, failures: int = 0) -> str:
        kind = type(
            "H", (Handler,), {"files": files, "ranges": ranges, "failures": failures, "asked": []}
        )
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_files_on_the_web(jsonl, tokenize, serve, tmp_path, monkeypatch) -> None:
    raw = jsonl.read_bytes()
    files = {"/a.jsonl": raw, "/b.jsonl.gz": gzip.compress(raw)}
    status, _, expected = tokenize(jsonl, out="local")
    assert status == 0
    monkeypatch.setattr(plan, "SMALLEST_BYTES", 3000)  # more than one part
    table = tmp_path / "c.parquet"
    texts = [json.loads(row)["text"] for row in raw.splitlines()]
    pq.write_table(pa.table({"text": texts}), table, row_group_size=50)
    files["/c.parquet"] = table.read_bytes()
    for number, (name, ranges) in enumerate(
        [("a.jsonl", True), ("a.jsonl", False), ("b.jsonl.gz", False), ("c.parquet", True)]
    ):
        url = f"{serve(files, ranges=ranges)}/{name}"
        (source,) = find_sources((url,))
        assert source.path == url
        assert (len(plan_parts([source], "file")) > 1) == (name == "c.parquet")
        status, output, manifest = tokenize(url, out=f"web{number}")
        assert status == 0, output
        for split in manifest["splits"].values():
            split.pop("parts")
        expected["splits"]["train"].pop("parts", None)
        assert manifest["splits"] == expected["splits"]


def test_a_web_server_that_fails_now_and_then(jsonl, tokenize, serve, monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(pool.time, "sleep", waits.append)
    monkeypatch.setattr(pool, "REMOTE_ATTEMPTS", 20)
    url = serve({"/a.jsonl": jsonl.read_bytes()}, failures=6) + "/a.jsonl"
    status, output, _ = tokenize(url)
    assert status == 0, output
    assert waits == sorted(waits) and len(waits) >= 1
    monkeypatch.setattr(pool, "REMOTE_ATTEMPTS", 3)
    url = serve({"/a.jsonl": jsonl.read_bytes()}, failures=1000) + "/a.jsonl"
    status, output, _ = tokenize(url, out="never")
    assert status == 2
    assert f"{url} cannot be read, tried 3 times" in output


def test_object_stores(jsonl, tokenize, tokenizer) -> None:
    """fsspec's own store in memory stands for the others."""
    memory = fsspec.filesystem("memory")
    lines = jsonl.read_bytes().splitlines(True)
    memory.pipe("/bucket/raw/0.jsonl", b"".join(lines[:50]))
    memory.pipe("/bucket/raw/1.jsonl", b"".join(lines[50:]))
    memory.pipe("/bucket/raw/readme.md", b"no")
    for number, url in enumerate(("memory://bucket/raw", "memory://bucket/raw/*.jsonl")):
        status, output, manifest = tokenize(url, out=str(number))
        assert status == 0, output
        assert [s["documents"] for s in manifest["sources"]] == [50, 150]
    status, output, _ = tokenize("memory://bucket/none.jsonl", out="none")
    assert status == 2 and "memory://bucket/none.jsonl does not exist" in output
    for protocol, extra in (("s3", "s3"), ("gs", "gcs")):
        status, output, _ = tokenize(f"{protocol}://bucket/a.jsonl", out="no")
        assert status == 2
        assert f"pip install 'megatron-ladder[{extra}]'" in output
    status, output, _ = tokenize("nowhere://bucket/a.jsonl", out="no")
    assert status == 2 and "nowhere" in output


def test_inputs_that_cannot_be_meant(tokenize, jsonl, tmp_path) -> None:
    status, output, _ = tokenize(jsonl, jsonl)
    assert status == 2 and "is given twice" in output
    status, output, _ = tokenize(f"{tmp_path}/*.none")
    assert status == 2 and "no file matches" in output
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    status, output, _ = tokenize(folder)
    assert status == 2 and f"splits train, test: give {folder}/SPLIT" in output
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n[{"text": "x"}]\n')
    status, output, _ = tokenize(tmp_path / "a.jsonl", options=("--max-bad-lines", 0))
    assert status == 2 and "one object a line is needed" in output


def test_several_and_nested_fields(tokenize, tokenizer, tmp_path, capsys) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"title": "One", "doc": {"body": "first"}}, {"title": "Two", "doc": {"body": "second"}}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, output, manifest = tokenize(file, options=("--text-field", "title", "doc.body"))
    assert status == 0, output
    assert cli.main(["inspect", str(tmp_path / "out"), "--document", "1"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("Two\n\nsecond")
    assert manifest["options"]["text_field"] == ["title", "doc.body"]
    dotted = tmp_path / "b.jsonl"  # a key that has the dot in it goes first
    dotted.write_text(json.dumps({"doc.body": "flat", "doc": {"body": "deep"}}) + "\n")
    status, _, manifest = tokenize(dotted, options=("--text-field", "doc.body"), out="b")
    assert status == 0 and manifest["splits"]["train"]["text_bytes"] == len("flat")
    status, output, _ = tokenize(file, options=("--text-field", "doc.title"), out="c")
    assert status == 2 and "no line has the field 'doc.title'; they have doc, title" in output


def test_a_line_that_is_too_long_is_named_and_not_held_in_memory(tokenize, tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line("one") + line("x" * 5000) + line("two"))
    limit = ("--max-document-bytes", 1000)
    status, output, manifest = tokenize(file, options=limit)
    assert status == 0
    assert f"{file}:2: a line of more than --max-document-bytes 1,000" in output
    assert manifest["splits"]["train"]["documents"] == 2
    text = tmp_path / "b.txt"
    text.write_text("word " * 1000)
    status, output, _ = tokenize(text, options=(*limit, "--max-bad-lines", 0), out="b")
    assert status == 2 and "5,000 bytes, more than --max-document-bytes 1,000" in output
    long = tmp_path / "c.txt"
    long.write_text("short\n\n" + "word\n" * 1000 + "\nlast\n")
    paragraphs = (*limit, "--text-documents", "paragraph")
    status, output, manifest = tokenize(long, options=paragraphs, out="c")
    assert status == 0 and f"{long}:3: a paragraph of 5,000 bytes" in output
    assert manifest["splits"]["train"]["documents"] == 2
    table = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["ok", "x" * 5000]}), table)
    status, output, _ = tokenize(table, options=limit, out="d")
    assert status == 0 and f"{table}: row 2: longer than --max-document-bytes 1,000" in output


def test_a_gigabyte_without_a_line_end_takes_little_memory(tmp_path) -> None:
    """Read as it is by the readers: 300 MB of zeros, packed into 300 KB."""
    import subprocess
    import sys

    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wb", 1) as out:
        out.write(line("one").encode())
        for _ in range(300):
            out.write(b"0" * 1_000_000)
        out.write(b"\n" + line("two").encode())
    code = """
import sys
from data_prep.read.documents import read_documents
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import find_sources
from data_prep.parts.pool import peak_memory
(source,) = find_sources((sys.argv[1],))
bad, before = BadLines(1), peak_memory()
print(list(read_documents(source, Reading(), bad, lambda _: None)), bad.examples)
assert peak_memory() - before < 80e6, peak_memory() - before
"""
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "['one', 'two']" in done.stdout and f"{file}:2: a line of more than" in done.stdout


def test_what_is_not_utf8(tokenize, tmp_path, capsys) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(line("one").encode() + b'{"text": "caf\xe9"}\n')
    status, output, manifest = tokenize(file)
    assert status == 0 and f"{file}:2: not UTF-8" in output
    assert manifest["splits"]["train"]["documents"] == 1
    status, output, manifest = tokenize(file, options=("--invalid-utf8", "replace"), out="b")
    assert status == 0 and "1 documents with invalid UTF-8, replaced by U+FFFD" in output
    assert cli.main(["inspect", str(tmp_path / "b"), "--document", "1"]) == 0
    assert "caf\ufffd" in capsys.readouterr().out
    status, output, _ = tokenize(file, options=("--invalid-utf8", "stop"), out="c")
    assert status == 2 and f"{file}:2: not UTF-8" in output and "replace or skip" in output


@pytest.fixture
def damaged(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "damaged"
    folder.mkdir()
    packed = gzip.compress("".join(line(f"text {i * 7919}") for i in range(3000)).encode())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    good = folder / "good.parquet"
    pq.write_table(pa.table({"text": [f"row {i * 7919}" for i in range(3000)]}), good)
    (folder / "cut.parquet").write_bytes(good.read_bytes()[:-2000])
    return {path.name: path for path in folder.iterdir()}


def test_a_damaged_file_does_not_lose_the_others(damaged, tokenize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "SMALLEST_BYTES", 1)  # a part for each file
    folder = next(iter(damaged.values())).parent
    status, output, manifest = tokenize(folder)
    assert status == 2 and not manifest
    assert "2 parts of the input could not be used, 1 could and are kept" in output
    assert f"{damaged['cut.jsonl.gz']} is cut short" in output
    assert f"{damaged['cut.parquet']} is damaged" in output
    assert len(list((tmp_path / ".out.tmp" / "parts").glob("*.json"))) == 1
    # With what can be read of them.
    status, output, manifest = tokenize(folder, options=("--bad-files", "skip"), out="skip")
    assert status == 0
    assert "2 files could not be read to their end" in output
    by_name = {Path(s["path"]).name: s for s in manifest["sources"]}
    assert by_name["good.parquet"]["documents"] == 3000
    assert 0 < by_name["cut.jsonl.gz"]["documents"] < 3000
    assert "is cut short" in by_name["cut.jsonl.gz"]["error"]
    # Mended, the same command goes on with what is left.
    damaged["cut.jsonl.gz"].write_bytes(gzip.compress(line("mended").encode()))
    damaged["cut.parquet"].write_bytes(damaged["good.parquet"].read_bytes())
    status, output, manifest = tokenize(folder)
    assert status == 0 and "(1 of 3 parts were done before)" in output
    assert manifest["splits"]["train"]["documents"] == 6001


def test_parquet_without_the_column(tokenize, tmp_path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["x"], "id": [None]}), file)
    status, output, _ = tokenize(file)
    assert status == 2 and "no column is named 'text'; it has content, id" in output
    pq.write_table(pa.table({"text": ["x", None]}), file)
    status, output, _ = tokenize(file)
    assert status == 0 and "1 empty documents left out" in output
    pq.write_table(pa.table({"text": [1, 2]}), file)
    status, output, _ = tokenize(file, out="numbers")
    assert status == 2 and "row 1: field 'text' is no string" in output


def test_an_input_that_was_edited_is_not_taken_for_done(tokenize, tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line("one"))
    assert tokenize(file)[0] == 0
    assert "already done" in tokenize(file)[1]
    file.write_text(line("two"))  # as long
    status, output, _ = tokenize(file)
    assert status == 2 and f"({file} has changed since)" in output


def test_an_output_inside_the_input(tokenize, tmp_path, jsonl) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl.read_bytes())
    status, output, _ = tokenize(tmp_path)
    assert status == 2 and "lies in the input folder" in output


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder as people have it."""
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    raw = line("one").encode()
    (folder / "a.jsonl").write_bytes(raw)
    (folder / "B.JSONL").write_bytes(raw)
    (folder / "deep" / "c.jsonl.xz").write_bytes(lzma.compress(raw))
    (folder / "deep" / "d.txt.BZ2").write_bytes(bz2.compress(b"two"))
    for name in ("e.7z", "f.7z", "g.csv", "h.jsonl.lz4", "_SUCCESS", "README.md"):
        (folder / name).write_bytes(b"seven..")
    (folder / "deep" / "._a.jsonl").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "gone.jsonl").symlink_to(folder / "nothing")
    (folder / "itself.jsonl").symlink_to(folder / "itself.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    return folder


NOT_READ = [
    {"named": "*.7z", "files": 2, "bytes": 14},
    {"named": "broken links", "files": 2, "bytes": 0},
    {"named": "*.csv", "files": 1, "bytes": 7},
    {"named": "*.lz4", "files": 1, "bytes": 7},
    {"named": "*.md", "files": 1, "bytes": 7},
    {"named": "._*", "files": 1, "bytes": 16},
    {"named": "links to folders", "files": 1, "bytes": 0},
    {"named": "without an ending", "files": 1, "bytes": 7},
]


def test_what_is_left_out_of_a_folder_is_named(mixed, tokenize) -> None:
    status, output, manifest = tokenize(mixed)
    assert status == 0
    read = [Path(source["path"]).name for source in manifest["sources"]]
    assert read == ["B.JSONL", "a.jsonl", "c.jsonl.xz", "d.txt.BZ2"]
    assert manifest["splits"]["train"]["documents"] == 4
    assert manifest["left_out"] == NOT_READ
    assert (
        "10 files of the input folders not read (0.0 MB): *.7z (2), broken links (2), *.csv"
        in output
    )
    # Nothing is said of what the user's own patterns leave out, nor where all was read.
    options = ("--include", "*.jsonl", "*.csv", "--exclude", "*/a.jsonl")
    status, output, manifest = tokenize(mixed, options=options, out="chosen")
    assert [Path(source["path"]).name for source in manifest["sources"]] == ["g.csv"]
    assert [one["named"] for one in manifest["left_out"]] == [
        *("broken links", "._*", "links to folders")
    ]
    everything = ("--include", "*", "--exclude", "*.csv", "--text-documents", "line")
    _, output, manifest = tokenize(mixed, options=everything, out="all")
    assert [one["named"] for one in manifest["left_out"]] == [
        *("*.7z", "broken links", "*.lz4", "._*", "links to folders")
    ]
    status, output, manifest = tokenize(mixed / "a.jsonl", out="one")
    assert "left_out" not in manifest and "not read" not in output


def test_what_is_left_out_of_a_pattern_and_of_a_store(mixed, tokenize) -> None:
    status, _, manifest = tokenize(f"{mixed}/[adefi]*", out="pattern")
    assert status == 0
    assert [Path(source["path"]).name for source in manifest["sources"]] == ["a.jsonl"]
    assert [(one["named"], one["files"]) for one in manifest["left_out"]] == [
        *(("*.7z", 2), ("broken links", 1), ("folders that a pattern matches", 1))
    ]
    status, output, _ = tokenize(f"{mixed}/*.7z", out="none")
    assert status == 2 and "/*.7z but *.7z (2), which are not read" in output
    status, output, _ = tokenize(f"{mixed}/gone.*", out="none")
    assert status == 2 and "/gone.* but 1 broken links" in output
    memory = fsspec.filesystem("memory")
    for name in ("mixed/a.jsonl", "mixed/e.7z", "mixed/._a.jsonl"):
        memory.pipe(f"/bucket/{name}", line("one").encode())
    status, output, manifest = tokenize("memory://bucket/mixed", out="store")
    assert status == 0, output
    assert [(one["named"], one["files"]) for one in manifest["left_out"]] == [
        ("*.7z", 1),
        ("._*", 1),
    ]


def test_a_folder_that_holds_nothing_to_read(mixed, tokenize, tmp_path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.7z").write_bytes(b"x")
    status, output, _ = tokenize(tmp_path / "odd")
    assert status == 2
    assert "holds no file named like *.jsonl, *.json," in output
    assert "but *.7z (1): give --include PATTERN" in output
    for file in (mixed / "e.7z", mixed / "h.jsonl.lz4", tmp_path / "a.tar.gz"):
        file.write_bytes(b"x")
        status, output, _ = tokenize(file)
        assert status == 2 and f"{file} is an archive, or packed in a way that is not" in output


def test_a_folder_that_may_not_be_read(tokenize, tmp_path, monkeypatch) -> None:
    """Root may read all, so the system's answer is stood in for."""
    (tmp_path / "dump" / "closed").mkdir(parents=True)
    (tmp_path / "dump" / "a.jsonl").write_text(line("one"))
    scandir = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, output, _ = tokenize(tmp_path / "dump")
    assert status == 2 and f"{tmp_path}/dump/closed: Permission denied" in output


def test_ranks_agree_though_files_that_are_not_read_change(mixed, tokenize) -> None:
    """Their logs may lie in the input folder."""
    ranks = ("--world-size", 2, "--rank")
    assert tokenize(mixed, options=(*ranks, 0))[0] == 0
    (mixed / "slurm-1.out").write_text("rank 1 starts")
    status, output, _ = tokenize(mixed, options=(*ranks, 1))
    assert status == 0, output
    (mixed / "late.jsonl").write_text(line("late"))
    status, output, _ = tokenize(mixed, options=(*ranks, 1))
    assert status == 2 and "4 files there, 5 now" in output


def test_half_a_character(tokenize, tmp_path, capsys) -> None:
    """A lone surrogate, as a limit on UTF-16 units leaves it: JSON can spell it and UTF-8 cannot."""
    file = tmp_path / "a.jsonl"
    file.write_text(line("one") + line("cut \ud83d off") + line("pair \ud83d\ude00"))
    status, output, manifest = tokenize(file)
    assert status == 0 and manifest["splits"]["train"]["documents"] == 2
    assert f"{file}:2: not UTF-8: U+D83D at character 4 is half of a character" in output
    status, output, manifest = tokenize(file, options=("--invalid-utf8", "replace"), out="b")
    assert status == 0 and "1 documents with invalid UTF-8, replaced by U+FFFD" in output
    for number, text in ((1, "cut \ufffd off"), (2, "pair 😀")):
        assert cli.main(["inspect", str(tmp_path / "b"), "--document", str(number)]) == 0
        assert text in capsys.readouterr().out
    status, output, _ = tokenize(file, options=("--invalid-utf8", "stop"), out="c")
    assert status == 2 and f"{file}:2: not UTF-8" in output and "replace or skip" in output
    limit = ("--max-bad-lines", 0)
    status, output, _ = tokenize(file, options=limit, out="d")
    assert status == 2 and "(--invalid-utf8 replace puts U+FFFD" in output


def test_parquet_with_text_that_is_not_utf8(tokenize, tmp_path, capsys) -> None:
    """Some writers do not check. It is treated as elsewhere, in columns of text and of bytes."""
    raw = pa.array([b"one", b"caf\xe9", b"two"], pa.binary())
    nested = pa.StructArray.from_arrays([raw.view(pa.string())], ["body"])
    encoded = raw.dictionary_encode()
    encoded = pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.view(pa.string()))
    columns = {
        "text": raw.view(pa.string()),
        "raw": raw,
        "large": raw.cast(pa.large_binary()).view(pa.large_string()),
        "doc": nested,
        "encoded": encoded,
    }
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file)
    for name in ("text", "raw", "large", "doc.body", "encoded"):
        field = ("--text-field", name)
        status, output, manifest = tokenize(file, options=field, out=f"{name}-skip")
        assert status == 0 and f"{file}: row 2: not UTF-8: unexpected end of data" in output
        assert manifest["splits"]["train"]["documents"] == 2
        options = (*field, "--invalid-utf8", "replace")
        status, output, manifest = tokenize(file, options=options, out=f"{name}-replace")
        assert status == 0 and "1 documents with invalid UTF-8, replaced" in output
        assert cli.main(["inspect", str(tmp_path / f"{name}-replace"), "--document", "1"]) == 0
        assert "caf\ufffd" in capsys.readouterr().out
        options = (*field, "--invalid-utf8", "stop")
        status, output, _ = tokenize(file, options=options, out="stop")
        assert status == 2 and f"{file}: row 2: not UTF-8" in output


def test_messages_with_text_that_is_not_utf8(tmp_path) -> None:
    raw = pa.array([b"one", b"caf\xe9"], pa.binary()).view(pa.string())
    message = pa.StructArray.from_arrays([raw], ["content"])
    for number, kind in enumerate((pa.ListArray, pa.LargeListArray)):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"messages": kind.from_arrays([0, 1, 2], message)}), file)
        (source,) = find_sources((file,))
        reading = Reading(("messages",), invalid_utf8="replace")
        (rows,) = read_rows(source, reading, 0, None, lambda _: None)
        assert rows == [{"messages": [{"content": text}]} for text in (b"one", b"caf\xe9")]
        bad = BadLines(0)
        found = [in_utf8([row["messages"]], "", reading, bad) for row in rows]
        assert found == [[[{"content": text}]] for text in ("one", "caf\ufffd")]
        assert bad.replaced == 1


def test_several_fields_of_which_one_is_null(tokenize, tmp_path) -> None:
    """Null is as an empty text; where all are null, the document is empty."""
    for name, title, wanted in (("null", "null", ["\n\nx"]), ("empty", '""', ["\n\nx", "\n\n"])):
        file = tmp_path / f"{name}.jsonl"
        both = f'{{"title": {title}, "body": "x"}}\n{{"title": {title}, "body": {title}}}\n'
        file.write_text(both)
        options = ("--text-field", "title", "body")
        status, output, manifest = tokenize(file, options=options, out=name)
        assert status == 0, output
        facts = manifest["splits"]["train"]
        assert (facts["documents"], facts["text_bytes"]) == (len(wanted), sum(map(len, wanted)))


def test_utf16(tokenize, tmp_path) -> None:
    """PowerShell's way to write a file."""
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(line("one").encode("utf-16"))
        status, output, _ = tokenize(tmp_path / name)
        assert status == 2 and "it is UTF-16: write it as UTF-8" in output
