"""Token ids of conversations, and which of them are trained on."""

from collections.abc import Sequence

import numpy as np

from data_prep.encode.engines import Engine
from data_prep.read.chat import Conversation


def encode_conversations(
    engine: Engine, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids of conversations.

    Returns:
        All ids, [tokens]; whether each is trained on, [tokens] bool; tokens of each document,
        [documents]; whether its EOD is trained on, [documents] bool: when the assistant has the last word.
    """
    pieces = [text.pieces for text in texts if isinstance(text, Conversation)]
    assert len(pieces) == len(texts)
    flat = [piece for document in pieces for piece in document]
    ids, lengths = engine.encode([text for text, _ in flat])
    trained = np.repeat(np.array([trained for _, trained in flat], bool), lengths)
    last = np.cumsum([len(document) for document in pieces])
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], last])]
    end_trained = np.array([document[-1][1] for document in pieces], bool)
    return ids, trained, np.diff(ends), end_trained
