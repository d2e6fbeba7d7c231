"""benchmarks/refine: triplets of catalogues, and all of the recipe on a hundredth of the work."""

import itertools
import json
from pathlib import Path

import polib
import pytest

from data_prep import cli as data_cli
from refine import stages, triplets

NOUNS = ["page", "image", "user", "group", "site", "form", "field", "title", "author", "comment"]
VERBS = ("delete the", "add another", "find each", "see every", "copy one")
ENDINGS = {"pt_BR": "ão", "pt": "am", "es": "ón", "gl": "ón", "fr": "ons", "it": "one", "ca": "ó"}


def translated(english: str, language: str) -> str:
    """By a rule: the words end as the language's do."""
    return " ".join(
        w if w.startswith("%") else w[::-1] + ENDINGS[language] for w in english.split()
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogues as Django's, in one folder for each language."""
    folder = tmp_path_factory.mktemp("package")
    english = [
        f"{verb} {noun} %(name)s {NOUNS[number % 7]} {number}"
        for number, (verb, noun) in enumerate((v, n) for v in VERBS for n in NOUNS)
    ]
    for language in ENDINGS:
        file = polib.POFile()
        file.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
        for number, text in enumerate(english):
            if language == "gl" and number % 3 == 0:
                continue  # not translated
            if number == 0:  # a plural
                both = {0: "um", 1: translated(text, language)}
                entry = polib.POEntry(msgid="one", msgid_plural=text, msgstr_plural=both)
            else:
                entry = polib.POEntry(msgid=text, msgstr=translated(text, language))
            file.append(entry)
        file.append(polib.POEntry(msgid="Page", msgstr="a single word is left out"))
        path = folder / "conf" / "locale" / language / "LC_MESSAGES" / "django.po"
        path.parent.mkdir(parents=True)
        file.save(str(path))
    return folder


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_triplets(package: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(triplets, "LIKE", 0.9)  # the texts of this test are much alike
    counts = triplets.write(tmp_path / "text", [package])
    tmp_path /= "text"
    train, held_out = read(tmp_path / "train.jsonl"), read(tmp_path / "held-out.jsonl")
    assert len(train) == counts["train"] > len(held_out) == counts["held-out"] > 0
    for one in train + held_out:
        assert one["reference"] == translated(one["source"], "pt_BR")
        drafts = [translated(one["source"], language) for language in ("pt", "es", "gl")]
        assert one["draft"] in drafts
    sources = [{one["source"] for one in some} for some in (train, held_out)]
    assert not sources[0] & sources[1]
    assert "Page" not in sources[0] | sources[1]
    base = read(tmp_path / "base.jsonl")
    for one in base:
        name = (triplets.DRAFTS | triplets.OTHERS)[one["language"]][0]  # no Brazilian Portuguese
        assert one["reference"] == translated(one["source"], name)
        assert one["source"] not in sources[1]
    same = [one["draft"] == one["reference"] for one in base]
    assert 0.02 < sum(same) / len(same) < 0.5  # some of seven words are spoiled in most texts
    triplets.write(tmp_path / "again", [package])
    for file in tmp_path.glob("*.jsonl"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_nothing_in_training_is_like_a_held_out_message() -> None:
    def texts(reference: str) -> dict[str, str]:
        return {triplets.TARGET: reference, "Spanish": "x"}

    messages = {f"message number {n} of many words": texts(f"{n}" * 9) for n in range(60)}
    held_out = triplets.split(messages)[1]
    assert 0 < len(held_out) < 30
    assert triplets.split(messages)[0] == {}  # all English texts are alike
    chosen = next(iter(held_out))
    apart = {chosen: texts("um texto em português"), "far away from it": texts("outra coisa")}
    kept, _ = triplets.split({**apart, "quite another": texts("um texto em portugues")})
    assert "quite another" not in kept  # its reference is like that of a held-out message
    assert "far away from it" in kept or triplets._draw("far away from it") < triplets.HELD_OUT


def options_of(command: tuple) -> dict[str, str]:
    words = [str(word) for word in command]
    return dict(itertools.pairwise(words))


def test_every_order_reads_the_same_tokens(package: Path, tmp_path: Path, monkeypatch) -> None:
    """The data are made; trainings and evaluations are taken down alone."""
    monkeypatch.setattr(triplets, "LIKE", 0.9)
    commands: dict[str, tuple] = {}

    def run(*words: object) -> None:
        out = Path(str(words[-1]))
        if words[0] == "data":
            assert data_cli.main([*map(str, words[1:])]) == 0
        elif words[0] == "eval":
            assert options_of(words)["--tasks"] == "refine"
            out.mkdir(parents=True)
        else:
            commands[out.name] = words

    monkeypatch.setattr(stages, "run", run)
    stages.prepare(tmp_path, [package], 330, 40)
    for order in stages.ORDERS:
        stages.tune(tmp_path, order, 7, 2, 1e-3)
    parts = {g: 2 * stages.tokens_of(tmp_path / "data" / g) for g in stages.GRADES}
    names = ["restarted-7-easy", "restarted-7-medium", "restarted-7"]
    assert list(commands) == ["base", "mixed-7", "staged-7", "reversed-7", *names]
    tokens = {
        name: int(options_of(command)["--schedule.train-tokens"])
        for name, command in commands.items()
        if name != "base"
    }
    assert tokens["mixed-7"] == tokens["staged-7"] == tokens["reversed-7"] == sum(parts.values())
    assert [tokens[name] for name in names] == list(parts.values())
    for name, begin in zip(names, ["base", *names], strict=False):
        assert options_of(commands[name])["--init-from"] == str(tmp_path / "runs" / begin)
    for order, grades in {"staged": stages.GRADES, "reversed": stages.GRADES[::-1]}.items():
        data = json.loads((tmp_path / f"{order}.json").read_text())["data"]
        assert [Path(path).name for path in data["paths"]] == list(grades)
        assert data["weights"] == [1, 0, 0]
        first = parts[grades[0]]
        assert data["phases"] == [
            {"from_tokens": first, "weights": [0, 1, 0]},
            {"from_tokens": first + parts[grades[1]], "weights": [0, 0, 1]},
        ]
    assert stages.tokens_of(tmp_path / "data" / "held-out") > 0
    commands.clear()
    stages.tune(tmp_path, "staged", 7, 2, 1e-3)  # done before
    assert not commands


@pytest.mark.slow
def test_the_recipe_from_catalogues_to_figures(package: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(triplets, "LIKE", 0.9)
    work, json_file, picture = tmp_path / "work", tmp_path / "a.json", tmp_path / "a.png"
    options = ["--work-dir", work, "--catalogues", package, "--seeds", 1, "--vocab-size", 330]
    options += ["--base-steps", 4, "--epochs", 1, "--orders", "mixed", "staged", "restarted"]
    argv = [*map(str, options), "--json", str(json_file), "--picture", str(picture)]
    stages.main(argv)
    report = json.loads(json_file.read_text())
    found = report["results"]
    assert set(found) == {"base", "mixed", "staged", "restarted"}
    tokens = sum(report["tokens"][grade] for grade in stages.GRADES)
    for order in ("mixed", "staged"):
        assert found[order][0]["step"] == -(-tokens // stages.TOKENS_A_STEP)
    drafts = {name: rows[0]["metrics"]["draft_chrf"] for name, rows in found.items()}
    assert len(set(drafts.values())) == 1
    assert picture.stat().st_size > 1000
    times = [path.stat().st_mtime_ns for path in sorted((work / "scores").iterdir())]
    stages.main(argv)  # nothing is made again
    assert [path.stat().st_mtime_ns for path in sorted((work / "scores").iterdir())] == times


def test_the_table() -> None:
    def result(chrf: float) -> dict:
        scores = {"chrf": chrf, "bleu": chrf / 2, "draft_chrf": 50.0, "draft_bleu": 25.0}
        return {"metrics": scores}

    found = {
        "base": [result(10)],
        "mixed": [result(60), result(62)],
        "staged": [result(61), result(60)],
    }
    assert stages.rows_of(found) == [
        ["the drafts as they are", "50.0", "25.0", ""],
        ["the model before", "10.0", "5.0", ""],
        ["mixed", "61.0 (60.0, 62.0)", "30.5 (30.0, 31.0)", ""],
        [
            "staged: easy, medium, hard",
            "60.5 (61.0, 60.0)",
            "30.2 (30.5, 30.0)",
            "-0.5 (+1.0, -2.0)",
        ],
    ]
