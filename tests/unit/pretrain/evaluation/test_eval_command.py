"""`megatron-ladder eval`: runs and exported folders, results' files, refusals, lm-evaluation-harness."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ladder.errors import UserError
from pretrain.cli import main
from pretrain.evaluation.results import cells, results_by_step, save, table
from pretrain.report.report import write_report
from tests.unit.hf import tiny
from tests.unit.pretrain.evaluation import eval_models
from tests.unit.pretrain.report.test_report import write_run

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed (430 MB: pip install 'megatron-ladder[eval]')",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run, model (the run's export), data and its tokenizer."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    tokenizer = tiny.train_sentencepiece(folder, "bpe")
    eval_models.make_run(folder, tokenizer)
    source = eval_models.write_texts(folder / "text.jsonl")
    eval_models.tokenize(source, tokenizer, folder / "data")
    return folder


def results_of(folder: Path) -> dict:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_run_and_its_export_give_the_same_figures(made: Path, tmp_path: Path, capsys) -> None:
    options = ["--data", str(made / "data"), "--tasks", "perplexity,last_word", "continuation"]
    options += ["--limit", "12", "--max-tokens", "3000", "--batch-size", "8"]
    found = {}
    for name in ("run", "model"):
        assert main(["eval", str(made / name), *options, "--output-dir", str(tmp_path / name)]) == 0
        found[name] = results_of(tmp_path / name)
    output = capsys.readouterr().out
    for text in ("bits_per_byte", "data validation", "12 items", "drawn at random", "first item"):
        assert text in output
    assert found["run"]["step"] == 0
    assert found["model"]["step"] is None
    pairs = list(zip(found["run"]["results"], found["model"]["results"], strict=True))
    assert [one["task"] for one, _ in pairs] == ["perplexity", "last_word", "continuation"]
    for one, other in pairs:
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-6)
        assert one.get("example") == other.get("example")
        assert one["data"] == "data"
        assert one["split"] == "validation"
    perplexity = pairs[0][0]
    assert perplexity["seq_length"] == 128
    assert 0 < perplexity["tokens"] <= 3000
    assert not perplexity["is_whole_split"]


def test_results_lie_beside_what_was_measured(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(made / "model", tmp_path / "model")
    before = sorted((tmp_path / "model").iterdir())
    options = ["--data", str(made / "data"), "--max-tokens", "1000", "--seq-length", "50"]
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    for path in (tmp_path / "run", checkpoint, tmp_path / "model"):
        assert main(["eval", str(path), *options]) == 0
    assert len(list((tmp_path / "run/evaluations").iterdir())) == 2  # none takes another's place
    assert results_of(tmp_path / "model-evaluations")["results"][0]["seq_length"] == 50
    assert sorted((tmp_path / "model").iterdir()) == before


def test_data_sets_are_given_by_several_options_or_values(made: Path, tmp_path: Path) -> None:
    for name in "abc":
        shutil.copytree(made / "data", tmp_path / name)
    data = ["--data", str(tmp_path / "a"), str(tmp_path / "b"), "--data", str(tmp_path / "c")]
    argv = ["eval", str(made / "run"), *data, "--max-tokens", "1000"]
    assert main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    results = results_of(tmp_path / "out")["results"]
    assert [result["data"] for result in results] == ["a", "b", "c"]


def refused(capsys, *argv: object) -> str:
    try:
        status: object = main(["eval", *map(str, argv)])
    except SystemExit as ended:  # of an option, in a box
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


def test_what_is_refused(made: Path, tmp_path: Path, capsys) -> None:
    run, data = made / "run", made / "data"
    other = tiny.train_sentencepiece(tmp_path, "unigram")
    others = eval_models.tokenize(made / "text.jsonl", other, tmp_path / "others")
    bare = shutil.copytree(made / "model", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer.model"):
        (bare / name).unlink()
    for argv, message in {
        (run,): "perplexity: give --data",
        (run, "--data", tmp_path / "no"): "does not exist",
        (tmp_path / "no", "--data", data): "does not exist",
        (run, "--data", others): "tokenized with another tokenizer",
        (bare, "--data", data): "has no tokenizer",
        (run, "--data", data, "--split", "test"): "nothing in its test split",
        (run, "--data", data, "--batch-size", "0"): "--batch-size 0: give 1 or more",
        (run, "--data", data, "--tasks", "toy"): "--data is not for toy",
        (run, "--data", data, data): "several folders are named data",
        (run, "--data", data, "--include-path", tmp_path): "--include-path: name one of its tasks",
    }.items():
        assert message in refused(capsys, *argv), argv
    assert not (run / "evaluations").exists()
    # Text is text: the tasks take it from any data set.
    argv = ["eval", str(run), "--data", str(others), "--tasks", "last_word", "--limit", "3"]
    assert main([*argv, "--output-dir", str(tmp_path / "out")]) == 0


def test_positions_beyond_the_context_are_measured_with_a_warning(
    made: Path, tmp_path: Path, capsys
) -> None:
    argv = ["eval", str(made / "run"), "--data", str(made / "data"), "--max-tokens", "3000"]
    assert main([*argv, "--seq-length", "256", "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "--seq-length 256 is beyond the context of" in said.out + said.err
    (result,) = results_of(tmp_path / "out")["results"]
    assert result["by_position"][-1]["last"] == result["seq_length"] == 256
    assert "loss by the number of tokens before: 8: " in said.out


def test_without_the_harness_its_tasks_say_what_to_install(made: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, made / "run", "--tasks", "arc_easy")
    assert "pip install 'megatron-ladder[eval]'" in said
    argv = (made / "run", "--data", made / "data", "--tasks", "perplexity", "last_wrod")
    assert "did you mean last_word?" in refused(capsys, *argv)


def test_a_task_that_fails_does_not_lose_the_others(made: Path, tmp_path: Path, capsys) -> None:
    """Here: one whose continuations do not fit."""
    argv = [made / "run", "--data", made / "data", "--tasks", "continuation,perplexity"]
    argv += ["--seq-length", "3", "--max-tokens", "1000", "--output-dir", tmp_path / "out"]
    assert "--seq-length 3: the continuation" in refused(capsys, *argv)
    assert [r["task"] for r in results_of(tmp_path / "out")["results"]] == ["perplexity"]


def test_the_report_shows_the_latest_of_the_last_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    folder = run / "evaluations"
    folder.mkdir()

    def write(name: str, step: int, moment: float, accuracy: float, task: str = "last_word"):
        metrics = {"accuracy": accuracy, "accuracy_stderr": 0.0123}
        result = {"task": task, "data": "d", "split": "validation", "metrics": metrics, "items": 9}
        save(folder / f"{name}.json", {"step": step, "unix_time": moment}, [result])

    assert results_by_step(run) == {}
    write("a", 10, 9.0, 0.111)
    write("z", 20, 2.0, 0.222)
    write("b", 20, 3.0, 0.333)
    write("c", 20, 1.0, 0.444, task="continuation")
    step, results = max(results_by_step(run).items())
    assert step == 20
    assert sorted(result["metrics"]["accuracy"] for result in results) == [0.333, 0.444]
    html = write_report([run]).read_text()
    assert "last_word accuracy, d validation" in html
    assert "0.3330 ± 0.0123" in html
    assert "0.2220" not in html
    (folder / "d.json").write_text("{}")
    with pytest.raises(UserError, match=r"d\.json is not a file of `megatron-ladder eval`"):
        write_report([run])


def test_the_table() -> None:
    results = [
        {"task": "toy", "metrics": {"acc,none": 0.5, "acc_stderr,none": 0.25}, "items": 4},
        {
            "task": "perplexity",
            "data": "d",
            "split": "test",
            "metrics": {"loss": 4.5, "loss_stderr": None, "perplexity": 1234.56, "trained_loss": 2},
            "tokens": 5000,
            "trained_tokens": 70,
        },
    ]
    assert cells(results) == [
        ("toy", "lm-eval", "acc,none", "0.5000 ± 0.2500", "4 items"),
        ("perplexity", "d test", "loss", "4.5000", "5,000 tokens"),
        ("perplexity", "d test", "perplexity", "1,234.6", "5,000 tokens"),
        ("perplexity", "d test", "trained_loss", "2.0000", "70 tokens"),
    ]
    assert len({line.index(" of") for line in table(results).splitlines()[:1]}) == 1


@needs_harness
def test_the_harness_runs_a_local_task_offline(made: Path, tmp_path: Path, capsys) -> None:
    """Two choices, of which one is the likelier: the same answers as the model's own likelihoods."""
    from pretrain.convert.model_text import load_tokenizer
    from pretrain.convert.plain_model import load_plain_model
    from pretrain.evaluation.likelihood import TextModel

    questions = [
        {"question": f"The {a} of the {b} is", "choices": ["the model", "a rank"], "answer": i % 2}
        for i, (a, b) in enumerate([("file", "run"), ("end", "text"), ("loss", "step")] * 2)
    ]
    lines = tmp_path / "toy.jsonl"
    lines.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "toy.yaml").write_text(
        "task: ladder_toy\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {lines}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "gone.yaml").write_text(
        "task: ladder_gone\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'gone.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    )
    plain = load_plain_model(made / "model")
    text_model = TextModel(plain.model, load_tokenizer(plain.tokenizer_file), [2], 128, 4)
    pairs = [(q["question"], f" {choice}") for q in questions for choice in q["choices"]]
    nats = [found.nats for found in text_model.likelihoods(pairs, "")]
    right = [(nats[2 * i + 1] < nats[2 * i]) == bool(q["answer"]) for i, q in enumerate(questions)]
    own = ["--include-path", str(tmp_path)]
    for model in ("model", "run"):
        out = tmp_path / f"out-{model}"
        argv = ["eval", str(made / model), "--tasks", "ladder_gone,ladder_toy", *own]
        assert main([*argv, "--output-dir", str(out)]) == 2  # as one of them could not be had
        said = capsys.readouterr()
        assert "task ladder_gone: its data could not be loaded" in said.err
        assert "ladder_toy" in said.out
        (result,) = results_of(out)["results"]
        assert result["task"] == "ladder_toy"
        assert result["items"] == 6
        assert result["metrics"]["acc,none"] == pytest.approx(sum(right) / 6)
    assert 0 < sum(right) < 6
    message = refused(capsys, made / "run", "--tasks", "ladder_toi", *own)
    assert "did you mean ladder_toy" in message
    assert "is not a folder" in refused(
        capsys, made / "run", "--tasks", "x", "--include-path", "no"
    )
