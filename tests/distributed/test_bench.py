"""The benchmark and the trace run and write what they say; how fast is nobody's business here."""

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli
from pretrain.bench import kinds
from pretrain.bench.kinds_plan import Setting, settings_of

ROOT = Path(__file__).parents[2]
SMALL = ["--hidden-size", "64", "--ffn-hidden-size", "96", "--seq-length", "32"]
TIMEOUT_S = 150


def run(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--recompute", "full"], marks=pytest.mark.slow),
        pytest.param(
            ["--sequence-parallel", "--micro-batch-size", "2", "--processor-time"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--fake-tp", "4"], marks=pytest.mark.slow),
        pytest.param(["--link", "p2p-off", "--target", "llama-3-8b"], marks=pytest.mark.slow),
    ],
)
def test_the_overlap_benchmark(options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "overlap.json"
    small = [*SMALL, "--layers", "2", "--heads", "4", "--steps", "2"]
    output = run("benchmarks/overlap.py", *small, *options, "--json", str(file))
    assert "hidden, against waiting at once" in output
    report = json.loads(file.read_text())
    lines = {(t["kind"], t["link"]): t["forward_backward"] for t in report["times_s"]}
    for kind in (
        "standard, waiting at once",
        "standard",
        "parallel",
        "ladder",
        "hybrid (last half)",
        "parallel-ladder",
    ):
        assert len(lines[kind, "link"]) == len(lines[kind, "zero"]) == 2
    planned = {"standard", "parallel", "ladder", "hybrid (last half)"}
    assert planned <= set(report["planned_link_ms"])
    halves = {kind for kind, _ in lines if "in halves" in kind}
    assert len(halves) == (2 if "2" in options else 0) and len(report["left_out"]) == 2 - len(
        halves
    )
    if "--recompute" not in options:
        assert "layers" in report["most_hidden"]["parallel-ladder"]
    assert report["versions"]["megatron-core"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--fake-tp", "8", "--heads", "8"], marks=pytest.mark.slow),
    ],
)
def test_the_inference_benchmark(options: list[str], tmp_path: Path) -> None:
    small = ["--hidden-size", "64", "--heads", "4", "--layers", "2", "--prompt-length", "8"]
    short = ["--steps", "2", "--prefill-steps", "3", "--cases", "70b:p2p-off", "--batches", "64"]
    json_file, *pictures = [tmp_path / "new" / name for name in ("i.json", "i.png", "t.png")]
    files = ["--json", json_file, "--picture", pictures[0], "--timeline", pictures[1]]
    output = run("benchmarks/inference.py", *small, *short, *options, *map(str, files))
    prefill, decode = json.loads(json_file.read_text())["cases"]
    for case, steps in ((prefill, 3), (decode, 2)):
        lines = {(t["kind"], t["link"]): t["seconds"] for t in case["times_s"]}
        assert {len(times) for times in lines.values()} == {steps}
        # The link is to a layer's compute what it is in the case.
        modelled = case["modelled"]
        ratio = modelled["all_reduce_s"] / (modelled["attention_s"] + modelled["mlp_s"])
        assert case["link_s"] / case["layer_s"] == pytest.approx(ratio)
        assert case["reduced"]["ffn_hidden_size"] > 0
    # 93 us, of 65 us and 1 MiB at 37 GB/s.
    assert decode["modelled"]["all_reduce_s"] == pytest.approx(93.3e-6, rel=1e-2)
    assert "| 70b, p2p-off | 64 |" in output and "| 1.29 | 1.28 |  |" in output  # the paper's
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--sequence-parallel", "--recompute", "full"],
    ],
)
def test_the_trace_of_a_step(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "trace"
    small = [*SMALL, "--num-layers", "2", "--num-attention-heads", "4", *options]
    output = run("-m", "pretrain.cli", "bench", "trace", str(out), *small)
    assert "hidden share" in output
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("standard", "ladder"):
        events = json.loads((out / f"trace_{kind}.json").read_text())["traceEvents"]
        assert {e["pid"] for e in events} == {0, 1}
        assert {"compute", "flight", "wait"} <= {e.get("cat") for e in events}


LAYOUTS = ["TP 2 SP, micro-batch 2, fp32", "TP 1, micro-batch 2, fp32"]


@pytest.fixture
def few_layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`bench kinds` measures two layers, in LAYOUTS alone."""

    def few(*args: Any, **kwargs: Any) -> list[Setting]:
        found = settings_of(*args, **kwargs)
        return [replace(s, num_layers=2) for s in found if s.layout in LAYOUTS]

    monkeypatch.setattr(kinds, "settings_of", few)
    before = {number: signal.getsignal(number) for number in kinds.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("few_layouts")
def test_every_kind_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes seconds. The time that it is given is for a machine with much other work."""
    file = tmp_path / "new" / "kinds.json"
    options = ["--preset", "debug", "--nproc-per-node", "2", "--minutes", "3"]
    assert cli.main(["bench", "kinds", str(file), *options]) == 0
    output = capsys.readouterr().out
    assert "2 layouts" in output and "best layout" in output
    report = json.loads(file.read_text())
    assert report["ended"] == "complete" and report["ranks"] == 2
    found = {row["layout"]: row for row in report["rows"]}
    assert list(found) == LAYOUTS
    both = {"standard in halves", "parallel in halves"}
    for layout, row in found.items():
        times = {name: kind["forward_backward_s"] for name, kind in row["kinds"].items()}
        assert {len(of_kind) for of_kind in times.values()} <= set(range(3, 11)), layout
        assert both <= set(times) or "TP 1" in layout
        if "TP 2" in layout:
            assert row["state_bytes"] == 64 * row["micro_batch_size"] * 64 * 4
            assert row["all_reduce_s"] > 0 and row["link_over_compute"] > 0
            assert set(times) - both == {
                "standard, waiting at once",
                "standard",
                "parallel",
                "ladder",
                "hybrid (last half)",
                "parallel-ladder",
                "no-comm",
            }
    # All ranks work in each layout: TP 1 has two copies of the layers.
    assert "all_reduce_s" not in found["TP 1, micro-batch 2, fp32"]
    alone = found["TP 1, micro-batch 2, fp32"]["kinds"]["standard"]
    total_s = statistics.median(sum(times) for times in alone["forward_backward_s"])
    assert alone["tokens_per_s_per_gpu"] == pytest.approx(2 * 64 * (2 / 4) / total_s)  # of 4 layers
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_that_cannot_be_taken_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "trace", "x", "--num-layers", "1"])
    output = capsys.readouterr()
    assert "shows two layers on two ranks" in output.err + output.out
    assert "Traceback" not in output.err


