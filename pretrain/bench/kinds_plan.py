"""What `bench kinds` measures: the kinds, the layouts in which they are measured, and their order."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ladder.config import (
    STALE,
    ModelConfig,
    ParallelConfig,
    Precision,
    Residual,
    TpOverlap,
    check_layout,
)
from megatron_ladder.errors import UserError
from megatron_ladder.fp8 import Fp8Config, Fp8Recipe, check_fp8
from pretrain.config.values import from_dict, to_dict
from pretrain.model.queues import ONE, SEVERAL
from pretrain.plan.memory import BF16, activation_bytes, room
from pretrain.run.metrics import flops_per_token, peak_flops

BLOCKING = "standard, waiting at once"
STANDARD = "standard"
NO_COMM = "no-comm"

REPETITIONS = 10
LEAST_LAYERS = 2

# For a guess of the time alone. A plan says that it is one, and the time left follows what was measured.
START_S, BUILD_S, PASS_S = 30.0, 2.0, 0.01
EFFICIENCY, CORE_FLOPS = 0.35, 2e10
# Left free on a card: NCCL's buffers, CUDA's context, gradients of states, workspaces of GEMMs.
_FREE_BYTES = 6 * 2**30


@dataclass(frozen=True)
class Kind:
    """Which layers a model has, and how their collectives are waited for."""

    residual: Residual
    halves: bool = False
    """Two halves of the micro-batch take turns (`ParallelConfig.tp_overlap`)."""
    last_half: bool = False
    """Of the layers only the last half; the others are standard."""
    blocking: bool = False
    """Each collective is waited for where it starts: nothing is hidden."""

    def model_fields(self, layers: int) -> dict[str, Any]:
        """Those of ModelConfig."""
        return {"residual": self.residual, "ladder_layers": layers // 2 if self.last_half else None}

    @property
    def tp_overlap(self) -> TpOverlap:
        return "halves" if self.halves else "none"

    @property
    def hides(self) -> bool:
        """Whether every layer hides its collectives behind other computation."""
        return not self.last_half and (self.halves or self.residual in STALE)


KINDS = {
    BLOCKING: Kind("standard", blocking=True),
    STANDARD: Kind("standard"),
    "standard in halves": Kind("standard", halves=True),
    "parallel": Kind("parallel"),
    "parallel in halves": Kind("parallel", halves=True),
    "ladder": Kind("ladder"),
    "hybrid (last half)": Kind("ladder", last_half=True),
    "parallel-ladder": Kind("parallel-ladder"),
    NO_COMM: Kind("no-comm"),
}


@dataclass(frozen=True)
class Setting:
    """A layout. Its kinds are measured in turns, with the same number of layers.

    The ranks that one copy of the layers does not take hold more copies, which run at the same time.
    """

    tensor_model_parallel_size: int
    sequence_parallel: bool
    micro_batch_size: int
    precision: Precision
    fp8: Fp8Recipe | None
    hardware_queues: int
    """CUDA_DEVICE_MAX_CONNECTIONS. On a CPU it means nothing."""
    num_layers: int

    @property
    def kinds(self) -> list[str]:
        """The names of its kinds, in KINDS. One rank alone communicates nothing, so that kinds that only
        communicate at another time are the same."""
        if self.tensor_model_parallel_size == 1:
            return [STANDARD, "parallel"]
        even = self.micro_batch_size % 2 == 0
        return [name for name, kind in KINDS.items() if even or not kind.halves]

    @property
    def layout(self) -> str:
        """In words, without the number of layers."""
        words = [
            f"TP {self.tensor_model_parallel_size}{' SP' if self.sequence_parallel else ''}",
            f"micro-batch {self.micro_batch_size}",
            f"FP8 {self.fp8}" if self.fp8 else self.precision,
        ]
        if self.hardware_queues != ONE:
            words.append(f"{self.hardware_queues} queues")
        return ", ".join(words)


# The files of a start, in a folder of its own: what kinds.py gives the ranks, and what they give it.
JOB, ROWS, ALIVE = "job.json", "rows.jsonl", "alive"


@dataclass(frozen=True)
class Job:
    """What one start of the ranks measures."""

    model: ModelConfig
    seq_length: int
    settings: tuple[Setting, ...]
    later: int
    """The number of settings that other starts will measure."""
    end_unix_time: float
    """When all of them shall have been measured."""


def write_job(folder: Path, job: Job) -> None:
    """Writes what `read_job` reads."""
    (folder / JOB).write_text(json.dumps(to_dict(job)))


def read_job(folder: Path) -> Job:
    """The job of the ranks that were started with this folder."""
    job: Job = from_dict(Job, json.loads((folder / JOB).read_text()))
    return job


def settings_of(model: ModelConfig, ranks: int, precision: Precision, fp8: bool) -> list[Setting]:
    """All settings, the most important ones first: all ranks as one tensor-parallel group, then smaller
    groups; then the same in FP8.

    With sequence parallelism the largest group has one hardware queue and then several: layers that hide
    their collectives there want several, and megatron-core's want one. Settings with one number of queues
    stand together, because the number is that of a process.

    Args:
        ranks: of this machine.
        precision: bf16; on a CPU fp32, and then one number of queues.
        fp8: whether FP8 can be measured.
    """
    recipes: list[Fp8Recipe | None] = [None, "tensorwise"] if fp8 else [None]
    found = [
        Setting(tp, sp, batch, precision, recipe, queues, model.num_layers)
        for recipe in recipes
        for tp in range(ranks, 0, -1)
        if ranks % tp == 0
        for sp in (False, True)[: 1 if tp == 1 else 2]
        for queues in (ONE, SEVERAL)[: 2 if sp and tp == ranks and precision == "bf16" else 1]
        for batch in (2, 1)
    ]
    return sorted(
        found,
        key=lambda s: (
            s.fp8 is not None,
            s.tensor_model_parallel_size != ranks,
            s.hardware_queues,
        ),
    )


def fitted(setting: Setting, model: ModelConfig, seq_length: int, card_bytes: int) -> Setting:
    """`setting` with as many of the model's layers as fit.

    Args:
        card_bytes: memory of a card; 0: there is none, so all layers are taken.

    Raises:
        UserError: the layout does not fit the model, or two layers do not fit in a card.
    """
    tp = setting.tensor_model_parallel_size
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, sequence_parallel=setting.sequence_parallel
    )
    standard = of_kind(model, Kind("standard"), setting)
    check_layout(standard, parallel)
    tokens = setting.micro_batch_size * seq_length
    check_fp8(Fp8Config(setting.fp8), standard, parallel, setting.precision, tokens)
    if not card_bytes:
        return setting
    each = _layer_bytes(setting, standard, seq_length)
    layers = min(model.num_layers, int((room(card_bytes) - _FREE_BYTES) / each))
    if layers < LEAST_LAYERS:
        raise UserError(
            f"a layer takes {each / 2**30:.1f} GiB of {card_bytes / 2**30:.1f}, by the planner: "
            f"{LEAST_LAYERS} do not fit"
        )
    return replace(setting, num_layers=layers)


def of_kind(model: ModelConfig, kind: Kind, setting: Setting) -> ModelConfig:
    """The layers of `model` with a residual kind. The vocabulary, which is not measured, is small."""
    return replace(
        model,
        num_layers=setting.num_layers,
        **kind.model_fields(setting.num_layers),
        vocab_size=128 * setting.tensor_model_parallel_size,
    )


def _layer_bytes(setting: Setting, standard: ModelConfig, seq_length: int) -> float:
    """Of one layer: weights, which all kinds share, gradients, and what backward needs. In FP8 each kind
    keeps copies of the weights for both directions of its GEMMs."""
    tp = setting.tensor_model_parallel_size
    weights = (standard.num_parameters(embeddings=False) - standard.hidden_size) / (
        standard.num_layers * tp
    )
    copies = 2 * len(setting.kinds) if setting.fp8 else 0
    kept = activation_bytes(
        standard,
        tokens=setting.micro_batch_size * seq_length,
        seq_length=seq_length,
        tp=tp,
        sp=setting.sequence_parallel,
        recompute="none",
        fp8=setting.fp8,
    )
    return weights * (2 * BF16 + copies) + kept


def guessed_seconds(setting: Setting, model: ModelConfig, seq_length: int, device: str) -> float:
    """About how long a setting takes, without the start of the ranks."""
    layers = of_kind(model, Kind("standard"), setting)
    each = flops_per_token(
        num_layers=layers.num_layers,
        attention_width=layers.attention_width,
        seq_length=seq_length,
        matmul_parameters=layers.num_parameters(embeddings=False),
    )
    flops = setting.micro_batch_size * seq_length * each / setting.tensor_model_parallel_size
    a_pass = PASS_S + flops / (EFFICIENCY * (peak_flops(device) or CORE_FLOPS / EFFICIENCY))
    return len(setting.kinds) * (BUILD_S + (2 + REPETITIONS) * a_pass)
