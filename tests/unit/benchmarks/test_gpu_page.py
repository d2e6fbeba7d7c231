"""benchmarks/gpu_page.py: what is there is shown, what is not is said."""

import contextlib
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

import gpu_page

ROOT = Path(__file__).parents[3]
HEAD = {"device": "A card", "versions": {"torch": "2.11.0", "cudnn": 92100}}


def write(folder: Path, name: str, report: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report))


def missing(*parts: str) -> str:
    return "**No results:**\n" + ",\n".join(f"`{part}`" for part in parts) + ".\n"


def step_of(case: str) -> dict[str, Any]:
    return {
        **{"case": case, "parameters": 1.2e9, "step_ms": 512.25, "tokens_per_second": 32_000.4},
        **{"tflops": 451.0, "mfu": 0.4562, "peak_gib": 61.25, "planned_gib": 60.5},
        **{"attention": "Transformer Engine: cuDNN", "sm_clock_mhz": 1755.0, "power_w": 641.0},
    }


def test_without_results_it_says_so_and_has_no_figures(tmp_path: Path) -> None:
    page = gpu_page.page(tmp_path)
    assert "There are no results yet" in page
    assert missing("training-1b", "training-1b-te", "training-8b", "cuda-graph") in page
    assert not any(line.startswith("|") for line in page.splitlines())
    assert all(words.question in page for words in gpu_page.QUESTIONS.values())
    assert not any(words.not_shown in page for words in gpu_page.QUESTIONS.values())


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    page = gpu_page.page(ROOT / "benchmarks/results/h100")
    assert (ROOT / "docs/results/h100.md").read_text() == page
    notes = (ROOT / "benchmarks/results/h100/notes.md").read_text()
    assert notes.startswith("## In short") and notes.strip() in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert max(line.count(" |") for line in tables) == 6, "columns of a table"


def test_figures_are_those_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    failed = {"case": "paper-1b:bf16:standard", "error": "out of memory: Tried to allocate 8 GiB"}
    write(folder, "training-1b", {**HEAD, "rows": [step_of("paper-1b:bf16:ladder"), failed]})
    parts = [{"name": "training-1b", "command": "python x.py", "status": "done", "seconds": 41.6}]
    write(folder, "summary", parts)
    log = (
        "FAILED tests/gpu/test_gpu.py::test_it - assert 1\n===== 1 failed, 38 passed in 9.00s ====="
    )
    (folder / "tests.log").write_text(log)
    rates = [
        {"rate": "1e-3", "kind": kind, "loss": loss}
        for kind, loss in (("ladder", 2.5), ("standard", 2.25))
    ]
    write(folder, "rates-of-learning", {**HEAD, "tokens": 20_000_000, "rates": rates})
    kinds = [
        {
            **{"kind": kind, "parameters": 25_690_624, "mean": mean, "less_the_firsts": [mean - 2]},
            **{"tokens_per_second": 1_500_000, "modelled_time": {"llama-3-8b": time}},
        }
        for kind, mean, time in (("standard", 2.0, 1.0), ("ladder", 2.0625, 0.8077))
    ]
    data = [{"training_tokens": 100_000_000}]
    write(folder, "learning", {**HEAD, "tokens": 210_000_000, "data": data, "rows": kinds})
    with tarfile.open(tmp_path / "results.tgz", "w:gz") as tar:
        for file in folder.iterdir():
            tar.add(file, file.name)
    out = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu_page.py", str(tmp_path / "results.tgz"), str(out)])
    gpu_page.main()
    page = out.read_text()
    assert "- A card: torch 2.11.0, cudnn 92100" in page
    assert "| training-1b | done | 42 |" in page
    assert "**Device:** A card. **Command:**\n\n    python x.py\n" in page
    assert "Parameters: paper-1b 1,200 M." in page
    cells = "| 512.2 | 32,000 | 45.6% | 61.25 | 60.50 |"
    assert f"| paper-1b:bf16:ladder {cells}" in page
    assert "| paper-1b:bf16:standard | out of memory: Tried to allocate 8 GiB |" in page
    assert "| paper-1b:bf16:ladder | Transformer Engine: cuDNN | 451.0 |  | 1755 | 641 |" in page
    assert (
        "1 failed, 38 passed in 9.00s" in page
        and "- `FAILED tests/gpu/test_gpu.py::test_it`" in page
    )
    assert "210,000,000 tokens of each kind, 2.10 epochs of 100,000,000" in page
    assert "| ladder | 25,690,624 | 2.0625 | +0.0625 | 1,500,000 |" in page
    assert "| ladder | 0.808 |" in page
    assert "| 1e-3 | 2.5000 | 2.2500 |" in page
    assert missing("training-1b-te", "training-8b", "cuda-graph") in page
    assert missing("layers", "layers-experts") in page and missing("tests") not in page


def test_results_of_the_real_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny, on the CPU: their times mean nothing."""
    tiny = ["--hidden-size", "64", "--ffn-hidden-size", "128", "--heads", "8", "--seq-length", "32"]
    fake = ["--fake-tp", "8", "--link", "nvswitch", "--layers", "2", "--steps", "2", "--also"]
    overlap = [*tiny, *fake, "parallel", "--sequence-parallel"]
    kinds = [*tiny, *fake, "parallel-ladder", "standard-halves", "no-comm"]
    attention = [
        "--tokens",
        "16",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "8",
        "--steps",
        "1",
    ]
    for script, name, options in (
        ("overlap", "overlap-70b-nvswitch-bf16-sp", overlap),
        ("overlap", "kinds-8b-p2p-off", kinds),
        ("overlap", "kinds-70b-nvswitch", [*kinds, "--micro-batch-size", "2"]),
        ("attention", "attention", attention),
    ):
        file = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *options, "--json", str(file)])
        with contextlib.suppress(SystemExit):
            gpu_page.script(script).main()
    parallel_state.destroy_model_parallel()
    (tmp_path / "connections-8.json").write_bytes(
        (tmp_path / "overlap-70b-nvswitch-bf16-sp.json").read_bytes()
    )
    capsys.readouterr()
    page = gpu_page.page(tmp_path)
    assert "Part `overlap-70b-nvswitch-bf16-sp`, 2 layers." in page
    assert all(f"\n| {kind} | " in page for kind in ("parallel", "ladder"))
    assert "| ladder at most, by its number of layers | 75.0% |" in page  # 3 of 4 in forward
    assert "| overlap-70b-nvswitch-bf16-sp | torch: " in page
    assert "Part `kinds-70b-nvswitch`, 2 layers, 2 repetitions." in page
    without_halves, with_halves = page.split("Part `kinds-")[2:0:-1]
    assert "\n| standard in halves | " in with_halves
    assert "Not measured, standard in halves: a micro-batch of 1 has no two" in without_halves
    for table in (without_halves, with_halves):
        assert "\n| parallel-ladder | " in table and "\n| no-comm |  |  |  | " in table
    assert missing("kinds-70b-nvswitch-sp") in page
    assert "| 8 | " in page
    assert missing("connections-1", "connections-2", "connections-32") in page
    assert "\n| torch, its choice | " in page