@pytest.mark.slow
def test_the_learning_benchmark(tmp_path: Path) -> None:
    """From source files to curves, at far less than a hundredth of a GPU's."""
    text = tmp_path / "text"
    text.mkdir()
    words = [path.stem for path in sorted((ROOT / "pretrain").rglob("*.py"))]
    for number in range(300):
        lines = [f"def {word}_{number}(x):\n    return x + {number}\n" for word in words[:20]]
        (text / f"module_{number}.py").write_text("\n".join(lines))
    json_file, picture = tmp_path / "learning.json", tmp_path / "learning.png"
    files = ["--work-dir", tmp_path / "work", "--json", json_file, "--picture", picture]
    small = [
        "--model.num-layers",
        "2",
        "--model.hidden-size",
        "32",
        "--model.ffn-hidden-size",
        "64",
    ]
    small += ["--model.num-attention-heads", "4", "--model.vocab-size", "None"]
    small += ["--data.seq-length", "32", "--micro-batch-size", "8", "--global-batch-size", "8"]
    small += ["--schedule.warmup-steps", "2", "--parallel.tensor-model-parallel-size", "1"]
    short = ["--train-tokens", "5120", "--seeds", "1", "--kinds", "standard", "ladder"]
    made = ["--text", text, "--vocab-size", "300"]
    output = run("benchmarks/learning.py", *map(str, [*made, *files, *short, *small]))
    assert "| ladder | " in output
    report = json.loads(json_file.read_text())
    assert [row["kind"] for row in report["rows"]] == ["standard", "ladder"]
    assert report["tokens"] == 5120 and report["data"][0]["validation_tokens"] > 0
    for trained in report["runs"]:
        losses = trained["training"]["loss"]
        assert losses[-1] < losses[0]
    assert picture.read_bytes().startswith(b"\x89PNG")
