"""A run's whole configuration: typed, frozen, saved with the run as JSON.

start/arguments.py makes the command line from these classes: each field is an option.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from megatron_ladder.config import (
    STALE,
    Attention,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
    TransformerImpl,
)
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config, check_fp8
from megatron_ladder.json_files import read_json
from megatron_ladder.side.config import SideConfig
from pretrain.config.data import DataConfig
from pretrain.config.faults import FaultConfig
from pretrain.config.optimizer import OptimizerConfig, refuse_together
from pretrain.config.past import Past
from pretrain.config.profile import ProfileConfig
from pretrain.config.schedule import BatchSizes, ScheduleConfig, batch_sizes, check_ramp
from pretrain.config.side import check_side_run
from pretrain.config.values import check_numbers, from_dict, to_dict
from pretrain.config.values import differences as differences
from pretrain.config.watch import WatchConfig
from pretrain.files import write_atomically


@dataclass(frozen=True)
class AdaptConfig:
    """How the model of `init_from` is led to its ladder layers (docs/guides/adapt.md)."""

    gradual_steps: int = 0
    """Ladder layers are turned on one after another over so many steps, the last first; 0: at once."""
    distillation_weight: float = 0.0
    """The share of the loss that is the divergence from the unmodified model's predictions."""
    distillation_temperature: float = 1.0
    """Both models' predictions are softened by it."""


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init_from: Path | None = None
    """A run or an imported model whose weights training starts from. Its model is taken too; some of
    its layers may be made ladder layers."""
    branch_from: Path | None = None
    """RUN@STEP: go on in another folder from that checkpoint, with its weights, optimizer, step and place
    in the data; options not given are that run's."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    side: SideConfig = field(default_factory=SideConfig)
    output_dir: Path | None = None
    """The run's folder; a run found there with the same configuration is resumed."""
    micro_batch_size: int = 1
    """Sequences a rank computes at once."""
    global_batch_size: int = 8
    """Sequences a step, over all ranks; the rest is gradient accumulation."""
    precision: Precision = "fp32"
    """bf16 keeps fp32 master weights and reduces gradients in fp32."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    transformer_impl: TransformerImpl = "auto"
    """Whose layers: megatron-core's local ones, or Transformer Engine's (auto: where there is one)."""
    attention: Attention = "auto"
    """Whose core attention: torch's where that is cuDNN's, else Transformer Engine's where it would be
    fused, else torch's (auto); te, torch, or unfused: megatron-core's, which keeps all scores."""
    recompute: Recompute = "none"
    """Activations to compute again in backward: none, selective (core attention) or full."""
    compile: bool = False
    """torch.compile each layer: for small models on one tensor-parallel rank, with local layers."""
    cuda_graph: bool = False
    """Forward and backward of a step as one CUDA graph: without Python's time for launching kernels."""
    deterministic: bool = False
    """Bitwise repeatable kernels and sums of NCCL on GPUs; the CPU is repeatable anyway."""
    seed: int = 1234
    eval_interval: int = 100
    """Steps between validations; 0 validates only at the end."""
    eval_sequences: int | None = None
    """Sequences of each validation split to use; None uses all."""
    save_interval: int = 100
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints to keep; at least 2, so that there is one before a damaged one."""
    async_save: bool = True
    """Training waits only until a checkpoint is copied; it is written meanwhile."""
    log_interval: int = 1
    """Steps between lines of metrics."""
    tensorboard: bool = True
    wandb: bool = False
    faults: FaultConfig = field(default_factory=FaultConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    past: tyro.conf.Suppress[Past] = field(default_factory=Past)
    """What the steps trained so far had, where the fields above say otherwise; `train` writes it."""

    def __post_init__(self) -> None:
        check_numbers(self)
        at_least_1 = {
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.global_batch_size,
            "save_interval": self.save_interval,
            "keep_last": self.keep_last,
            "log_interval": self.log_interval,
            "eval_sequences": self.eval_sequences,
            "profile.first_step": self.profile.first_step,
            "profile.steps": self.profile.steps,
            "data.seq_length": self.data.seq_length,
            "schedule.train_steps": self.schedule.train_steps,
            "schedule.train_tokens": self.schedule.train_tokens,
        }
        not_negative = {
            "eval_interval": self.eval_interval,
            "data.num_workers": self.data.num_workers,
            "optimizer.lr": self.optimizer.lr,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "optimizer.clip_grad": self.optimizer.clip_grad,
            "schedule.warmup_steps": self.schedule.warmup_steps,
            "schedule.warmup_tokens": self.schedule.warmup_tokens,
            "schedule.wsd_decay_steps": self.schedule.wsd_decay_steps,
            "adapt.gradual_steps": self.adapt.gradual_steps,
            "seed": self.seed,
        }
        for least, values in ((1, at_least_1), (0, not_negative)):
            for name, value in values.items():
                if value is not None and value < least:
                    raise UserError(f"{name} is {value}: it must be at least {least}")
        for name in ("fim_rate", "fim_spm_rate"):
            if not 0 <= (share := getattr(self.data, name)) <= 1:
                raise UserError(f"data.{name} is {share}: it must be a share from 0 to 1")
        if self.data.seq_length > self.model.max_position_embeddings:
            raise UserError(
                f"data.seq_length {self.data.seq_length} is longer than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}: lower the "
                "first or raise the second"
            )
        self._check_cuts()
        if self.parallel.tp_overlap == "halves" and self.micro_batch_size % 2:
            raise UserError(
                f"micro_batch_size {self.micro_batch_size} has no two equal halves, which "
                "parallel.tp_overlap halves needs: give an even micro_batch_size, or leave it out"
            )
        schedule = self.schedule
        check_ramp(schedule.rampup_batch_size, self.global_batch_size)
        for one, other in (("train_steps", "train_tokens"), ("warmup_steps", "warmup_tokens")):
            if getattr(schedule, one) is not None and getattr(schedule, other) is not None:
                raise UserError(f"schedule.{one} and schedule.{other} are both set: give one")
        if self.warmup_steps >= self.train_steps:
            raise UserError(
                f"warm-up takes {self.warmup_steps} steps, the whole run {self.train_steps}: shorten "
                "warm-up, or train longer"
            )
        if not 0 <= schedule.wsd_decay_fraction <= 1 or not 0 <= schedule.min_lr_fraction <= 1:
            raise UserError(
                "schedule.wsd_decay_fraction must be from 0 to 1, and min_lr_fraction from 0 to 1"
            )
        if (decay_steps := schedule.wsd_decay_steps) is not None:
            if schedule.decay != "wsd":
                raise UserError(
                    "schedule.wsd_decay_steps needs schedule.decay wsd: give that, or leave it out"
                )
            if self.warmup_steps + decay_steps > self.train_steps:
                raise UserError(
                    f"schedule.wsd_decay_steps {decay_steps} and warm-up ({self.warmup_steps} steps) are "
                    f"longer than the run ({self.train_steps} steps): shorten them, or train longer"
                )

        check_fp8(
            *(self.fp8, self.model, self.parallel, self.precision),
            tokens=self.data.seq_length * self.micro_batch_size,
        )
        refuse_together(
            self.optimizer,
            experts=self.model.experts.num_moe_experts is not None,
            side=self.side.is_on,
            primary_weights=self.fp8.primary_weights,
            distillation=self.adapt.distillation_weight > 0,
        )
        self._check_adapt()
        check_side_run(self)
        self.watch.check(self.save_interval)

    def _check_cuts(self) -> None:
        """Refuses a sequence length that the ranks cannot divide among them."""
        tp, cp = self.parallel.tensor_model_parallel_size, self.parallel.context_parallel_size
        length, over = self.data.seq_length, tp if self.parallel.sequence_parallel else 1
        if cp > 1 and length % (2 * cp * over):
            raise UserError(
                f"data.seq_length {length} is not divisible by {2 * cp * over}: "
                f"parallel.context_parallel_size {cp} cuts each sequence in {2 * cp} chunks"
                + (f", and sequence parallelism divides these over {tp} ranks" if over > 1 else "")
                + ". Change one of these"
            )
        if length % over:
            raise UserError(
                f"data.seq_length {length} is not divisible by "
                f"parallel.tensor_model_parallel_size {tp}: sequence parallelism divides each sequence "
                "over these ranks. Change one of the two"
            )

    def _check_adapt(self) -> None:
        adapt = self.adapt
        if not 0 <= adapt.distillation_weight <= 1 or adapt.distillation_temperature <= 0:
            raise UserError(
                f"adapt.distillation_weight must be from 0 to 1 (it is {adapt.distillation_weight}), and "
                f"adapt.distillation_temperature above 0 (it is {adapt.distillation_temperature})"
            )
        if self.init_from is None and (adapt.gradual_steps or adapt.distillation_weight):
            raise UserError(
                "adapt.gradual_steps and adapt.distillation_weight need a model to start from: give "
                "--init-from RUN, or leave both out"
            )
        if adapt.gradual_steps and not STALE.intersection(self.model.layer_residuals()):
            raise UserError(
                f"adapt.gradual_steps is {adapt.gradual_steps}, but no layer is to be a ladder layer: "
                "give --ladder-layers"
            )
        if adapt.gradual_steps > self.train_steps:
            raise UserError(
                f"adapt.gradual_steps {adapt.gradual_steps} is more than the run's {self.train_steps} "
                "steps: the run would end before all ladder layers are on. Lower it, or train longer"
            )

    @property
    def tokens_per_step(self) -> int:
        """Of steps with the whole batch, which a ramp leads to."""
        return self.global_batch_size * self.data.seq_length

    @property
    def documents_divided(self) -> bool:
        """Whether documents are apart, and context-parallel ranks divide them."""
        return self.parallel.context_parallel_size > 1 and not self.data.attend_across_documents

    @property
    def train_steps(self) -> int:
        return self._steps("train_steps", "train_tokens", default=1000)

    @property
    def warmup_steps(self) -> int:
        return self._steps("warmup_steps", "warmup_tokens", default=0)

    @property
    def wsd_decay_steps(self) -> int:
        """Steps in which wsd goes down, at the end of the run; 0: it does not."""
        if (steps := self.schedule.wsd_decay_steps) is not None:
            return steps
        share = self.schedule.wsd_decay_fraction
        steps = max(1, round(self.train_steps * share)) if share else 0
        return min(steps, self.train_steps - self.warmup_steps)

    @property
    def batch_sizes(self) -> BatchSizes:
        """The sequences of each step."""
        ramp = self.schedule.rampup_batch_size
        return batch_sizes(self.past.batch_sizes, ramp, self.global_batch_size)

    def samples_after(self, step: int) -> int:
        """The sequences that the first `step` steps train on."""
        return self.batch_sizes.samples_after(step)

    def tokens_after(self, step: int) -> int:
        """The tokens that the first `step` steps train on."""
        return self.samples_after(step) * self.data.seq_length

    def steps_for(self, tokens: int) -> int:
        """The number of steps that train on at least `tokens` tokens."""
        samples = -(-tokens // self.data.seq_length)
        return self.batch_sizes.steps_for(samples)

    @property
    def drawn_samples(self) -> int:
        """The number of sequences that the order of the data is drawn for (Past.drawn)."""
        return self.past.drawn or self.samples_after(self.train_steps)

    def _steps(self, steps: str, tokens: str, default: int) -> int:
        if (count := getattr(self.schedule, tokens)) is not None:
            return self.steps_for(count)
        count = getattr(self.schedule, steps)
        return default if count is None else count

    def num_microbatches(self, data_parallel_size: int, step: int | None = None) -> int:
        """The number of micro-batches whose gradients a rank accumulates in one step; None: in one with the
        whole batch.

        Raises:
            UserError: the ranks cannot divide the batch.
        """
        size = self.global_batch_size if step is None else self.batch_sizes.of(step)
        return self._micro_batches(size, data_parallel_size)

    def check_batches(self, data_parallel_size: int) -> None:
        """Refuses a batch size that the ranks cannot divide, those of a ramp too.

        Raises:
            UserError: it names the size and what divides it.
        """
        self.num_microbatches(data_parallel_size)
        if ramp := self.schedule.rampup_batch_size:
            for size in range(ramp[0], self.global_batch_size, ramp[1]):
                self._micro_batches(size, data_parallel_size)

    def _micro_batches(self, size: int, data_parallel_size: int) -> int:
        in_ramp = size != self.global_batch_size
        name = f"global_batch_size {size}"
        if in_ramp:
            name = f"a batch of {size}, which schedule.rampup_batch_size has on the way,"
        together = self.micro_batch_size * data_parallel_size
        if size % together:
            raise UserError(
                f"{name} is not a multiple of micro_batch_size {self.micro_batch_size} x data-parallel "
                f"size {data_parallel_size} = {together}: change one of them"
                + (". Leave out a ramp that is over" if in_ramp else "")
            )
        count = size // together
        stages = self.parallel.pipeline_model_parallel_size
        if self.parallel.num_chunks > 1 and count % stages:
            raise UserError(
                f"{count} micro-batches a step ({name.rstrip(',')}) are not a "
                f"multiple of parallel.pipeline_model_parallel_size {stages}: the interleaved "
                "schedule runs them in groups of that size"
            )
        return count


def save_config(config: TrainConfig, path: Path) -> None:
    write_atomically(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config(path: Path, onto: TrainConfig | None = None) -> TrainConfig:
    """Reads a run's saved configuration, or, given `onto`, some fields that replace those of `onto`.

    Raises:
        UserError: the file does not exist, or does not hold a configuration.
    """
    try:
        values = read_json(path, "a run's config.json")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a config.json saved by a run") from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder: give a file, such as {path / 'config.json'}"
        ) from None
    if onto is not None:
        values = _merged(to_dict(onto), values)
    elif "model" not in values:
        raise UserError(f"{path} has no field model: give --preset NAME as well")
    return from_dict(TrainConfig, values, where=str(path))


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(old[k], v) for k, v in new.items() if _are_dicts(old.get(k), v)}
    return {**old, **new, **both}


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)
