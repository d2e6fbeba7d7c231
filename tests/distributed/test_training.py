"""Runs by the command line: killed and resumed, moved to another layout, exported."""

import gzip
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain.cli import main
from pretrain.convert.export import export_run
from pretrain.files import sha256
from pretrain.run.checkpoint import load_weights
from pretrain.run.folder import checkpoints
from tests.data_sets import write_data_set
from tests.runs import run_train
from tests.unit.hf.tiny import train_sentencepiece

STEPS = 20
OPTIONS = f"--preset debug --schedule.train-steps {STEPS} --save-interval 5 --eval-interval 10"
TIMEOUT_S = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "data", vocab_size=400)


def command(data: Path, run: Path, *options: str) -> list[str]:
    arguments = [*OPTIONS.split(), "--data.paths", str(data), "--output-dir", str(run), *options]
    return [sys.executable, "-m", "pretrain.cli", "train", *arguments]


def pipeline(size: int) -> tuple[str, ...]:
    return ("--parallel.pipeline-model-parallel-size", str(size))


def context_parallel(size: int) -> tuple[str, str]:
    return ("--parallel.context-parallel-size", str(size))


FIRST_STAGE_OF_ONE = ("--parallel.num-layers-in-first-pipeline-stage", "1")


def train(data: Path, run: Path, *options: str) -> str:
    argv = command(data, run, *options)[4:]
    codes, output = run_train(argv, run.with_name(f"{run.name}.log"), TIMEOUT_S)
    assert set(codes) == {0}, output
    return output


def metrics(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if m["kind"] == kind]


def losses(run: Path, steps: int = STEPS) -> list[float]:
    by_step = [(m["step"], m["loss"]) for m in metrics(run, "train")]
    assert [step for step, _ in by_step] == list(range(1, steps + 1)), "steps are lost or repeated"
    return [loss for _, loss in by_step]


