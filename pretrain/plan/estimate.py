"""Estimates, before a run is started, its hours, GPU-hours, jobs, memory and storage.

The time of a step comes from the planner (planner.py: modelled, not measured) or from a given MFU.
"""

import math
from dataclasses import dataclass, replace

from megatron_ladder.errors import UserError
from pretrain.config.train import TrainConfig
from pretrain.plan.attended import Attended, attended
from pretrain.plan.experts import has_experts
from pretrain.plan.links import network_of
from pretrain.plan.memory import is_planned, memory_plan, room
from pretrain.plan.planner import DEVICES, Hardware
from pretrain.plan.search import KINDS, row
from pretrain.plan.side import side_flops, with_side_network
from pretrain.run.folder import checkpoint_bytes, stored_bytes
from pretrain.run.metrics import flops_per_token
from pretrain.sizes import in_units

BYTES_OF_A_WEIGHT = {"bf16": 2, "fp32": 4}
STORAGE_BYTES_PER_S = 2e9
# While a checkpoint is begun, training waits. Both are assumed: a GPU's copy to host memory, and rank 0's
# work on the list of what each rank writes (3 s for 4,096 ranks: docs/results/resharding.md).
HOST_COPY_BYTES_PER_S = 5e9
PLANNING_S_PER_RANK = 1e-3


@dataclass(frozen=True)
class Estimate:
    """What a run takes. Times are in seconds unless they say hours, sizes in bytes."""

    ranks: int
    device: str
    step_s: float
    """Of a step with the whole batch."""
    step_source: str
    """Where step_s comes from, in words."""
    fp8: bool
    """The layers' GEMMs are in FP8."""
    mfu: float
    """The share of the device's bf16 peak that is reached, also with FP8. Operations of attention are those
    within the sequences, or within the documents where they are apart."""
    mfu_whole_sequences: float
    """The same, where operations are counted as if documents were not apart."""
    attended: Attended
    """What attention works on."""
    train_steps: int
    tokens: int
    training_s: float
    """The time of all steps."""
    validation_s: float
    """The time of all validations on one data set; 0 when eval_sequences does not give its length."""
    saving_s: float
    """The time that training waits for checkpoints."""
    write_s: float
    """The time in which one checkpoint is written, in the background if the run says so."""
    too_slow: bool
    """Writing takes longer than the steps between two checkpoints, so training waits for it."""
    starting_s: float
    """The time that all jobs take to start, and all but the first to check and to read a checkpoint."""
    jobs: int
    """The number of jobs with the time limit, one after another; 1 without a limit."""
    parameters: int
    memory_bytes: float | None
    """On the fullest GPU, modelled; None where memory is not planned (`is_planned`)."""
    memory_limit_bytes: float
    """The device's memory, less a margin for what the memory model leaves out."""
    checkpoint_bytes: int
    """The size of one checkpoint."""
    stored_bytes: int
    """The size of all checkpoints: those kept, and the one being written."""
    exported_bytes: int
    """The size of the exported Hugging Face folder, in the run's precision."""

    @property
    def hours(self) -> float:
        """Hours in which jobs run. Waiting in the queue is not included."""
        parts = self.training_s + self.validation_s + self.saving_s + self.starting_s
        return parts / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.ranks


