import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.errors import UserError
from pretrain.config.presets import PRESETS
from pretrain.config.train import save_config
from pretrain.evaluation.results import save
from pretrain.report.evaluated import draw_needles, draw_positions, titled
from pretrain.report.report import write_report
from pretrain.report.runs import Run, read_run
from pretrain.report.scores import draw_scores, names_of
from pretrain.run.metrics import MetricsLog, flops_per_token, peak_flops, read_metrics

PNG = b"\x89PNG"


def write_run(path: Path, *, steps: int = 20, slower: float = 1.0, loss: float = 5.0) -> Path:
    """A run's metrics as the training loop writes them."""
    path.mkdir(parents=True)
    log = open_log(path)
    log.start(
        step=0,
        world_size=2,
        name=path.name,
        residual="ladder",
        versions={},
        parameters=1000,
        tokens_per_step=100,
        train_steps=steps,
        device="cpu",
    )
    log.baseline(dataset="data", unigram_loss=6.0)
    for step in range(1, steps + 1):
        write_step(log, step, loss - step / 10, slower)
        if step % 10 == 0:
            log.validation(
                step=step,
                tokens=100 * step,
                time=step * slower,
                dataset="data",
                loss=loss + 0.5 - step / 10,
                perplexity=math.exp(loss),
            )
    log.end(step=steps, reason="finished")
    save_config(PRESETS["debug"](), path / "config.json")
    return path


def open_log(path: Path, resume_step: int = 0) -> MetricsLog:
    return MetricsLog(
        path, resume_step=resume_step, train_steps=20, tensorboard=False, wandb=False, config={}
    )


def write_step(log: MetricsLog, step: int, loss: float, slower: float = 1.0) -> None:
    log.train(
        eta_s=0.0,
        step=step,
        tokens=100 * step,
        time=step * slower,
        loss=loss,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens_per_second=100 / slower,
        tflops_per_gpu=0.1,
        mfu=None,
        memory_gib=1.0,
    )


def test_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = write_report([run])
    assert page == run / "report" / "index.html"
    html = page.read_text()
    for text in (
        "3.5000",
        "nats below that entropy, data",
        "2.5000",
        "finished",
        "Loss against tokens",
    ):
        assert text in html
    assert "http" not in html.replace("https://arxiv", "")  # nothing is fetched
    pictures = sorted(run.glob("report/*.png"))
    assert len(pictures) == 5
    assert all(p.read_bytes().startswith(PNG) for p in pictures)


def evaluated(run: Path, *results: dict) -> Path:
    """The run, with a file of `eval`."""
    (run / "evaluations").mkdir()
    facts = {"step": 20, "unix_time": 1.0}
    whole = [{"data": "d", "split": "validation", "metrics": {}, **one} for one in results]
    save(run / "evaluations" / "a.json", facts, whole)
    return run


CURVE = [
    {"first": 1, "last": 8, "loss": 5.0},
    {"first": 9, "last": 16, "loss": 4.0},
    {"first": 17, "last": 4096, "loss": math.nan},
]
PLACES = [
    {"length": length, "depth": depth, "accuracy": depth}
    for length in (64, 128)
    for depth in (0.0, 0.5, 1.0)
]


def moved(run: Run) -> Run:
    """The run, with other losses and accuracies."""
    text = json.dumps(run.evaluated)
    step, results = json.loads(
        text.replace('"loss": 4.0', '"loss": 4.5').replace(": 0.5}", ": 0.7}")
    )
    return replace(run, evaluated=(step, results))


