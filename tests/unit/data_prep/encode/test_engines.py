"""The fast engine is used only where it gives the reference's ids."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.encode import engines
from data_prep.encode.encoders import open_encoder
from data_prep.encode.engines import FastEngine, LazyReference, ReferenceEngine, load_fast
from data_prep.encode.guard import Verdict, judge
from data_prep.parts.plan import plan_parts
from data_prep.read.reading import Reading
from data_prep.read.sources import find_sources


def trained(folder: Path, texts: list[str], **options: object) -> Path:
    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([line for t in texts for line in t.split("\n")]),
            model_writer=file,
            vocab_size=420,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return path


@pytest.fixture(scope="session")
def kinds(texts, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Ours; Llama's way (a space before the text, user-defined pieces); byte-level BPE."""
    llama = trained(
        tmp_path_factory.mktemp("llama"),
        texts,
        model_type="bpe",
        user_defined_symbols=["[INST]", "[/INST]"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=["<|endoftext|>", "<|fim|>"])
    hugging_face = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(str(hugging_face))
    return {"ours": tokenizer, "llama": llama, "bpe": hugging_face}


def judged(path: Path, source: Path) -> Verdict:
    parts = plan_parts(find_sources((source,)), "file")
    return judge(path, open_encoder(path), None, parts, Reading())


@pytest.fixture(scope="session")
def verdicts(kinds, jsonl) -> dict[str, Verdict]:
    return {name: judged(path, jsonl) for name, path in kinds.items()}


def test_what_the_guard_finds(verdicts) -> None:
    assert all(v.fast for v in verdicts.values()), verdicts
    assert set(verdicts["ours"].routed) == {"<unk>", "<s>", "</s>"}  # not newline and tab
    assert {"[INST]", "[/INST]"} <= set(verdicts["llama"].routed)
    assert "<s>" in verdicts["ours"].report


MARKS = (
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "<|endoftext|>",
    "<|fim|>",
    "<0x0A>",
    "▁",
    " ",
    "\n",
    "def",
)


@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=8)), max_size=6).map("".join),
        max_size=5,
    )
)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("name", ["ours", "llama", "bpe"])
def test_both_engines_give_the_same_ids(kinds, verdicts, name: str, texts: list[str]) -> None:
    reference = LazyReference(kinds[name], None)
    fast = _engine(kinds[name], verdicts[name].routed)
    expected, lengths = reference.engine().encode(texts)
    found, found_lengths = fast.encode(texts)
    assert lengths.tolist() == found_lengths.tolist()
    assert expected.tolist() == found.tolist()


_engines: dict[Path, FastEngine] = {}


def _engine(path: Path, routed: tuple[str, ...]) -> FastEngine:
    if path not in _engines:
        _engines[path] = FastEngine(load_fast(path), routed, LazyReference(path, None))
    return _engines[path]


def test_an_engine_that_differs_is_not_used(
    tokenizer, jsonl, tmp_path, monkeypatch, capsys
) -> None:
    fast = FastEngine._fast

    def wrong(self: FastEngine, texts: list[str]) -> engines.Ids:
        ids, lengths = fast(self, texts)
        ids = ids.copy()
        ids[ids == 300] = 301
        return ids, lengths

    expected = tmp_path / "expected"
    argv = ["tokenize", str(jsonl), "--tokenizer", str(tokenizer), "--output-dir"]
    assert cli.main([*argv, str(expected), "--engine", "reference"]) == 0
    monkeypatch.setattr(FastEngine, "_fast", wrong)
    assert not judged(tokenizer, jsonl).fast
    capsys.readouterr()
    assert cli.main([*argv, str(tmp_path / "data")]) == 0
    assert "gigatoken 0.10.0 differs from it on" in capsys.readouterr().out
    assert (tmp_path / "data" / "train.bin").read_bytes() == (expected / "train.bin").read_bytes()


def test_an_engine_that_drops_a_token_is_not_used(tokenizer, jsonl, monkeypatch) -> None:
    fast = FastEngine._fast

    def short(self: FastEngine, texts: list[str]) -> engines.Ids:
        ids, lengths = fast(self, texts)
        lengths = lengths.copy()
        if len(lengths) and lengths[-1]:
            lengths[-1] -= 1
            ids = ids[:-1]
        return ids, lengths

    monkeypatch.setattr(FastEngine, "_fast", short)
    assert not judged(tokenizer, jsonl).fast


def test_tokenizers_that_the_fast_engine_does_not_know(texts, jsonl, tmp_path) -> None:
    unigram = trained(tmp_path, texts, model_type="unigram")
    verdict = judged(unigram, jsonl)
    assert not verdict.fast
    assert "gigatoken" in verdict.report and "unigram" in verdict.report


def test_documents_that_spell_control_pieces(tokenizer, tmp_path) -> None:
    """They are text, in their place among the others."""
    lines = ["plain", "a <s> b", "", "</s></s>", "plain again", "<unk>"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    for engine in ("fast", "reference"):
        argv = ["tokenize", str(file), "--tokenizer", str(tokenizer), "--engine", engine]
        argv += ["--output-dir", str(tmp_path / engine), "--validation-fraction", "0"]
        assert cli.main(argv) == 0
    ids = np.fromfile(tmp_path / "fast" / "train.bin", "<u2")
    assert ids.tolist() == np.fromfile(tmp_path / "reference" / "train.bin", "<u2").tolist()
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert ids.tolist() == [i for t in lines if t for i in (*model.encode(t), model.eos_id())]


def test_what_the_fast_engine_remembers_is_thrown_away(kinds, texts, monkeypatch) -> None:
    monkeypatch.setattr(FastEngine, "REMEMBERED_CHARACTERS", 1000)
    for name, loads in (("llama", True), ("bpe", False)):
        engine = FastEngine(load_fast(kinds[name]), (), LazyReference(kinds[name], None))
        before, expected = engine._backend, engine.encode(texts)[0].tolist()
        assert (engine._backend is not before) == loads
        assert engine.encode(texts)[0].tolist() == expected


def test_an_empty_batch(tokenizer) -> None:
    for engine in (_engine(tokenizer, ()), ReferenceEngine(open_encoder(tokenizer))):
        ids, lengths = engine.encode([])
        assert len(ids) == len(lengths) == 0


def test_torch_and_transformers_are_never_imported(jsonl, tokenizer, tmp_path) -> None:
    code = (
        "import sys; from data_prep import cli; status = cli.main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'megatron', 'pretrain'} & set(sys.modules))); "
        "sys.exit(status)"
    )
    argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", tmp_path / "data"]
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
