"""What a run trains on."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Phase:
    """From a point of the run on, another blend."""

    from_tokens: int
    """Tokens trained on before it; it begins with the next whole step."""
    weights: tuple[float, ...]
    """One for each of data.paths, in any unit; 0 leaves a data set out."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on: data set folders written by `megatron-ladder data tokenize`."""

    paths: tuple[Path, ...] = ()
    weights: tuple[float, ...] | None = None
    """One for each path, in any unit; None weighs by tokens. 0, where there are phases: not yet."""
    phases: tuple[Phase, ...] = ()
    """Other weights from later points on, in a --config FILE; `megatron-ladder data blend --then`
    writes one. They may be changed while a run is stopped, as far as it has not come yet."""
    seq_length: int = 2048
    """Tokens in a training sequence; documents are packed into it."""
    attend_across_documents: bool = True
    """False: tokens attend to their own document alone, and its first token is not a label."""
    fim_rate: float = 0.0
    """The share of training documents made fill-in-the-middle tasks (arXiv 2207.14255)."""
    fim_spm_rate: float = 0.5
    """Of them, the share with the suffix before the prefix."""
    fim_tokens: tuple[str, str, str] | None = None
    """The tokenizer's prefix, middle and suffix tokens; None: those of StarCoder, Qwen or Code Llama."""
    num_workers: int = 2
    """Loader processes a rank; 0 loads in the training process."""
