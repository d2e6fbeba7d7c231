"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255): documents rearranged so that a model learns
to write what is missing between two texts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.data.folders import DataFolder

# What models that were trained so call the tokens: prefix, middle, suffix.
KNOWN = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen2.5
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),  # Code Llama
)


@dataclass(frozen=True)
class FillInTheMiddle:
    """How often, and by which tokens."""

    rate: float
    """The share of documents that are rearranged."""
    spm_rate: float
    """Of them, the share with the suffix first."""
    prefix: int
    middle: int
    suffix: int

    def rearranged(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A document, or a part of one, [n] ids, cut at two places: [n + 3]; or as it is.

        PSM: <prefix> a <suffix> c <middle> b. SPM: <prefix> <suffix> c <middle> a b (the paper's
        second form, section 3). Cuts are between tokens, not within: the paper's cuts within help models
        that are asked to go on in the middle of a word.
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
    """What the run asks for, with the tokens' ids. Raises UserError when the tokenizer has none."""
    data = config.data
    if not data.fim_rate:
        return None
    ids = find_tokens(folder.path / folder.tokenizer["file"], data.fim_tokens)
    return FillInTheMiddle(data.fim_rate, data.fim_spm_rate, *ids)


def find_tokens(tokenizer: Path, names: tuple[str, str, str] | None) -> tuple[int, int, int]:
    """Ids of prefix, middle and suffix in a data set's tokenizer.

    Args:
        names: theirs; None looks for those that are known.

    Raises:
        UserError: the tokenizer has none of those.
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
    if tokenizer.suffix == ".model":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromFile(str(tokenizer))
        found = model.PieceToId(name)
        return None if found == model.unk_id() else found
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(tokenizer)).token_to_id(name)
