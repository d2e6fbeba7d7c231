"""`data clean`: what each rule drops, that the first of duplicates stays, and that nothing depends on
who did the work."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.clean import duplicates
from data_prep.clean.quality import make_filter, make_judge
from data_prep.parts import plan
from data_prep.version import VERSION

pytest.importorskip("datatrove", reason="the extra `clean` is not installed")

WORDS = ["river", "people", "water", "house", "garden", "summer", "winter", "toward", "light"]


def prose(seed: int, words: int = 120) -> str:
    """Sentences of different words, without repetition: every rule lets them pass."""
    rng = random.Random(seed)
    text = [f"{rng.choice(WORDS)}{rng.choice(WORDS)}"[: rng.randint(4, 9)] for _ in range(words)]
    lines = [" ".join(text[i : i + 12]).capitalize() + "." for i in range(0, words, 12)]
    return "\n".join(lines)


def write(path: Path, records: list) -> Path:
    path.write_text(
        "".join(json.dumps(r if isinstance(r, dict) else {"text": r}) + "\n" for r in records)
    )
    return path


def run(*argv: object) -> None:
    assert cli.main(["clean", *map(str, argv)]) == 0


def left(folder: Path) -> list[dict]:
    lines: list[dict] = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        data = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        lines += map(json.loads, data.read().splitlines())
    return lines


def report(folder: Path) -> dict:
    return json.loads((folder / "clean-report.json").read_text())


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "clean-dropped.jsonl").read_text().splitlines()]


# --- quality ---


@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("gopher-quality", "gopher_short_doc", prose(1, 40)),
        ("gopher-quality", "gopher_long_doc", " ".join(["word"] * 100_001)),
        ("gopher-quality", "gopher_below_avg_threshold", "a be " * 60),
        ("gopher-quality", "gopher_above_avg_threshold", "internationalization " * 60),
        ("gopher-quality", "gopher_too_many_hashes", "tag# " * 60),
        ("gopher-quality", "gopher_too_many_ellipsis", "well, then ... " * 60),
        ("gopher-quality", "gopher_too_many_bullets", "- some words of a list\n" * 20),
        (
            "gopher-quality",
            "gopher_too_many_end_ellipsis",
            f"{'word ' * 30}...\n{'word ' * 30}...\n{'word ' * 30}\n",
        ),
        ("gopher-quality", "gopher_below_alpha_threshold", "word 1234 5678 " * 40),
        ("gopher-repetition", "dup_para_frac", "one same line\n\n" * 3 + prose(2)),
        ("gopher-repetition", "dup_line_frac", "same\n" * 8 + prose(2)),
        ("gopher-repetition", "top_2_gram", "very good " * 20 + prose(3, 60).replace("\n", " ")),
        ("gopher-repetition", "duplicated_5_n_grams", prose(4, 60).replace("\n", " ") * 2),
        ("fineweb", "line_punct_ratio", prose(5).replace(".", "")),
        ("fineweb", "short_line_ratio", "Short.\nLines.\nAll of them.\n"),
        ("fineweb", "char_dup_ratio", f"{prose(6)}\n{prose(6)}"),
        (
            "fineweb",
            "list_ratio",
            "Two words, with full stop at the end of it\n\n\n\n\n.\n" + "a" * 40 + ".",
        ),
    ],
)
def test_each_rule_drops_what_it_names_and_lets_prose_pass(name, reason, text) -> None:
    judge = make_filter(name)
    assert judge(text) == reason
    assert all(judge(prose(seed)) is None for seed in range(5))


def test_no_rule_fails_on_text_without_words_or_lines() -> None:
    judge = make_judge(("gopher-quality", "gopher-repetition", "fineweb"), None, None)
    assert judge(" \n") == "empty"
    for text in ("\0", "...", "\n\n.\n", "\u2028", "\u0300", "日本語" * 40):
        assert judge(text) is not None
    plain = make_judge((), 5, 10)
    assert [plain(t) for t in ("1234", "12345", "12345678901")] == [
        "fewer than --min-characters",
        None,
        "more than --max-characters",
    ]


# --- duplicates ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), max_size=30))
def test_first_of_same_is_the_first(texts: list[str]) -> None:
    digests = np.array([np.frombuffer(duplicates.digest(t), "<u8") for t in texts], "<u8")
    first = duplicates.first_of_same(digests.reshape(-1, 2))
    assert first.tolist() == [texts.index(t) for t in texts]


def jaccard(one: str, other: str) -> float:
    a, b = ({s for some in duplicates.shingles(t) for s in some} for t in (one, other))
    return len(a & b) / len(a | b)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(0)
    texts, wanted = [], []
    for seed in range(100):
        words = [f"{w}{i}" for i, w in enumerate(prose(seed, 400).split())]
        texts.append(" ".join(words))
        wanted.append(len(texts) - 1)
        near = list(words)
        near[rng.randrange(400)] = "changed"  # five of 396 runs of words differ
        texts.append(" ".join(near))
        wanted.append(len(texts) - 2)
        far = list(words)
        for place in range(0, 400, 8):
            far[place] = "changed"
        texts.append(" ".join(far))
        wanted.append(len(texts) - 1)
    assert jaccard(texts[0], texts[1]) > 0.95
    assert jaccard(texts[0], texts[2]) < 0.5
    signatures = np.array([duplicates.signature(t) for t in texts], "<u4")
    keys = duplicates.band_keys(signatures, duplicates.rows_per_band(0.8))
    found = duplicates.near_duplicates(iter(keys), signatures, np.arange(len(texts)), 0.8)
    assert found.tolist() == wanted


def test_clusters_are_joined_through_a_third_and_the_first_stands_for_them() -> None:
    clusters = duplicates.Clusters(6)
    for pair in ((5, 3), (4, 5), (1, 4)):
        clusters.join(*pair)
    assert clusters.firsts().tolist() == [0, 1, 2, 1, 1, 1]


def test_text_without_spaces_has_shingles_of_characters() -> None:
    (runs,) = duplicates.shingles("日本語" * 30)
    assert runs[0] == "日 本 語 日 本"
    (runs,) = duplicates.shingles("two words")
    assert runs == ["two words"]


def test_rows_grow_with_the_threshold() -> None:
    assert [duplicates.rows_per_band(t) for t in (0.5, 0.8, 1.0)] == [3, 7, 32]


# --- the command ---


def near(text: str) -> str:
    return text.replace(".", "!", 1)


@pytest.fixture
def dump(tmp_path: Path) -> list[Path]:
    """Two files: exact and near duplicates within and across them, repeated ids, quality."""
    base = [prose(seed, 400) for seed in range(60)]
    one = [{"text": t, "id": i} for i, t in enumerate(base[:40])]
    one[7]["text"] = one[3]["text"]
    one[9]["id"] = one[8]["id"]
    two = [{"text": t, "id": 100 + i} for i, t in enumerate(base[40:])]
    two[0]["text"] = near(base[5])
    two[1]["text"] = base[6]
    two[2]["text"] = base[9]  # as the one whose id was there before: that one goes, this one stays
    two[3]["text"] = "short"
    two[4]["text"] = " "
    two.append({"text": base[0] + " tail", "id": 0})
    return [write(tmp_path / "1.jsonl", one), write(tmp_path / "2.jsonl", two)]


ALL = ("--exact-dedup", "--near-dedup", "--id-field", "id", "--quality", "gopher-quality")


def test_what_is_dropped_why_and_what_stays(
    dump: list[Path], tmp_path: Path, capsys, not_installed
) -> None:
    out = tmp_path / "out"
    run(*dump, "--output-dir", out, *ALL)
    facts = report(out)
    assert facts["made_by"] == f"megatron-ladder {VERSION}"
    assert {why: n["documents"] for why, n in facts["dropped"].items()} == {
        "repeated id": 2,
        "exact duplicate": 2,
        "near duplicate": 1,
        "gopher-quality: gopher_short_doc": 1,
        "empty": 1,
    }
    kept = left(out)
    assert facts["documents"] == 61
    assert facts["kept"]["documents"] == len(kept) == 54
    everything = [json.loads(line) for path in dump for line in path.read_text().splitlines()]
    assert facts["kept"]["text_bytes"] == sum(len(r["text"].encode()) for r in kept)
    assert facts["text_bytes"] == sum(len(r["text"].encode()) for r in everything)
    # In the order of the input.
    gone = {7, 9, 40, 41, 43, 44, 60}
    assert [f"{r['id']}" for i, r in enumerate(everything) if i not in gone] == [
        r["id"] for r in kept
    ]
    by_reason = {s["reason"]: s for s in samples(out)}
    assert by_reason["near duplicate"]["source"] == f"{dump[1]}#1"
    assert by_reason["near duplicate"]["repeats"] == f"{dump[0]}#6"
    assert by_reason["exact duplicate"]["repeats"] in (f"{dump[0]}#4", f"{dump[0]}#7")
    assert by_reason["gopher-quality: gopher_short_doc"]["text"] == "short"
    assert kept[0]["source"] == f"{dump[0]}#1"
    printed = capsys.readouterr().out
    assert "61 documents" in printed
    assert "near duplicate" in printed
    run(*dump, "--output-dir", out, *ALL)
    assert "already done" in capsys.readouterr().out


def test_output_does_not_depend_on_processes_or_on_parts(
    dump: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*dump, "--output-dir", tmp_path / "one", *ALL)
    monkeypatch.setattr(plan, "SMALLEST_BYTES", 20_000)
    for workers in (1, 2):
        run(*dump, "--output-dir", tmp_path / f"{workers}w", "--workers", workers, *ALL)
    names = [sorted(p.name for p in (tmp_path / f"{w}w").iterdir()) for w in (1, 2)]
    assert names[0] == names[1]
    assert len(names[0]) > 4
    for name in names[0]:
        assert (tmp_path / "1w" / name).read_bytes() == (tmp_path / "2w" / name).read_bytes()
    texts = [[(r["text"], r["id"]) for r in left(tmp_path / n)] for n in ("one", "1w")]
    assert texts[0] == texts[1]
    assert report(tmp_path / "one")["dropped"] == report(tmp_path / "1w")["dropped"]


def test_cleaning_twice_drops_no_more_and_tokenize_takes_the_folder(
    dump: list[Path], tmp_path: Path, tokenizer: Path
) -> None:
    run(*dump, "--output-dir", tmp_path / "once", *ALL)
    run(tmp_path / "once", "--output-dir", tmp_path / "twice", *ALL)
    assert report(tmp_path / "twice")["dropped"] == {}
    assert (
        report(tmp_path / "twice")["documents"] == 54
    )  # the samples of what was dropped are no text
    argv = [
        "tokenize",
        tmp_path / "once",
        "--tokenizer",
        tokenizer,
        "--output-dir",
        tmp_path / "data",
    ]
    assert cli.main([str(a) for a in argv] + ["--validation-fraction", "0"]) == 0


def test_a_killed_run_goes_on_and_gives_the_same(
    dump: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SMALLEST_BYTES", 20_000)
    run(*dump, "--output-dir", tmp_path / "whole", *ALL)
    program = (
        "import sys; from data_prep import cli; from data_prep.parts import plan; "
        "plan.SMALLEST_BYTES = 20_000\n"
        "if __name__ == '__main__': sys.exit(cli.main(sys.argv[1:]))"
    )
    script = tmp_path / "clean.py"
    script.write_text(program)
    argv = [sys.executable, script, "clean", *dump, "--output-dir", tmp_path / "cut", *ALL]
    rng = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(list(map(str, argv)), start_new_session=True)
        time.sleep(rng.uniform(0.5, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut").exists() or report(tmp_path / "cut")
    # Processes of a parent that was killed end by themselves, and let go of the folder with that.
    assert subprocess.run(list(map(str, argv)), timeout=60).returncode == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_bad_input(dump: list[Path], tmp_path: Path, refused) -> None:
    out = tmp_path / "out"
    assert "nothing to do" in refused("clean", dump[0], "--output-dir", out)
    both = (dump[0], "--output-dir", out)
    assert "--near-threshold 0.0" in refused(
        "clean", *both, "--near-dedup", "--near-threshold", "0.0"
    )
    assert "above --max-characters" in refused(
        "clean", *both, "--min-characters", 9, "--max-characters", 3
    )
    no_id = ("--id-field", "key", "--max-bad-lines", 9)
    assert "none of the first 10 lines has the field 'key'" in refused("clean", *both, *no_id)
    assert "nothing is left" in refused("clean", *both, "--min-characters", 1_000_000)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "holds something else" in refused(
        "clean", dump[0], "--output-dir", tmp_path / "full", "--exact-dedup"
    )
    assert "lies in the input folder" in refused(
        "clean", tmp_path, "--output-dir", out, "--exact-dedup"
    )
    broken = tmp_path / "broken.jsonl.zst"
    broken.write_bytes(zstandard.compress(dump[0].read_bytes())[:-20])
    assert "cut short" in refused("clean", dump[0], broken, "--output-dir", out, "--exact-dedup")


def test_libraries_that_are_missing_are_named(
    dump: list[Path], tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, option in (("datatrove.data", "--quality fineweb"), ("rensa", "--near-dedup")):
        monkeypatch.setitem(sys.modules, module, None)
        said = refused("clean", dump[0], "--output-dir", tmp_path / "out", *option.split())
        assert "pip install 'megatron-ladder[clean]'" in said


def test_what_is_not_used_is_said(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": text}) for text in ("one", "one", "two")]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join([*lines, "{broken", '{"text": null}']))
    (tmp_path / "in" / "b.csv").write_text("x")
    argv = ["clean", str(tmp_path / "in"), "--exact-dedup", "--output-dir", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    told = capsys.readouterr().out
    assert (
        f"1 lines could not be used; the first ones:\n  {tmp_path}/in/a.jsonl:4: not JSON" in told
    )
    assert "1 files of the input folders not read (0.0 MB): *.csv (1)" in told
    report = json.loads((tmp_path / "out" / "clean-report.json").read_text())
    assert report["left_out"] == [{"named": "*.csv", "files": 1, "bytes": 1}]
    assert report["kept"]["documents"] == 2
    report["options"]["version"] -= 1  # made by an older release
    (tmp_path / "out" / "clean-report.json").write_text(json.dumps(report))
    assert cli.main(argv) == 0
    assert "already done" in capsys.readouterr().out
