"""A context made longer by the commands of docs/guides/extend-context.md, on a model of seconds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pretrain.cli import main
from pretrain.convert.plain_model import load_plain_model
from tests.distributed.test_training import metrics
from tests.runs import run_train
from tests.unit.pretrain.evaluation import eval_models

SHORT, LONG = 64, 512
BASE = f"--preset debug --data.seq-length {SHORT} --model.max-position-embeddings {SHORT}"
BASE += " --schedule.train-steps 10 --model.residual standard"
EXTEND = f"--preset extend --data.seq-length {LONG} --precision fp32 --recompute none"
EXTEND += " --global-batch-size 2 --schedule.train-steps 6 --schedule.warmup-steps 1"
EXTEND += " --eval-interval 3 --eval-sequences 2 --optimizer.lr 1e-3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets all and long, and the run base."""
    folder = tmp_path_factory.mktemp("extend")
    texts = eval_models.plain_texts()
    joined = ["\n".join(texts[i : i + 20]) for i in range(0, len(texts), 10)]
    source = eval_models.write_texts(folder / "text.jsonl", [*texts, *joined])
    tokenizer = eval_models.train_tokenizer(source, folder / "tokenizer")
    for name, options in (("all", ()), ("long", ("--min-tokens", str(LONG)))):
        eval_models.tokenize(source, tokenizer, folder / name, *options)
    said = train(folder, f"{BASE} --data.paths {folder / 'all'} --output-dir {folder / 'base'}")
    assert "Context:" not in said
    return folder


def train(folder: Path, options: str) -> str:
    codes, output = run_train(options.split(), folder / "log", 150)
    assert set(codes) == {0}, output
    return output


def extend(place: Path, run: Path, options: str = "") -> str:
    data = "" if "--config" in options else f"--data.paths {place / 'long'}"
    start = f"{EXTEND} --init-from {place / 'base'} {data} --output-dir {run}"
    return train(run.parent, f"{start} {options}")


def test_extended_by_yarn_measured_reported_and_exported(
    place: Path, tmp_path: Path, capsys
) -> None:
    blend = tmp_path / "blend.json"
    sets, then = (str(place / "long"), str(place / "all")), str(4 * 2 * LONG)
    argv = ["data", "blend", *sets, "--weights", "1", "0", "--then", then, "1", "1"]
    assert main([*argv, "--output", str(blend)]) == 0
    run = tmp_path / "longer"
    said = extend(place, run, f"--config {blend}")
    assert f"Context: {SHORT} -> {LONG} tokens" in said
    assert f"yarn scaling by 8 of a context of {SHORT}" in said
    assert "Blend of steps 1 to 4: long 100.0%\n" in said
    assert [m["step"] for m in metrics(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert "nothing to do" in extend(place, run, f"--config {blend}")

    for folder in (place / "base", run):
        argv = ["eval", str(folder), "--data", str(place / "long"), "--tasks", "perplexity,needle"]
        assert main([*argv, "--seq-length", str(LONG), "--limit", "20"]) == 0
    assert main(["report", str(place / "base"), str(run), "--output-dir", str(tmp_path / "r")]) == 0
    assert {"loss_by_position.png", "needle.png"} <= {p.name for p in (tmp_path / "r").iterdir()}
    assert "loss by the number of tokens before: 8: " in capsys.readouterr().out

    assert main(["export", str(run), str(tmp_path / "model"), "--dtype", "fp32"]) == 0
    fields = json.loads((tmp_path / "model/config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]  # transformers' own code
    assert fields["max_position_embeddings"] == LONG
    assert fields["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": LONG / SHORT,
        "original_max_position_embeddings": SHORT,
    }
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert settings["model_max_length"] == LONG
    same_logits(run, tmp_path / "model")


def test_extended_by_another_base_on_two_ranks(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "longer"
    parallel = "--parallel.tensor-model-parallel-size 2 --parallel.sequence-parallel"
    said = extend(place, run, f"--model.rotary-base 200000 {parallel}")
    assert "RoPE: base 10,000 -> base 200,000" in said
    assert main(["export", str(run), str(tmp_path / "model"), "--dtype", "fp32"]) == 0
    fields = json.loads((tmp_path / "model/config.json").read_text())
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 200000.0}
    same_logits(run, tmp_path / "model")


def same_logits(run: Path, folder: Path) -> None:
    """transformers' model of the folder gives the run's logits at every position of the new context."""
    plain = load_plain_model(run)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(theirs, LlamaForCausalLM)
    ids = torch.randint(
        3, plain.config.vocab_size, (1, LONG), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected, found = plain.model(ids).logits, theirs(ids).logits
    assert torch.allclose(found, expected, atol=1e-4 * expected.std().item(), rtol=0)
