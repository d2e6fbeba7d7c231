"""Measures the loss of a model on a data set, in nats a token, in bits a byte, and by position."""

import math
import time
from typing import Any

import numpy as np

from pretrain.evaluation.documents import Documents
from pretrain.evaluation.likelihood import token_losses
from pretrain.evaluation.positions import bucket_ends, bucket_sums, by_position, ratio_stderr


def measure_perplexity(
    model: Any, documents: Documents, seq_length: int, batch_size: int
) -> dict[str, Any]:
    """Predicts every token of the documents once, and measures the loss.

    The stream [EOD] document EOD document EOD ... is cut into windows of seq_length + 1 tokens. The last
    token of a window is the first of the next one, so that every token but the first EOD is predicted
    once. A token is predicted from the tokens before it in its window, as in training. The last window may
    be shorter.

    Returns:
        A result as results.py writes it. `loss` is the mean over tokens, EOD included, in nats; its
        standard error treats windows as independent. `by_position` has the mean over the tokens that have
        so many tokens before them in their window. `bits_per_byte` is the loss of all tokens, EOD included,
        divided by the bytes of the text. Where the data set has a mask, `trained_loss` is the
        mean over the tokens that are trained on.
    """
    eod = np.array([documents.folder.tokenizer["eod_id"]])
    ids, trained = documents.ids(), documents.trained()
    stream = np.concatenate([eod.astype(ids.dtype), ids])
    starts = range(0, len(ids), seq_length)
    windows = [stream[start : start + seq_length + 1] for start in starts]
    ends = bucket_ends(seq_length)
    sums = np.zeros((len(windows), len(ends)))  # nats of each window's buckets of positions
    trained_nats = 0.0
    begin = time.perf_counter()
    title = f"perplexity, {documents.folder.name}"
    for i, losses, _ in token_losses(model, windows, batch_size, title):
        of_window = losses.double().numpy()
        sums[i] = bucket_sums(of_window, ends)
        if trained is not None:
            trained_nats += of_window[trained[starts[i] : starts[i] + len(of_window)]].sum()
    seconds = time.perf_counter() - begin
    counts = np.stack([bucket_sums(np.ones(len(window) - 1), ends) for window in windows])
    nats = sums.sum(1)
    loss = float(nats.sum() / len(ids))
    text_bytes = documents.text_bytes()
    metrics: dict[str, float | None] = {
        "loss": loss,
        "loss_stderr": ratio_stderr(nats, counts.sum(1)),
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": float(nats.sum() / (text_bytes * math.log(2))),
    }
    found: dict[str, Any] = {
        "task": "perplexity",
        "metrics": metrics,
        "by_position": by_position(sums, counts, ends),
        "tokens": len(ids),
        "documents": len(documents),
        "is_whole_split": documents.is_whole,
        "text_bytes": text_bytes,
        "seq_length": seq_length,
        "seconds": seconds,
        "tokens_per_second": len(ids) / seconds,
    }
    if trained is not None and trained.any():
        metrics["trained_loss"] = float(trained_nats / trained.sum())
        found["trained_tokens"] = int(trained.sum())
    return found
