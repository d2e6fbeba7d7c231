"""Any model as one plain module: of a run, of an import and of a Hugging Face folder."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_ladder.errors import UserError
from pretrain.convert.import_model import import_model
from pretrain.convert.plain_model import load_plain_model
from pretrain.data.folders import open_folder
from pretrain.data.sample import check_tokenizer, sample_sequences
from pretrain.model.staleness import (
    loss_with_ladder_layers,
    mean_loss,
    measure_staleness,
    save_staleness,
    saved_staleness,
)
from tests.data_sets import write_data_set
from tests.unit.hf import foreign, tiny


@pytest.mark.parametrize("name", foreign.MODELS)
def test_folders_and_imports_give_transformers_logits(name: str, tmp_path: Path) -> None:
    published = foreign.save(foreign.make(name), tmp_path / "published")
    import_model(published, tmp_path / "run")
    ids = torch.randint(0, foreign.VOCAB, (2, 20))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(published)(ids).logits
        for path in (published, tmp_path / "run", tmp_path / "run/checkpoints/step_00000000"):
            plain = load_plain_model(path)
            torch.testing.assert_close(plain.model(ids).logits, expected, atol=1e-4, rtol=0)
            assert plain.tokenizer["eod_id"] == 2
            assert plain.tokenizer_file.is_file()
            assert plain.config.num_layers == len(plain.model.model.layers)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_plain_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="no checkpoint"):
        load_plain_model(tmp_path)
    published = foreign.save(foreign.make("qwen2, tied"), tmp_path / "published")
    text = (published / "config.json").read_text()
    (published / "config.json").write_text(
        text.replace('"intermediate_size": 48', '"intermediate_size": 40')
    )
    with pytest.raises(UserError, match="misshaped"):
        load_plain_model(published)


def test_a_layers_staleness_is_what_that_ladder_model_loses() -> None:
    torch.manual_seed(3)
    standard = tiny.model(residual="standard")
    sequences = tiny.tokens(3, 13)
    found = measure_staleness(standard, sequences, "tests")
    assert found.tokens == 36
    # Over all sequences and positions at once, by transformers' own loss.
    assert found.standard == pytest.approx(
        standard(sequences, labels=sequences).loss.item(), abs=1e-5
    )
    for layer, loss in enumerate(found.alone):
        ladder = tiny.model(residual="ladder", ladder_layers=[layer])
        ladder.load_state_dict(standard.state_dict())
        logits = ladder(sequences[:, :-1]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        assert abs(loss - found.standard) > 1e-3
    assert all(layer.residual == "standard" for layer in standard.model.layers)
    best = min(range(4), key=lambda i: found.alone[i])
    assert found.choose(1) == (best,)
    assert found.order()[0] == best
    assert found.choose(4) == (0, 1, 2, 3)
    for count in (0, 5):
        with pytest.raises(UserError, match="4 layers"):
            found.choose(count)


def test_a_ladder_model_is_measured_from_standard_and_left_as_it_was() -> None:
    ladder = tiny.model(residual="ladder", ladder_layers=2)
    sequences = tiny.tokens(2, 9)
    loss = mean_loss(ladder, sequences)
    assert measure_staleness(ladder, sequences, "tests").standard != pytest.approx(loss, abs=1e-4)
    assert mean_loss(ladder, sequences) == loss
    assert loss_with_ladder_layers(ladder, sequences, [2, 3]) == loss


def test_a_layer_of_a_parallel_model_is_made_a_parallel_ladder_layer() -> None:
    parallel, sequences = tiny.model(residual="parallel"), tiny.tokens(2, 9)
    found = measure_staleness(parallel, sequences, "tests")
    assert found.standard == mean_loss(parallel, sequences)
    assert all(layer.residual == "parallel" for layer in parallel.model.layers)
    for layer, loss in enumerate(found.alone):
        ladder = tiny.model(residual="parallel-ladder", ladder_layers=[layer])
        ladder.load_state_dict(parallel.state_dict())
        assert loss == mean_loss(ladder, sequences)
        assert (abs(loss - found.standard) > 1e-3) == (layer > 0)  # the first reads the embedding


def test_staleness_is_kept_with_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="report depth"):
        saved_staleness(tmp_path)
    found = measure_staleness(tiny.model(residual="standard"), tiny.tokens(1, 9), "tests")
    save_staleness(tmp_path, found)
    assert saved_staleness(tmp_path) == found


def test_samples_are_pieces_of_the_held_out_split(tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data", validation_documents=3, document_length=50)
    folder = open_folder(data)
    sample = sample_sequences(folder, count=4, length=20)
    assert sample.shape == (4, 21)
    tokens = torch.frombuffer(bytearray((data / "validation.bin").read_bytes()), dtype=torch.uint16)
    windows = tokens.to(torch.int64).unfold(0, 21, 1)
    places = [int((windows == piece).all(1).nonzero()[0]) for piece in sample]
    assert places == [0, 43, 86, 129]
    assert len(sample_sequences(folder, count=100, length=20)) == 7
    with pytest.raises(UserError, match="150 tokens"):
        sample_sequences(folder, count=1, length=150)
    check_tokenizer(folder, data / "tokenizer.model", Path("model"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="another tokenizer than that of model"):
        check_tokenizer(folder, tmp_path / "tokenizer.json", Path("model"))
    # The same tokenizer as an exported folder has it beside its tokenizer.json.
    (tmp_path / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    check_tokenizer(folder, tmp_path / "tokenizer.json", Path("model"))
