import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ladder.config import ParallelConfig
from megatron_ladder.errors import UserError
from pretrain.config.changes import may_change
from pretrain.config.data import DataConfig
from pretrain.config.faults import FaultConfig
from pretrain.config.presets import OF_A_MODEL, PRESETS
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.train import (
    AdaptConfig,
    TrainConfig,
    differences,
    from_dict,
    load_config,
    save_config,
    to_dict,
)
from pretrain.run.checkpoint_files import write_manifest
from pretrain.start.arguments import parse_train


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in OF_A_MODEL])
@pytest.mark.parametrize("residual", ["standard", "ladder", "parallel", "parallel-ladder"])
def test_every_preset_takes_every_residual_kind_and_survives_saving(
    name: str, residual: str, tmp_path: Path
) -> None:
    config, _ = parse_train(["--preset", name, "--model.residual", residual])
    config = replace(config, data=replace(config.data, paths=(Path("a"),), weights=(1.0,)))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_options_override_the_saved_configuration(tmp_path: Path) -> None:
    config, ranks = parse_train(
        [
            "--preset",
            "tiny",
            "--model.ladder-layers",
            "1",
            "3",
            "--data.paths",
            "x",
            "y",
            "--nproc-per-node",
            "2",
        ]
    )
    assert config.model.ladder_layers == (1, 3)
    assert ranks == 2
    save_config(config, tmp_path / "config.json")
    again, _ = parse_train(["--config", str(tmp_path / "config.json"), "--seed", "7"])
    assert again == replace(config, seed=7)


def test_the_number_of_options_stays_small() -> None:
    """Each one is a promise to users. Raise this only with a reason in the commit."""

    def count(values: dict) -> int:
        return sum(count(v) if isinstance(v, dict) else 1 for v in values.values())

    # 52, and with the overlap: five of the layout (sequence parallelism, stages), two dropouts, desync's n;
    # with other projects' models: four of what they are made of, and where to start from; with adapting
    # them: gradually, and by distillation (two); blends that change (phases); for what goes wrong: two
    # policies, a spike's size, how many of them, hangs of steps and of starts, slow ranks; saves in the
    # background. FP8: the recipe, which layers it leaves out (two), weights in it; a trace: from which
    # step, how many; Adam's moments; compile, a CUDA graph; whose attention, which no default can know of
    # every machine; halves, which take an even micro-batch and smaller GEMMs for what they hide. Windows
    # and YaRN of other projects' models: six. A mixture of experts: the thirteen fields of megatron-core's
    # that published models differ in, and over how many ranks. Outputs that are scaled, layers without
    # norms. A side network: its width, which layers it leaves out, how it begins, whether it adds to what
    # is there. Where a branch begins, how long it goes down; an average of the weights. What is
    # measured and exported beside the training: by which tasks, on which data, how often. Muon and its
    # momentum, z-loss, a ramp of the batch size. What `past` has is no option.
    values = to_dict(PRESETS["debug"]())
    del values["past"]
    assert count(values) <= 127


def test_lengths_in_tokens_are_rounded_up_to_steps() -> None:
    config = replace(
        PRESETS["debug"](),
        global_batch_size=4,
        data=DataConfig(seq_length=100),
        schedule=ScheduleConfig(train_tokens=4001, warmup_tokens=400),
    )
    assert (config.train_steps, config.warmup_steps) == (11, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--schedule.train-steps 10 --schedule.train-tokens 10", "are both set"),
        (
            "--schedule.train-steps 10 --schedule.warmup-steps 10",
            "warm-up takes 10 steps, the whole run 10",
        ),
        ("--data.seq-length 4096", "longer than model.max_position_embeddings"),
        ("--micro-batch-size 0", "micro_batch_size is 0"),
        ("--data.seq-length 0", "data.seq_length is 0"),
        ("--optimizer.lr -1", "optimizer.lr is -1.0: it must be at least 0"),
        ("--schedule.min-lr-fraction 2", "min_lr_fraction from 0 to 1"),
        ("--model.residual parallel --model.ladder-layers 2", "model.residual is parallel"),
        ("--parallel.context-parallel-size 3", "data.seq_length 64 is not divisible by 6"),
        (
            "--parallel.sequence-parallel --parallel.tensor-model-parallel-size 2 "
            "--parallel.context-parallel-size 2 --data.seq-length 60",
            "data.seq_length 60 is not divisible by 8: parallel.context_parallel_size 2 cuts each "
            "sequence in 4 chunks, and sequence parallelism divides these over 2 ranks",
        ),
        ("--parallel.virtual-pipeline-model-parallel-size 2", "there are no stages to divide"),
        (
            "--parallel.sequence-parallel --parallel.tensor-model-parallel-size 2 --data.seq-length 63",
            "data.seq_length 63 is not divisible",
        ),
        ("--model.hidden-dropout 1", "a share from 0 up to 1"),
        ("--adapt.gradual-steps 3", "need a model to start from: give --init-from RUN"),
        ("--model.num-layrs 4", "--model.num-layers"),  # the suggestion
        ("--precision fp8", "fp32"),
        ("--model.num-layers many", "num-layers"),
    ],
)
def test_values_that_do_not_fit_end_with_status_2(options: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_train(["--preset", "debug", *options.split()])
    assert ended.value.code == 2
    output = capsys.readouterr()
    text = " ".join((output.out + output.err).replace("│", " ").split())
    assert message in text
    assert "Traceback" not in text


def test_interleaved_stages_need_micro_batches_in_groups() -> None:
    config = replace(
        PRESETS["debug"](),
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
        ),
        micro_batch_size=1,
        global_batch_size=4,
    )
    assert config.num_microbatches(1) == 4
    with pytest.raises(UserError, match=r"1 micro-batches a step .* in groups of that size"):
        config.num_microbatches(4)


