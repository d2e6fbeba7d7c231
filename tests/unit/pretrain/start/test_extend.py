"""`train --preset extend`: what becomes of context and RoPE, and what may differ from the model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ladder import rope
from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from pretrain.config.presets import PRESETS
from pretrain.config.train import AdaptConfig, save_config
from pretrain.data.checks import open_data
from pretrain.data.folders import keep_facts
from pretrain.run.checkpoint_files import write_manifest
from pretrain.start.arguments import parse_train
from pretrain.start.extend import extension, rope_in_words
from pretrain.start.initial import check_initial
from pretrain.start.plan_only import plan_only
from tests.data_sets import write_data_set

OLD = 128  # the context of the preset debug


def write_base(folder: Path, **model) -> Path:
    """A run to start from, whose weights nobody reads."""
    base = PRESETS["debug"]()
    data = write_data_set(folder / "data")
    config = replace(
        base,
        model=replace(base.model, vocab_size=200, **model),
        data=replace(base.data, paths=(data,)),
        output_dir=folder / "base",
    )
    checkpoint = folder / "base/checkpoints/step_00000010"
    checkpoint.mkdir(parents=True)
    for path in (folder / "base", checkpoint):
        save_config(config, path / "config.json")
    keep_facts(folder / "base", open_data(config))
    write_manifest(checkpoint, {})
    return folder / "base"


def extended(base: Path, *options: object) -> ModelConfig:
    argv = ["--preset", "extend", "--init-from", base, *options]
    return parse_train([str(word) for word in argv])[0].model


YARN = {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0}
LLAMA3 = {"rope_scaling_type": "llama3", "rope_scaling_factor": 4.0}
LINEAR = {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0}
ORIGINAL = "rope_original_max_position_embeddings"


@pytest.mark.parametrize(
    ("before", "options", "now"),
    [
        ({}, "", {**YARN, "rope_scaling_factor": 16.0, ORIGINAL: OLD}),
        ({}, "--model.rope-scaling-type linear", {**LINEAR, "rope_scaling_factor": 16.0}),
        (
            {},
            "--model.rope-scaling-type llama3",
            {**LLAMA3, "rope_scaling_factor": 16.0, ORIGINAL: OLD},
        ),
        ({}, "--model.rotary-base 5e5", {"rotary_base": 5e5}),
        ({}, "--model.rotary-base=5e5", {"rotary_base": 5e5}),
        (
            {},
            "--model.rotary_base 5e5 --model.rope_scaling_type yarn",
            {**YARN, "rotary_base": 5e5, "rope_scaling_factor": 16.0, ORIGINAL: OLD},
        ),
        ({}, "--model.rope-attention-factor 1", {
            **YARN, "rope_scaling_factor": 16.0, ORIGINAL: OLD, "rope_attention_factor": 1.0,
        }),
        # What is scaled is scaled further, from the same original context.
        (YARN, "", {**YARN, "rope_scaling_factor": 64.0, ORIGINAL: OLD // 4}),
        (LLAMA3, "", {**LLAMA3, "rope_scaling_factor": 64.0}),
        ({**LLAMA3, ORIGINAL: 40}, "", {**LLAMA3, "rope_scaling_factor": 64.0, ORIGINAL: 40}),
        (LINEAR, "", {**LINEAR, "rope_scaling_factor": 64.0}),
        (LINEAR, "--model.rotary-base 5e5", {**LINEAR, "rotary_base": 5e5}),
    ],
)  # fmt: skip
def test_the_context_and_rope(before: dict, options: str, now: dict, tmp_path: Path) -> None:
    base = write_base(tmp_path, **before)
    found = extended(base, "--data.seq-length", 2048, *options.split())
    debug = PRESETS["debug"]().model
    assert found == replace(debug, vocab_size=200, max_position_embeddings=2048, **now)


def test_stretching_twice_is_stretching_once(tmp_path: Path) -> None:
    once = extended(write_base(tmp_path / "once"), "--data.seq-length", 2048)
    middle = extended(write_base(tmp_path / "once2"), "--data.seq-length", 512)
    fields = {
        name: getattr(middle, name)
        for name in (
            "max_position_embeddings",
            "rope_scaling_type",
            "rope_scaling_factor",
            ORIGINAL,
        )
    }
    twice = extended(write_base(tmp_path / "twice", **fields), "--data.seq-length", 2048)
    assert twice == once
    assert torch.equal(rope.frequencies(twice), rope.frequencies(once))


def test_yarn_keeps_its_original_context(tmp_path: Path) -> None:
    """Where none is named it follows max_position_embeddings, which may change with the same weights."""
    base = write_base(tmp_path, **YARN)
    saved = PRESETS["debug"]().model
    trained = rope.frequencies(replace(saved, **YARN))
    argv = ["--preset", "adapt", "--init-from", str(base), "--model.max-position-embeddings", "999"]
    config, _ = parse_train(argv)
    assert config.model.max_position_embeddings == 999
    assert torch.equal(rope.frequencies(config.model), trained)


def test_a_context_longer_than_the_sequences(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    options = ("--data.seq-length", 256, "--model.max-position-embeddings", 512)
    model = extended(base, *options)
    assert (model.max_position_embeddings, model.rope_scaling_factor) == (512, 4.0)
    config, _ = parse_train(["--preset", "extend", "--init-from", str(base), *map(str, options)])
    assert config.data.seq_length == 256
    assert "Context: 128 -> 512 tokens, trained with sequences of 256." in extension(config)


@pytest.mark.parametrize(
    ("before", "options", "said"),
    [
        (
            {},
            "--data.seq-length 128",
            "is 128 tokens already, this run's would be 128: give a longer",
        ),
        ({"max_position_embeddings": 1 << 20}, "", "1,048,576 tokens already"),
        (LLAMA3, "--model.rope-scaling-type yarn", "scaled by llama3 already"),
    ],
)
def test_what_is_refused(before: dict, options: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        extended(write_base(tmp_path, **before), *options.split())


def test_what_may_differ_from_the_saved_model(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    argv = ["--preset", "extend", "--init-from", str(base), "--data.seq-length", "512"]
    config, _ = parse_train([*argv, "--data.paths", str(tmp_path / "data")])
    folders = open_data(config)
    check_initial(config, folders)
    plain = {"rope_scaling_factor": None, "rope_scaling_type": "llama3", ORIGINAL: None}
    rotary = replace(config.model, **plain, rotary_base=9e5)
    check_initial(replace(config, model=rotary), folders)
    for changes in ({"num_query_groups": 4}, {"layernorm_epsilon": 1e-6}, {"sliding_window": 9}):
        other = replace(config, model=replace(config.model, **changes))
        with pytest.raises(
            UserError, match=f"model that differs.*model.{next(iter(changes))}"
        ) as e:
            check_initial(other, folders)
        assert "RoPE may change" not in str(e.value)
    # With the context as it was RoPE may not change: the model would be another one.
    short = replace(config.data, seq_length=64)
    same = replace(config, data=short, model=replace(rotary, max_position_embeddings=OLD))
    with pytest.raises(
        UserError,
        match=r"rotary_base: 10000.0 there, 900000.0 here. RoPE may change only with .* 128 t",
    ):
        check_initial(same, folders)
    taught = replace(
        config,
        model=replace(config.model, ladder_layers=2),
        adapt=AdaptConfig(distillation_weight=0.5),
    )
    with pytest.raises(
        UserError, match=r"data.seq_length 512 is beyond the teacher's context, 128"
    ):
        check_initial(taught, folders)


def test_it_says_what_it_does(tmp_path: Path, capsys) -> None:
    base = write_base(tmp_path)
    argv = ["--preset", "extend", "--init-from", str(base), "--data.seq-length", "1024"]
    said = (
        "Context: 128 -> 1,024 tokens, trained with sequences of 1,024. RoPE: base 10,000 -> base 10,000 "
        "with yarn scaling by 8 of a context of 128"
    )
    config, _ = parse_train(argv)
    assert extension(config) == said
    plan_only([*argv, "--plan-only", "h100", "--nproc-per-node", "1"])
    assert capsys.readouterr().out.splitlines()[0] == said
    assert (
        rope_in_words(extended(base, *argv[4:], "--model.rotary-base", "500000")) == "base 500,000"
    )
    assert extension(PRESETS["debug"]()) == ""
    begun = replace(config, output_dir=tmp_path / "run")
    (tmp_path / "run/checkpoints/step_00000010").mkdir(parents=True)
    write_manifest(tmp_path / "run/checkpoints/step_00000010", {})
    assert extension(begun) == ""