def hardware_of(device: str, network_gbit_per_s: float = 400.0) -> Hardware:
    """GPUs of a name in DEVICES, in nodes with NVSwitch, with one NIC for each GPU.

    Raises:
        UserError: the name is not known.
    """
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
    storage_bytes_per_s: float = STORAGE_BYTES_PER_S,
) -> Estimate:
    """Plans a run as a chain of jobs, each with a time limit.

    A job starts, which takes `start_up_s`, reads its checkpoint to check it, and reads it again to load it.
    It trains until `lead_s` before its limit, and then writes a last checkpoint, for which training waits.
    Other checkpoints are written while training goes on (config.async_save): training waits until each GPU
    has copied its part, and for a checkpoint before that is not written yet.

    Args:
        config: the run; model.vocab_size must be given.
        ranks: the number of GPUs.
        hardware: the GPUs, and for the planner the links between them (from `hardware_of`).
        mfu: the share of the bf16 peak that is reached, such as 0.4 (also with FP8); None uses the
            planner's model.
        time_limit_s: of one job; None means no limit.
        lead_s: the time before the limit at which a job stops.
        start_up_s: the time from a job's start until it reads the checkpoint.
        storage_bytes_per_s: the rate at which all ranks together write and read the run's folder.

    Raises:
        UserError: the run cannot be laid out or planned, or the limit is too short to train.
    """
    if config.model.vocab_size is None:
        raise UserError(
            "the estimate needs model.vocab_size: give --model.vocab-size, or data sets (--data.paths)"
        )
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"an MFU of {mfu}: it must be above 0 and at most 1, such as 0.4")
    dp = config.parallel.data_parallel_size(ranks)
    config.check_batches(dp)
    works_on = attended(config)
    step_s, reached, source = _step(config, ranks, hardware, mfu, works_on.mean)
    whole = attended(replace(config, data=replace(config.data, attend_across_documents=True)))

    training_s = sum(
        steps * _step(_of_size(config, size), ranks, hardware, mfu, works_on.mean)[0]
        for size, steps in config.batch_sizes.counts(config.train_steps).items()
    )
    validation_s = _validations(config) * _sequences_s(config, step_s, works_on.mean)
    checkpoint = checkpoint_bytes(config)
    write_s = checkpoint / storage_bytes_per_s
    read_s = 2 * write_s
    begin_s = checkpoint / ranks / HOST_COPY_BYTES_PER_S + ranks * PLANNING_S_PER_RANK
    waited_s = begin_s + write_s
    not_yet_s = max(0.0, waited_s - config.save_interval * step_s)
    usual_s = begin_s + not_yet_s if config.async_save else waited_s
    saves_s = (-(-config.train_steps // config.save_interval) - 1) * usual_s + waited_s
    work_s = training_s + validation_s + saves_s
    jobs = 1
    if time_limit_s is not None:
        useful_s = time_limit_s - start_up_s - read_s - lead_s
        if useful_s < step_s:
            raise UserError(
                f"a job of {_hours(time_limit_s)} is too short: start-up takes {start_up_s:.0f} s and "
                f"reading a checkpoint {read_s:.0f} s, the job stops {lead_s:.0f} s before its limit, and "
                f"one step takes {step_s:.1f} s. Ask for longer jobs"
            )
        jobs = math.ceil(work_s / useful_s)
    # The padding of the vocabulary is not exported.
    padding = config.model.padded_vocab_size - config.model.vocab_size
    tables = 1 if config.model.share_embeddings_and_output_weights else 2
    exported = config.model.num_parameters() - padding * tables * config.model.hidden_size
    return Estimate(
        ranks=ranks,
        device=hardware.device.name,
        step_s=step_s,
        step_source=source,
        fp8=config.fp8.recipe is not None,
        mfu=reached,
        mfu_whole_sequences=reached * _flops(config, whole.mean) / _flops(config, works_on.mean),
        attended=works_on,
        train_steps=config.train_steps,
        tokens=config.tokens_after(config.train_steps),
        training_s=training_s,
        validation_s=validation_s,
        saving_s=saves_s + (jobs - 1) * waited_s,
        write_s=write_s,
        too_slow=config.async_save and not_yet_s > 0,
        starting_s=jobs * start_up_s + (jobs - 1) * read_s,
        jobs=jobs,
        parameters=config.model.num_parameters(),
        memory_bytes=memory_plan(config, dp).total if is_planned(config) else None,
        memory_limit_bytes=room(hardware.device.memory_bytes),
        checkpoint_bytes=checkpoint,
        stored_bytes=stored_bytes(config),
        exported_bytes=exported * BYTES_OF_A_WEIGHT[config.precision],
    )


def _step(
    config: TrainConfig, ranks: int, hardware: Hardware, mfu: float | None, attended: float
) -> tuple[float, float, str]:
    """A step's time in seconds, its MFU, and where the two come from."""
    model = config.model
    if mfu is not None:
        step_s = _flops(config, attended) / (ranks * hardware.device.peak_flops * mfu)
        return step_s, mfu, f"an MFU of {mfu:.0%}"
    if config.precision != "bf16" or model.residual not in KINDS:
        raise UserError(
            f"the planner models {', '.join(KINDS)} in bf16, not {model.residual} in {config.precision}: "
            "give an MFU"
        )
    if has_experts(model) and config.fp8.recipe:
        raise UserError(
            f"the planner does not model experts in FP8 (fp8.recipe {config.fp8.recipe}): give an MFU"
        )
    if config.side.is_on:
        raise UserError(
            f"the planner does not model side-tuning (side.reduction {config.side.reduction}): give an MFU"
        )
    fp8 = config.fp8.recipe is not None
    if fp8 and not hardware.device.fp8:
        raise UserError(
            f"fp8.recipe {config.fp8.recipe}: {hardware.device.name} has no fp8 units: leave the recipe "
            "out, or name another GPU"
        )
    planned = row(config, ranks, replace(hardware, fp8=fp8), attended)
    return planned.step_s, planned.mfu, "the planner's model, not measured"


def _of_size(config: TrainConfig, size: int) -> TrainConfig:
    """The run, were all its steps of `size` sequences."""
    schedule = replace(config.schedule, rampup_batch_size=None)
    return replace(config, global_batch_size=size, schedule=schedule)


def _flops(config: TrainConfig, attended: float) -> float:
    """Floating-point operations of a step, where attention works on so many tokens together."""
    flops = _model_flops(config, attended)
    if config.side.is_on:
        flops = with_side_network(config, flops, attended)
    return config.tokens_per_step * flops


def _model_flops(config: TrainConfig, attended: float) -> float:
    """Those for one token of training the whole model."""
    model = config.model
    return flops_per_token(
        num_layers=model.num_layers,
        attention_width=model.attention_width,
        seq_length=attended,
        matmul_parameters=model.num_matmul_parameters(),
    )


def _validations(config: TrainConfig) -> int:
    """The number of validations: one at every interval, and one at the end."""
    return -(-config.train_steps // config.eval_interval) if config.eval_interval else 1


def _sequences_s(config: TrainConfig, step_s: float, attended: float) -> float:
    """The time of validating `eval_sequences`: forward is a third of training the whole model, and the side
    network."""
    trained = _model_flops(config, attended)
    if config.side.is_on:
        trained += side_flops(config, attended)
    forward = config.tokens_per_step * trained / 3 / _flops(config, attended)
    return step_s * forward * (config.eval_sequences or 0) / config.global_batch_size


def format_estimate(found: Estimate) -> str:
    """The estimate as lines of text."""
    lost = found.starting_s + found.saving_s
    peak = " of the bf16 peak" if found.fp8 else ""
    lines = [
        f"{found.tokens:,} tokens in {found.train_steps:,} steps of {found.step_s:.2f} s on "
        f"{found.ranks} x {found.device} (MFU {found.mfu:.1%}{peak}; {found.step_source})",
        f"Time      {found.hours:,.1f} hours, {found.gpu_hours:,.0f} GPU-hours, in {found.jobs} "
        f"{'job' if found.jobs == 1 else 'jobs'}; {_hours(lost)} of it starting and waiting for "
        f"checkpoints, {_hours(found.validation_s)} validating",
        f"Storage   {in_units(found.stored_bytes, 'B')} for checkpoints of "
        f"{in_units(found.checkpoint_bytes, 'B')}, each written in {found.write_s:,.0f} s; exported "
        f"{in_units(found.exported_bytes, 'B')}",
    ]
    if source := found.attended.source:
        lines.append(
            f"Documents attention works on {found.attended.mean:,.0f} tokens together ({source}); as if "
            f"of whole sequences the MFU is {found.mfu_whole_sequences:.1%}"
        )
    if found.too_slow:
        lines.append(
            "          WRITING TAKES LONGER THAN THE STEPS BETWEEN TWO CHECKPOINTS: raise save_interval"
        )
    if found.memory_bytes is not None:
        fits = found.memory_bytes <= found.memory_limit_bytes
        lines.append(
            f"Memory    {in_units(found.memory_bytes, 'B')} of {in_units(found.memory_limit_bytes, 'B')} a "
            "GPU, modelled" + ("" if fits else ": IT DOES NOT FIT, give more GPUs or recompute")
        )
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h"
