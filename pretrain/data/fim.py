"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255): rearranges documents so that a model learns to
write the text that is missing between two others."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder

# The names of the prefix, middle and suffix token in models that were trained with fill-in-the-middle.
KNOWN = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen2.5
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),  # Code Llama
)


@dataclass(frozen=True)
class FillInTheMiddle:
    """How often documents are rearranged, and the ids of the tokens that mark their parts."""

    rate: float
    """The share of documents that are rearranged."""
    spm_rate: float
    """The share of the rearranged documents that have the suffix first (SPM)."""
    prefix: int
    middle: int
    suffix: int

    def rearranged(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rearranges a document, or a part of one, with probability `rate`.

        Two random cuts divide it into a, b and c. PSM is <prefix> a <suffix> c <middle> b, SPM is <prefix>
        <suffix> c <middle> a b (the paper's second form, section 3). Cuts lie between tokens. The paper
        also cuts within tokens, which helps models that must continue in the middle of a word.

        Args:
            tokens: [n] ids. Fewer than 2 stay as they are.

        Returns:
            [n + 3] ids, or `tokens` unchanged.
        """
        draw, order = rng.random(2)
        cuts = np.sort(rng.integers(0, len(tokens) + 1, 2))
        if draw >= self.rate or len(tokens) < 2:
            return tokens
        a, b, c = np.split(tokens, cuts)
        prefix, middle, suffix = ([token] for token in (self.prefix, self.middle, self.suffix))
        if order < self.spm_rate:
            return np.concatenate([prefix, suffix, c, middle, a, b])
        return np.concatenate([prefix, a, suffix, c, middle, b])


def fill_in_the_middle(config: TrainConfig, folder: DataFolder) -> FillInTheMiddle | None:
    """The run's fill-in-the-middle with the tokens' ids; None when data.fim_rate is 0.

    Raises:
        UserError: the tokenizer does not have the tokens, or the model has no rows for them.
    """
    data, size = config.data, config.model.vocab_size
    if not data.fim_rate:
        return None
    ids = find_tokens(folder.path / folder.tokenizer["file"], data.fim_tokens)
    if size is not None and max(ids) >= size:
        raise UserError(
            f"data.fim_rate: its tokens have the ids {ids[0]}, {ids[1]} and {ids[2]}, "
            f"the model's ids end at {size - 1} (model.vocab_size): give other --data.fim-tokens, or train "
            "a model with more ids"
        )
    return FillInTheMiddle(data.fim_rate, data.fim_spm_rate, *ids)


def find_tokens(tokenizer: Path, names: tuple[str, str, str] | None) -> tuple[int, int, int]:
    """The ids of the prefix, middle and suffix token in a data set's tokenizer.

    Args:
        names: the three tokens' names; None tries those in KNOWN.

    Raises:
        UserError: the tokenizer does not have all three.
    """
    for candidates in (names,) if names else KNOWN:
        ids = [_id(tokenizer, name) for name in candidates]
        if all(i is not None for i in ids):
            return ids[0], ids[1], ids[2]  # type: ignore[return-value]
    wanted = ", ".join(names) if names else "<fim_prefix>, <fim_middle>, <fim_suffix> or the like"
    raise UserError(
        f"data.fim_rate: {tokenizer} has no tokens {wanted}: give --data.fim-tokens PREFIX MIDDLE "
        "SUFFIX, or use a tokenizer with them (`data train-tokenizer --special-tokens ...`)"
    )


def _id(tokenizer: Path, name: str) -> int | None:
    try:
        return _id_of(tokenizer, name)
    except Exception as error:  # neither library raises anything narrower
        raise UserError(f"{tokenizer} cannot be read ({error}): copy the data set again") from error


def _id_of(tokenizer: Path, name: str) -> int | None:
    if tokenizer.suffix == ".model":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromFile(str(tokenizer))
        found = model.PieceToId(name)
        return None if found == model.unk_id() else found
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(tokenizer)).token_to_id(name)
