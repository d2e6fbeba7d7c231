"""The same command again, and other ranks: bad lines add up, and what is done counts as space."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep import cli, files, progress
from data_prep.dataset import output
from data_prep.parts import plan
from data_prep.parts.workplace import Workplace
from data_prep.progress import Progress

GOOD = json.dumps({"text": "some words " * 30}) + "\n"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Four files, a part each, with two bad lines each."""
    monkeypatch.setattr(plan, "SMALLEST_BYTES", 4000)
    files = []
    for name in "abcd":
        file = tmp_path / f"{name}.jsonl"
        file.write_text(GOOD * 9 + "{broken\n" * 2 + f'{{"text": "{name} {"z" * 800}"}}\n')
        files.append(file)
    return files


@pytest.fixture
def tokenize(parts: list[Path], tokenizer: Path, tmp_path: Path) -> list[object]:
    argv: list[object] = ["tokenize", *parts, "--tokenizer", tokenizer, "--workers", 1]
    return [*argv, "--validation-fraction", 0, "--output-dir", tmp_path / "out"]


def test_bad_lines_of_an_earlier_run_count(tokenize, tmp_path: Path, refused) -> None:
    argv = [*tokenize, "--max-bad-lines", 5]
    for _ in range(3):
        told = refused(*argv)
        assert "more than --max-bad-lines 5 lines cannot be used; the first ones" in told
        assert "a.jsonl:10: not JSON" in told
        assert list((tmp_path / ".out.tmp" / "parts").glob("*.json"))
    assert cli.main([*map(str, tokenize), "--max-bad-lines", "8"]) == 0


def test_bad_lines_of_all_ranks_count(tokenize, tmp_path: Path, refused) -> None:
    argv = [*map(str, tokenize), "--max-bad-lines", "5", "--world-size", "4"]
    for rank in range(4):
        assert cli.main([*argv, "--rank", str(rank)]) == 0
    told = refused("merge", tmp_path / "out")
    assert "more than --max-bad-lines 5 lines cannot be used" in told
    assert not (tmp_path / "out").exists()
    plan_file = tmp_path / ".out.tmp" / "plan.json"
    facts = json.loads(plan_file.read_text())
    # With a higher limit nothing that was done is lost: one task says it again, which takes no time.
    before = {part: part.stat().st_mtime_ns for part in (tmp_path / ".out.tmp/parts").iterdir()}
    assert cli.main([*argv, "--max-bad-lines", "8", "--rank", "2"]) == 0
    assert json.loads(plan_file.read_text())["max_bad_lines"] == 8
    assert before == {part: part.stat().st_mtime_ns for part in before}
    del facts["max_bad_lines"]  # an older version's plan
    plan_file.write_text(json.dumps(facts))
    assert cli.main([*argv, "--rank", "0"]) == 0
    assert cli.main(["merge", str(tmp_path / "out")]) == 0


def test_bad_lines_of_an_earlier_clean_count(parts, tmp_path: Path, refused) -> None:
    argv = [
        "clean",
        *parts,
        "--min-characters",
        1,
        "--output-dir",
        tmp_path / "out",
        "--workers",
        1,
    ]
    for _ in range(3):
        assert "more than --max-bad-lines 5" in refused(*argv, "--max-bad-lines", 5)
    assert cli.main([*map(str, argv), "--max-bad-lines", "8"]) == 0


def test_a_damaged_marker_is_done_again(tokenize, tmp_path: Path) -> None:
    argv = [*map(str, tokenize), "--world-size", "1", "--rank", "0"]
    assert cli.main(argv) == 0
    marker = next((tmp_path / ".out.tmp" / "parts").glob("*.json"))
    before = json.loads(marker.read_text())
    marker.write_text("{")
    assert cli.main(argv) == 0
    assert json.loads(marker.read_text())["splits"] == before["splits"]


def test_parts_that_are_done_take_no_more_space(
    tokenize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    argv = [*map(str, tokenize), "--world-size", "2"]
    assert cli.main([*argv, "--rank", "0"]) == 0
    done = list((tmp_path / ".out.tmp" / "parts").iterdir())
    assert Workplace(tmp_path / "out").bytes() == sum(file.stat().st_size for file in done)
    text = sum(file.stat().st_size for file in tmp_path.glob("*.jsonl"))
    needed = int(2 * text / 3.5 * 2)
    free = type("usage", (), {"free": needed - 500})  # the parts that are done are larger
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: free)
    assert cli.main([*argv, "--rank", "1"]) == 0
    assert "MB free, about" in refused(*tokenize[:-1], tmp_path / "other")


def test_ranks_write_the_plan_once(tokenize, tmp_path: Path, monkeypatch) -> None:
    argv = [*map(str, tokenize), "--world-size", "2"]
    assert cli.main([*argv, "--rank", "0"]) == 0
    before = (tmp_path / ".out.tmp" / "plan.json").stat().st_ino
    assert cli.main([*argv, "--rank", "1"]) == 0
    assert (tmp_path / ".out.tmp" / "plan.json").stat().st_ino == before


def test_temporary_names_differ_between_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    first = files.temporary_name(Path("a/b.bin"))
    assert first == files.temporary_name(Path("a/b.bin"))
    assert first.parent == Path("a") and first.name.startswith("b.bin.tmp-")
    monkeypatch.setattr(files, "_OWN", "another machine's")  # whose process has the same number
    assert files.temporary_name(Path("a/b.bin")) != first


def test_one_part_shows_its_progress(
    tokenizer: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(GOOD.encode() * 1000))
    argv = ["tokenize", file, "--tokenizer", tokenizer, "--output-dir", tmp_path / "out"]
    assert cli.main([str(a) for a in argv]) == 0
    told = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenizing: ")
    ]
    assert told
    assert told[-1].startswith("tokenizing: 100 % of 0 MB") and "M tokens/s" in told[-1]


def test_no_time_is_guessed_of_nothing(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    shown = Progress(17_000_000, "reading")
    shown.reached(0)
    shown.reached(8_500_000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "reading: 0 % of 17 MB, 0.0 MB/s"
    assert second.startswith("reading: 50 % of 17 MB, ") and second.endswith(" s left")
