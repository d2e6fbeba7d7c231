"""What a training will take: hours, GPU-hours, jobs, memory and storage, before it is started.

The step's time is the planner's (bench/plan.py: modelled, not measured), or follows from a stated MFU.
"""

import math
from dataclasses import dataclass

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.plan.links import network_of
from pretrain.plan.memory import memory_plan, room
from pretrain.plan.planner import DEVICES, Hardware
from pretrain.plan.search import KINDS, row
from pretrain.run.folder import checkpoint_bytes, stored_bytes
from pretrain.run.metrics import flops_per_token
from pretrain.sizes import in_units

BYTES_OF_A_WEIGHT = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Estimate:
    """Times in seconds unless they say hours, sizes in bytes."""

    ranks: int
    device: str
    step_s: float
    step_source: str
    """Where step_s comes from, in words."""
    mfu: float
    """Of the device's bf16 peak."""
    train_steps: int
    tokens: int
    training_s: float
    """All steps."""
    validation_s: float
    """Of one data set; 0 when eval_sequences does not say how long it is."""
    saving_s: float
    """Checkpoints, as if training waited for all of each: the most it can be."""
    starting_s: float
    """All jobs' starts, and reading the checkpoint in all but the first."""
    jobs: int
    """Of the time limit, one after another; 1 without a limit."""
    parameters: int
    memory_bytes: float | None
    """On the fullest GPU, modelled; None when it is not for bf16."""
    memory_limit_bytes: float
    """Of the device, less a margin for what the model leaves out."""
    checkpoint_bytes: int
    stored_bytes: int
    """Checkpoints kept, and the one being written."""
    exported_bytes: int
    """The Hugging Face folder, in the run's precision."""

    @property
    def hours(self) -> float:
        """Of running jobs; waiting in the queue comes on top."""
        parts = self.training_s + self.validation_s + self.saving_s + self.starting_s
        return parts / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.ranks


def hardware_of(device: str, network_gbit_per_s: float = 400.0) -> Hardware:
    """GPUs by name, in nodes with NVSwitch, one NIC each. Raises UserError when the name is not known."""
    if device not in DEVICES:
        raise UserError(f"no device {device!r}: choose one of {', '.join(DEVICES)}")
    return Hardware(DEVICES[device], network_of(network_gbit_per_s))


