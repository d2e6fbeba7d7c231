"""Tokenizers as people have them: larger than the model, in older files, in files of others, or none."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_ladder.errors import UserError
from megatron_ladder.hf.tokenizer import added_beyond
from pretrain.cli import main
from pretrain.convert.plain_model import load_plain_model
from pretrain.data.checks import check_ids, open_data
from pretrain.data.folders import kept_facts, open_folder
from pretrain.evaluation.likelihood import token_losses
from pretrain.files import sha256
from pretrain.start.arguments import parse_train
from pretrain.start.initial import check_initial
from tests.data_sets import write_data_set

TEXTS = ("the quick brown fox", "  two spaces\n\tand a tab", "x = 12345", "naïve 日本 🙂", "[PAD]")
VOCAB = 280


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["the quick brown fox jumps over the lazy dog and the quick otters"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without a tokenizer, and beside it a tokenizer.json of as many tokens."""
    tokenizer = byte_bpe()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    folder = tmp_path_factory.mktemp("published")
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "model"


@pytest.fixture
def model(weights: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def tokenizer_json(weights: Path, *more: str) -> bytes:
    tokenizer = Tokenizer.from_file(str(weights.with_name("tokenizer.json")))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in more])
    return tokenizer.to_str().encode()


def imported(model: Path, *options: str) -> Path:
    run = model.with_name("run")
    assert main(["import", str(model), str(run), *options]) == 0
    return run


def data_set(folder: Path, tokenizer: bytes, tokens: int, at_most: int) -> Path:
    """Of a tokenizer.json; its largest id is `at_most`."""
    write_data_set(folder, vocab_size=at_most, tokenizer=tokenizer)
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"] |= {"file": "tokenizer.json", "kind": "huggingface"}
    manifest["tokenizer"] |= {"vocab_size": tokens}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ids = np.memmap(folder / "train.bin", "uint16", "r+")
    ids[5] = at_most
    ids.flush()
    return folder


def test_added_tokens_may_lie_beyond_the_model(
    weights: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A [PAD] that was added to a model of as many rows as the first tokens: it is said, and goes on."""
    own = tokenizer_json(weights, "[PAD]", "<image>")
    (model / "tokenizer.json").write_bytes(own)
    run = imported(model)
    said = capsys.readouterr().err
    assert "the model has 280 rows and none for [PAD] (280), <image> (281)" in said
    # The tokenizer comes back as it was.
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == own
    # Data may be trained on if it does not use them.
    unused = open_folder(data_set(tmp_path / "unused", own, 282, 279))
    used = open_folder(data_set(tmp_path / "used", own, 282, 280))
    check_ids([unused], 280)
    with pytest.raises(UserError, match=r"train split holds the token \[PAD\] with the id 280"):
        check_ids([unused, used], 280)
    (unused.path / "tokenizer.json").rename(unused.path / "elsewhere.json")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read .*: copy the data set"):
        check_ids([unused], 280)
    (unused.path / "elsewhere.json").rename(unused.path / "tokenizer.json")
    start = ["--preset", "adapt", "--init-from", str(run), "--data.seq-length", "32"]
    open_data(parse_train([*start, "--data.paths", str(unused.path)])[0])
    with pytest.raises(UserError, match="with the id 280, the model's ids end at 279"):
        open_data(parse_train([*start, "--data.paths", str(used.path)])[0])
    # And so for what is evaluated.
    plain = load_plain_model(model)
    list(token_losses(plain.model, [np.array([1, 279])], 1, ""))
    with pytest.raises(UserError, match="holds the token id 280, the model's ids end at 279"):
        list(token_losses(plain.model, [np.array([1, 2]), np.array([280, 2])], 1, ""))


def test_a_larger_vocabulary_is_another_models(weights: Path, model: Path, capsys) -> None:
    tokenizer = byte_bpe()
    assert added_beyond(tokenizer, 280) == {}
    assert added_beyond(tokenizer, 279) == {"<|endoftext|>": 279}
    assert added_beyond(tokenizer, 278) is None
    (model / "tokenizer.json").write_bytes(tokenizer_json(weights))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 278}))
    assert main(["import", str(model), str(model.with_name("run"))]) == 2
    assert "has 280 tokens, the model's vocab_size is 278" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_json_and_merges_txt(weights: Path, model: Path, tmp_path: Path, kind: str) -> None:
    """transformers' own ids, in the run and in the folder that is exported again."""
    fields = json.loads(tokenizer_json(weights))["model"]
    vocab = fields["vocab"] | {"<|endoftext|>": 279}
    (model / "vocab.json").write_text(json.dumps(vocab))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in fields["merges"])]
    (model / "merges.txt").write_text("\n".join(merges) + "\n")
    own = {"tokenizer_class": kind, "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    theirs = AutoTokenizer.from_pretrained(model)
    run = imported(model)
    facts = kept_facts(run)[0]
    file = facts.path / facts.tokenizer["file"]
    assert facts.tokenizer["sha256"] == sha256(file)
    ours = Tokenizer.from_file(str(file))
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        right = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False).ids == right
        assert again.encode(text, add_special_tokens=False) == right
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()
    with pytest.raises(UserError, match=r"`megatron-ladder import` makes a tokenizer\.json"):
        load_plain_model(model)


