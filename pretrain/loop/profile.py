"""`train --profile.first-step N`: traces some steps, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from megatron_ladder.collectives import ranges
from pretrain.config.train import TrainConfig

logger = logging.getLogger(__name__)


class StepProfile:
    """Traces the steps that `config.profile` names, on every rank."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.output_dir is not None
        self._first, self._count = config.profile.first_step, config.profile.steps
        self._folder = config.output_dir / "profile"
        self._open: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Traces the step inside the `with`, if it is one of those to trace.

        The trace is written when the last of these steps ends; a crash before that loses it.
        """
        if self._first is not None and step >= self._first + self._count:
            self.close()  # the last one was passed over
        if self._first is None or not self._first <= step < self._first + self._count:
            yield
            return
        if self._open is None:
            self._begin(step)
        with ranges.named(f"step {step}"):
            yield
        if step == self._first + self._count - 1:
            self.close()

    def close(self) -> None:
        """Writes the trace so far: training may end, or stop on a signal, before the last step to trace."""
        if self._open is not None:
            opened, self._open = self._open, None
            opened.close()

    def _begin(self, step: int) -> None:
        path = self._folder / f"from-step-{step}-rank-{dist.get_rank()}.json.gz"
        self._open = contextlib.ExitStack()
        if dist.get_rank() == 0:
            self._open.callback(logger.info, "traced: %s (open it at ui.perfetto.dev)", path)
        self._open.enter_context(traced(path))


@contextlib.contextmanager
def traced(path: Path) -> Iterator[None]:
    """Traces the body of the `with`; writes JSON for Chrome and Perfetto, with the ranges of ranges.py."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with ranges.recorded(), torch.profiler.profile(activities=activities) as profiler:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
