"""`megatron-ladder report depth`: the options."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class DepthOptions:
    """Draw what each layer of a model does: what it adds, what is missing without it, its staleness."""

    model: tyro.conf.Positional[Path]
    """A run, one of its checkpoints, or a Hugging Face folder."""
    other: tyro.conf.Positional[Path | None] = None
    """Another of the same tokenizer, to set beside it, with linear maps between their layers."""
    data: Path | None = None
    """A data set made with the model's tokenizer; None: the run's own first one."""
    output_dir: Path | None = None
    """Where to write; None: `depth` in the model's folder."""
    sequences: int = 16
    """Pieces of the held-out split to measure on."""
    seq_length: int | None = None
    """Tokens in each; None: 256, or the longest that the model takes."""


def main_depth(options: DepthOptions) -> int:
    """Writes the report of the layers and returns the exit status.

    Raises:
        UserError: before any measurement, when the model or the data cannot be measured.
    """
    from pretrain.depth.report import write_depth_report

    page = write_depth_report(
        [options.model] + ([options.other] if options.other else []),
        data=options.data,
        output_dir=options.output_dir,
        count=options.sequences,
        length=options.seq_length,
    )
    print(f"Report: {page}")
    return 0
