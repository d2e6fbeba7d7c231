"""A training under random faults: python -m tests.chaos.run --faults 30 --steps 300 --json F --markdown F

It is submitted by `megatron-ladder submit`, once undisturbed and once with faults from a seeded generator,
and compared: every loss and every weight, bit by bit. docs/results/faults.md has a table of it.
"""

import contextlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import tyro

from pretrain.run.checkpoint import load_weights
from pretrain.run.checkpoint_files import damage
from pretrain.run.folder import checkpoint_at, checkpoint_step, checkpoints
from pretrain.run.goodput import read_goodput
from pretrain.run.metrics import read_metrics
from pretrain.run.status import read_starts
from pretrain.run.versions import versions
from tests.chaos.faults import KINDS, Fault, file_of, newest, plan, possible_kinds
from tests.chaos.place import Place, make_place
from tests.slurm.cluster import missing

RECOVERY_S = 300.0
"""From a fault to the next step, at most: a hang takes 6 s to notice, or 72 in a save; srun waits 30."""
POLL_S = 0.02
ASK_S = 3.0
"""Between two questions to SLURM."""


@dataclass(frozen=True)
class Options:
    """Train under random faults, and compare with an undisturbed training."""

    faults: int = 30
    steps: int = 300
    seed: int = 1
    launcher: Literal["slurm", "local"] = "slurm"
    """slurm: a private cluster of three fake nodes, two of which train. local: torchrun."""
    kinds: tuple[str, ...] = ()
    """Of faults; none given: all that are possible here."""
    train: tuple[str, ...] = ()
    """More options of the training."""
    json: Path | None = None
    """Where to write the results."""
    markdown: Path | None = None
    """Where to write the table."""


@dataclass(frozen=True)
class Outcome:
    """What a fault has led to."""

    kind: str
    step: int
    """The last one done before it."""
    detail: str
    newest_valid: int
    """The newest checkpoint whose files were whole then; 0: none."""
    starts: int
    """New starts until training went on."""
    resumed_from: int | None
    steps_lost: int
    seconds: float | None
    """Until the first step of the new start was done."""


def last_step(run: Path) -> int:
    """The last that metrics.jsonl tells of; 0 before there is one."""
    return max(losses(run), default=0)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in train_lines(run)}


def train_lines(run: Path) -> list[dict[str, Any]]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [line for line in read_metrics(run) if line["kind"] == "train"]


def newest_valid(run: Path) -> int:
    for checkpoint in reversed(checkpoints(run)):
        if not damage(checkpoint, read=True):
            return checkpoint_step(checkpoint)
    return 0


def resumptions(run: Path) -> list[int]:
    """The steps from which training began or went on, of all starts that came so far."""
    return [line["step"] for line in read_starts(run) if line["kind"] == "train"]


class Chaos:
    """A run that is disturbed."""

    def __init__(self, place: Place, run: Path, rng: random.Random) -> None:
        self._place, self._run, self._rng = place, run, rng

    def strike(self, fault: Fault) -> Outcome:
        """Waits for a fault's step, lets it happen, and waits until training has gone on.

        Raises:
            AssertionError: it did not go on, or lost more than it may.
        """
        run, kind = self._run, KINDS[fault.kind]
        at_step = fault.step + (fault.kind == "NaN")  # a step passed over has no line
        self._wait(lambda: last_step(run) >= at_step, f"step {at_step} was not reached")
        detail, damaged, ranks = "", None, []
        if kind.damage:
            self._wait(lambda: newest(run), "there is no checkpoint")
            ranks = self._place.ranks(run)
            for rank in ranks:  # or a newer checkpoint could take its place meanwhile
                rank.suspend()
            damaged = newest(run)
            assert damaged
            detail = kind.damage(file_of(damaged, self._rng), self._rng)
        valid, before, step = newest_valid(run), len(resumptions(run)), last_step(run)
        said = self._place.sentences(run, kind.says)
        begun = time.monotonic()
        detail = ", ".join(filter(None, [detail, kind.strike(self._place, run, self._rng)]))
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # the one that was killed
                rank.resume()
        if kind.effect == "none":
            reached = last_step(run)
            self._wait(lambda: last_step(run) > reached, "training does not go on")
            assert len(resumptions(run)) == before, f"{fault}: it was started again"
            if fault.kind == "NaN":
                found = json.loads((run / f"bad_steps/step_{fault.step}.json").read_text())
                assert (found["action"], found["loss"]) == ("skip", "nan"), found
                step, detail = fault.step, "skipped"
            return Outcome(fault.kind, step, detail, valid, 0, None, 0, None)

        reached = step

        def goes_on() -> bool:
            nonlocal reached
            seen = last_step(run)
            if len(resumptions(run)) == before:
                reached = max(reached, seen)
                return False
            return seen > resumptions(run)[-1]

        self._wait(goes_on, "training does not go on")
        seconds = time.monotonic() - begun
        starts = resumptions(run)[before:]
        lost = reached - starts[0]
        assert valid <= starts[0] <= reached, f"{fault}: went on from {starts[0]} of {reached}"
        if damaged:
            assert starts[0] != checkpoint_step(damaged), f"{fault}: the damaged one was used"
        if kind.says:
            assert self._place.sentences(run, kind.says) > said, f"{fault}: {self._place.logs(run)}"
        if kind.effect == "stop":
            assert lost == 0, f"{fault}: {lost} steps are lost"
        return Outcome(
            fault.kind, step, detail, valid, len(starts), starts[-1], lost, round(seconds, 1)
        )

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        now = asked = time.monotonic()
        end = now + RECOVERY_S
        while not condition():
            time.sleep(POLL_S)
            now = time.monotonic()
            is_over = False
            if now - asked > ASK_S:
                asked = now
                is_over = self._place.state(self._run) in ("COMPLETED", "FAILED", "CANCELLED")
            if now > end or (is_over and not condition()):
                raise AssertionError(f"{what}\n{self._place.logs(self._run)}")


