import inspect
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from pretrain.config.data import DataConfig
from pretrain.config.presets import PRESETS
from pretrain.config.train import save_config
from pretrain.data import checks
from pretrain.data.batches import ValidationBatches, train_batches
from pretrain.data.checks import open_data
from pretrain.data.folders import keep_facts, kept_facts, open_folder, unigram_loss
from pretrain.index.parts import index_parts
from pretrain.start.going_on.past import same_data
from tests.data_sets import write_data_set


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_set(tmp_path / "data")


def config_for(*paths: Path, **data):
    return replace(PRESETS["debug"](), data=DataConfig(paths=paths, seq_length=64, **data))


def test_a_whole_folder_opens(data: Path) -> None:
    folder = open_folder(data)
    assert folder.tokens("train") == 60 * 64
    assert folder.tokens("test") == 0


def test_unigram_loss_is_the_entropy_of_the_counts(data: Path) -> None:
    tokens = np.fromfile(data / "validation.bin", dtype=np.uint16)
    shares = np.bincount(tokens) / len(tokens)
    entropy = -sum(p * math.log(p) for p in shares if p)
    assert unigram_loss(open_folder(data)) == pytest.approx(entropy)


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_a_step_reads_the_same_sequences_at_every_layout(data_parallel_size: int) -> None:
    config = replace(PRESETS["debug"](), micro_batch_size=2, global_batch_size=8)
    dataset = torch.utils.data.TensorDataset(torch.arange(1000))
    steps, micro_batches = 3, config.num_microbatches(data_parallel_size)
    seen: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(data_parallel_size):
        batches = train_batches(
            dataset,
            config,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
            consumed_samples=16,
        )
        for step in range(steps):
            for _ in range(micro_batches):
                seen[step] += next(batches)[0].tolist()
    assert [sorted(s) for s in seen] == [list(range(16 + 8 * i, 24 + 8 * i)) for i in range(steps)]


@pytest.mark.parametrize("data_parallel_size", [1, 2])
@pytest.mark.parametrize("begin", [0, 3, 5])
def test_a_ramp_reads_each_sequence_once_and_in_order(data_parallel_size: int, begin: int) -> None:
    """Also where it is resumed, within the ramp and after it."""
    config = replace(PRESETS["debug"](), micro_batch_size=1)
    config = replace(config, schedule=replace(config.schedule, rampup_batch_size=(2, 2, 12)))
    dataset = torch.utils.data.TensorDataset(torch.arange(1000))
    sizes = [2, 2, 4, 6, 8, 8]
    seen: list[list[int]] = [[] for _ in sizes]
    for rank in range(data_parallel_size):
        batches = train_batches(
            dataset,
            config,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
            consumed_samples=config.samples_after(begin),
        )
        for step in range(begin, len(sizes)):
            for _ in range(config.num_microbatches(data_parallel_size, step + 1)):
                seen[step] += next(batches)[0].tolist()
    assert [len(step) for step in seen[begin:]] == sizes[begin:]
    order = [sequence for step in seen for sequence in sorted(step)]
    assert order == list(range(sum(sizes[:begin]), sum(sizes)))


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3])
@pytest.mark.parametrize("wanted", [None, 7])
@pytest.mark.parametrize("stages", [1, 2])
def test_validation_reads_each_sequence_once(data_parallel_size, wanted, stages) -> None:
    """Full micro-batches, as many as the stages need; what fills them does not count."""
    config = replace(
        PRESETS["debug"](),
        micro_batch_size=4,
        eval_sequences=wanted,
        parallel=ParallelConfig(pipeline_model_parallel_size=stages),
    )
    dataset = [{"tokens": torch.tensor([i]), "loss_mask": torch.ones(1)} for i in range(10)]
    seen = []
    for rank in range(data_parallel_size):
        batches = ValidationBatches(
            dataset, config, data_parallel_rank=rank, data_parallel_size=data_parallel_size
        )
        assert len(batches) % stages == 0
        for batch in batches:
            assert len(batch["tokens"]) == 4
            seen += batch["tokens"][batch["loss_mask"] == 1].tolist()
    assert sorted(seen) == list(range(wanted or 10))


class Counted(list):
    """A data set that knows how many items were read."""

    read = 0

    def __getitem__(self, number):
        self.read += 1
        return super().__getitem__(number)


