"""Every mistake: a clear message, status 2, and nothing that was there is lost."""

import gzip
import json
from pathlib import Path

import pytest
import sentencepiece
import zstandard

from data_prep import cli
from data_prep.dataset import output
from data_prep.encode import tokenize_part
from data_prep.parts.workplace import Workplace
from tests.unit.data_prep.conftest import hugging_face


@pytest.fixture
def out(tmp_path: Path, jsonl: Path, tokenizer: Path) -> Path:
    """A data set made before; every test checks that it is intact at the end."""
    path = tmp_path / "before"
    argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", path]
    assert cli.main([str(a) for a in argv]) == 0
    return path


@pytest.fixture(autouse=True)
def intact(out: Path):
    def content() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in out.iterdir()}

    before = content()
    yield
    assert content() == before


@pytest.fixture
def tokenize(refused, tokenizer: Path, tmp_path: Path):
    def run(source: object, *options: object) -> str:
        target = tmp_path / "new"
        message = refused(
            "tokenize", source, "--tokenizer", tokenizer, "--output-dir", target, *options
        )
        assert not target.exists()
        assert not list(tmp_path.glob(".*.tmp"))
        return message

    return run


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


LINE = json.dumps({"text": "hello"}) + "\n"


def test_missing_or_empty_input(tokenize, tmp_path) -> None:
    assert "does not exist" in tokenize(tmp_path / "no.jsonl")
    empty = write(tmp_path / "a.jsonl", "")
    assert f"the input file {empty} is empty" in tokenize(empty)
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "a.jsonl", "")
    write(tmp_path / "two" / "b.jsonl", "")
    assert f"all 2 input files are empty, {tmp_path}/two/a.jsonl among" in tokenize(
        tmp_path / "two"
    )
    file = write(tmp_path / "b.jsonl", '{"text": ""}\n')
    assert tokenize(file).endswith(f"no document with text in {file} 1 empty documents left out")
    other = write(tmp_path / "two" / "b.jsonl", '{"text": 5}\n')
    message = tokenize(tmp_path / "two")
    assert f"no document with text in {tmp_path}/two/a.jsonl and 1 other files" in message
    assert f"{other}:1: field 'text' is no string" in message
    (tmp_path / "folder").mkdir()
    assert "holds no file named like" in tokenize(tmp_path / "folder")
    write(tmp_path / "folder" / "a.py", "x")
    assert "*.rs" in tokenize(tmp_path / "folder", "--include", "*.rs")


