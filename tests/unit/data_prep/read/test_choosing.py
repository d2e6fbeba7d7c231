"""Which files are read: by --include and --exclude, each once, and none about what was dropped."""

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.errors import UserError
from data_prep.left_out import LeftOut
from data_prep.read.documents import read_documents
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import find_sources


def named(*inputs: object, **options: tuple[str, ...]) -> list[str]:
    return [Path(source.path).name for source in find_sources(inputs, **options)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    (place / "tests").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "c.py", "tests/d.jsonl", "tests/e.py"):
        (place / name).write_text('{"text": "x"}\n')
    return place


def test_include_and_exclude_choose_of_patterns_too(folder: Path, monkeypatch) -> None:
    everything = f"{folder}/**"
    assert named(everything) == ["a.jsonl", "b.jsonl", "c.py", "d.jsonl", "e.py"]
    assert named(everything, include=("*.py",)) == ["c.py", "e.py"]
    assert named(everything, exclude=("*/tests/*",)) == ["a.jsonl", "b.jsonl", "c.py"]
    assert named(everything, include=("*.py",), exclude=("*/tests/*",)) == ["c.py"]
    assert named(folder, include=("*.py",), exclude=("*/tests/*",)) == ["c.py"]
    # What is named is read; the options choose of the others.
    assert named(folder / "a.jsonl", folder, include=("*.py",)) == ["a.jsonl", "c.py", "e.py"]
    left_out = LeftOut()
    named(everything, exclude=("*.py",), left_out=left_out)  # type: ignore[arg-type]
    assert not left_out
    with pytest.raises(UserError, match=r"no file matches .*5 files are left out, by --include"):
        named(everything, include=("*.md",))


def test_patterns_of_stores(folder: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b.jsonl", "clean-dropped.jsonl"):
        store.pipe(f"/choose/{name}", b'{"text": "x"}\n')
    assert named("memory://choose/*.jsonl", exclude=("*/b*",)) == ["a.jsonl"]
    with pytest.raises(UserError, match="written by `data clean`"):
        named("memory://choose/clean-dropped.jsonl")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_options_that_would_be_ignored_are_refused(folder: Path, option: str, refused) -> None:
    files = [folder / "a.jsonl", folder / "b.jsonl"]  # as a shell makes of a pattern
    argv = ["--vocab-size", 300, "--output-dir", folder / "out", f"--{option}", "b*"]
    told = refused("train-tokenizer", *files, *argv)
    assert "--include and --exclude choose among the files of folders and of patterns" in told
    assert "a pattern in quotes" in told


def test_a_file_under_two_names(folder: Path, monkeypatch) -> None:
    file = folder / "a.jsonl"
    monkeypatch.chdir(folder)
    for other in ("a.jsonl", "tests/../a.jsonl", f"file://{file}", folder):
        with pytest.raises(UserError, match="is given twice"):
            named(file, other)
    (folder / "newest.jsonl").symlink_to("b.jsonl")
    with pytest.raises(UserError, match=r"newest\.jsonl is given twice, as .*/b\.jsonl too"):
        named(folder / "b.jsonl", folder / "newest.jsonl")
    # A folder, or a pattern, may have links: nobody gave the file twice.
    for given in (folder, f"{folder}/**/*.jsonl"):
        left_out = LeftOut()
        assert named(given, left_out=left_out) == ["a.jsonl", "b.jsonl", "d.jsonl"]  # type: ignore[arg-type]
        assert left_out.counts["links to files that are read"] == [1, 0]
    (folder / "newest.jsonl").unlink()
    (folder / "newest.jsonl").symlink_to("../elsewhere.jsonl")
    (folder.parent / "elsewhere.jsonl").write_text('{"text": "x"}\n')
    assert "newest.jsonl" in named(folder)


def test_what_clean_wrote_about_dropped_documents(folder: Path) -> None:
    for name in ("clean-dropped.jsonl", "clean-report.json"):
        (folder / name).write_text('{"text": "dropped"}\n')
        with pytest.raises(UserError, match=f"leave {name} out, or give the folder"):
            named(folder / "a.jsonl", folder / name)
    assert named(folder) == named(f"{folder}/**/*.json*") == ["a.jsonl", "b.jsonl", "d.jsonl"]
    with pytest.raises(
        UserError, match=r"no file matches .*; 1 files are left out, .*`data clean`"
    ):
        named(f"{folder}/clean-d*")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("dataset_dict.json", "{", "is not a saved dataset's splits: "),
        ("dataset_dict.json", '{"splits": 3}', "is a saved dataset with the splits"),
        ("dataset_dict.json", '{"splits": ["train"]}', "splits train: give"),
        ("state.json", "[1", "is not the state.json of a saved dataset: "),
        ("state.json", '{"_data_files": 3}', "_data_files must be a list of files"),
        ("state.json", '{"_data_files": [{"filename": 3}]}', "_data_files must be a list of files"),
    ],
)
def test_damaged_descriptions_of_saved_datasets(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        find_sources((tmp_path,))


class Unsized(http.server.BaseHTTPRequestHandler):
    """Does not say how much it sends."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.files[self.path.split("?")[0]])

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    line = json.dumps({"text": "hello"}).encode() + b"\n"
    files = {
        "/a.jsonl": line * 3,
        "/a.jsonl.gz": gzip.compress(line * 3),
        "/get": line * 3,
        "/0": b"",
    }
    kind = type("H", (Unsized,), {"files": files})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "url",
    ["a.jsonl", "a.jsonl?download=true", "a.jsonl.gz?v=1.2&x=/b.txt", "get?file=a.jsonl"],
)
def test_urls_with_a_query_from_a_server_that_says_no_size(server: str, url: str) -> None:
    (source,) = find_sources((f"{server}/{url}",))
    assert (source.kind, source.bytes) == ("jsonl", 0)
    texts = list(read_documents(source, Reading(), BadLines(0), lambda _: None))
    assert texts == ["hello"] * 3


def test_an_empty_file_of_such_a_server(
    server: str, tokenizer: Path, tmp_path: Path, refused
) -> None:
    argv = ["--tokenizer", tokenizer, "--output-dir", tmp_path / "out"]
    assert f"no document with text in {server}/0" in refused("tokenize", f"{server}/0", *argv)
    assert cli.main(["tokenize", f"{server}/a.jsonl", *map(str, argv)]) == 0