def test_what_was_measured_of_long_sequences_is_drawn(tmp_path: Path) -> None:
    before = evaluated(
        write_run(tmp_path / "before"), {"task": "perplexity", "tokens": 9, "by_position": CURVE}
    )
    after = evaluated(
        write_run(tmp_path / "after"),
        {"task": "perplexity", "tokens": 9, "by_position": CURVE[:2]},
        {"task": "needle", "items": 6, "by_place": PLACES},
        {"task": "needle", "data": "e", "items": 3, "by_place": PLACES[:3]},
    )
    html = write_report([before, after], tmp_path / "both").read_text()
    assert "Loss against the number of tokens before a token" in html
    assert "Needles in a haystack" in html
    for name in ("loss_by_position", "needle"):
        assert (tmp_path / "both" / f"{name}.png").read_bytes().startswith(PNG)
    run = read_run(after, "after")
    for draw in (draw_positions, draw_needles):  # what is drawn depends on what was measured
        assert draw([run]) != draw([moved(run)])
    html = write_report([before], tmp_path / "one").read_text()
    assert "Needles in a haystack" not in html
    assert not (tmp_path / "one" / "needle.png").exists()
    titles = [title for title, _ in titled([read_run(after, "after")], "by_place")]
    assert titles == ["after, d validation", "after, e validation"]
    assert [title for title, _ in titled([read_run(before, "b")], "by_position")] == ["b"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "perplexity", "by_position": [{"first": 1, "last": 8}]},
        {"task": "perplexity", "by_position": [{"first": 1, "last": 8, "loss": True}]},
        {"task": "perplexity", "by_position": {"first": 1}},
        {"task": "needle", "by_place": [{"length": 10**400, "depth": 0, "accuracy": 1}]},
        {"task": "needle", "by_place": ["no object"]},
    ],
)
def test_a_file_with_other_rows_is_refused(wrong: dict, tmp_path: Path) -> None:
    run = evaluated(write_run(tmp_path / "run"), wrong)
    with pytest.raises(UserError, match=r"a\.json is not a file of `megatron-ladder eval`"):
        write_report([run])


def test_runs_side_by_side_are_compared_at_the_end_and_at_equal_time(tmp_path: Path) -> None:
    standard = write_run(tmp_path / "standard")
    ladder = write_run(tmp_path / "ladder", slower=0.5, loss=5.1)
    html = write_report([standard, ladder], tmp_path / "out").read_text()
    assert "+0.1000" in html  # at the end
    # After 10 s the ladder has done 20 steps (3.6), the standard one 10 (4.5).
    assert "-0.9000 at 0 min 10 s" in html


def test_runs_in_progress_and_with_gaps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, steps=3)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[3]) | {"loss": math.nan}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(broken)]) + '\n{"kin')
    assert "in progress" in write_report([run]).read_text()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    html = write_report(runs, tmp_path / "out").read_text()
    assert "a/run" in html
    assert "b/run" in html


def test_names_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run")
    html = write_report([run], tmp_path / "out").read_text()
    assert "<b>run" not in html
    assert "&lt;b&gt;run" in html


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has not started yet"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start", "residual": "ladder"}\nnonsense\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a line of metrics"):
        write_report([tmp_path])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="no folder: give another --output-dir"):
        write_report([run], tmp_path / "metrics.jsonl")


