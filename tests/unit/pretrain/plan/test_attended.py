"""How long the documents of a run's sequences are, by hand and in its batches; what plans make of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.config.data import DataConfig, Phase
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder
from pretrain.data.index_file import HEADER_BYTES
from pretrain.plan import attended as module
from pretrain.plan.attended import Attended, attended, pieces
from pretrain.plan.estimate import estimate, format_estimate, hardware_of
from pretrain.plan.memory import memory_plan
from pretrain.plan.search import row

H100 = hardware_of("h100")


def folder_of(path: Path, lengths: list[int]) -> DataFolder:
    path.mkdir()
    index = bytes(HEADER_BYTES) + np.array(lengths, "<i4").tobytes()
    (path / "train.idx").write_bytes(index + bytes(8 * len(lengths)))
    facts = {"documents": len(lengths), "tokens": sum(lengths)}
    return DataFolder(path, {"splits": {"train": facts}})


def config_of(seq_length: int = 2048, apart: bool = True, **data: object) -> TrainConfig:
    config = PRESETS["paper-1b"]()
    data_config = DataConfig(seq_length=seq_length, attend_across_documents=not apart, **data)
    return replace(config, data=data_config)


def test_documents_are_cut_where_sequences_end() -> None:
    assert pieces(np.array([3, 10, 2], "<i4"), 4) == [3, 1, 4, 4, 1, 2]
    assert pieces(np.array([2], "<i4"), 4) == [2]


def test_of_many_documents_some_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DOCUMENTS", 3)
    assert pieces(np.array([1, 9, 2, 9, 3], "<i4"), 50) == [1, 2, 3]
    # A hundred million tokens of documents would not fit 32 bits.
    assert sum(pieces(np.full(3, 2**31 - 1, "<i4"), 2**30)) == 3 * (2**31 - 1)


def test_each_data_set_counts_by_its_share_of_the_run(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / "a", [4] * 8), folder_of(tmp_path / "b", [16] * 6)]
    found = attended(config_of(8), folders)  # by tokens: 32 and 96
    assert found == Attended(pytest.approx((32 * 4 + 96 * 8) / 128), 8, found.source)
    config = config_of(8, weights=(1.0, 0.0))
    assert attended(config, folders).longest == 4
    half = config.tokens_per_step * config.train_steps // 2
    config = replace(config, data=replace(config.data, phases=(Phase(half, (1.0, 3.0)),)))
    assert attended(config, folders).mean == pytest.approx((4 + (4 + 3 * 8) / 4) / 2, rel=1e-3)


def test_windows_count_within_documents(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", [300, 50, 3])
    config = config_of(1000)
    config = replace(config, model=replace(config.model, sliding_window=100))
    expected = (100 * (600 - 100) + 50 * 50 + 9) / 353
    assert attended(config, [folder]).mean == pytest.approx(expected)


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    assert attended(config_of(apart=False)) == Attended(2048, 2048)
    for data in ({}, {"paths": (tmp_path / "not there",)}):
        found = attended(config_of(**data))
        assert (found.mean, found.longest) == (2048, 2048)
        assert "each sequence is one document" in found.source


def test_an_estimate_counts_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "data", [64] * 1000)
    monkeypatch.setattr(module, "open_folder", lambda _: folder)
    apart = config_of(paths=(folder.path,))
    together = replace(apart, data=replace(apart.data, attend_across_documents=True))
    model = apart.model

    def flops(length: float) -> float:
        """Of a token, by hand: 6 for each weight, 12 L h s in attention."""
        return 6 * model.num_matmul_parameters() + 12 * model.num_layers * 1536 * length

    mean = attended(apart).mean
    assert mean == pytest.approx(64)
    one, other = (estimate(c, ranks=64, hardware=H100, mfu=0.4) for c in (apart, together))
    assert one.step_s / other.step_s == pytest.approx(flops(64) / flops(2048))
    assert one.mfu_whole_sequences == pytest.approx(0.4 * flops(2048) / flops(64))
    assert other.mfu_whole_sequences == other.mfu == 0.4
    said = format_estimate(one)
    assert "64 tokens together (from the data sets' documents)" in said
    assert f"the MFU is {one.mfu_whole_sequences:.1%}" in said
    assert "Documents" not in format_estimate(other)
    planned, whole = (estimate(c, ranks=64, hardware=H100) for c in (apart, together))
    assert planned.step_s == row(apart, 64, H100, mean).step_s < whole.step_s
    assert planned.mfu / whole.mfu == pytest.approx(
        flops(64) / planned.step_s / (flops(2048) / whole.step_s)
    )


@pytest.mark.parametrize("attention", ["te-unfused", "torch-unfused", "unfused"])
def test_scores_in_memory_are_those_of_the_longest_document(attention) -> None:
    config = replace(config_of(), recompute="none")
    plans = [memory_plan(config, 64, attention, longest) for longest in (None, 2048, 1024)]
    assert plans[0] == plans[1]
    assert memory_plan(config, 64, "te", 1024) == memory_plan(config, 64, "te")
    long, short = plans[1].activations, plans[2].activations
    tokens = config.micro_batch_size * 2048
    per_token = config.model.num_attention_heads * config.model.num_layers
    scores = tokens * per_token * {"te-unfused": 2, "torch-unfused": 4, "unfused": 6}[attention]
    assert long - short == pytest.approx(scores * 1024)
