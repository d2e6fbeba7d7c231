"""Steps whose loss or gradients are bad: found before the update, written down, and passed over.

A step that is passed over keeps its number, its data and its learning rate; only the weights do not
follow. What was decided is RUN/bad_steps/step_N.json, and a resumed run does as it says: it comes to
the weights of a run that nothing stopped, also where the fault does not happen again.

megatron-core's rerun_state_machine is not used: it runs a step twice to tell a faulty GPU from a bad
batch, and then ends the job; it neither skips nor goes back. Its optimizers leave an update out by
themselves (found_inf) only with a loss scale, which fp32 and bf16 do not have, and look at no loss.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pretrain.config.faults import BadStepPolicy
from pretrain.config.train import TrainConfig
from pretrain.files import write_atomically
from pretrain.loop.saving import CheckpointSaver
from pretrain.run.bad_step import BadStep, bad_steps_of
from pretrain.run.folder import checkpoint_step
from pretrain.run.versions import versions

logger = logging.getLogger(__name__)

Verdict = tuple[str, BadStepPolicy]
"""What is wrong with a step, and the policy for it."""
RECENT = 100
"""Losses whose median a spike is measured against."""
AT_LEAST = 10
"""Losses that must be known before one can be a spike."""
NAMES = 20
"""Parameters with bad gradients that a rank names."""


class BadSteps:
    """Judges every step, alike on all ranks.

    Args:
        config: the run's.
        saver: of the checkpoints to go back to.
        recent_losses: of the last good steps before this start, from the checkpoint.
    """

    def __init__(
        self, config: TrainConfig, saver: CheckpointSaver, recent_losses: Iterable[float]
    ) -> None:
        assert config.output_dir is not None
        self._config = config
        self._saver = saver
        self._run_dir = config.output_dir
        self._recent = deque(recent_losses, maxlen=RECENT)
        self._known = _from_first_rank(
            bad_steps_of(self._run_dir) if dist.get_rank() == 0 else None
        )
        self.found: BadStep | None = None
        """What the last step judged was; None: good."""

    @property
    def recent_losses(self) -> tuple[float, ...]:
        return tuple(self._recent)

    def decided(self, step: int) -> BadStep | None:
        """Why a step is to be passed over, where an earlier start of the run decided so."""
        for bad in self._known:
            if bad.passed_over and bad.passed_over[0] <= step <= bad.passed_over[1]:
                return bad
        return None

    def is_good(
        self, step: int, loss: float, grad_norm: float, sums: list[Tensor], model: list[Any]
    ) -> bool:
        """Judges a step. A bad one is written down, with what is to be done about it: `found`.

        Args:
            loss: of the global batch.
            grad_norm: before clipping.
            sums: of each micro-batch of this rank's, on the last stage: the loss's sum, its tokens.
            model: chunks with their gradients.
        """
        verdict = self._verdict(loss, grad_norm)
        # Both are sums over all ranks. Should one rank see others still, all must act alike.
        is_bad = torch.tensor([float(verdict is not None)], device=torch.cuda.current_device())
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        self.found = None
        if not is_bad.item():
            self._recent.append(loss)
            return True
        verdicts: list[Verdict | None] = [None] * dist.get_world_size()
        dist.all_gather_object(verdicts, verdict)
        details = self._details(step, loss, grad_norm, sums, model)
        newest = self._saver.newest()
        if dist.get_rank() == 0:
            self.found = self._decision(step, newest, *next(v for v in verdicts if v))
            self._write(self.found, details)
        self.found = _from_first_rank(self.found)
        self._known.append(self.found)
        return False

    def went_back(self, recent_losses: Iterable[float]) -> None:
        """The weights are a checkpoint's again."""
        self._recent = deque(recent_losses, maxlen=RECENT)

    def _verdict(self, loss: float, grad_norm: float) -> Verdict | None:
        """What is wrong with a step, and the policy for it."""
        faults = self._config.faults
        if not math.isfinite(loss):
            return f"the loss is {loss}", faults.not_finite
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}", faults.not_finite
        if faults.spike_factor and len(self._recent) >= AT_LEAST:
            median = statistics.median(self._recent)
            if loss > faults.spike_factor * median:
                return f"the loss is {loss:.4f}, the median {median:.4f}", faults.spike
        return None

    def _decision(
        self, step: int, checkpoint: Path | None, reason: str, policy: BadStepPolicy
    ) -> BadStep:
        limit = self._config.faults.max_bad_steps
        if sum(bad.action != "stop" for bad in self._known) >= limit and policy != "stop":
            why = f"{reason}, after {limit} bad steps passed over (faults.max_bad_steps)"
            return BadStep(step, why, "stop", None)
        if policy == "stop":
            return BadStep(step, reason, "stop", None)
        if policy == "rollback" and checkpoint:
            return BadStep(step, reason, "rollback", (checkpoint_step(checkpoint) + 1, step))
        return BadStep(step, reason, "skip", (step, step))  # before the first checkpoint also

    def _details(
        self, step: int, loss: float, grad_norm: float, sums: list[Tensor], model: list[Any]
    ) -> dict[str, Any]:
        """What a person wants to see of a bad step; called by all ranks."""
        ranks: list[Any] = [None] * dist.get_world_size()
        mine = self._micro_batches(step, sums), _bad_gradients(model)
        dist.all_gather_object(ranks, mine)
        size = self._config.global_batch_size
        return {
            "loss": _plain(loss),
            "grad_norm": _plain(grad_norm),
            # By their positions in the order in which the run reads its data.
            "samples": [(step - 1) * size, step * size],
            "micro_batches": sorted(
                (entry for entries, _ in ranks for entry in entries), key=lambda e: e["samples"]
            ),
            "not_finite_gradients": {
                str(rank): names for rank, (_, names) in enumerate(ranks) if names
            },
            "recent_losses": list(self._recent),
            "versions": versions(),
        }

    def _micro_batches(self, step: int, sums: list[Tensor]) -> list[dict[str, Any]]:
        """Each micro-batch's mean loss, by one rank for each; its samples: first, and one after last."""
        if parallel_state.get_tensor_model_parallel_rank():
            return []
        width = self._config.micro_batch_size
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        entries = []
        for number, pair in enumerate(sums):
            total, tokens = pair.tolist()
            first = (step - 1) * self._config.global_batch_size + (number * size + rank) * width
            loss = _plain(total / max(tokens, 1.0))
            entries.append({"samples": [first, first + width], "loss": loss})
        return entries

    def _write(self, bad: BadStep, details: dict[str, Any]) -> None:
        folder = self._run_dir / "bad_steps"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{bad.step}.json"
        write_atomically(path, json.dumps({**asdict(bad), **details}, indent=2) + "\n")
        logger.warning("step %d is bad: %s; %s. See %s", bad.step, bad.reason, bad.action, path)


def _from_first_rank(value: Any) -> Any:
    """The first rank's: it alone reads and writes, as what it wrote may be seen later by others."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _bad_gradients(model: list[Any]) -> list[str]:
    """Parameters of this rank, as it names them, with a gradient that is not finite."""
    return [
        name
        for chunk in model
        for name, parameter in chunk.module.named_parameters()
        if not parameter.main_grad.isfinite().all()
    ][:NAMES]


def _plain(value: float) -> float | str:
    """For JSON, which has no word for NaN."""
    return value if math.isfinite(value) else str(value)