def test_the_report_starts_without_torch() -> None:
    code = "import sys, pretrain.report.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_resumed_run_drops_what_its_checkpoint_has_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=7)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut short by a kill
    log = open_log(run, resume_step=5)
    assert log.time_so_far == 5.0
    write_step(log, 6, 1.0)
    log.wait()
    steps = [m["step"] for m in read_metrics(run) if m["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [m for m in read_metrics(run) if m["kind"] == "end"] == []


def test_a_run_without_a_checkpoint_starts_its_metrics_afresh(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    open_log(run, resume_step=0)
    assert read_metrics(run) == []


def test_the_console_line_says_what_matters(tmp_path: Path, capsys) -> None:
    write_step(open_log(tmp_path), 5, 4.5)
    line = capsys.readouterr().out
    for text in ("step  5/20", "loss 4.5000", "lr 1.00e-03", "100 tok/s", "ETA 0s"):
        assert text in line
    assert "MFU" not in line


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(
        tmp_path, resume_step=0, train_steps=2, tensorboard=True, wandb=False, config={}
    )
    write_step(log, 1, 4.5)
    log.end(step=1, reason="finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == pytest.approx(4.5)


def test_operations_and_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
    # One layer of width 2 over 3 positions: 6 N + 12 L h s.
    assert flops_per_token(
        num_layers=1, attention_width=2, seq_length=3, matmul_parameters=10
    ) == pytest.approx(60 + 72)


def test_what_is_measured_at_several_steps_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluations").mkdir()
    for step, moment, accuracy in ((10, 1.0, 0.1), (20, 1.0, 0.9), (20, 2.0, 0.3), (30, 1.0, 0.4)):
        metrics = {"accuracy": accuracy, "accuracy_stderr": 0.02, "once": 1.0}
        if step < 20:
            del metrics["once"]
        result = {"task": "last_word", "data": "d", "split": "validation", "metrics": metrics}
        path = run / "evaluations" / f"{step}-{moment}.json"
        save(path, {"step": step, "unix_time": moment}, [result])
    log = open_log(run, resume_step=20)
    for kind, facts in (
        ("evaluation", {"step": 20}),
        ("export", {"step": 10, "folder": "exports/step_00000010"}),
        ("watch_failed", {"step": 10, "what": "evaluation", "reason": "no network"}),
        ("watch_failed", {"step": 20, "what": "evaluation", "reason": "killed"}),
        ("watch_left_out", {"step": 15, "reason": "evaluation of step 10 took until step 20"}),
        ("watch_left_out", {"step": 12, "what": "export", "reason": "export of step 5 took long"}),
    ):
        log.note(kind, kind, **facts)
    log.end(step=20, reason="finished")
    found = read_run(run, "run")
    # The newest of each step; step 30 is not one of this run any more.
    points = found.scores["last_word accuracy, d validation"]
    assert [(p.step, p.value, p.stderr) for p in points] == [(10, 0.1, 0.02), (20, 0.3, 0.02)]
    assert found.tokens_at(15) == 1500
    assert names_of([found]) == ["last_word accuracy, d validation"]
    html = write_report([run]).read_text()
    for text in (
        "What `eval` measured at several steps, beside the loss",
        "exports/step_00000010",
        "failed: no network<",
        "failed: killed, and later succeeded",
        "steps left out of the measurements</th><td>15<",
        "steps left out of the exports</th><td>12<",
    ):
        assert text in html, text
    assert (run / "report/scores.png").read_bytes().startswith(PNG)
    other = write_run(tmp_path / "other")
    assert draw_scores([found]) != draw_scores([found, read_run(other, "other")])
    fewer = replace(found, scores={name: [points[0]] for name in found.scores})
    assert names_of([fewer]) == []


def test_the_balance_of_experts_is_drawn(tmp_path: Path) -> None:
    """Of a run with experts in layers 1 and 2 of three, beside one without."""
    dense, run = write_run(tmp_path / "dense", steps=4), write_run(tmp_path / "experts", steps=4)
    lines = read_metrics(run)
    for line in lines:
        if line["kind"] == "train":
            line |= {
                "expert_imbalance": 2.0 - line["step"] / 10,
                "expert_imbalance_by_layer": [None, 1.5, 2.0 - line["step"] / 10],
                "dropped_share": 0.0,
                "router_entropy": 0.75,
            }
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([dense, run]).read_text()
    assert (dense / "report" / "experts.png").read_bytes().startswith(PNG)
    for words in ("fullest expert over the mean, worst layer", "1.60", "0.750"):
        assert words in page
    assert "that were dropped" not in page
    alone = write_report([write_run(tmp_path / "alone", steps=2)]).read_text()
    assert "fullest expert" not in alone and not (tmp_path / "alone/report/experts.png").exists()
    for wrong in ([1.0, "2"], 3.0):
        lines[-2]["expert_imbalance_by_layer"] = wrong
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(UserError, match="expert_imbalance_by_layer is"):
            write_report([run])


def test_tensorboard_gets_the_balance(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(
        tmp_path, resume_step=0, train_steps=2, tensorboard=True, wandb=False, config={}
    )
    balance = {"expert_imbalance": 1.5, "dropped_share": 0.25, "router_entropy": 0.75}
    log.train(
        eta_s=0.0,
        **dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens_per_second"), 1.0),
        **{"step": 1, "tokens": 1, "time": 1.0, "tflops_per_gpu": 1.0, "mfu": None},
        **{"memory_gib": 1.0, "expert_imbalance_by_layer": [None, 1.5]},
        **balance,
    )
    log.end(step=1, reason="finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in balance.items():
        assert events.Scalars(f"train/{name}")[0].value == pytest.approx(value)