def tensor_parallel(size: int) -> tuple[str, str]:
    return ("--parallel.tensor-model-parallel-size", str(size))


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def whole_run(request, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """(tensor-parallel size, a run that nothing disturbed)."""
    run = tmp_path_factory.mktemp("runs") / f"tp{request.param}"
    train(data, run, *tensor_parallel(request.param))
    return request.param, run


def kill_at_step(step: int, data: Path, run: Path, *options: str) -> None:
    """Starts a run and sends it SIGKILL once `step` is in its metrics and it has a checkpoint."""
    process = subprocess.Popen(
        command(data, run, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + TIMEOUT_S
    seen = 0
    while seen < step or not checkpoints(run):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
        file = run / "metrics.jsonl"
        seen = file.read_text().count('"kind": "train"') if file.is_file() else 0
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.wait(TIMEOUT_S)
    _, left = psutil.wait_procs(children, timeout=20)
    assert not left, "torchrun and the ranks must go with it"


def test_a_killed_run_resumes_bitwise(whole_run, data: Path, tmp_path: Path) -> None:
    tp, whole = whole_run
    run = tmp_path / "run"
    step = random.Random(tp).randrange(6, STEPS - 2)
    kill_at_step(step, data, run, *tensor_parallel(tp))
    (run / "checkpoints/step_00000003.tmp").mkdir()  # as a kill while deleting leaves it
    assert "Resuming" in train(data, run, *tensor_parallel(tp))
    assert not list(run.glob("checkpoints/*.tmp"))
    assert metrics(run, "start")[-1]["step"] >= 5  # from a checkpoint, not from the start
    assert_same(run, whole)


def assert_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    last = f"checkpoints/step_{STEPS:08d}"
    expected, got = load_weights(whole / last), load_weights(run / last)
    assert set(got) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


@pytest.mark.slow
def test_a_killed_run_over_context_parallel_ranks_resumes_bitwise(
    data: Path, tmp_path: Path
) -> None:
    """With dropout and documents apart, so that the ranks draw different numbers of random numbers."""
    options = (*context_parallel(2), "--data.no-attend-across-documents")
    options += ("--model.hidden-dropout", "0.1", "--model.attention-dropout", "0.1")
    train(data, tmp_path / "whole", *options)
    kill_at_step(9, data, tmp_path / "run", *options)
    assert "Resuming" in train(data, tmp_path / "run", *options)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_left_alone(whole_run, data: Path) -> None:
    tp, run = whole_run
    before = (run / "metrics.jsonl").read_bytes()
    assert "nothing to do" in train(data, run, *tensor_parallel(tp))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_old_checkpoints_are_pruned_and_none_is_half_there(whole_run) -> None:
    _, run = whole_run
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step_00000015", "step_00000020"]


ONE, TWO = tensor_parallel(1), tensor_parallel(2)
INTERLEAVED = ("--parallel.virtual-pipeline-model-parallel-size", "2")
OTHER_LAYOUTS = [
    pytest.param(ONE, id="tp1", marks=pytest.mark.slow),
    pytest.param((*ONE, "--nproc-per-node", "2"), id="dp2"),
    pytest.param((*TWO, "--nproc-per-node", "4"), id="dp2 x tp2", marks=pytest.mark.slow),
    pytest.param((*ONE, *context_parallel(2)), id="cp2"),
    pytest.param((*ONE, *pipeline(2), *FIRST_STAGE_OF_ONE), id="pp2, 1 and 3 layers"),
    pytest.param(
        (*TWO, *pipeline(2), "--parallel.sequence-parallel", *INTERLEAVED),
        id="tp2 with sp x pp2, interleaved",
    ),
]


@pytest.mark.parametrize("options", OTHER_LAYOUTS)
def test_a_checkpoint_continues_at_other_layouts(
    options: tuple[str, ...], whole_run, data: Path, tmp_path: Path
) -> None:
    tp, whole = whole_run
    if tp != 2:
        pytest.skip("moved from TP 2 to the others")
    expected = metrics(whole, "validation")[-1]["loss"]
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / f"checkpoints/step_{STEPS:08d}")
    train(data, run, *options)
    assert metrics(run, "start")[-1]["step"] == 15
    assert metrics(run, "validation")[-1]["loss"] == pytest.approx(expected, abs=1e-5)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_fewer_data_parallel_ranks(
    whole_run, data: Path, tmp_path: Path
) -> None:
    """As after the death of a node: the newest checkpoint is one of those that come at intervals."""
    _, whole = whole_run
    run = tmp_path / "run"
    kill_at_step(7, data, run, *ONE, "--nproc-per-node", "2")
    train(data, run, *ONE, "--nproc-per-node", "1")
    assert metrics(run, "start")[-1]["step"] >= 5
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)


def test_the_run_exports_and_its_card_has_its_figures(whole_run, tmp_path: Path) -> None:
    tp, whole = whole_run
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    # The made-up data set's tokenizer is none; a real one of its vocabulary's size takes its place.
    manifest = json.loads((run / "data/0/manifest.json").read_text())
    train_sentencepiece(run / "data/0", "bpe", vocab_size=manifest["tokenizer"]["vocab_size"])
    manifest["tokenizer"]["sha256"] = sha256(run / "data/0/tokenizer.model")
    (run / "data/0/manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "model"
    export_run(run, out, dtype=None, max_shard_size="5GB")
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    weights = load_weights(run / f"checkpoints/step_{STEPS:08d}")
    assert torch.equal(loaded.model.norm.weight, weights["decoder.final_layernorm.weight"])
    card = (out / "README.md").read_text()
    assert f"{metrics(run, 'validation')[-1]['loss']:.4f} nats a token at step {STEPS}" in card
    assert f"| Tensor-parallel size | {tp} |" in card
    sources = len(manifest["sources"])
    tokens = manifest["splits"]["train"]["tokens"]
    assert f"{tokens:,} tokens for training, from {sources} source" in card
    assert f"SHA-256 {manifest['tokenizer']['sha256']} |" in card


def test_training_learns(whole_run) -> None:
    _, run = whole_run
    (baseline,) = metrics(run, "baseline")
    assert metrics(run, "validation")[-1]["loss"] < baseline["unigram_loss"] - 0.5


@pytest.mark.slow  # at every layout, test_layouts.py does it against the oracle
@pytest.mark.parametrize(
    "options",
    [
        ("--recompute", "full"),
        ("--recompute", "selective"),
        ("--micro-batch-size", "1"),
    ],
)
def test_options_that_do_not_change_the_numbers(options, whole_run, data, tmp_path) -> None:
    tp, whole = whole_run
    if tp != 2:
        pytest.skip("the layout with collectives is the one to try")
    train(data, tmp_path / "run", *tensor_parallel(tp), *options)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)


def test_bf16_and_wsd_train_on_the_cpu(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", "--precision", "bf16", "--schedule.decay", "wsd")
    rates = [m["learning_rate"] for m in metrics(tmp_path / "run", "train")]
    assert rates[5] == max(rates) == rates[12]
    assert rates[-1] == pytest.approx(0.1 * rates[5])
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 1


def test_index_files_are_made_once_and_are_never_there_by_half(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--schedule.train-steps", "4", "--save-interval", "2")
    cache = run / "dataset_cache"
    train(data, run, *options)
    files = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert "made.json" in files
    assert sum(name.endswith("_index.npy") for name in files) >= 6
    shutil.rmtree(run / "checkpoints/step_00000004")
    train(data, run, *options)
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == files
    assert len(metrics(run, "train")) == 4
    # As a run leaves it that was killed while it made them: nothing of it is used.
    shutil.rmtree(cache)
    half = run / ".dataset_cache.killed"
    half.mkdir()
    (half / next(n for n in files if "shuffle" in n)).write_bytes(b"half")
    shutil.rmtree(run / "checkpoints/step_00000004")
    train(data, run, *options)
    assert {p.name for p in cache.iterdir()} == set(files)
    assert not list(run.glob(".dataset_cache.*"))


def test_a_run_that_was_killed_before_it_began_begins(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").touch()
    assert "New run" in train(data, run, "--schedule.train-steps", "4")


def test_documents_apart_and_loss_masks_by_the_command_line(tmp_path: Path) -> None:
    """At tensor-parallel 1 and 2; the mask leaves a label in four, the losses stay finite."""
    data = write_data_set(tmp_path / "data", vocab_size=400)
    manifest = json.loads((data / "manifest.json").read_text())
    for split, facts in manifest["splits"].items():
        mask = (torch.arange(facts["tokens"]) % 4 == 0).to(torch.uint8)
        (data / f"{split}.mask").write_bytes(mask.numpy().tobytes())
        facts |= {"mask_bytes": facts["tokens"], "trained_tokens": int(mask.sum())}
    (data / "manifest.json").write_text(json.dumps(manifest))
    both = {}
    for name, options in {"one": (), "two": tensor_parallel(2)}.items():
        run = tmp_path / name
        train(data, run, "--data.no-attend-across-documents", *options)
        both[name] = losses(run)
        assert metrics(run, "validation")[-1]["loss"] < both[name][0]
    assert both["one"] == pytest.approx(both["two"], abs=1e-4)


@pytest.mark.slow
def test_a_run_starts_from_another_with_some_layers_made_ladder(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it was it has the loss that it had; changed, another, which training brings down."""
    base = tmp_path / "base"
    train(data, base, "--model.residual", "standard")
    start = ("--init-from", str(base))
    train(data, tmp_path / "control", *start, *tensor_parallel(2), "--save-interval", "20")
    led = (
        *(*start, *tensor_parallel(2), "--ladder-layers", "last:3", "--save-interval", "4"),
        *("--adapt.gradual-steps", "10", "--adapt.distillation-weight", "0.5"),
    )
    train(data, tmp_path / "ladder", *led)
    # While layers are being turned on.
    kill_at_step(6, data, tmp_path / "killed", *led)
    assert "Resuming" in train(data, tmp_path / "killed", *led)
    assert losses(tmp_path / "killed") == losses(tmp_path / "ladder")

    def validations(name: str) -> dict[int, float]:
        return {m["step"]: m["loss"] for m in metrics(tmp_path / name, "validation")}

    control, ladder = validations("control"), validations("ladder")
    assert control[0] == pytest.approx(validations("base")[STEPS], abs=1e-5)
    assert abs(ladder[0] - control[0]) > 1e-3
    assert ladder[STEPS] < ladder[0] - 0.01
    assert (
        json.loads((tmp_path / "control/config.json").read_text())["model"]["residual"]
        == "standard"
    )

    def refused(*options: str) -> str:
        assert main(command(data, tmp_path / "new", *options)[3:]) == 2
        output = capfd.readouterr()
        return " ".join((output.out + output.err).replace("\u2502", " ").split())

    assert "model.hidden_size: 64 there, 128 here" in refused(*start, "--model.hidden-size", "128")
    assert "model.residual: standard there, parallel here" in refused(
        *start, "--model.residual", "parallel"
    )
    assert "is the same as its teacher" in refused(*start, "--adapt.distillation-weight", "0.5")
    assert "does not exist" in refused("--init-from", str(tmp_path / "nothing"))
    assert "staleness.json does not exist" in refused(*start, "--ladder-layers", "auto:2")
    changed = ("--init-from", str(tmp_path / "ladder"), "--ladder-layers", "last:2")
    assert "residual is ladder already" in refused(*changed)
    other = write_data_set(tmp_path / "other", vocab_size=400, tokenizer=b"another")
    assert "another tokenizer" in refused(*start, "--data.paths", str(other))


def test_steps_are_traced(data: Path, tmp_path: Path) -> None:
    """A sum that has been started is waited for after the next sub-module has run, in the trace too."""
    run = tmp_path / "run"
    options = ("--profile.first-step", "3", "--profile.steps", "2", "--schedule.train-steps", "5")
    output = train(data, run, *tensor_parallel(2), *options, "--save-interval", "5")
    assert "ui.perfetto.dev" in output
    assert len(losses(run, steps=5)) == 5
    files = sorted((run / "profile").iterdir())
    assert [f.name for f in files] == [f"from-step-3-rank-{r}.json.gz" for r in (0, 1)]
    for file in files:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        named = sorted(
            (event["ts"], event["name"])
            for event in events
            if event.get("cat") == "user_annotation"
        )
        names = [name for _, name in named]
        assert [name for name in names if name.startswith("step")] == ["step 3", "step 4"]
        assert {"input gradient: start", "input gradient: wait"} <= set(names)
        first = names.index("layer 1: attention")
        ours = [n for n in names[first:] if n.startswith(("layer", "output"))][:5]
        assert ours == [
            "layer 1: attention",
            "output: start",
            "layer 1: mlp",
            "output: start",
            "output: wait",  # of attention
        ]
