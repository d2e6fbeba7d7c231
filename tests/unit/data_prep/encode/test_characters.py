"""Both engines give the same ids for every character of Unicode."""

import json
import random
import runpy
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.encode import characters, probe
from data_prep.encode.encoders import open_encoder
from data_prep.encode.engines import FastEngine, LazyReference, load_fast
from data_prep.encode.guard import Verdict, judge
from data_prep.parts.plan import plan_parts
from data_prep.read.reading import Reading
from data_prep.read.sources import find_sources

SCRIPT = runpy.run_path(str(Path(__file__).parents[4] / "scripts" / "characters.py"))
SPLIT, PATTERNS = SCRIPT["split"], SCRIPT["PATTERNS"]
GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NFC = {"type": "NFC"}
BYTE_LEVEL: dict[str, tuple[Any, Any]] = {
    "gpt-2": (None, GPT_2),
    "llama-3": (None, SPLIT(PATTERNS["Llama 3, Olmo"])),
    "gpt-4o": (None, SPLIT(PATTERNS["GPT-4o"])),
    "qwen-3": (NFC, SPLIT(PATTERNS["Qwen 2 and 3"])),
}
SENTENCEPIECE: dict[str, dict[str, object]] = {
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
    "stripped": {"normalization_rule_name": "identity"},
    "as it is": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
}
# Unicode 17's letters and digits; marks, those of newer versions too; the parts of Hangul; what NFC and
# NFKC change; joiners; white space; long s, which the patterns' (?i:'s) takes.
ODD = (
    "\U00011dd4\U00018dcb\U00033479\U00011de0\u088f\u0301\u0323\u0334\u0345"
    "\u1ac6\U0001e6e3\U000105d2\u0307"
    "\u1100\u1161\u11a8\u1e9b\ufb01\u2126\u212b\u09af\u09bc\u09df\u200d\u200c\u3000\u0085\u00a0\u2581\u017f"
    "aA1 .'\r\n\t"
)


def byte_level(path: Path, normalizer: Any, pre_tokenizer: Any) -> Path:
    """A tokenizer.json whose vocabulary shows where words end."""
    tokenizer = {"version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    model = {"type": "BPE", "dropout": None, "fuse_unk": False, "byte_fallback": False}
    tokenizer |= probe._probe({"model": model})
    count = len(tokenizer["model"]["vocab"])
    end = {"id": count, "content": "<|endoftext|>", "single_word": False, "lstrip": False}
    end |= {"rstrip": False, "normalized": False, "special": True}
    path.write_text(json.dumps({**tokenizer, "added_tokens": [end]}))
    return path


def trained(path: Path, texts: list[str], **options: object) -> Path:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([line for t in texts for line in t.split("\n")]),
            model_writer=file,
            vocab_size=420,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return path


@pytest.fixture(scope="session")
def kinds(texts, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    found = {name: byte_level(folder / f"{name}.json", *how) for name, how in BYTE_LEVEL.items()}
    return found | {
        name: trained(folder / f"{name}.model", texts, **options)
        for name, options in SENTENCEPIECE.items()
    }


@pytest.fixture(scope="session")
def engines(kinds, jsonl) -> dict[str, tuple[Verdict, LazyReference, FastEngine]]:
    parts = plan_parts(find_sources((jsonl,)), "file")
    found = {}
    for name, path in kinds.items():
        verdict = judge(path, open_encoder(path), None, parts, Reading())
        lazy = LazyReference(path, None)
        fast = FastEngine(load_fast(path), verdict.routed, lazy, verdict.characters)
        found[name] = verdict, lazy, fast
    return found


def same(lazy: LazyReference, fast: FastEngine, texts: list[str]) -> bool:
    expected, found = lazy.engine().encode(texts), fast.encode(texts)
    return all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_no_kind_is_slow_by_bad_luck(engines, name: str) -> None:
    """Whatever the made-up strings hold, the fast engine is used."""
    assert engines[name][0].fast, engines[name][0].report


ANY = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ODD))


