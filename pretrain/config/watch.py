"""The configuration of what is done with checkpoints beside a training."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ladder.errors import UserError

OFFLINE = ("perplexity", "last_word", "continuation", "needle", "refine")
"""The tasks that are made of data sets; all others are those of lm-evaluation-harness."""


@dataclass(frozen=True)
class WatchConfig:
    """Measures and exports checkpoints in a process beside the training (docs/guides/watch.md)."""

    tasks: tuple[str, ...] = ()
    """Tasks of `eval`, also of lm-evaluation-harness, to measure checkpoints by; none: no measurement."""
    data: tuple[Path, ...] = ()
    """Data sets for perplexity, last_word, continuation, needle and refine; none: those of the run."""
    interval: int | None = None
    """Steps between checkpoints that are measured; None: each one is. The last one always is."""
    limit: int | None = None
    """As `eval --limit`: items of a task at most."""
    max_tokens: int | None = 1_000_000
    """As `eval --max-tokens`: of perplexity."""
    include_path: Path | None = None
    """As `eval --include-path`: task definitions of your own for lm-evaluation-harness."""
    export_interval: int = 0
    """Steps between checkpoints that are also written as Hugging Face folders, RUN/exports/step_N; the last
    one always is. 0: none."""

    @property
    def is_on(self) -> bool:
        return bool(self.tasks or self.export_interval)

    def check(self, save_interval: int) -> None:
        """Refuses intervals at which there are no checkpoints.

        Raises:
            UserError: an interval is no multiple of `save_interval`, or a number is too small.
        """
        for name in ("interval", "limit", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"watch.{name} is {value}: it must be at least 1")
        if self.export_interval < 0:
            raise UserError(
                f"watch.export_interval is {self.export_interval}: it must be at least 0"
            )
        for name, interval in (
            ("interval", self.interval or 0),
            ("export_interval", self.export_interval),
        ):
            if interval % save_interval:
                near = -(-interval // save_interval) * save_interval
                raise UserError(
                    f"watch.{name} {interval} is not a multiple of save_interval {save_interval}: only "
                    f"checkpoints are measured and exported. Give {near}, or another save_interval"
                )
        if not self.tasks and (self.data or self.interval or self.limit or self.include_path):
            raise UserError(
                "watch.data, interval, limit and include_path are for the tasks of watch.tasks: name some, "
                "such as --watch.tasks last_word continuation, or leave these out"
            )

    def measures(self, step: int, save_interval: int) -> bool:
        """Whether the checkpoint of a step is measured by the tasks, if it is not the last one."""
        return bool(self.tasks) and step % (self.interval or save_interval) == 0

    def exports(self, step: int) -> bool:
        """Whether the checkpoint of a step is exported, if it is not the last one."""
        return bool(self.export_interval) and step % self.export_interval == 0
