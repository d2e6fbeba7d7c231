"""A trunk and three branches of it (decay, anneal on another blend, longer), each killed and resumed.

    python -m tests.distributed.branches FOLDER

trains a trunk of 400 steps, and branches off step 300. Each branch is trained twice: once to its end, and
once killed by SIGKILL and started again. All losses and weights must be the same, bit by bit, and the first
steps of those that keep the blend must be the trunk's next one.
"""

import signal
import sys
from pathlib import Path

import torch

from pretrain.convert.weights import checkpoint_weights
from pretrain.run.folder import checkpoint_at
from tests.data_sets import write_data_set
from tests.distributed.test_training import losses, metrics
from tests.runs import run_train

TIMEOUT_S = 900
QUIET = ("--data.num-workers", "0", "--no-tensorboard")


def train_trunk(run: Path, data: list[Path], *, steps: int, interval: int) -> None:
    """A run of the debug preset whose learning rate does not go down, on two data sets."""
    options = f"--preset debug --schedule.train-steps {steps} --save-interval {interval}"
    options += (
        " --eval-interval 10 --keep-last 10 --schedule.decay wsd --schedule.wsd-decay-fraction 0"
    )
    paths = ["--data.paths", *map(str, data), "--data.weights", "3", "1"]
    codes, said = run_train(
        [*options.split(), *paths, "--output-dir", str(run), *QUIET],
        run.with_name("trunk.log"),
        TIMEOUT_S,
    )
    assert codes == [0], said


def branches(
    data: list[Path], *, at: int, decay: int, longer: int
) -> dict[str, tuple[tuple[str, ...], int]]:
    """By name: the options of a branch, and its last step."""
    end = at + decay
    down = ("--schedule.train-steps", str(end), "--schedule.wsd-decay-steps", str(decay))
    blend = ("--data.paths", *map(str, data), "--data.weights", "0", "1")
    return {
        "decay": (down, end),
        "anneal": ((*down, "--schedule.min-lr-fraction", "0", *blend), end),
        "longer": (("--schedule.train-steps", str(longer)), longer),
    }


def _options(trunk: Path, at: int, run: Path, *options: str) -> list[str]:
    return ["--branch-from", f"{trunk}@{at}", "--output-dir", str(run), *options]


def branch_of(trunk: Path, at: int, run: Path, *options: str) -> str:
    """Trains a branch to its end, or goes on with it. Returns what it has printed."""
    argv = _options(trunk, at, run, *options)
    codes, said = run_train(argv, run.with_name(f"{run.name}.log"), TIMEOUT_S)
    assert set(codes) == {0}, said
    return said


def interrupted(trunk: Path, at: int, run: Path, *options: str, until: int) -> None:
    """Begins a branch, and kills it when it has trained step `until`."""
    file = run / "metrics.jsonl"

    def has_trained() -> bool:
        return file.is_file() and file.read_text().count('"kind": "train"') >= until - at

    log = run.with_name(f"{run.name}.log")
    codes, said = run_train(_options(trunk, at, run, *options), log, TIMEOUT_S, has_trained)
    assert set(codes) == {-signal.SIGKILL}, said


def losses_after(run: Path, first: int, last: int) -> list[float]:
    by_step = [(m["step"], m["loss"]) for m in metrics(run, "train")]
    assert [step for step, _ in by_step] == list(range(first + 1, last + 1))
    return [loss for _, loss in by_step]


def assert_same_end(run: Path, other: Path, step: int) -> None:
    """The same weights and master weights in the checkpoint of a step."""
    for which in ("trained", "master"):
        ours, theirs = (checkpoint_weights(checkpoint_at(r, step), which) for r in (run, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor[:], theirs[name][:]), name


def main(folder: Path) -> None:
    """Show 1 of the guide: 400 steps. It prints what is the same."""
    data = [
        write_data_set(folder / name, vocab_size=400, train_documents=count, seed=seed)
        for seed, (name, count) in enumerate({"web": 2000, "code": 300}.items())
    ]
    trunk = folder / "trunk"
    train_trunk(trunk, data, steps=400, interval=50)
    for name, (options, steps) in branches(data, at=300, decay=80, longer=500).items():
        whole, killed = folder / name, folder / f"{name}-killed"
        branch_of(trunk, 300, whole, *options)
        interrupted(trunk, 300, killed, *options, until=337)
        branch_of(trunk, 300, killed, *options)
        assert losses_after(killed, 300, steps) == losses_after(whole, 300, steps)
        assert_same_end(killed, whole, steps)
        print(
            f"{name}: {steps - 300} steps, killed after 37: all losses and weights the same",
            flush=True,
        )
        if name != "anneal":
            assert losses_after(whole, 300, steps)[0] == losses(trunk, 400)[300]
            print(f"{name}: its first step is the trunk's next one", flush=True)
    assert losses_after(folder / "longer", 300, 500)[:100] == losses(trunk, 400)[300:]
    print("longer: its first 100 steps are the trunk's last 100")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
