"""Side-tuned runs by the command line: trained, resumed, exported, evaluated, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ladder.hf.generate import generate_text
from pretrain.cli import main
from pretrain.convert.plain_model import load_plain_model
from pretrain.run.checkpoint import load_weights
from pretrain.run.folder import backbone_of, find_checkpoint
from tests.data_sets import write_data_set
from tests.runs import run_train
from tests.unit.hf.tiny import train_sentencepiece

TIMEOUT_S = 150
OPTIONS = (
    "--schedule.train-steps 4 --save-interval 2 --eval-interval 0 --global-batch-size 4 "
    "--eval-sequences 8 --data.seq-length 64"
)
SIDE = "--preset side-tune --schedule.warmup-steps 0 --precision fp32 --side.reduction 4"


def train(data: Path, run: Path, *options: str) -> str:
    argv = [*options, *OPTIONS.split(), "--data.paths", str(data), "--output-dir", str(run)]
    codes, output = run_train(argv, run.with_name(f"{run.name}.log"), TIMEOUT_S)
    assert set(codes) == {0}, output
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_sentencepiece(folder, "bpe").read_bytes()
    return write_data_set(folder / "data", vocab_size=500, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("base") / "base"
    train(data, run, "--preset", "debug")
    return run


@pytest.fixture(scope="module")
def run(data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "side"
    options = (*SIDE.split(), "--side.dropped-layers", "2")
    output = train(data, run, *options, "--init-from", str(base))
    assert "A side network of" in output
    return run


def test_the_run_is_whole_without_the_other(data: Path, base: Path, run: Path) -> None:
    (start,) = [
        m
        for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if m["kind"] == "start"
    ]
    side = load_weights(find_checkpoint(run))
    assert start["trained_parameters"] == sum(weight.numel() for weight in side.values())
    assert start["trained_parameters"] < start["parameters"] / 3
    kept = load_weights(find_checkpoint(backbone_of(run)))
    for name, weight in load_weights(find_checkpoint(base)).items():
        assert torch.equal(kept[name], weight), name


def test_the_exported_folder_has_the_runs_logits(run: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert main(["export", str(run), str(out)]) == 0  # it compares the logits itself
    assert main(["export", str(run), str(out)]) == 0  # it is there
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ours = load_plain_model(run).model
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = ours(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)
        again = load_plain_model(out).model(ids).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
    # The backbone's tensors are those of a folder without a side network.
    assert main(["export", str(base), str(tmp_path / "base")]) == 0
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    state = loaded.state_dict()
    for name, weight in backbone.state_dict().items():
        assert torch.equal(state[name], weight), name
    (text,) = generate_text(out, ["def f"], max_new_tokens=4)
    assert text.startswith("def f")


def test_it_is_evaluated(run: Path, data: Path, tmp_path: Path) -> None:
    assert main(["eval", str(run), "--data", str(data), "--output-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "RUN", "--prompt", "a"], "is side-tuned"),
        (["serve", "RUN"], "is side-tuned"),
        (["train", "--preset", "adapt", "--init-from", "RUN"], "is side-tuned"),
        (["train", *SIDE.split()], "starts from the weights of an existing model"),
        (["train", "--preset", "debug", "--side.reduction", "4"], "give --init-from"),
        (
            [
                *("train", *SIDE.split(), "--init-from", "BASE", "--side.dropped-layers", "0", "1"),
                *("--parallel.pipeline-model-parallel-size", "2"),
            ],
            "leaves no block",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]),
)
def test_what_is_refused(
    argv: list[str],
    said: str,
    run: Path,
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [{"RUN": str(run), "BASE": str(base)}.get(word, word) for word in argv]
    if argv[0] == "train":
        argv += ["--data.paths", str(data), "--output-dir", str(tmp_path / "new")]
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_folder_with_a_side_network_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(["export", str(run), str(out)]) == 0
    for argv in (["serve", str(out)], ["import", str(out), str(tmp_path / "imported")]):
        assert main(argv) == 2
        assert "has a side network" in capsys.readouterr().err
