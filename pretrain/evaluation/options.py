"""The options of `megatron-ladder eval`, and checks that they fit together. This file imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_ladder.errors import UserError
from pretrain.config.watch import OFFLINE


@dataclass(frozen=True)
class EvalOptions:
    """Measure a model: its loss on data sets, small tasks made of held-out text, and what
    lm-evaluation-harness has."""

    model: tyro.conf.Positional[Path]
    """A run, a checkpoint of it, or a Hugging Face folder."""
    data: tyro.conf.UseAppendAction[tuple[tuple[Path, ...], ...]] = ()
    """Data sets of `megatron-ladder data tokenize`."""
    tasks: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """perplexity (the default), last_word, continuation, needle, refine: on each data set. Other names are
    those of lm-evaluation-harness. Several by spaces or commas."""
    split: Literal["train", "validation", "test"] = "validation"
    max_tokens: int | None = 1_000_000
    """Perplexity of documents drawn at random that hold at most as many tokens; None: of all."""
    seq_length: int | None = None
    """Tokens from which a next one is predicted at most; None: the model's context. Beyond it the model
    meets positions that it was not made for."""
    limit: int | None = None
    """Items of a task at most; None: 500 of last_word and continuation, 250 of needle, all of refine's
    and of the others'."""
    batch_size: int = 4
    """Sequences in one forward pass."""
    seed: int = 1234
    """Of what is drawn: documents, items."""
    include_path: Path | None = None
    """A folder with task definitions of your own for lm-evaluation-harness. Their code is run."""
    output_dir: Path | None = None
    """For the results' file; None: RUN/evaluations, or beside a Hugging Face folder FOLDER-evaluations."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seq_length", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
        if self.offline_tasks() and not self.data_paths():
            raise UserError(
                f"{', '.join(self.offline_tasks())}: give --data FOLDER, made by "
                "`megatron-ladder data tokenize`"
            )
        if self.data_paths() and not self.offline_tasks():
            raise UserError(
                f"--data is not for {', '.join(self.task_names())}: leave it out, or add one of "
                f"{', '.join(OFFLINE)} to --tasks"
            )
        if self.include_path is not None and not self.harness_tasks():
            raise UserError(
                "--include-path: name one of its tasks with --tasks, or leave --include-path out"
            )
        names = [path.name for path in self.data_paths()]
        if len(set(names)) < len(names):
            raise UserError(
                f"--data: several folders are named {max(names, key=names.count)}, and results are "
                "stored by the folder's name: measure them with one command each"
            )

    def data_paths(self) -> list[Path]:
        return [path for some in self.data for path in some]

    def task_names(self) -> list[str]:
        names = [name for some in self.tasks for part in some for name in part.split(",") if name]
        return list(dict.fromkeys(names)) or ["perplexity"]

    def offline_tasks(self) -> list[str]:
        return [name for name in self.task_names() if name in OFFLINE]

    def harness_tasks(self) -> list[str]:
        return [name for name in self.task_names() if name not in OFFLINE]
