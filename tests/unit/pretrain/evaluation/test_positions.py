"""Loss by position, against each position's own loss in windows that are computed one by one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.data.folders import open_folder
from pretrain.evaluation.documents import Documents, open_split
from pretrain.evaluation.perplexity import measure_perplexity
from pretrain.evaluation.positions import bucket_ends, bucket_sums, ratio_stderr
from tests.data_sets import write_data_set
from tests.unit.hf import tiny


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    path = write_data_set(
        tmp_path / "data", vocab_size=tiny.VOCAB, validation_documents=11, document_length=20
    )
    return open_split(open_folder(path), "validation")  # 220 tokens


@pytest.mark.parametrize("seq_length", [1, 7, 8, 10, 64, 256, 4096, 100_000])
def test_buckets_hold_every_position_once(seq_length: int) -> None:
    ends = bucket_ends(seq_length)
    assert ends[-1] == seq_length
    assert ends[0] <= max(seq_length, 8) and (np.diff(ends) > 0).all()
    assert ends[0] >= min(seq_length, 8)
    if seq_length >= 64:
        assert (ends[1:] / ends[:-1]).max() < 1.6
        assert seq_length // 2 in ends and seq_length // 8 in ends
    values = np.random.default_rng(0).random(seq_length)
    starts = np.concatenate([[0], ends[:-1]])
    expected = [values[a:b].sum() for a, b in zip(starts, ends, strict=True)]
    assert bucket_sums(values, ends).tolist() == pytest.approx(expected)


def test_a_short_window_has_its_first_buckets_alone() -> None:
    assert bucket_sums(np.array([1.0, 2.0, 4.0]), np.array([2, 5, 9])).tolist() == [3.0, 4.0, 0.0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_bucket_is_the_mean_over_its_positions(documents: Documents, batch_size: int) -> None:
    """Seven windows of 32 tokens; the last one is shorter, and has no token in the last buckets."""
    torch.manual_seed(0)
    model = tiny.model(residual="ladder")
    raw = np.frombuffer(Path(documents.folder.prefix("validation") + ".bin").read_bytes(), "<u2")
    stream = torch.from_numpy(np.concatenate([[2], raw]).astype(np.int64))
    at: dict[int, list[tuple[int, float]]] = {}  # by position: the window's number, and a loss
    for number, start in enumerate(range(0, 220, 32)):
        window = stream[start : start + 33]
        with torch.no_grad():
            losses = F.cross_entropy(
                model(window[None, :-1]).logits[0], window[1:], reduction="none"
            )
        for position, loss in enumerate(losses.tolist(), start=1):
            at.setdefault(position, []).append((number, loss))
    assert len(at[32]) == 6 and len(at[28]) == 7
    found = measure_perplexity(model, documents, 32, batch_size)
    rows = found["by_position"]
    assert [(row["first"], row["last"]) for row in rows] == [
        (1, 8), (9, 11), (12, 16), (17, 23), (24, 32),
    ]  # fmt: skip
    for row in rows:
        pairs = [pair for n in range(row["first"], row["last"] + 1) for pair in at[n]]
        assert row["tokens"] == len(pairs)
        assert row["loss"] == pytest.approx(np.mean([loss for _, loss in pairs]), abs=1e-5)
        sums, counts = np.zeros(7), np.zeros(7)
        for number, loss in pairs:
            sums[number] += loss
            counts[number] += 1
        assert row["loss_stderr"] == pytest.approx(ratio_stderr(sums, counts), rel=1e-4)
    assert sum(row["tokens"] for row in rows) == found["tokens"] == 220
    whole = sum(row["loss"] * row["tokens"] for row in rows) / 220
    assert found["metrics"]["loss"] == pytest.approx(whole)
    json.dumps(rows)  # numbers of Python


def test_buckets_beyond_the_text_are_left_out(documents: Documents) -> None:
    found = measure_perplexity(tiny.model(residual="standard"), documents, 1024, 1)
    rows = found["by_position"]
    assert rows[-1]["first"] <= 220 <= rows[-1]["last"]
    assert all(row["loss_stderr"] is None for row in rows)  # of one window