def estimate(
    config: TrainConfig,
    *,
    ranks: int,
    hardware: Hardware,
    mfu: float | None = None,
    time_limit_s: float | None = None,
    lead_s: float = 300.0,
    start_up_s: float = 180.0,
    storage_bytes_per_s: float = 2e9,
) -> Estimate:
    """Plans a run as one job after another of a limited time.

    A job starts (`start_up_s`, reading its checkpoint), trains until `lead_s` before its limit, and writes
    a last checkpoint.

    Args:
        config: with model.vocab_size.
        ranks: GPUs.
        hardware: the GPUs, and the links between them for the planner (`hardware_of`).
        mfu: share of the bf16 peak reached, such as 0.4; None takes the planner's model of the step.
        time_limit_s: of one job; None: there is none.
        lead_s: how long before the limit a job stops.
        storage_bytes_per_s: what all ranks together write to and read from the run's folder.

    Raises:
        UserError: what cannot be laid out or planned, or a limit too short to train in.
    """
    if config.model.vocab_size is None:
        raise UserError("the estimate needs model.vocab_size: give it, or data sets")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"an MFU of {mfu}: it is a share above 0 and up to 1, such as 0.4")
    dp = config.parallel.data_parallel_size(ranks)
    config.num_microbatches(dp)
    step_s, reached, source = _step(config, ranks, hardware, mfu)

    training_s = config.train_steps * step_s
    validation_s = _validations(config) * _sequences_s(config, step_s)
    checkpoint = checkpoint_bytes(config)
    save_s = checkpoint / storage_bytes_per_s
    saves = -(-config.train_steps // config.save_interval)
    work_s = training_s + validation_s + saves * save_s
    jobs = 1
    if time_limit_s is not None:
        useful_s = time_limit_s - start_up_s - save_s - lead_s
        if useful_s < step_s:
            raise UserError(
                f"a job of {_hours(time_limit_s)} trains nothing: start-up takes {start_up_s:.0f} s, "
                f"reading a checkpoint {save_s:.0f} s, it stops {lead_s:.0f} s before its limit, and a "
                f"step takes {step_s:.1f} s. Ask for longer jobs"
            )
        jobs = math.ceil(work_s / useful_s)
    # Vocabulary padding is not exported.
    padding = config.model.padded_vocab_size - config.model.vocab_size
    tables = 1 if config.model.share_embeddings_and_output_weights else 2
    exported = config.model.num_parameters() - padding * tables * config.model.hidden_size
    return Estimate(
        ranks=ranks,
        device=hardware.device.name,
        step_s=step_s,
        step_source=source,
        mfu=reached,
        train_steps=config.train_steps,
        tokens=config.train_steps * config.tokens_per_step,
        training_s=training_s,
        validation_s=validation_s,
        saving_s=(saves + jobs - 1) * save_s,
        starting_s=jobs * start_up_s + (jobs - 1) * save_s,
        jobs=jobs,
        parameters=config.model.num_parameters(),
        memory_bytes=memory_plan(config, dp).total if config.precision == "bf16" else None,
        memory_limit_bytes=room(hardware.device.memory_bytes),
        checkpoint_bytes=checkpoint,
        stored_bytes=stored_bytes(config),
        exported_bytes=exported * BYTES_OF_A_WEIGHT[config.precision],
    )


def _step(
    config: TrainConfig, ranks: int, hardware: Hardware, mfu: float | None
) -> tuple[float, float, str]:
    """A step's seconds, its MFU, and where they come from."""
    model = config.model
    if mfu is not None:
        flops = config.tokens_per_step * flops_per_token(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            seq_length=config.data.seq_length,
            matmul_parameters=model.num_matmul_parameters(),
        )
        return flops / (ranks * hardware.device.peak_flops * mfu), mfu, f"an MFU of {mfu:.0%}"
    if config.precision != "bf16" or model.residual not in KINDS:
        raise UserError(
            f"the planner knows {', '.join(KINDS)} in bf16, not {model.residual} in "
            f"{config.precision}: state an MFU"
        )
    planned = row(config, ranks, hardware)
    return planned.step_s, planned.mfu, "the planner's model, not measured"


def _validations(config: TrainConfig) -> int:
    """How many there are: at every interval, and at the end."""
    return -(-config.train_steps // config.eval_interval) if config.eval_interval else 1


def _sequences_s(config: TrainConfig, step_s: float) -> float:
    """Validating `eval_sequences`: forward is a third of a step's work."""
    return step_s * (config.eval_sequences or 0) / config.global_batch_size / 3


def format_estimate(found: Estimate) -> str:
    """Lines for people."""
    lost = found.starting_s + found.saving_s
    lines = [
        f"{found.tokens:,} tokens in {found.train_steps:,} steps of {found.step_s:.2f} s on "
        f"{found.ranks} x {found.device} (MFU {found.mfu:.1%}; {found.step_source})",
        f"Time      {found.hours:,.1f} hours, {found.gpu_hours:,.0f} GPU-hours, in {found.jobs} "
        f"{'job' if found.jobs == 1 else 'jobs'}; {_hours(lost)} of it starting and writing "
        f"checkpoints, {_hours(found.validation_s)} validating",
        f"Storage   {in_units(found.stored_bytes, 'B')} for checkpoints of "
        f"{in_units(found.checkpoint_bytes, 'B')}; exported {in_units(found.exported_bytes, 'B')}",
    ]
    if found.memory_bytes is not None:
        fits = found.memory_bytes <= found.memory_limit_bytes
        lines.append(
            f"Memory    {in_units(found.memory_bytes, 'B')} of {in_units(found.memory_limit_bytes, 'B')} a "
            "GPU, modelled" + ("" if fits else ": IT DOES NOT FIT, give more GPUs or recompute")
        )
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h"
