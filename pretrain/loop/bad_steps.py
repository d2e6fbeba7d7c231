"""Steps whose loss or gradients are bad: they are found before the update, recorded, and passed over.

A step that is passed over keeps its number, its data and its learning rate; only the weights are not
updated. The decision is written to RUN/bad_steps/step_N.json. A resumed run follows that file, so it
reaches the same weights as a run that was never stopped, even if the fault does not happen again.

megatron-core's rerun_state_machine is not used: it runs a step twice to tell a faulty GPU from a bad
batch, and then ends the job; it neither skips a step nor goes back to a checkpoint. megatron-core's
optimizers leave out an update by themselves (found_inf) only with a loss scale, which fp32 and bf16 do
not have, and they do not check the loss.
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
"""A spike is measured against the median of so many good losses before it, or fewer at a run's start."""
AT_LEAST = 10
"""No loss is a spike before so many losses are known."""
NAMES = 20
"""The most parameters with bad gradients that each rank names."""


class BadSteps:
    """Decides for every step whether it is good. All ranks get the same answer.

    Args:
        config: the run's configuration.
        saver: gives the checkpoint to go back to.
        recent_losses: the losses of the last good steps before this start, from the checkpoint.
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
        """The bad step that `is_good` found last; None: the last step was good."""

    @property
    def recent_losses(self) -> tuple[float, ...]:
        """The losses of the last good steps, for the checkpoint."""
        return tuple(self._recent)

    def decided(self, step: int) -> BadStep | None:
        """The decision to pass over this step, where one was made before; None: train the step."""
        for bad in self._known:
            if bad.passed_over and bad.passed_over[0] <= step <= bad.passed_over[1]:
                return bad
        return None

    def is_good(
        self, step: int, loss: float, grad_norm: float, sums: list[Tensor], model: list[Any]
    ) -> bool:
        """Whether a step is good. A bad step is recorded in a file, and in `found` with the action to take.

        Called by every rank, between backward and the update.

        Args:
            loss: mean cross-entropy of the global batch, in nats a token.
            grad_norm: before clipping.
            sums: for each micro-batch of this rank, on the last stage: [2], the sum of the losses and the
                number of trained tokens.
            model: chunks with their gradients.
        """
        verdict = self._verdict(loss, grad_norm)
        # loss and grad_norm come from sums over all ranks, so ranks should agree. Where they do not, all
        # ranks must still act alike: a step is bad when any rank finds it bad.
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
        """Call it when a checkpoint was loaded again; `recent_losses` come from that checkpoint."""
        self._recent = deque(recent_losses, maxlen=RECENT)

    def _verdict(self, loss: float, grad_norm: float) -> Verdict | None:
        """What is wrong with a step, and the policy for it; None: the step is good."""
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
            why = f"{reason}, and {limit} bad steps were passed over before (faults.max_bad_steps)"
            return BadStep(step, why, "stop", None)
        if policy == "stop":
            return BadStep(step, reason, "stop", None)
        if policy == "rollback" and checkpoint:
            return BadStep(step, reason, "rollback", (checkpoint_step(checkpoint) + 1, step))
        # Also for "rollback" before the first checkpoint: there is none to go back to.
        return BadStep(step, reason, "skip", (step, step))

    def _details(
        self, step: int, loss: float, grad_norm: float, sums: list[Tensor], model: list[Any]
    ) -> dict[str, Any]:
        """The facts that help a person to find the cause of a bad step; called by all ranks."""
        ranks: list[Any] = [None] * dist.get_world_size()
        mine = self._micro_batches(step, sums), _bad_gradients(model)
        dist.all_gather_object(ranks, mine)
        return {
            "loss": _plain(loss),
            "grad_norm": _plain(grad_norm),
            # Positions in the order in which the run reads its data: the first, and one after the last.
            "samples": [self._config.samples_after(step - 1), self._config.samples_after(step)],
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
        """The mean loss of each micro-batch of this rank, and its samples: first, and one after the last.

        Only the first tensor- and context-parallel rank lists them, so that each micro-batch is listed
        once.
        """
        sums = [pair.clone() for pair in sums]
        for pair in sums:  # each context-parallel rank has those of its tokens
            dist.all_reduce(pair, group=parallel_state.get_context_parallel_group())
        if parallel_state.get_tensor_and_context_parallel_rank():
            return []
        width = self._config.micro_batch_size
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        entries = []
        for number, pair in enumerate(sums):
            total, tokens = pair.tolist()
            first = self._config.samples_after(step - 1) + (number * size + rank) * width
            loss = _plain(total / max(tokens, 1.0))
            entries.append({"samples": [first, first + width], "loss": loss})
        return entries

    def _write(self, bad: BadStep, details: dict[str, Any]) -> None:
        folder = self._run_dir / "bad_steps"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{bad.step}.json"
        write_atomically(path, json.dumps({**asdict(bad), **details}, indent=2) + "\n")
        logger.warning(
            "step %d is bad: %s. Action: %s. Details: %s", bad.step, bad.reason, bad.action, path
        )


def _from_first_rank(value: Any) -> Any:
    """The first rank's value, on all ranks.

    Only the first rank reads and writes the files: other machines may see later what it has written.
    """
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _bad_gradients(model: list[Any]) -> list[str]:
    """This rank's names of parameters whose gradients are not finite, at most NAMES of them."""
    return [
        name
        for chunk in model
        for name, parameter in chunk.module.named_parameters()
        if not parameter.main_grad.isfinite().all()
    ][:NAMES]


def _plain(value: float) -> float | str:
    """The value as JSON can hold it: NaN and infinity, which JSON lacks, become text."""
    return value if math.isfinite(value) else str(value)
