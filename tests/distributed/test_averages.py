"""The mean of checkpoints, and the average that is kept while training, against sums done by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ladder.errors import UserError
from pretrain.cli import main
from pretrain.convert.export import export_run
from pretrain.convert.merge import merge_run
from pretrain.files import sha256
from pretrain.run.checkpoint import load_weights
from pretrain.run.checkpoint_files import damage
from pretrain.run.folder import checkpoint_at, checkpoints
from tests.data_sets import write_data_set
from tests.distributed.resharding import whole
from tests.distributed.test_training import losses, metrics, tensor_parallel, train
from tests.unit.hf.tiny import train_sentencepiece

STEPS = 10
SHORT = (
    f"--schedule.train-steps {STEPS} --keep-last 20 --data.num-workers 0 --no-tensorboard".split()
)
EMA, MASTER = "optimizer.state.ema.", "optimizer.state.param."
DECAY = 0.9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a real tokenizer, which export needs."""
    folder = write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)
    manifest = json.loads((folder / "manifest.json").read_text())
    train_sentencepiece(folder, "bpe", vocab_size=manifest["tokenizer"]["vocab_size"])
    manifest["tokenizer"]["sha256"] = sha256(folder / "tokenizer.model")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("fp32, one rank", marks=pytest.mark.slow),
        "bf16, two tensor ranks",
    ],
)
def run(request, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps its checkpoints of every second step."""
    run = tmp_path_factory.mktemp("runs") / "run"
    bf16 = ("--precision", "bf16", *tensor_parallel(2)) if "bf16" in request.param else ()
    train(data, run, *SHORT, "--save-interval", "2", *bf16)
    return run


def test_the_mean_of_five_is_the_mean_by_hand(run: Path, data: Path, tmp_path: Path) -> None:
    assert len(checkpoints(run)) == 5
    out = merge_run(run, 5, None, tmp_path / "mean")
    merged = checkpoint_at(out, STEPS)
    assert damage(merged, read=True) == ""
    ours = load_weights(merged)
    five = [whole(path) for path in checkpoints(run)]
    trained = load_weights(checkpoints(run)[-1])
    assert ours.keys() == trained.keys()
    for name, weight in trained.items():
        total = torch.zeros_like(five[0][MASTER + name])
        for one in five:
            total = total + one[MASTER + name]
        by_hand = (total / 5).to(weight.dtype)
        assert ours[name].dtype == weight.dtype
        assert torch.equal(ours[name], by_hand), name
        assert not torch.equal(ours[name], weight) or weight.numel() < 100, name
    # It is a run's folder: eval and export read it, and transformers loads what they write.
    assert main(["eval", str(out), "--data", str(data), "--max-tokens", "500"]) == 0
    export_run(out, tmp_path / "model", dtype=None, max_shard_size="5GB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    norm = ours["decoder.final_layernorm.weight"]
    assert torch.equal(loaded.model.norm.weight.to(norm.dtype), norm)
    card = (tmp_path / "model/README.md").read_text()
    assert "the mean of the checkpoints of steps [2, 4, 6, 8, 10]" in card
    assert "nats a token at step" not in card


def test_a_mean_by_steps_is_made_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["merge", str(run), "--steps", "8", "4"]
    assert main(argv) == 0
    out = run / "merged/2-up-to-step-8"
    assert capsys.readouterr().out.strip() == str(out)
    assert json.loads((out / "merged.json").read_text())["steps"] == [4, 8]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert main(argv) == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    with pytest.raises(UserError, match="is the mean of other checkpoints"):
        merge_run(run, None, [2, 8], out)


def test_a_run_begins_with_a_mean_and_none_goes_on_with_it(
    run: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = merge_run(run, 2, None, tmp_path / "mean")
    config = json.loads((run / "config.json").read_text())
    layout = tensor_parallel(config["parallel"]["tensor_model_parallel_size"])
    more = (*SHORT, *layout, "--precision", config["precision"])
    train(data, tmp_path / "new", "--init-from", str(out), *more)
    assert metrics(tmp_path / "new", "start")[0]["step"] == 0
    assert losses(tmp_path / "new", STEPS)[0] < losses(run, STEPS)[0] - 0.5
    capfd.readouterr()
    assert main(["train", "--config", str(out / "config.json")]) == 2
    assert "holds a mean of checkpoints, which has no optimizer's state" in capfd.readouterr().err
    at = ("--branch-from", f"{out}@{STEPS}", "--output-dir", str(tmp_path / "branch"))
    assert main(["train", *at]) == 2
    assert "has weights alone" in " ".join(capfd.readouterr().err.split())


def test_means_that_cannot_be_made_are_refused(run: Path, tmp_path: Path) -> None:
    for last, steps, said in (
        (None, None, "give either --last N or --steps"),
        (2, [2, 4], "give either --last N or --steps"),
        (1, None, "--last 1: give at least 2"),
        (6, None, "--last 6: .* has checkpoints of steps 2, 4, 6, 8, 10"),
        (None, [2, 3], "--steps 3: .* has checkpoints of steps 2, 4"),
        (None, [2, 2], "give at least two different steps"),
    ):
        with pytest.raises(UserError, match=said):
            merge_run(run, last, steps, tmp_path / "out")
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    largest = max(checkpoint_at(damaged, 8).glob("*.distcp"), key=lambda f: f.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    with pytest.raises(UserError, match=r"step_00000008 is damaged: .* its SHA-256 differs"):
        merge_run(damaged, 2, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# --- an average while training ---


def by_hand(run: Path, first: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The average of the master weights of each step after `first`, from what it was at that step."""
    average = {name: tensor.clone() for name, tensor in start.items()}
    for step in range(first + 1, STEPS + 1):
        tensors = whole(checkpoint_at(run, step))
        for name in average:
            average[name] = torch.lerp(average[name], tensors[MASTER + name], 1 - DECAY)
    return average


def averages(run: Path, step: int) -> dict[str, Tensor]:
    found = whole(checkpoint_at(run, step)).items()
    return {name.removeprefix(EMA): t for name, t in found if name.startswith(EMA)}


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_the_average_is_the_one_by_hand(precision: str, data: Path, tmp_path: Path) -> None:
    """Turned on at step 4 of a run, and kept through a stop; then at two data-parallel ranks."""
    run = tmp_path / "run"
    every = ("--save-interval", "1", "--precision", precision, *SHORT)
    train(data, run, *every)
    plain = losses(run, STEPS)
    for step in range(5, STEPS + 1):
        shutil.rmtree(checkpoint_at(run, step))
    ema = (*every, "--optimizer.ema-decay", str(DECAY))
    said = train(data, run, *ema)
    assert "(changed: optimizer.ema_decay: None -> 0.9)" in said
    assert losses(run, STEPS) == plain  # it changes no weight
    begin = whole(checkpoint_at(run, 4))
    start = {n.removeprefix(MASTER): t for n, t in begin.items() if n.startswith(MASTER)}
    expected, found = by_hand(run, 4, start), averages(run, STEPS)
    assert found.keys() == expected.keys()
    for name, average in expected.items():
        assert torch.equal(found[name], average), name
    # Stopped after step 7, and resumed.
    for ranks in ("1", "2"):
        for step in range(8, STEPS + 1):
            shutil.rmtree(checkpoint_at(run, step))
        seven = averages(run, 7)
        train(data, run, *ema, "--nproc-per-node", ranks)
        again, expected = averages(run, STEPS), by_hand(run, 7, seven)
        for name, average in again.items():
            assert torch.equal(average, expected[name]), name
            assert ranks == "2" or torch.equal(average, found[name]), name


def test_the_average_is_exported_and_is_not_where_none_is_kept(data: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    train(data, run, *SHORT, *tensor_parallel(2), "--optimizer.ema-decay", str(DECAY))
    assert main(["export", str(run), str(model), "--weights", "ema"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    average, trained = averages(run, STEPS), load_weights(checkpoint_at(run, STEPS))
    name = "decoder.final_layernorm.weight"
    assert torch.equal(loaded.model.norm.weight, average[name])
    assert not torch.equal(average[name], trained[name])
    card = (model / "README.md").read_text()
    assert "the average over the steps, with a decay of 0.9" in card
    assert "nats a token at step" not in card
    with pytest.raises(UserError, match="not the export of"):
        export_run(run, model, None, "5GB")
    # Turned off, the next checkpoint has none; and turned on again it begins anew.
    shutil.rmtree(checkpoint_at(run, STEPS))
    train(data, run, *SHORT, "--save-interval", "5", *tensor_parallel(2))
    with pytest.raises(UserError, match="has no average of the weights: a run keeps one with"):
        export_run(run, tmp_path / "other", None, "5GB", which="ema")


def test_a_bad_step_and_a_rollback_leave_the_average_as_the_weights(
    data: Path, tmp_path: Path
) -> None:
    from tests.faults import losses_times, train_with

    argv = ["--preset", "debug", "--data.paths", str(data), *SHORT, "--save-interval", "1"]
    argv += ["--optimizer.ema-decay", str(DECAY), "--faults.not-finite", "skip"]
    run = tmp_path / "run"
    codes, said = train_with(
        losses_times(float("nan")),
        [*argv, "--output-dir", str(run)],
        tmp_path / "log",
        rank=0,
        steps=(6,),
    )
    assert codes == [0], said
    five, six = (whole(checkpoint_at(run, step)) for step in (5, 6))
    kept = [name for name in five if name.startswith((EMA, MASTER))]
    assert kept and all(torch.equal(five[name], six[name]) for name in kept)
