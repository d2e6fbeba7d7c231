"""Generation from an exported folder."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron_ladder.errors import UserError
from megatron_ladder.hf.generate import generate_text
from megatron_ladder.inference import cache
from tests.unit.hf import tiny
from tests.unit.hf.test_export import export

PROMPTS = ["def f(x):\n    return", "import"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = tiny.model(residual="ladder", ladder_layers=2)
    with torch.no_grad():
        # Never a byte token, as random bytes are not text; nor <unk>, which has no text either.
        built.lm_head.weight[3 : 3 + 256] = 0
        built.lm_head.weight[0] = 0
    return built


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory, bpe_file):
    return export(model, tmp_path_factory.mktemp("export") / "out", bpe_file)


def test_greedy_is_the_likeliest_token_each_time(model, folder, bpe_file):
    """Against a loop over whole forward passes, prompt by prompt, with SentencePiece's own ids."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(bpe_file))
    texts = generate_text(folder, PROMPTS, max_new_tokens=12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer.encode(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert text == tokenizer.decode(ids)
        assert text.startswith(prompt)


def test_the_folders_defaults_do_not_come_on_top(folder, tmp_path):
    """An imported chat model's generation_config.json is kept for transformers' users."""
    other = shutil.copytree(folder, tmp_path / "other")
    defaults = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    defaults |= {"num_return_sequences": 2, "stop_strings": ["e"]}
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | defaults))
    texts = [generate_text(place, PROMPTS, max_new_tokens=12) for place in (folder, other)]
    assert texts[0] == texts[1]


def test_a_standard_model_generates_as_well(tmp_path, bpe_file):
    folder = export(tiny.model(residual="standard"), tmp_path / "out", bpe_file)
    (text,) = generate_text(folder, ["import"], max_new_tokens=4)
    assert text.startswith("import")
    assert text != "import"


def test_sampling_repeats_by_seed_and_leaves_the_random_state(folder):
    def sample(seed, **options):
        return generate_text(
            folder, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed, **options
        )

    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)
    greedy = generate_text(folder, PROMPTS, max_new_tokens=12)
    assert sample(1, top_k=1) == sample(1, top_p=1e-6) == greedy != sample(1)
    assert generate_text(folder, [], max_new_tokens=1) == []


def test_a_dropped_leading_space_is_kept(tmp_path):
    """With a dummy prefix, the new tokens decoded alone would lose their first space."""
    source = tiny.train_sentencepiece(
        tmp_path, "bpe", add_dummy_prefix=True, user_defined_symbols=[]
    )
    model = tiny.model(residual="ladder")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(source))
    pieces = [tokenizer.id_to_piece(i) for i in range(tiny.VOCAB)]
    word = next(i for i, p in enumerate(pieces) if p.startswith("▁") and p[1:].isalpha())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        ids = tokenizer.encode("import")
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        model.lm_head.weight[word] = hidden
    folder = export(model, tmp_path / "out", source)
    text = generate_text(folder, ["import"], max_new_tokens=1)
    assert text == ["import " + pieces[word].removeprefix("▁")]


def test_errors(folder, tmp_path):
    def fails(message, where=folder, prompts=("import",), **options):
        with pytest.raises(UserError, match=message):
            generate_text(where, prompts, **({"max_new_tokens": 4} | options))

    fails("does not exist", tmp_path / "none")
    fails("is not an exported model", tmp_path)
    fails("a prompt is empty", prompts=["import", ""])
    fails("context of 128", prompts=["1" * 125])
    assert generate_text(folder, ["1" * 124], max_new_tokens=4)
    fails("max_new_tokens", max_new_tokens=0)
    fails("temperature", temperature=-1.0)
    fails("top_k", top_k=0)
    fails("top_p", top_p=1.5)

    for name, message in (
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "is not an exported model"),
        ("config.json", "is not an exported model"),
    ):
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        (broken / name).unlink()
        fails(message, broken)
    for content in (b"\xff" * 100, (2).to_bytes(8, "little") + b"{}"):  # no weights at all
        damaged = tmp_path / f"damaged-{len(content)}"
        shutil.copytree(folder, damaged)
        (damaged / "model.safetensors").write_bytes(content)
        fails("its weights cannot be loaded", damaged)
    (broken / "config.json").write_text('{"model_type": "bert"}')
    fails("architecture none is not supported", broken)


def test_prompts_that_the_memory_has_no_room_for(folder, monkeypatch):
    monkeypatch.setattr(cache, "memory_here", lambda: 10_000)
    with pytest.raises(UserError, match=r"batch of 2 prompts of up to \d+ tokens.*use `serve`"):
        generate_text(folder, PROMPTS, max_new_tokens=6)


def test_a_temperature_that_is_almost_0_is_0(folder):
    greedy = generate_text(folder, PROMPTS, max_new_tokens=6)
    for temperature in (1e-6, 1e-30, 1e-300):
        assert generate_text(folder, PROMPTS, max_new_tokens=6, temperature=temperature) == greedy
    hot = {"max_new_tokens": 6, "temperature": 1.0}
    all_of_them = generate_text(folder, PROMPTS, top_k=1 << 40, **hot)
    assert all_of_them == generate_text(folder, PROMPTS, **hot)


def test_text_that_is_none(folder):
    with pytest.raises(UserError, match=r"no Unicode text: it holds '\\udcff' at character 1"):
        generate_text(folder, ["a\udcff"], max_new_tokens=1)


@pytest.mark.parametrize("pad", [None, -1, 10**6, 5])
def test_any_token_fills_what_is_masked(folder, tmp_path, pad):
    """Folders of others have no token to pad with, one that does not exist, or one that is text."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((copy / name).read_text()) | {"pad_token_id": pad}
        (copy / name).write_text(json.dumps(fields))
    assert generate_text(copy, PROMPTS, max_new_tokens=6) == generate_text(
        folder, PROMPTS, max_new_tokens=6
    )
