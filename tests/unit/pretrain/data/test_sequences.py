"""What a sequence holds: megatron-core's documents, and what the run asks for beside them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_ladder.errors import UserError
from pretrain.config.data import DataConfig
from pretrain.config.presets import PRESETS
from pretrain.data.checks import open_data
from pretrain.data.fim import FillInTheMiddle, fill_in_the_middle, find_tokens
from pretrain.data.sequences import Sequences, train_sequences
from tests.data_sets import write_data_set
from tests.held_out import validation_sequences

FIM = FillInTheMiddle(rate=1.0, spm_rate=0.5, prefix=-1, middle=-2, suffix=-3)


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_set(tmp_path / "data", document_length=23, train_documents=200)


def config_for(*paths: Path, **data):
    return replace(
        PRESETS["debug"](),
        data=DataConfig(paths=paths, seq_length=64, **data),
        output_dir=paths[0].parent,
    )


def sequences(*paths: Path, **data) -> Sequences:
    config = config_for(*paths, **data)
    return train_sequences(config, open_data(config), paths[0].parent / "cache")


def add_mask(data: Path) -> np.ndarray:
    """A mask for the train split; returns it."""
    tokens = np.fromfile(data / "train.bin", np.uint16)
    mask = (np.random.default_rng(1).random(len(tokens)) < 0.3).astype(np.uint8)
    mask.tofile(data / "train.mask")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"] |= {"mask_bytes": len(mask), "trained_tokens": int(mask.sum())}
    (data / "manifest.json").write_text(json.dumps(manifest))
    return mask


def test_items_are_megatrons_own(data: Path) -> None:
    ours = sequences(data)
    for number in range(50):
        expected = GPTDataset.__getitem__(ours, number)
        found = ours[number]
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_documents_apart(data: Path) -> None:
    ours, plain = sequences(data, attend_across_documents=False), sequences(data)
    for number in range(50):
        item = ours[number]
        assert torch.equal(item["tokens"], plain[number]["tokens"])
        ended = item["tokens"] == 2  # EOD
        assert torch.equal(item["documents"][1:] != item["documents"][:-1], ended[:-1])
        assert torch.equal(item["loss_mask"] == 0, ended)
        assert item["documents"].dtype == torch.int32


@pytest.mark.parametrize("apart", [False, True])
def test_masks_are_those_of_the_labels(data: Path, apart: bool) -> None:
    mask = add_mask(data)
    tokens = np.fromfile(data / "train.bin", np.uint16)
    length = 23
    by_document = {
        tokens[i : i + length].tobytes(): mask[i : i + length]
        for i in range(0, len(tokens), length)
    }
    ours = sequences(data, attend_across_documents=not apart)
    checked = 0
    for number in range(60):
        item = ours[number]
        text = torch.cat([item["tokens"][:1], item["labels"]]).numpy()
        ends = np.flatnonzero(text == 2)
        for begin, end in zip(ends[:-1] + 1, ends[1:] + 1, strict=True):
            whole = by_document[text[begin:end].astype(np.uint16).tobytes()].copy()
            if apart:
                whole[0] = 0
            assert item["loss_mask"].numpy()[begin - 1 : end - 1].tolist() == whole.tolist()
            checked += 1
    assert checked > 60


def test_a_blend_of_data_with_and_without_masks(data: Path, tmp_path: Path) -> None:
    add_mask(data)
    other = write_data_set(tmp_path / "other", train_documents=100)
    shares = [
        float(item["loss_mask"].mean()) for item in (sequences(data, other)[i] for i in range(80))
    ]
    assert 1.0 in shares
    assert min(shares) < 0.5


def test_validation_has_masks_too(data: Path) -> None:
    tokens = np.fromfile(data / "validation.bin", np.uint16)
    np.zeros(len(tokens), np.uint8).tofile(data / "validation.mask")
    config = config_for(data, fim_rate=0.0)
    held_out = validation_sequences(config, open_data(config), data.parent / "cache")["data"]
    assert held_out[0]["loss_mask"].sum() == 0


def test_a_mask_that_is_missing_is_refused(data: Path) -> None:
    add_mask(data)
    (data / "train.mask").unlink()
    with pytest.raises(UserError, match=r"train\.mask is missing"):
        open_data(config_for(data))


# --- fill in the middle ---


@settings(deadline=None)  # a busy machine is not what is tested
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(0, 2**32), st.booleans())
def test_what_is_rearranged_can_be_put_back(text: list[int], seed: int, suffix_first: bool) -> None:
    fim = replace(FIM, spm_rate=float(suffix_first))
    found = fim.rearranged(np.array(text, np.int64), np.random.default_rng(seed)).tolist()
    if len(text) < 2:
        assert found == text
        return
    assert found[0] == fim.prefix
    suffix, middle = found.index(fim.suffix), found.index(fim.middle)
    if suffix_first:
        assert found[middle + 1 :] + found[suffix + 1 : middle] == text
    else:
        assert found[1:suffix] + found[middle + 1 :] + found[suffix + 1 : middle] == text


def test_rates_are_shares() -> None:
    rng = np.random.default_rng(0)
    text = np.arange(50)
    fim = replace(FIM, rate=0.3, spm_rate=0.25)
    made = [fim.rearranged(text, rng).tolist() for _ in range(4000)]
    changed = [m for m in made if m[0] == fim.prefix]
    assert len(changed) / len(made) == pytest.approx(0.3, abs=0.03)
    assert sum(m[1] == fim.suffix for m in changed) / len(changed) == pytest.approx(0.25, abs=0.05)


@pytest.fixture
def with_fim(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pretrain.data.fim.find_tokens", lambda *_: (190, 191, 192))
    return data


def test_sequences_are_filled_in_and_always_the_same(with_fim: Path) -> None:
    half, again, none = (sequences(with_fim, fim_rate=rate) for rate in (0.5, 0.5, 0.0))
    changed = 0
    for number in range(60):
        item, plain = half[number], none[number]
        assert all(torch.equal(again[number][name], value) for name, value in item.items())
        assert torch.equal(item["tokens"][1:], item["labels"][:-1])
        assert len(item["tokens"]) == 64
        changed += not torch.equal(item["tokens"], plain["tokens"])
    assert 30 < changed <= 60
    config = config_for(with_fim, fim_rate=1.0)
    held_out = validation_sequences(config, open_data(config), with_fim.parent / "cache")["data"]
    assert not {190, 191, 192} & set(held_out[0]["tokens"].tolist()[:20])


def test_tokens_for_which_the_model_has_no_row_are_refused(with_fim: Path) -> None:
    """A tokenizer may have added tokens beyond the model's rows; padding rows would be trained instead."""
    config = config_for(with_fim, fim_rate=1.0)
    folder = open_data(config)[0]
    for size, fits in ((193, True), (192, False)):
        sized = replace(config, model=replace(config.model, vocab_size=size))
        if fits:
            assert fill_in_the_middle(sized, folder)
        else:
            with pytest.raises(UserError, match="190, 191 and 192, the model's ids end at 191"):
                fill_in_the_middle(sized, folder)


