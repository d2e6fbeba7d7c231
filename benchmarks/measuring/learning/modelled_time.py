"""The time that a large shape takes on nodes of 8 GPUs: modelled by the planner, not measured."""

from dataclasses import dataclass, replace
from typing import Any

from measuring.learning.kinds import KINDS, model_fields
from megatron_ladder.errors import UserError
from pretrain.config.presets import PRESETS
from pretrain.plan.links import PRESETS as LINKS
from pretrain.plan.links import network_of
from pretrain.plan.planner import DEVICES, Hardware
from pretrain.plan.search import Row, search

TP = 8
GBIT_PER_S = 400.0
"""A GPU's network to other nodes."""


@dataclass(frozen=True)
class Target:
    """A preset's shape on a number of GPUs."""

    preset: str
    gpus: int
    device: str
    link: str | None
    """A name in links.PRESETS for tensor parallelism. None: NVSwitch's."""
    plan: dict[str, dict[str, Row]]
    """By kind: `at_tp8` is the fastest layout at TP 8, `fastest` the fastest of all."""

    @property
    def name(self) -> str:
        return f"{self.preset} over {self.link}" if self.link else self.preset

    @property
    def where(self) -> str:
        return f"{self.gpus} x {self.device}"

    def token_s(self, kind: str) -> float:
        """Seconds a token at TP 8."""
        return 1 / (self.plan[kind]["at_tp8"].tokens_per_s_per_gpu * self.gpus)

    def facts(self, kinds: list[str]) -> dict[str, Any]:
        """The fields of the results' JSON."""
        return {
            "about": "by the planner (pretrain/plan/search.py), not measured",
            "target": self.name,
            "device": self.where,
            "kinds": {
                kind: {name: self._layout(row) for name, row in self.plan[kind].items()}
                for kind in kinds
            },
        }

    def _layout(self, row: Row) -> dict[str, Any]:
        return {
            "tp": row.tp,
            "pp": row.pp,
            "dp": row.dp,
            "sequence_parallel": row.sequence_parallel,
            "micro_batch_size": row.micro_batch_size,
            "recompute": row.recompute,
            "step_s": round(row.step_s, 3),
            "exposed_tp_s": round(row.exposed_tp_s, 3),
            "tokens_per_s": round(row.tokens_per_s_per_gpu * self.gpus),
            "memory_gb": round(row.memory_gb, 1),
        }


def modelled(target: str, device: str) -> Target:
    """Args: target: a preset's name, with :GPUS where it needs more than 8, and @LINK for another link.

    Raises:
        UserError: there is no such preset, or no layout of it at TP 8 that fits.
    """
    where, _, link = target.partition("@")
    preset, _, number = where.partition(":")
    if preset not in PRESETS or not (number or "8").isdigit() or (link and link not in LINKS):
        raise UserError(
            f"--target {target}: give one of {', '.join(PRESETS)}, with :GPUS and @LINK "
            f"({', '.join(LINKS)}) if need be"
        )
    gpus = int(number or 8)
    config = PRESETS[preset]()
    model = config.model
    if model.vocab_size is None:
        model = replace(model, vocab_size=32_000)
    config = replace(config, model=model, precision="bf16")
    plan: dict[str, dict[str, Row]] = {}
    for kind in KINDS:  # without halves: they change no curve
        fields = model_fields(kind, model.num_layers)
        try:
            rows = search(
                replace(config, model=replace(model, **fields)),
                gpus,
                Hardware(DEVICES[device], network_of(GBIT_PER_S), link=link or None),
            )[fields["residual"]]
        except UserError as error:
            raise UserError(f"--target {preset} on {gpus} x {device}: {error}") from error
        at_tp = [row for row in rows if row.tp == TP]
        if not at_tp:
            raise UserError(
                f"--target {preset} has no layout at TP {TP} that fits in {device}: choose another"
            )
        plan[kind] = {"at_tp8": at_tp[0], "fastest": rows[0]}
    return Target(preset, gpus, device, link or None, plan)