def test_files_that_are_not_what_their_name_says(tokenize, tmp_path) -> None:
    assert "is not gzip data" in tokenize(write(tmp_path / "a.jsonl.gz", LINE))
    assert "is not zstd data" in tokenize(write(tmp_path / "a.jsonl.zst", LINE))
    packed = gzip.compress(LINE.encode())
    assert "is gzip data, which its name does not say" in tokenize(
        write(tmp_path / "b.jsonl", packed)
    )
    assert "it holds binary data" in tokenize(write(tmp_path / "c.jsonl", b"\x7fELF\0\0\0" * 20))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files_that_are_cut_short_or_damaged(ending, tokenize, tmp_path) -> None:
    raw = "".join(json.dumps({"text": f"hello {i * 7919}"}) + "\n" for i in range(2000)).encode()
    packed = (
        gzip.compress(raw)
        if ending == "gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    )
    file = tmp_path / f"a.jsonl.{ending}"
    assert "is cut short" in tokenize(write(file, packed[: len(packed) // 2]))
    broken = bytearray(packed)
    broken[len(broken) // 2 : len(broken) // 2 + 40] = b"\xff" * 40
    message = tokenize(write(file, bytes(broken)))
    assert "is damaged" in message or "cannot be used" in message or "cut short" in message


def test_lines_that_cannot_be_used_are_counted_and_shown(tokenizer, tmp_path, capsys) -> None:
    lines = [LINE, "{broken\n", "[1]\n", '{"other": 1}\n', '{"text": 5}\n', LINE]
    file = write(tmp_path / "a.jsonl", "".join(lines).encode() + b'{"text": "\xff"}\n')
    argv = ["tokenize", file, "--tokenizer", tokenizer, "--output-dir", tmp_path / "new"]
    assert cli.main([*map(str, argv), "--validation-fraction", "0"]) == 0
    output = capsys.readouterr().out
    assert "5 lines or files skipped" in output
    for number, why in ((2, "not JSON"), (3, "not a JSON object"), (4, "no field 'text'")):
        assert f"a.jsonl:{number}: {why}" in output
    assert "a.jsonl:5: field 'text' is no string" in output
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert manifest["sources"][0]["skipped_lines"] == 5


def test_too_many_bad_lines_stop_the_work(tokenize, tmp_path) -> None:
    file = write(tmp_path / "a.jsonl", LINE + "{\n" * 4)
    message = tokenize(file, "--max-bad-lines", 3)
    assert "more than --max-bad-lines 3 lines" in message
    assert "a.jsonl:2: not JSON" in message


def test_a_text_field_that_is_not_there(tokenize, tmp_path) -> None:
    few = write(tmp_path / "a.jsonl", '{"content": "x", "id": 1}\n' * 3)
    many = write(tmp_path / "b.jsonl", '{"content": "x", "id": 1}\n' * 500)
    for file in (few, many):
        message = tokenize(file, "--max-bad-lines", 1000)
        assert "no line has the field 'text'; they have content, id" in message
    message = tokenize(many)
    assert "none of the first 101 lines has the field 'text'; they have content, id" in message
    assert "give --text-field NAME, or more --max-bad-lines, if later lines have it" in message


def test_text_that_is_not_utf8_is_skipped_and_counted(tokenize, tmp_path) -> None:
    file = write(tmp_path / "a.txt", b"caf\xe9")
    assert "not UTF-8" in tokenize(file, "--max-bad-lines", 0)
    assert "no document with text" in tokenize(file)
    assert "holds binary data" in tokenize(write(tmp_path / "b.txt", b"a\0b"), "--max-bad-lines", 0)


def test_tokenizers_that_are_none(refused, jsonl, tmp_path) -> None:
    def run(tokenizer: Path) -> str:
        return refused(
            "tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", tmp_path / "new"
        )

    assert "does not exist" in run(tmp_path / "no.model")
    assert "not a SentencePiece model" in run(write(tmp_path / "a.model", "junk"))
    assert "not a Hugging Face tokenizer.json" in run(write(tmp_path / "a.json", "{}"))
    assert "give a SentencePiece .model or" in run(write(tmp_path / "a.txt", "x"))


def test_tokenizers_that_cannot_end_documents(refused, jsonl, tmp_path) -> None:
    model = tmp_path / "a.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["hello world"] * 10),
            model_writer=file,
            vocab_size=270,
            byte_fallback=True,
            hard_vocab_limit=False,
            eos_id=-1,
            minloglevel=2,
        )
    new = tmp_path / "new"
    message = refused("tokenize", jsonl, "--tokenizer", model, "--output-dir", new)
    assert "has no end-of-sentence piece" in message
    file = hugging_face(tmp_path / "b.json", eod="<|stop|>")
    message = refused("tokenize", jsonl, "--tokenizer", file, "--output-dir", new)
    assert "has no token <|endoftext|> or" in message
    assert "give --eod-token" in message


def test_an_output_folder_in_use(refused, jsonl, tokenizer, out, tmp_path) -> None:
    base = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir"]
    assert "holds something else" in refused(*base, out, "--validation-fraction", "0.5")
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "thesis.txt", "precious")
    assert "holds something else" in refused(*base, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert "is a file" in refused(*base, write(tmp_path / "file", ""))


def test_fractions_that_leave_nothing(tokenize, jsonl, tmp_path) -> None:
    assert "leave something to train on" in tokenize(jsonl, "--validation-fraction", "1")
    one = write(tmp_path / "a.jsonl", LINE)
    message = tokenize(one, "--validation-fraction", "0.1")
    assert "the validation split got none of the 1 documents" in message
    assert "--text-documents" not in message  # it does nothing for JSON lines
    text = write(tmp_path / "a.txt", "hello")
    message = tokenize(text, "--test-fraction", "0.1")
    assert "the test split got none of the 1 documents" in message
    assert "--text-documents paragraph cuts" in message


def test_no_space_or_no_permission(tokenize, jsonl, monkeypatch) -> None:
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    assert "MB free, about" in tokenize(jsonl)
    monkeypatch.undo()
    # Root may write anywhere, so the system's answer is stood in for.
    monkeypatch.setattr(output.os, "access", lambda *_: False)
    assert "no permission to write in" in tokenize(jsonl)


def test_a_disk_that_fills_up_on_the_way(tokenize, jsonl, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "train.bin")

    monkeypatch.setattr(tokenize_part.PartFiles, "add", full)
    assert "train.bin: No space left on device" in tokenize(jsonl)


def test_unknown_options_come_with_a_suggestion(refused, jsonl) -> None:
    assert "--output-dir" in refused("tokenize", jsonl, "--output-dr", "x", "--tokenizer", "y")


def test_a_vocabulary_that_does_not_fit(refused, jsonl, tmp_path) -> None:
    base = ["train-tokenizer", jsonl, "--output-dir", tmp_path / "t", "--vocab-size"]
    assert "give 300 or more" in refused(*base, 100)
    assert "give at most 16,777,216" in refused(*base, 10**22)
    assert "too small for this --vocab-size" in refused(*base, 50_000)
    assert not list(tmp_path.glob("t/*"))


def test_a_tokenizer_is_not_overwritten(refused, jsonl, tokenizer) -> None:
    before = tokenizer.read_bytes()
    message = refused(
        "train-tokenizer", jsonl, "--vocab-size", 340, "--output-dir", tokenizer.parent
    )
    assert "exists: remove it or choose another" in message
    assert tokenizer.read_bytes() == before


def test_bad_text_while_training_a_tokenizer(refused, tmp_path) -> None:
    file = write(tmp_path / "a.jsonl", '{"content": "x"}\n' * 20)
    base = ["train-tokenizer", file, "--output-dir", tmp_path / "t", "--vocab-size", 340]
    assert "no line has the field" in refused(*base)


def test_inspecting_what_is_not_there(refused, out, tmp_path) -> None:
    assert "is not a data set" in refused("inspect", tmp_path / "no")
    assert "split has" in refused("inspect", out, "--document", 10_000)
    assert "show at least one" in refused("inspect", out, "--document", 0, "--max-tokens", -1)
    assert "the test split has 0 documents" in refused(
        "inspect", out, "--split", "test", "--document", 0
    )


def test_inspecting_files_that_disagree(refused, out, tmp_path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    with (damaged / "train.bin").open("ab") as file:
        file.write(b"xx")
    assert "the data set is damaged" in refused("inspect", damaged)
    write(damaged / "manifest.json", "{}")
    assert "is not a data set's manifest" in refused("inspect", damaged)


def test_two_runs_into_one_folder(jsonl, tokenizer, refused, tmp_path) -> None:
    target = tmp_path / "new"
    base = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", target]
    with Workplace(target).held(alone=True):
        (tmp_path / ".new.tmp" / "parts" / "x.train.bin").write_text("at work")
        assert "another process is making this data set" in refused(*base)
        assert (tmp_path / ".new.tmp" / "parts" / "x.train.bin").read_text() == "at work"
    assert cli.main([str(a) for a in base]) == 0  # as when that process ends


def test_a_damaged_data_set_is_not_called_done(jsonl, tokenizer, refused, tmp_path) -> None:
    target = tmp_path / "new"
    base = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", target]
    assert cli.main([str(a) for a in base]) == 0
    (target / "train.bin").write_bytes(b"xx")
    assert "holds something else" in refused(*base)


def test_no_input_and_no_number(refused, jsonl, tokenizer, tmp_path) -> None:
    base = ["--tokenizer", tokenizer, "--output-dir", tmp_path / "new"]
    assert "no input: give files or folders" in refused("tokenize", *base)
    message = refused("tokenize", jsonl, *base, "--validation-fraction", "nan")
    assert "must be 0 or more" in message


def test_a_sample_without_a_document(refused, tmp_path) -> None:
    file = write(tmp_path / "a.txt", "hello world\n" * 100_000)
    base = ["train-tokenizer", file, "--output-dir", tmp_path / "t", "--vocab-size", 300]
    assert "no document was sampled" in refused(*base, "--max-training-bytes", 10)


def test_a_manifest_without_its_parts(refused, out, tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for content in (b'{"splits": {}}', b"\xff"):
        write(broken / "manifest.json", content)
        assert "is not a data set's manifest" in refused("inspect", broken)