def test_files_of_other_tokenizers(model: Path, capsys) -> None:
    (model / "vocab.json").write_text("{}")
    (model / "merges.txt").write_text("#version: 0.2\n")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    out = str(model.with_name("out"))
    assert main(["import", str(model), out]) == 2
    assert "name the model's class as tokenizer_class" in capsys.readouterr().err
    ranks = (f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
    (model / "tokenizer.model").write_text("\n".join(ranks))
    assert main(["import", str(model), out]) == 2
    assert "is a file of tiktoken" in capsys.readouterr().err
    for name in ("tokenizer.model", "merges.txt"):
        (model / name).unlink()
    (model / "tekken.json").write_text("{}")
    imported(model)
    assert "(tekken.json, vocab.json cannot be read)" in capsys.readouterr().err


def test_weights_alone(weights: Path, model: Path, tmp_path: Path, capsys) -> None:
    """They go in and out; what needs a tokenizer asks for one; data of any tokenizer trains them."""
    run = imported(model)
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    capsys.readouterr()
    for command in (
        ["generate", str(run), "--prompt", "a"],
        ["eval", str(run), "--data", str(write_data_set(tmp_path / "data"))],
    ):
        assert main(command) == 2
        assert f"{run} has no tokenizer, because the model's folder had none" in (
            " ".join(capsys.readouterr().err.split())
        )
    own = tokenizer_json(weights)
    data = data_set(tmp_path / "own", own, 280, 279)
    config, _ = parse_train(
        ["--preset", "adapt", "--init-from", str(run), "--data.paths", str(data)]
    )
    check_initial(config, [open_folder(data)])
    # A run that was trained on it is exported with the data's tokenizer.
    assert main(["import", str(model), str(tmp_path / "trained")]) == 0
    kept = tmp_path / "trained" / "data" / "0"
    (kept / "manifest.json").write_bytes((data / "manifest.json").read_bytes())
    (kept / "tokenizer.json").write_bytes(own)
    assert main(["export", str(tmp_path / "trained"), str(tmp_path / "with")]) == 0
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == own


@pytest.mark.parametrize(("pad", "status"), [(-1, 0), (None, 0), (279, 0), (280, 2)])
def test_padding_tokens(
    weights: Path, model: Path, tmp_path: Path, capsys, pad: int | None, status: int
) -> None:
    """-1 means none in some models; transformers loads no model with an id beyond its rows."""
    (model / "tokenizer.json").write_bytes(tokenizer_json(weights))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    run = tmp_path / "run"
    assert main(["import", str(model), str(run)]) == status
    if status:
        assert "pad_token_id is 280, the model's ids end at 279" in capsys.readouterr().err
        with pytest.raises(AssertionError, match="within num_embeddings"):
            LlamaForCausalLM.from_pretrained(model)
        return
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    exported = json.loads((tmp_path / "again" / "config.json").read_text())
    assert exported["pad_token_id"] == pad
    LlamaForCausalLM.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("listed_in", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_to_a_sentencepiece_model(
    weights: Path, model: Path, tmp_path: Path, capsys, listed_in: str
) -> None:
    """A chat model's: its tokenizer.model alone would write <|im_end|> as text."""
    (tmp_path / "text").write_text("the fox the dog the hen\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(model / "tokenizer"),
        vocab_size=VOCAB - 2,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    first = pieces.vocab_size()
    assert first <= VOCAB - 2
    own: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    own |= {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>"}
    if listed_in == "added_tokens.json":
        (model / listed_in).write_text(json.dumps({"<|im_start|>": first, "<|im_end|>": first + 1}))
    else:
        shape = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        own["added_tokens_decoder"] = {
            str(i): {"content": token, "special": True, **shape}
            for i, token in ((0, "<unk>"), (first, "<|im_start|>"), (first + 1, "<|im_end|>"))
        }
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    theirs = AutoTokenizer.from_pretrained(model)
    run = imported(model)
    facts = kept_facts(run)[0]
    assert facts.tokenizer["vocab_size"] == first + 2
    ours = Tokenizer.from_file(str(facts.path / facts.tokenizer["file"]))
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in (*TEXTS, "<|im_start|>user\nthe fox<|im_end|>\n"):
        right = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False).ids == right
        assert again.encode(text, add_special_tokens=False) == right
    with pytest.raises(UserError, match=r"<\|im_start\|> \(\d+\), <\|im_end\|> \(\d+\) were added"):
        load_plain_model(model)
    # The pieces' own ids say nothing new.
    listed = {"0": {"content": "<unk>"}, "2": {"content": "</s>"}}
    own = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": listed}
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    (model / "added_tokens.json").unlink(missing_ok=True)
    assert load_plain_model(model).tokenizer["kind"] == "sentencepiece"


def test_mistrals_own_weights(weights: Path, model: Path, capsys) -> None:
    """They lie beside transformers' in many folders; alone they are not read."""
    (model / "tokenizer.json").write_bytes(tokenizer_json(weights))
    whole = (model / "model.safetensors").read_bytes()
    assert main(["import", str(model), str(model.with_name("run"))]) == 0
    alone = capsys.readouterr().out.split(":")[0]
    (model / "consolidated.safetensors").write_bytes(whole)
    assert main(["import", str(model), str(model.with_name("again"))]) == 0
    assert capsys.readouterr().out.split(":")[0] == alone  # the size too
    (model / "model.safetensors").unlink()
    assert main(["import", str(model), str(model.with_name("third"))]) == 2
    assert "has weights in Mistral's own format only" in capsys.readouterr().err