def wait_for_end(place: Place, run: Path) -> None:
    """Until the job is over; it must have ended by itself, and well."""
    end = time.monotonic() + 2 * RECOVERY_S
    while (state := place.state(run)) != "COMPLETED":
        assert state != "FAILED" and time.monotonic() < end, f"{state}\n{place.logs(run)}"
        time.sleep(0.5)


def assert_same(run: Path, undisturbed: Path, steps: int) -> None:
    expected, got = losses(undisturbed), losses(run)
    assert got == expected, "losses differ"
    assert max(got) == steps
    weights = load_weights(checkpoint_at(undisturbed, steps))
    found = load_weights(checkpoint_at(run, steps))
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), f"{name} differs"


def chaos(options: Options, folder: Path) -> dict[str, Any]:
    """Trains undisturbed, trains under faults, and compares.

    Returns:
        What is written as JSON.

    Raises:
        AssertionError: the run did not end by itself, lost too much, or ended with other numbers.
    """
    with make_place(folder, options.launcher, options.train) as place:
        kinds = list(options.kinds) or possible_kinds(place)
        if not place.has_own_disk:
            print("disk full is left out: mounting a file system is not permitted here")
            kinds = [kind for kind in kinds if kind != "disk full"]
        faults = plan(options.seed, options.faults, options.steps, kinds)
        nan_steps = [fault.step for fault in faults if fault.kind == "NaN"]
        undisturbed, run = folder / "undisturbed", folder / "run"
        place.submit(undisturbed, options.steps, nan_steps)
        wait_for_end(place, undisturbed)

        begun = time.monotonic()
        place.submit(run, options.steps, nan_steps)
        disturbed = Chaos(place, run, random.Random(options.seed))
        outcomes = []
        for number, fault in enumerate(faults, start=1):
            outcomes.append(disturbed.strike(fault))
            print(row(number, outcomes[-1]), flush=True)
        wait_for_end(place, run)
        seconds = time.monotonic() - begun
        assert_same(run, undisturbed, options.steps)
        goodput = read_goodput(run, train_lines(run)[-1]["time"])
        assert goodput
        return {
            "launcher": options.launcher,
            "seed": options.seed,
            "steps": options.steps,
            "versions": versions(),
            "faults": [asdict(outcome) for outcome in outcomes],
            "starts": len(resumptions(run)),
            "steps_lost": sum(outcome.steps_lost for outcome in outcomes),
            "seconds": round(seconds, 1),
            "goodput": round(goodput.share, 3),
        }


def row(number: int, outcome: Outcome) -> str:
    """A line of the table."""
    detail = f" ({outcome.detail})" if outcome.detail else ""
    if outcome.resumed_from is None:
        end = "goes on | | 0 | |"
    else:
        starts = f"{outcome.starts} starts" if outcome.starts > 1 else "started again"
        end = f"{starts} | {outcome.resumed_from} | {outcome.steps_lost} | {outcome.seconds} |"
    return f"| {number} | {outcome.kind}{detail} | {outcome.step} | {end}"


def table(results: dict[str, Any]) -> str:
    head = [
        "| | fault | after step | then | from step | steps lost | s until the next step |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [row(i, Outcome(**values)) for i, values in enumerate(results["faults"], start=1)]
    return "\n".join([*head, *rows]) + "\n"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.launcher == "slurm" and (why := missing()):
        raise SystemExit(why)
    with tempfile.TemporaryDirectory(prefix="chaos", ignore_cleanup_errors=True) as folder:
        results = chaos(options, Path(folder))
    text = table(results)
    print(f"\n{text}")
    print({name: value for name, value in results.items() if name != "faults"})
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