def test_a_validation_batch_is_made_when_it_is_taken() -> None:
    """Those of a whole split may not fit in the host's memory."""
    config = replace(PRESETS["debug"](), micro_batch_size=4, eval_sequences=None)
    split = Counted({"tokens": torch.tensor([i]), "loss_mask": torch.ones(1)} for i in range(10))
    batches = ValidationBatches(split, config, data_parallel_rank=0, data_parallel_size=1)
    assert (len(batches), split.read) == (3, 0)
    taken = iter(batches)
    for read in (4, 8, 11):  # the last one has two sequences, filled with the first one
        batch = next(taken)
        assert split.read == read
    assert batch["tokens"].flatten().tolist() == [8, 9, 0, 0]
    assert batch["loss_mask"].flatten().tolist() == [1, 1, 0, 0]
    assert [len(b["tokens"]) for b in batches] == [4, 4, 4]  # and once more


def _edit_manifest(data: Path, change) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    change(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data: give --data\.paths"):
        open_data(config_for())
    with pytest.raises(UserError, match="does not exist: make it with"):
        open_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        open_folder(tmp_path / "empty")


def test_manifests_that_are_none_are_refused(data: Path) -> None:
    (data / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not a data set's manifest"):
        open_folder(data)
    (data / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is not a data set's manifest"):
        open_folder(data)


def test_files_that_disagree_are_refused(data: Path) -> None:
    with (data / "train.bin").open("ab") as file:
        file.write(b"\x00\x00")
    with pytest.raises(UserError, match=r"train.bin has 7,682 bytes; the manifest says 7,680"):
        open_folder(data)
    # The manifest made to agree with the wrong .bin: the index still tells.
    _edit_manifest(data, lambda m: m["splits"]["train"].update(bin_bytes=7682))
    with pytest.raises(UserError, match=r"train.idx describes 3,840 tokens but .* holds 3,841"):
        open_folder(data)
    (data / "train.idx").unlink()
    with pytest.raises(UserError, match=r"train.idx is missing"):
        open_folder(data)


def test_an_index_of_another_type_is_refused(data: Path) -> None:
    raw = bytearray((data / "train.idx").read_bytes())
    raw[17] = 4
    (data / "train.idx").write_bytes(raw)
    with pytest.raises(UserError, match="is not the index of uint16 tokens"):
        open_folder(data)


def test_data_of_two_tokenizers_is_refused(data: Path, tmp_path: Path) -> None:
    other = write_data_set(tmp_path / "other", tokenizer=b"another")
    with pytest.raises(UserError, match="tokenized with different tokenizers"):
        open_data(config_for(data, other))


def test_a_vocabulary_larger_than_the_models_is_refused(data: Path) -> None:
    config = config_for(data)
    config = replace(config, model=replace(config.model, vocab_size=100))
    with pytest.raises(UserError, match="vocabulary of 200 ids, the model only"):
        open_data(config)


def test_too_little_data_for_the_sequence_length_is_refused(tmp_path: Path) -> None:
    short = write_data_set(tmp_path / "short", train_documents=1, document_length=30)
    with pytest.raises(UserError, match="the train split has 30 tokens, one sequence takes"):
        open_data(config_for(short))


def test_a_validation_split_without_a_whole_sequence_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uneven = write_data_set(tmp_path / "uneven", validation_documents=1, document_length=30)
    config = config_for(uneven)
    (folder,) = open_data(config)
    assert "uneven: no validation. Its validation split has 30 tokens" in caplog.text
    parts = index_parts(config, [folder], tmp_path / "cache")
    assert [part.what for part in parts] == [folder.prefix("train")]
    assert not folder.validates(30)
    assert folder.validates(29)


def test_weights_must_fit_the_paths(data: Path) -> None:
    for weights, said in (((1.0, 2.0), "give one of 0 or more"), ((0.0,), "not all of them 0")):
        with pytest.raises(UserError, match=said):
            open_data(config_for(data, weights=weights))


def test_a_run_keeps_what_export_needs_and_refuses_another_tokenizer(data, tmp_path) -> None:
    run = tmp_path / "run"
    folders = open_data(config_for(data))
    same_data(run, folders)  # nothing kept yet
    with pytest.raises(UserError, match=r"holds no data/0/manifest\.json"):
        kept_facts(run)
    keep_facts(run, folders)
    save_config(config_for(data), run / "config.json")
    (kept,) = kept_facts(run)
    assert kept.manifest == folders[0].manifest
    assert (kept.path / "tokenizer.model").read_bytes() == b"a tokenizer"
    same_data(run, folders)
    other = open_data(config_for(write_data_set(tmp_path / "other", tokenizer=b"another")))
    with pytest.raises(UserError, match="was tokenized with another tokenizer than the run"):
        same_data(run, other)


def test_a_tokenizer_that_begins_texts_otherwise_gives_the_same_ids(tmp_path: Path) -> None:
    """`export` writes into the tokenizer what training began documents with."""
    text = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    files = {
        "plain": {**text, "post_processor": None},
        "with-bos": {**text, "post_processor": {"type": "TemplateProcessing"}},
        "other": {**text, "model": {**text["model"], "vocab": {"a": 1, "b": 0}}},
    }
    paths = {}
    for name, content in files.items():
        raw = json.dumps(content).encode()
        paths[name] = write_data_set(tmp_path / name, tokenizer=raw)
        (paths[name] / "tokenizer.model").rename(paths[name] / "tokenizer.json")
        manifest = json.loads((paths[name] / "manifest.json").read_text())
        manifest["tokenizer"] |= {"kind": "huggingface", "file": "tokenizer.json"}
        (paths[name] / "manifest.json").write_text(json.dumps(manifest))
    folders = open_data(config_for(paths["plain"], paths["with-bos"]))
    keep_facts(tmp_path / "run", folders)
    save_config(config_for(paths["plain"], paths["with-bos"]), tmp_path / "run" / "config.json")
    same_data(tmp_path / "run", folders)
    moved = paths["plain"].rename(tmp_path / "again")  # its tokenizer is now the exported one
    shutil.copy(paths["with-bos"] / "tokenizer.json", moved)
    shutil.copy(paths["with-bos"] / "manifest.json", moved)
    same_data(tmp_path / "run", open_data(config_for(moved, paths["with-bos"])))
    with pytest.raises(UserError, match="were tokenized with different tokenizers"):
        open_data(config_for(moved, paths["other"]))
    with pytest.raises(UserError, match="was tokenized with another tokenizer than the run"):
        same_data(tmp_path / "run", [open_folder(paths["other"])])


def test_a_data_set_made_again_is_not_resumed_with(data: Path, tmp_path: Path) -> None:
    keep_facts(tmp_path / "run", open_data(config_for(data)))
    save_config(config_for(data), tmp_path / "run" / "config.json")
    shutil.rmtree(data)
    write_data_set(data, train_documents=61)
    with pytest.raises(
        UserError, match=r"\(3,840 tokens then, 3,904 now\), so a resumed run would"
    ):
        same_data(tmp_path / "run", open_data(config_for(data)))
    joined = write_data_set(tmp_path / "joined")
    shutil.rmtree(data)
    write_data_set(data)
    same_data(tmp_path / "run", open_data(config_for(data, joined)))


def test_counts_that_megatron_core_cannot_number_are_refused(data: Path, monkeypatch) -> None:
    config = config_for(data)
    monkeypatch.setattr(checks, "MOST_DOCUMENTS", 59)
    with pytest.raises(
        UserError, match=r"train split has 60 .* at most 59. Make 2 data sets of it"
    ):
        open_data(config)
    monkeypatch.setattr(checks, "MOST_DOCUMENTS", 60)
    open_data(config)
    monkeypatch.setattr(checks, "MOST_DATA_SETS", 0)
    with pytest.raises(
        UserError, match=r"data\.paths has 1 data sets, megatron-core blends at most"
    ):
        open_data(config)


def test_the_bounds_are_megatron_cores() -> None:
    assert np.iinfo(np.int32).max == checks.MOST_DOCUMENTS
    source = inspect.getsource(BlendedMegatronDatasetBuilder)
    assert "numpy.arange(start=beg, stop=end, step=1, dtype=numpy.int32)" in source
    # What that does with too many documents, in 16 bits: 32768 becomes a number below 0.
    assert np.arange(0, 40_000, 1, dtype=np.int16)[2**15] == -(2**15)
    source = inspect.getsource(BlendedDataset.__init__)
    assert f"len(datasets) < {checks.MOST_DATA_SETS + 1}" in source