def test_adapting_needs_a_model_that_exists() -> None:
    for preset in OF_A_MODEL:
        with pytest.raises(UserError, match=f"--preset {preset} starts from the weights"):
            parse_train(["--preset", preset])
    with pytest.raises(UserError, match="auto:2 chooses among the layers of an existing model"):
        parse_train(["--preset", "debug", "--ladder-layers", "auto:2"])


def test_ladder_layers_of_a_new_model() -> None:
    config, _ = parse_train(["--preset", "debug", "--ladder-layers", "last:1"])
    assert config.model.layer_residuals() == ("standard", "standard", "standard", "ladder")
    config, _ = parse_train(["--preset", "debug", "--ladder-layers", "0,2"])
    assert config.model.ladder_layers == (0, 2)


def test_ladder_layers_of_a_parallel_model(tmp_path: Path) -> None:
    """Without weights to start from, and with those of a run."""
    debug = ["--preset", "debug", "--ladder-layers", "last:1"]
    some = ("parallel", "parallel", "parallel", "parallel-ladder")
    config, _ = parse_train([*debug, "--model.residual", "parallel-ladder"])
    assert config.model.layer_residuals() == some
    base = PRESETS["debug"]()
    for residual in ("parallel", "parallel-ladder"):
        run = replace(base, model=replace(base.model, residual=residual, vocab_size=300))
        folder = tmp_path / residual
        checkpoint = folder / "checkpoints" / "step_00000001"
        checkpoint.mkdir(parents=True)
        save_config(run, folder / "config.json")
        config, _ = parse_train([*debug, "--config", str(folder / "config.json")])
        assert config.model.layer_residuals() == some
        trained = replace(run, data=replace(run.data, paths=(Path("a"),)))
        save_config(trained, checkpoint / "config.json")
        write_manifest(checkpoint, {})
        adapt = ["--preset", "adapt", "--ladder-layers", "last:1", "--init-from", str(folder)]
        if residual == "parallel":
            config, _ = parse_train(adapt)
            assert config.model.layer_residuals() == some
        else:
            with pytest.raises(UserError, match="residual is parallel-ladder already"):
                parse_train(adapt)


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        (AdaptConfig(gradual_steps=-1), "gradual_steps is -1"),
        (AdaptConfig(gradual_steps=21), "more than the run's 20"),
        (
            AdaptConfig(distillation_weight=1.5),
            r"distillation_weight must be from 0 to 1 \(it is 1.5\)",
        ),
        (AdaptConfig(distillation_temperature=0), r"distillation_temperature above 0 \(it is 0\)"),
    ],
)
def test_bad_adaptation(adapt: AdaptConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(PRESETS["debug"](), init_from=Path("run"), adapt=adapt)
    standard = PRESETS["debug"]()
    standard = replace(standard, model=replace(standard.model, residual="standard"))
    with pytest.raises(UserError, match="no layer is to be a ladder layer"):
        replace(standard, init_from=Path("run"), adapt=AdaptConfig(gradual_steps=2))


def test_an_unknown_preset_is_named_with_what_is_near() -> None:
    with pytest.raises(UserError, match=r"no preset 'tinny' \(did you mean tiny\?\)"):
        parse_train(["--preset", "tinny"])
    with pytest.raises(UserError, match=r"give --preset NAME \(debug, tiny, "):
        parse_train(["--seed", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not a run's config.json: Expecting"),
        ("[]", "must hold one JSON object"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text, message, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(file)


def test_unknown_fields_of_a_saved_configuration_are_named() -> None:
    config = PRESETS["debug"]()
    with pytest.raises(UserError, match="unknown field colour"):
        from_dict(type(config), {**to_dict(config), "colour": 1})


def test_differences_know_what_is_safe_to_change() -> None:
    old, _ = parse_train(["--preset", "tiny"])
    new, _ = parse_train(
        ["--preset", "tiny", "--parallel.tensor-model-parallel-size", "1", "--optimizer.lr", "1"]
    )
    changed = differences(old, new)
    assert changed == {
        "optimizer.lr": (old.optimizer.lr, 1.0),
        "parallel.tensor_model_parallel_size": (2, 1),
    }
    assert [may_change(name) for name in changed] == [True, True]
    assert not may_change("seed")


def test_batches_that_do_not_divide_are_refused() -> None:
    config = replace(PRESETS["debug"](), micro_batch_size=3, global_batch_size=8)
    with pytest.raises(UserError, match="global_batch_size 8 is not a multiple"):
        config.num_microbatches(data_parallel_size=2)


def test_fault_options_are_checked_and_may_change() -> None:
    faults = FaultConfig(not_finite="skip", spike_factor=2.0)
    assert from_dict(FaultConfig, to_dict(faults)) == faults
    assert may_change("faults.not_finite")
    with pytest.raises(UserError, match=r"faults\.max_bad_steps is -1: it must be at least 0"):
        FaultConfig(max_bad_steps=-1)
    with pytest.raises(UserError, match=r"faults\.spike_factor is 1\.0: every second loss"):
        FaultConfig(spike_factor=1.0)


@pytest.mark.parametrize(
    ("faults", "may_skip"),
    [
        (FaultConfig(), False),  # spikes are not looked for
        (FaultConfig(spike_factor=3.0), True),  # rollback, which skips before the first checkpoint
        (FaultConfig(spike_factor=3.0, spike="stop"), False),
        (FaultConfig(not_finite="rollback"), True),
        (FaultConfig(not_finite="skip"), True),
    ],
)
def test_whether_a_step_may_be_skipped(faults: FaultConfig, may_skip: bool) -> None:
    assert faults.may_skip == may_skip


def test_a_configuration_saved_before_there_were_fault_options_is_read() -> None:
    values = to_dict(PRESETS["debug"]())
    del values["faults"]
    assert from_dict(TrainConfig, values) == PRESETS["debug"]()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_layers": "2"}, r"model\.num_layers is '2': it must be a whole number"),
        ({"num_layers": True}, r"model\.num_layers is True"),
        ({"num_layers": 10**12}, r"model\.num_layers is 1000000000000: .* at most 10,000"),
        ({"num_layers": 10**40}, r"model\.num_layers is 1000"),
        ({"hidden_size": 0}, r"model\.hidden_size is 0"),
        ({"hidden_size": 64.0}, r"model\.hidden_size is 64\.0"),
        ({"hidden_size": 1 << 30, "ffn_hidden_size": 1 << 30}, "parameters; at most"),
        ({"num_attention_heads": [4]}, r"num_attention_heads is \[4\]"),
        ({"num_query_groups": 0}, r"num_query_groups is 0"),
        ({"rotary_base": float("nan")}, r"rotary_base is nan"),
        ({"rotary_base": float("inf")}, r"rotary_base is inf"),
        ({"residual": "ladders"}, "residual is 'ladders': it must be standard or ladder or"),
        ({"ladder_layers": [[1]]}, r"ladder_layers\[0\] is \[1\]"),
        (
            {"ladder_layers": {}},
            r"ladder_layers is {}: it must be a whole number or a list or null",
        ),
    ],
)
def test_absurd_models_are_refused_in_a_sentence(fields, said: str, tmp_path: Path) -> None:
    model = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model": model | fields}))
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "config.json")


def test_numbers_of_old_configurations_are_kept(tmp_path: Path) -> None:
    """A whole number for a float, and a limit that is off."""
    values = to_dict(PRESETS["debug"]())
    values["optimizer"] |= {"lr": 1, "clip_grad": float("inf")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path / "config.json")
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (1, float("inf"))
