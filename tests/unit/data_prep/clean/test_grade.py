"""`data grade`: thirds by chrF, in the order of the input; what is refused."""

import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sacrebleu.metrics import CHRF

from data_prep import cli
from data_prep.clean.grade import GRADES

RNG = random.Random(3)


def spoiled(text: str, share: float) -> str:
    return "".join(RNG.choice("xyz") if RNG.random() < share else c for c in text)


def triplet(number: int) -> dict:
    reference = " ".join(RNG.choice(("gato", "está", "sobre", "mesa", "casa")) for _ in range(8))
    draft = spoiled(reference, number % 30 / 30)
    return {"source": f"sentence {number}", "draft": draft, "reference": reference, "id": number}


TRIPLETS = [triplet(number) for number in range(90)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def graded(folder: Path) -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in GRADES
    }


def test_thirds_by_chrf(tmp_path: Path, capsys) -> None:
    lines = write(tmp_path / "a.jsonl", TRIPLETS)
    assert cli.main(["grade", str(lines), "--output-dir", str(tmp_path / "out")]) == 0
    found = graded(tmp_path / "out")
    assert {name: len(rows) for name, rows in found.items()} == dict.fromkeys(GRADES, 30)
    scores = [CHRF().sentence_score(t["draft"], [t["reference"]]).score for t in TRIPLETS]
    ordered = sorted(range(90), key=lambda i: scores[i])
    for name, chosen in zip(GRADES, (ordered[:30], ordered[30:60], ordered[60:]), strict=True):
        expected = [
            {key: TRIPLETS[i][key] for key in ("source", "draft", "reference")}
            | {"chrf": round(scores[i], 2)}
            for i in sorted(chosen)
        ]
        assert found[name] == expected
    said = capsys.readouterr().out
    assert f"easy            30   {min(scores):.1f} to " in said
    assert " to 100.0, mean" in said
    assert not (tmp_path / ".out.tmp").exists()


def test_other_names_more_fields_and_a_table(tmp_path: Path) -> None:
    rows = [
        {"meta": {"from": "en"}, "src": t["source"], "mt": t["draft"], "pe": t["reference"]}
        for t in TRIPLETS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    how = ["--text-field", "meta.from", "src", "mt", "pe", "--output-dir"]
    assert cli.main(["grade", str(tmp_path / "a.parquet"), *how, str(tmp_path / "out")]) == 0
    lines = write(tmp_path / "a.jsonl", TRIPLETS)
    assert cli.main(["grade", str(lines), "--output-dir", str(tmp_path / "same")]) == 0
    for name in GRADES:
        renamed = [
            {"meta.from": "en", "src": r["source"], "mt": r["draft"], "pe": r["reference"]}
            | {"chrf": r["chrf"]}
            for r in graded(tmp_path / "same")[name]
        ]
        assert graded(tmp_path / "out")[name] == renamed


def test_a_score_by_hand(tmp_path: Path) -> None:
    """Nothing alike, one of two words alike, the same."""
    rows = [
        {"source": "s", "draft": draft, "reference": "abcdefg"}
        for draft in ("xyzuvwk", "abcdxyz", "abcdefg")
    ]
    write(tmp_path / "a.jsonl", rows)
    assert cli.main(["grade", str(tmp_path / "a.jsonl"), "--output-dir", str(tmp_path / "o")]) == 0
    scores = [rows[0]["chrf"] for rows in graded(tmp_path / "o").values()]
    # Of 7, 6, 5, 4, 3, 2 runs of 1 to 6 characters the second draft has 4, 3, 2, 1, 0, 0 right.
    by_hand = 100 * (4 / 7 + 3 / 6 + 2 / 5 + 1 / 4) / 6
    assert scores == [0, pytest.approx(by_hand, abs=0.01), 100]


def test_bad_lines_are_counted(tmp_path: Path, capsys, refused) -> None:
    lines = write(
        tmp_path / "a.jsonl", [*TRIPLETS, {"source": "s", "draft": None, "reference": ""}]
    )
    assert cli.main(["grade", str(lines), "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 lines skipped" in said and "a.jsonl:91: field 'draft' is no string" in said
    message = refused("grade", lines, "--max-bad-lines", 0, "--output-dir", tmp_path / "none")
    assert "more than --max-bad-lines 0" in message
    assert not (tmp_path / "none").exists() and not (tmp_path / ".none.tmp").exists()


def test_what_is_refused(tmp_path: Path, refused, monkeypatch) -> None:
    lines = write(tmp_path / "a.jsonl", TRIPLETS)
    out = ("--output-dir", tmp_path / "out")
    same = write(tmp_path / "same.jsonl", [t | {"draft": t["reference"]} for t in TRIPLETS])
    assert "have the same chrF, 100.0" in refused("grade", same, *out)
    few = write(tmp_path / "few.jsonl", TRIPLETS[:2])
    assert "2 triplets: three grades need three" in refused("grade", few, *out)
    (tmp_path / "a.txt").write_text("hello\n")
    assert "a.txt is plain text" in refused("grade", tmp_path / "a.txt", *out)
    assert "give two names or more" in refused("grade", lines, *out, "--text-field", "draft")
    assert "the name of the score" in refused("grade", lines, *out, "--text-field", "a", "chrf")
    message = refused("grade", lines, *out, "--text-field", "src", "mt", "pe")
    assert "field 'src'; they have draft, id, reference, source: give --text-field NAME" in message
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    assert "exists: choose another" in refused("grade", lines, "--output-dir", tmp_path / "there")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert "pip install 'megatron-ladder[refine]'" in refused("grade", lines, *out)
    assert not (tmp_path / "out").exists()