@given(st.lists(st.text(ANY, max_size=12), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_any_text_has_the_same_ids(engines, name: str, texts: list[str]) -> None:
    _, lazy, fast = engines[name]
    assert same(lazy, fast, texts)


# Blocks of thousands: Chinese characters, Hangul's syllables, private use and the like.
ALIKE = (
    range(0x3400, 0xA000),
    range(0xAC00, 0xD7A4),
    range(0x17000, 0x18D00),
    range(0x20000, 0x323B0),
)


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_every_assigned_character_has_the_same_ids(engines, name: str, step: int) -> None:
    """Of blocks whose characters are all alike, every 97th."""
    _, lazy, fast = engines[name]
    chance = random.Random(name)
    codes = [
        c
        for c in (*range(1, 0x33500), *range(0xE0000, 0xE0200))
        if not 0xD800 <= c < 0xE000 and (c % step == 0 or not any(c in block for block in ALIKE))
    ]
    # Each by itself, so that those that go to the reference take no others with them.
    plain = [chr(c) for c in codes if fast.takes(chr(c))]
    chance.shuffle(plain)
    around = [("a", "a"), ("1", "."), (" ", "A"), ("'", "\u0301")]
    texts = [
        "\n".join(f"{left}{c}{right}" for c in plain[i : i + 500])
        for i, (left, right) in zip(range(0, len(plain), 500), around * len(plain), strict=False)
    ]
    assert all(fast.takes(text) for text in texts)
    assert same(lazy, fast, texts)
    routed = [chr(c) for c in codes if not fast.takes(chr(c))]
    assert same(lazy, fast, [f"a{c}a" for c in routed])
    assert len(routed) < 6000


def test_marks_in_a_row_are_put_in_the_same_order(engines) -> None:
    """NFC sorts them by their classes, of which there are more than the table's neighbours show."""
    _, lazy, fast = engines["qwen-3"]
    chance = random.Random(0)
    marks = [chr(c) for c in range(0x300, 0x20000) if unicodedata.category(chr(c))[0] == "M"]
    marks = [mark for mark in marks if fast.takes(mark)]

    def word() -> str:
        common = marks[:112] if chance.random() < 0.5 else marks
        some = [chance.choice(common) for _ in range(chance.choice((1, 2, 3, 40)))]
        return chance.choice("aeiouEकবกあが한") + "".join(some)

    texts = ["".join(word() for _ in range(5)) for _ in range(1000)]
    assert all(fast.takes(text) for text in texts)
    assert same(lazy, fast, texts)


@pytest.mark.parametrize("name", ["nmt_nfkc", "nfkc_cf"])
def test_decomposed_text_is_composed_as_sentencepiece_does_it(engines, name: str) -> None:
    """Graphemes of six bytes and more, which gigatoken and tokenizers look up character by character."""
    _, lazy, fast = engines[name]
    texts = [
        unicodedata.normalize("NFD", text)
        for text in ("각", "Ầ", "プが", "ญี่ปุ่น", "क़ी", "ἐνθάδ\u1fbd ἵξομαι")
    ]
    assert same(lazy, fast, texts) and all(fast.takes(text) for text in texts)
    # It is the same text as the composed one.
    assert (
        same(lazy, fast, ["각"])
        and fast.encode([texts[0]])[0].tolist() == fast.encode(["각"])[0].tolist()
    )


def test_the_documents_with_such_a_character_alone_go_to_the_reference(
    engines, monkeypatch
) -> None:
    verdict, _, fast = engines["llama-3"]
    assert "\U00011dd4" in verdict.characters and "\U00018dcb" in verdict.characters
    assert f"one of {len(verdict.characters):,} rare characters" in verdict.report
    slow: list[str] = []

    class Counting:
        def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            slow.extend(texts)
            return np.zeros(len(texts), np.uint32), np.ones(len(texts), np.int64)

    monkeypatch.setattr(LazyReference, "engine", lambda self: Counting())
    fast.encode(["plain", "日本語 🙂 naïve", "a\U00011dd4a"])
    assert slow == ["a\U00011dd4a"]


def test_a_data_set_with_such_a_character(kinds, tmp_path, capsys) -> None:
    """The ids are the reference's, though no text of the check's sample has one."""
    lines = [f"plain text {i} " + "word " * 2000 for i in range(70)]
    lines[69] += "a\U00011dd4a"
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    for engine in ("fast", "reference"):
        argv = ["tokenize", str(file), "--tokenizer", str(kinds["llama-3"]), "--engine", engine]
        argv += ["--output-dir", str(tmp_path / engine), "--validation-fraction", "0"]
        assert cli.main(argv) == 0
        assert ("engine: gigatoken" in capsys.readouterr().out) == (engine == "fast")
    assert (tmp_path / "fast" / "train.bin").read_bytes() == (
        tmp_path / "reference" / "train.bin"
    ).read_bytes()


def test_the_table_is_what_the_installed_versions_do(monkeypatch) -> None:
    """Where it has characters, around them, and in a plane without any."""
    some = (range(0x800, 0x900), range(0x105C0, 0x10600), range(0x16EA0, 0x16EE0))
    monkeypatch.setattr(probe, "ASSIGNED", some)
    monkeypatch.setattr(probe, "OTHERS", (range(0x50000, 0x50100),))
    table = json.loads(characters.TABLE.read_text())
    if characters.versions() not in table:
        pytest.skip(f"characters.json does not have {characters.versions()}")
    tried = {c for r in some for c in r} | {ord(pair[0]) for pair in probe.COMPOSED}
    for normalizer, pre_tokenizer in BYTE_LEVEL.values():
        model = {"type": "BPE", "dropout": None, "fuse_unk": False, "byte_fallback": False}
        tokenizer = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model}
        known = characters.from_ranges(
            table[characters.versions()][characters.cut_by({**tokenizer})]
        )
        found = probe.different_characters({"version": "1.0", **tokenizer})
        assert found and set(found) == set(known) & tried


def test_versions_that_are_not_in_the_table(kinds, monkeypatch, tmp_path, capsys) -> None:
    table = tmp_path / "characters.json"
    table.write_text("{}")
    monkeypatch.setattr(characters, "TABLE", table)
    monkeypatch.setattr(probe, "ASSIGNED", (range(0x880, 0x890),))
    monkeypatch.setattr(probe, "OTHERS", ())
    found = characters.characters_of(json.loads(kinds["llama-3"].read_text()))
    assert found == "\u088f"
    assert "comparing all characters of gigatoken" in capsys.readouterr().err


def test_ranges() -> None:
    codes = [0x88F, 0x10940, 0x10941, 0x10942, 0x33479]
    assert characters.to_ranges(codes) == "88f 10940-10942 33479"
    assert characters.from_ranges("88f 10940-10942 33479") == codes
    assert characters.to_ranges([]) == "" and characters.from_ranges("") == []


def test_what_decides_how_characters_are_read(kinds) -> None:
    """Not the vocabulary, and not options about spaces."""
    tokenizer = json.loads(kinds["llama-3"].read_text())
    same = json.loads(kinds["llama-3"].read_text())
    same["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    same["model"]["vocab"] = {}
    assert characters.cut_by(tokenizer) == characters.cut_by(same)
    others = [json.loads(kinds[name].read_text()) for name in BYTE_LEVEL]
    assert len({characters.cut_by(other) for other in others}) == len(others)


@pytest.mark.slow
def test_no_other_pairs_become_one_character() -> None:
    """NFC's pairs that gigatoken knows and tokenizers does not: all of one block of 128, or with a mark."""
    import tokenizers
    from gigatoken.gigatoken_rs import load_hf_json

    model = {"type": "BPE", "dropout": None, "fuse_unk": False, "byte_fallback": False}
    plain = {"version": "1.0", "normalizer": None, "pre_tokenizer": GPT_2}
    plain |= probe._probe({"model": model})
    nfc = json.dumps({**plain, "normalizer": NFC})
    composing, reference = load_hf_json(nfc.encode()), tokenizers.Tokenizer.from_str(nfc)
    as_it_is = load_hf_json(json.dumps(plain).encode())
    found = set()
    letters = [range(0x80, 0x3400), range(0xA000, 0xAC00), range(0x10000, 0x12000)]
    letters += [range(0x16100, 0x17000), range(0x1AFF0, 0x20000)]
    for code in (c for some in letters for c in some):
        block = range(code & ~127, (code & ~127) + 128)
        pairs = [chr(code) + chr(second) for second in (*block, *range(0x300, 0x346))]
        text = "\n".join(pairs)
        if not np.array_equal(composing.encode(text), as_it_is.encode(text)):
            for pair in pairs:
                ids = composing.encode(pair).tolist()
                if len(ids) < len(as_it_is.encode(pair)) and ids != reference.encode(pair).ids:
                    found.add(pair)
    assert found <= set(probe.COMPOSED) and len(found) == len(probe.COMPOSED)
