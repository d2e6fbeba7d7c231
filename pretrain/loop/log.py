"""What the training loop reports. Rank 0 writes metrics of it, and log lines; other ranks write nothing."""

import logging
import math
import resource
import statistics
import time
from collections import deque
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_ladder.fields.windows import attention_length
from megatron_ladder.mcore_compat import LadderConfig
from pretrain.config.changes import Changes
from pretrain.config.side import trained_parameters
from pretrain.config.train import TrainConfig, to_dict
from pretrain.data.baselines import Baselines
from pretrain.data.folders import DataFolder, keep_facts
from pretrain.loop.rank_speed import SlowRank
from pretrain.loop.watchdog import Watchdog
from pretrain.model import cudnn
from pretrain.model.fusions import Choice, adam_class, choices, table
from pretrain.model.graphs import WARM_UP_STEPS
from pretrain.plan.memory import Attention, in_words, memory_plan
from pretrain.plan.side import with_side_network
from pretrain.run.bad_step import BadStep
from pretrain.run.metrics import MetricsLog, flops_per_token, peak_flops
from pretrain.run.status import State, Status
from pretrain.run.versions import versions
from pretrain.start.initial import keep_initial
from pretrain.watch.watch import Watch, scalars

logger = logging.getLogger(__name__)


class RunLog:
    """Times the steps and derives rates from them. The time of validation and checkpoints is left out.

    Args:
        config: the run's configuration, resolved.
        resume_step: the last step trained before this process started.
        device: "cpu" or the GPU's name.
        status: gets what the run is doing.
        watchdog: gets the end of each step.
        changed: options that have other values from here on than before.
    """

    def __init__(
        self,
        config: TrainConfig,
        resume_step: int,
        device: str,
        status: Status,
        watchdog: Watchdog,
        changed: Changes | None = None,
    ) -> None:
        self._config = config
        self._status = status
        self._watchdog = watchdog
        self._world_size = dist.get_world_size()
        self._is_resumed = resume_step > 0
        self._log: MetricsLog | None = None
        self._baselines: Baselines | None = None
        self._planned: float | None = None
        if dist.get_rank() == 0:
            assert config.output_dir is not None
            self._log = MetricsLog(
                config.output_dir,
                resume_step=resume_step,
                train_steps=config.train_steps,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                config=to_dict(config),
            )
            self._log.start(
                step=resume_step,
                world_size=self._world_size,
                name=config.output_dir.name,
                residual=config.model.residual,
                versions=versions(),
                parameters=config.model.num_parameters(),
                trained_parameters=trained_parameters(config),
                tokens_per_step=config.tokens_per_step,
                tokens=config.tokens_after(resume_step),
                train_steps=config.train_steps,
                device=device,
                branch_from=str(config.branch_from) if config.branch_from else None,
                changed={name: list(pair) for name, pair in (changed or {}).items()},
            )
        self._peak = None if device == "cpu" else peak_flops(device)
        self._trained_s = self._log.time_so_far if self._log else 0.0
        self._step_started = time.perf_counter()
        self._pending_tokens = 0
        self._pending_s = 0.0
        self._pending_flops = 0.0
        self._recent_s: deque[float] = deque(maxlen=100)  # of a token
        status.begin(resume_step, last_checkpoint=resume_step or None)
        if resume_step < config.train_steps:
            watchdog.phase("the first step")
        else:
            watchdog.step_ended(resume_step, 0.0)  # none is to come

    def has_reader(self) -> bool:
        """Whether this rank prints to a program that still reads, or prints nothing."""
        return self._log is None or self._log.has_reader

    def doing(self, state: State) -> None:
        """Call it when something other than training begins; the end of the next step ends this state."""
        self._status.update(state)
        self._watchdog.allow_more()

    def allow_more(self) -> None:
        """Call it before what may take longer than a step, whatever the run is doing."""
        self._watchdog.allow_more()

    def built(
        self,
        mcore_config: LadderConfig,
        attention: Attention | None = None,
        longest: int | None = None,
    ) -> None:
        """Logs what each part of the model runs on, and the planned memory of the fullest GPU.

        Args:
            attention, longest: as in `memory_plan`. None: memory is not planned.
        """
        if self._log:
            found = choices(mcore_config, adam_class())
            if self._config.compile:
                by = "one graph a layer, by torch.compile; of the parts below, only linears stay as listed"
                found.insert(0, Choice("layers", by, ""))
            if self._config.cuda_graph:
                by = f"one CUDA graph, captured after {WARM_UP_STEPS} steps"
                found.insert(0, Choice("forward and backward", by, ""))
            records = [asdict(choice) for choice in found]
            words = f"what each part of the model runs on:\n{table(found)}"
            if not torch.cuda.is_available():
                words = "the model runs on the CPU; `megatron-ladder doctor` lists what each part runs on"
                if mcore_config.core_attention.keeps_scores:
                    words += (
                        f"; attention keeps its scores in memory: {mcore_config.core_attention.why}"
                    )
            self._log.note("built", words, choices=records)
            for problem in cudnn.problems() if torch.cuda.is_available() else []:
                logger.warning(problem)
        if attention is not None:
            dp = self._config.parallel.data_parallel_size(self._world_size)
            plan = memory_plan(self._config, dp, attention, longest)
            self._planned = plan.total
            if self._log:
                words = f"memory of the fullest GPU: planned {in_words(plan)}"
                self._log.note("memory_plan", words, **asdict(plan))

    def data(self, folders: list[DataFolder], baselines: Baselines) -> None:
        """Copies the facts of the data sets into the run's folder.

        Args:
            baselines: of the data sets. Each is recorded once, at the end of the step in which it is there.
        """
        if self._log:
            assert self._config.output_dir is not None
            keep_facts(self._config.output_dir, folders)
            keep_initial(self._config, is_resumed=self._is_resumed)
            self._baselines = baselines

    def is_due(self, step: int) -> bool:
        """Whether a step's figures are written."""
        return step % self._config.log_interval == 0 or step == self._config.train_steps

    def train(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        z_loss: float,
        attended: float,
        balance: dict[str, Any],
    ) -> None:
        """Call it when a step is done.

        Args:
            loss: mean cross-entropy of the global batch, in nats a token.
            grad_norm: before clipping.
            z_loss: what was trained beside the loss, which it is not a part of.
            attended: of this rank's tokens of the step (RankBatches.attended).
            balance: of the experts, at a step that is due (load_balance).
        """
        seconds = time.perf_counter() - self._step_started
        tokens = self._tokens_of(step)
        self._pending_tokens += tokens
        self._pending_s += seconds
        self._pending_flops += self._flops(tokens, attended)
        self._trained_s += seconds
        self._recent_s.append(seconds / tokens)
        token_s = self._token_s()
        to_come = self._config.tokens_after(self._config.train_steps)
        to_come -= self._config.tokens_after(step)
        self._status.update(
            "training",
            step=step,
            tokens=self._config.tokens_after(step),
            loss=loss,
            tokens_per_second=1 / token_s,
            eta_s=to_come * token_s,
        )
        due = self.is_due(step)
        if self._log and due:
            achieved = self._pending_flops / self._pending_s
            whole = {}
            if self._peak and not self._config.data.attend_across_documents:
                length = attention_length(self._config.model, [self._config.data.seq_length])
                flops = self._flops(self._pending_tokens, length)
                whole["mfu_whole_sequences"] = flops / self._pending_s / self._peak
            if self._config.optimizer.z_loss_coeff:
                whole["z_loss"] = z_loss
            self._log.train(
                eta_s=to_come * token_s,
                step=step,
                tokens=self._config.tokens_after(step),
                time=self._trained_s,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=learning_rate,
                tokens_per_second=self._pending_tokens / self._pending_s,
                tflops_per_gpu=achieved / 1e12,
                mfu=achieved / self._peak if self._peak else None,
                **whole,
                memory_gib=_peak_memory_gib(),
                **balance,
            )
        if due:
            self._pending_tokens, self._pending_s, self._pending_flops = 0, 0.0, 0.0
        self._step_done(step)

    def passed_over(self, step: int, bad: BadStep) -> None:
        """Call it for a step that is not in the weights. The time that it took is not counted.

        Args:
            bad: the bad step that decided this; its number may differ from `step` after a rollback.
        """
        if self._log and step == bad.step:
            assert bad.passed_over is not None
            if bad.action == "rollback":
                self._log.go_back(bad.passed_over[0] - 1)
            self._log.note("bad_step", f"step {step}: {bad.reason}: {bad.action}", **asdict(bad))
        if bad.action == "rollback":
            self._pending_tokens, self._pending_s, self._pending_flops = 0, 0.0, 0.0
            self._trained_s = self._log.time_so_far if self._log else 0.0
        self._status.update("training", step=step, tokens=self._config.tokens_after(step))
        self._step_done(step)

    def slow_ranks(self, step: int, ranks: list[SlowRank]) -> None:
        """Records slow ranks, which make the others wait."""
        for slow in ranks if self._log else []:
            assert self._log is not None
            self._log.note(
                "slow_rank",
                f"step {step}: rank {slow.rank} on {slow.host} is slow at {slow.what}: "
                f"{slow.seconds:.3g} s, the median of all ranks is {slow.median:.3g} s",
                step=step,
                **asdict(slow),
            )

    def validated(self, step: int) -> list[str]:
        """The data sets whose validation of the step that training began with is recorded. Every rank
        calls it and gets them."""
        recorded = [self._log.validated(step) if self._log else []]
        dist.broadcast_object_list(recorded)
        if self._is_resumed and not recorded[0]:
            logger.info("step %d was saved, and not validated: validating it now", step)
        return recorded[0]

    def validation(self, step: int, dataset: str, loss: float) -> None:
        """Call it when a data set has been validated on; `loss` is in nats a token."""
        if self._log:
            self._log.validation(
                step=step,
                tokens=self._config.tokens_after(step),
                time=self._trained_s,
                dataset=dataset,
                loss=loss,
                perplexity=math.exp(min(loss, 700.0)),
            )
        self.allow_more()  # the next data set's validation, which may take as long
        self._step_started = time.perf_counter()

    def beside(self) -> list[dict[str, Any]]:
        """The lines on what earlier starts have done beside the training. Of the first rank."""
        return self._log.beside if self._log else []

    def watched(self, watch: Watch) -> None:
        """Records what has come of checkpoints beside the training, and says what is being done."""
        for news in watch.news() if self._log else []:
            assert self._log is not None
            found = scalars(news.facts.get("results", []))
            self._log.beside_training(
                news.kind, news.text, step=news.step, scalars=found, **news.facts
            )
        self._status.update(watch=watch.doing)

    def wait_for_lines(self) -> None:
        """Waits until the lines so far are on disk in metrics.jsonl. Any thread may call it."""
        if self._log:
            self._log.sync()

    def saved(self, step: int) -> None:
        """Call it when a checkpoint is complete."""
        logger.info("saved checkpoint of step %d", step)
        self._status.update(last_checkpoint=step)

    def saving_began(self) -> None:
        """Call it when training goes on while a checkpoint is written.

        The time that it took to begin the checkpoint is not counted in the next step.
        """
        self._step_started = time.perf_counter()

    def save_failed(self, step: int, reason: str) -> None:
        """Call it when a checkpoint could not be written; training goes on without it."""
        if self._log:
            logger.error("could not save a checkpoint of step %d: %s", step, reason)
            self._log.save_failed(step=step, reason=reason)

    def end(self, step: int, reason: str) -> None:
        """Call it when training ends without a failure.

        Args:
            reason: "finished" at the end of the schedule, else why the run stopped.
        """
        self._compare_memory()
        finished = reason == "finished"
        self._record_baselines(wait=finished)  # a run that stops will go on: its next start counts
        if self._log:
            self._log.end(step=step, reason=reason)
        self._status.update(
            "finished" if finished else "stopped", step=step, reason="" if finished else reason
        )

    def _compare_memory(self) -> None:
        """Records the planned and the measured memory of the fullest GPU, where memory was planned."""
        if self._planned is None:
            return
        peak = torch.tensor(_peak_memory_gib() * 2**30, device=torch.cuda.current_device())
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        if self._log:
            measured, planned = peak.item(), self._planned
            self._log.note(
                "memory_peak",
                f"memory of the fullest GPU: {measured / 2**30:.2f} GiB at the peak, planned "
                f"{planned / 2**30:.2f} GiB ({measured / planned - 1:+.1%})",
                measured=measured,
                planned=planned,
            )

    def _tokens_of(self, step: int) -> int:
        return self._config.batch_sizes.of(step) * self._config.data.seq_length

    def _flops(self, tokens: float, attended: float) -> float:
        """This rank's operations of so many tokens of all ranks, where attention works on `attended` of
        them together."""
        model = self._config.model
        flops = flops_per_token(
            num_layers=model.num_layers,
            attention_width=model.attention_width,
            seq_length=attended,
            matmul_parameters=model.num_matmul_parameters(),
        )
        if self._config.side.is_on:
            flops = with_side_network(self._config, flops, attended)
        return tokens / self._world_size * flops

    def _token_s(self) -> float:
        """Seconds of a token in a usual step: the median of the last 100; 0 before the first."""
        return statistics.median(self._recent_s) if self._recent_s else 0.0

    def _record_baselines(self, *, wait: bool = False) -> None:
        if self._log and self._baselines:
            for dataset, loss in self._baselines.arrived(wait=wait):
                self._log.baseline(dataset=dataset, unigram_loss=loss)

    def _step_done(self, step: int) -> None:
        self._record_baselines()
        self._watchdog.step_ended(step, self._token_s() * self._tokens_of(step + 1))
        self._step_started = time.perf_counter()


def _peak_memory_gib() -> float:
    """The peak of this rank's memory: that of the GPU where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