def test_documents_stay_whole(with_fim: Path) -> None:
    """Rearranged tokens do not leave their document, whose EOD stays last."""
    item = sequences(with_fim, fim_rate=1.0, attend_across_documents=False)[3]
    plain = sequences(with_fim, attend_across_documents=False)[3]
    wholes = [
        sorted(plain["tokens"][plain["documents"] == d].tolist())
        for d in plain["documents"].unique()
    ]
    found = [item["tokens"][item["documents"] == d].tolist() for d in item["documents"].unique()]
    for whole, ours in list(zip(wholes, found, strict=False))[:2]:
        extra = [t for t in ours if t in (190, 191, 192)]
        assert sorted(t for t in ours if t not in extra) == [t for t in whole if t not in extra]
        assert ours[-1] == 2


def test_data_with_masks_is_left_as_it_is(with_fim: Path) -> None:
    add_mask(with_fim)
    a, b = sequences(with_fim, fim_rate=1.0), sequences(with_fim)
    assert all(torch.equal(a[i]["tokens"], b[i]["tokens"]) for i in range(20))


def test_tokens_are_found_by_name(tmp_path: Path) -> None:
    import sentencepiece
    import tokenizers

    path = tmp_path / "tokenizer.json"
    names = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    model = tokenizers.models.WordLevel(
        {"<unk>": 0, **{n: i + 1 for i, n in enumerate(names)}}, "<unk>"
    )
    tokenizers.Tokenizer(model).save(str(path))
    assert find_tokens(path, None) == (1, 2, 3)
    assert find_tokens(path, (names[2], names[1], names[0])) == (3, 2, 1)
    with pytest.raises(UserError, match=r"has no tokens a, b, c: give --data\.fim-tokens"):
        find_tokens(path, ("a", "b", "c"))
    model_file = tmp_path / "tokenizer.model"
    with model_file.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["some text to learn from"] * 50),
            model_writer=file,
            vocab_size=280,
            byte_fallback=True,
            hard_vocab_limit=False,
            control_symbols=["<fim_prefix>", "<fim_middle>", "<fim_suffix>"],
            minloglevel=2,
        )
    assert find_tokens(model_file, None) == (3, 4, 5)
    with pytest.raises(UserError, match="has no tokens x"):
        find_tokens(model_file, ("x", "y", "z"))
    for file in (path, model_file):
        file.write_text("no tokenizer")
        with pytest.raises(UserError, match=r"cannot be read .*: copy the data set again"):
            find_tokens(file, None)


@pytest.mark.parametrize("name", ["fim_rate", "fim_spm_rate"])
def test_shares_are_from_0_to_1(data: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 1.5"):
        config_for(data, **{name: 1.5})
