"""What lm-evaluation-harness is told of a model (it is optional, so a stand-in takes its place)."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from pretrain.convert.model_text import ModelText
from pretrain.convert.plain_model import load_plain_model
from pretrain.evaluation.harness import wrap
from tests.chat_models import PROMPT, tokenizer_json, write_chat_model


def told(plain, monkeypatch: pytest.MonkeyPatch) -> dict:
    stand_in = SimpleNamespace(HFLM=lambda **arguments: arguments)
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", stand_in)
    return wrap(plain, 64, 2)


def test_texts_begin_and_end_as_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_chat_model(tmp_path / "model")
    plain = load_plain_model(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    whole = theirs.encode(PROMPT)
    bos, end_of_text, end_of_turn = 300, 301, 304

    def begins(model) -> list[int]:
        lm = told(model, monkeypatch)
        ids = lm["tokenizer"].encode(PROMPT, add_special_tokens=lm["add_bos_token"])
        assert ids[-len(whole) + 1 :] == whole[1:]
        return [*ids[: -len(whole) + 1], lm["prefix_token_id"]]

    assert begins(plain) == [bos, bos]
    assert plain.model.generation_config.eos_token_id == [end_of_text, end_of_turn]
    # Runs: one whose data had BOS, and one whose data had none, although its tokenizer has one.
    run = replace(plain, path=tmp_path / "run")
    assert begins(run) == [bos, bos]
    without = ModelText(tokenizer_json(begins=False), (end_of_text,))
    assert begins(replace(run, text=without)) == [end_of_text]
    assert plain.model.generation_config.eos_token_id == [end_of_text]
