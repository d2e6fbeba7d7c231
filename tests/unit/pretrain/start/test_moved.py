"""Data sets, runs and models that have been moved, renamed, or whose paths are written otherwise."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ladder.errors import UserError
from pretrain.cli import main
from pretrain.config.data import DataConfig
from pretrain.config.presets import PRESETS
from pretrain.config.train import AdaptConfig, TrainConfig, load_config, save_config
from pretrain.data.checks import open_data
from pretrain.data.folders import DataFolder, keep_facts, kept_facts, labels, open_folder
from pretrain.data.sequences import train_sequences
from pretrain.run.checkpoint_files import write_manifest, written_files
from pretrain.run.folder import (
    check_output_dir,
    find_checkpoint,
    plan_of,
    started_from,
    write_config,
)
from pretrain.start.arguments import parse_train
from pretrain.start.going_on.past import same_data
from pretrain.start.initial import check_initial, keep_initial
from pretrain.start.preflight import preflight
from tests.data_sets import write_data_set
from tests.held_out import validation_sequences
from tests.runs import run_train


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the data sets web and code."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    write_data_set(home / "web")
    write_data_set(home / "code", seed=1)
    return home


def config_for(*paths: str | Path, **data) -> TrainConfig:
    base = PRESETS["debug"]()
    return replace(
        base,
        model=replace(base.model, vocab_size=200),
        data=DataConfig(paths=tuple(map(Path, paths)), seq_length=64, **data),
        output_dir=Path("run"),
    )


def begin(config: TrainConfig) -> None:
    """A run's folder after its first checkpoint."""
    assert config.output_dir is not None
    write_config(config)
    keep_facts(config.output_dir, open_data(config))
    (config.output_dir / "checkpoints/step_00000010").mkdir(parents=True)


def planned(config: TrainConfig) -> str:
    check_output_dir(config)
    return plan_of(config)


def resumed(*paths: str | Path) -> list[DataFolder]:
    config = config_for(*paths)
    check_output_dir(config)
    return same_data(Path("run"), open_data(config))


def test_a_path_may_be_written_otherwise(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(config_for("web", "code"))
    (place / "link").symlink_to("web")
    for web in ("./web", place / "web", "link", "code/../web"):
        assert [folder.name for folder in resumed(web, "code")] == ["web", "code"]
    monkeypatch.chdir(place / "web")
    config = replace(config_for(".", "../code"), output_dir=place / "run")
    assert [f.name for f in same_data(place / "run", open_data(config))] == ["web", "code"]


def test_a_data_set_may_be_moved(place: Path) -> None:
    begin(config_for("web", "code"))
    (place / "disk").mkdir()
    shutil.move("web", "disk/fineweb")
    found = resumed("disk/fineweb", "code")
    assert [str(folder.path) for folder in found] == ["disk/fineweb", "code"]
    assert [folder.name for folder in found] == ["web", "code"]
    # Its name stays, also when the run's folder is written again.
    keep_facts(Path("run"), found)
    write_config(config_for("disk/fineweb", "code"))
    shutil.move("disk/fineweb", "again")
    assert [folder.name for folder in resumed("again", "code")] == ["web", "code"]


def test_runs_of_older_versions_know_names_from_their_paths(place: Path) -> None:
    begin(config_for("web"))
    manifest = Path("run/data/0/manifest.json")
    shutil.copy("web/manifest.json", manifest)
    shutil.move("web", "moved")
    assert [folder.name for folder in resumed("moved")] == ["web"]
    assert kept_facts(Path("run"))[0].manifest == open_folder(Path("moved")).manifest


def test_other_data_is_refused_wherever_it_is(place: Path) -> None:
    begin(config_for("web", "code"))
    for paths in (("code", "web"), ("web",), ("code",)):
        with pytest.raises(UserError, match="give these first and in this order"):
            resumed(*paths)
    # Another text with the same number of tokens, in the same place.
    shutil.rmtree("web")
    write_data_set(place / "web", seed=2)
    with pytest.raises(UserError, match="web holds other training text than web, which the run"):
        resumed("web", "code")
    shutil.rmtree("run/data")
    with pytest.raises(UserError, match="is the run's folder complete"):
        resumed("web", "code")


def test_sequences_do_not_depend_on_the_place(
    place: Path, one_rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fill-in-the-middle draws by the data set's name."""
    monkeypatch.setattr("pretrain.data.fim.find_tokens", lambda *_: (190, 191, 192))
    before = config_for("web", "code", fim_rate=0.5)
    begin(before)
    first = train_sequences(before, open_data(before), place / "cache")
    shutil.move("web", "other")
    now = config_for("other", "code", fim_rate=0.5)
    again = train_sequences(now, same_data(Path("run"), open_data(now)), place / "cache2")
    renamed = train_sequences(now, open_data(now), place / "cache2")
    numbers = range(len(first))
    assert all(torch.equal(first[i]["tokens"], again[i]["tokens"]) for i in numbers)
    assert not all(torch.equal(first[i]["tokens"], renamed[i]["tokens"]) for i in numbers)


def test_data_sets_of_one_name_are_both_validated(place: Path, one_rank) -> None:
    write_data_set(place / "other" / "web", seed=2)
    config = config_for("web", "other/web", "web")
    folders = open_data(config)
    assert labels(folders) == ["web", "web-2", "web-3"]
    held_out = validation_sequences(config, folders, place / "cache")
    tokens = [dataset[0]["tokens"] for dataset in held_out.values()]
    assert list(held_out) == labels(folders)
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_one_data_set_given_twice_is_said(place: Path, caplog) -> None:
    """A link, or a copy, is the same text: megatron-core draws its sequences in the same order again."""
    shutil.copytree("web", "copy")
    preflight(config_for("web", "code"), 1)
    assert "same training text" not in caplog.text
    preflight(config_for("web", "code", "copy"), 1)
    assert "web and copy hold the same training text: each sequence" in caplog.text


def parsed(*argv: str | Path) -> TrainConfig:
    return parse_train([str(word) for word in argv])[0]


def same(one: Path | None, other: Path) -> bool:
    return one is not None and one.resolve() == other.resolve()


@pytest.mark.parametrize("file", ["config.json", "checkpoints/step_00000010/config.json"])
def test_a_runs_configuration_is_that_run_wherever_it_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    begin(config_for("web"))
    shutil.copy("run/config.json", "run/checkpoints/step_00000010")
    monkeypatch.chdir("/")
    for saved in (
        config_for(place / "web"),
        config_for("web"),
    ):  # of this version, and of older ones
        full = replace(
            saved, output_dir=place / "run" if saved.data.paths[0].is_absolute() else "run"
        )
        save_config(full, place / "run" / file)
        config = parsed("--config", place / "run" / file)
        assert same(config.output_dir, place / "run")
        assert same(config.data.paths[0], place / "web")
        # Another run with its options.
        again = parsed("--config", place / "run" / file, "--output-dir", "again")
        assert (again.output_dir, again.data) == (Path("again"), config.data)


def test_a_run_is_moved_with_its_data_or_without(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for saved in (config_for("web"), None):  # of an older version; as it is saved now
        shutil.rmtree("run", ignore_errors=True)
        begin(config_for("web"))
        if saved:
            save_config(saved, Path("run/config.json"))
        else:
            main_config = replace(config_for(place / "web"), output_dir=place / "run")
            save_config(main_config, Path("run/config.json"))
        moved = place.parent / f"moved-{bool(saved)}"
        shutil.copytree(place, moved)
        hidden = place.rename(place.parent / "gone")
        config = parsed("--config", moved / "run/config.json")
        assert same(config.output_dir, moved / "run")
        assert same(config.data.paths[0], moved / "web")
        hidden.rename(place)
        monkeypatch.chdir(place)
    # The run alone: its data is where it was.
    shutil.copytree("run", place.parent / "alone")
    config = parsed("--config", place.parent / "alone/config.json")
    assert same(config.output_dir, place.parent / "alone")
    assert same(config.data.paths[0], place / "web")


def test_a_file_that_is_no_runs_keeps_what_it_says(place: Path) -> None:
    save_config(config_for("web"), place / "config.json")
    assert parsed("--config", "config.json").output_dir == Path("run")


def test_folders_without_a_name_get_theirs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("web")
    config = parsed("--preset", "debug", "--data.paths", ".", "--output-dir", "../code/..")
    assert config.data.paths[0].name == "web"
    assert config.output_dir is not None
    assert config.output_dir.name == "home"


def test_a_checkpoint_may_be_a_link(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(config_for("web"))
    (place / "run/checkpoints/step_00000020").mkdir()
    checkpoint = place / "run/checkpoints/step_00000010"
    (place / "best").symlink_to(checkpoint)
    assert find_checkpoint(place / "best") == checkpoint
    monkeypatch.chdir("run/checkpoints")
    assert find_checkpoint(Path("step_00000010")) == checkpoint


@pytest.fixture
def base(place: Path) -> Path:
    """A run to start from: a configuration, and files that stand for weights."""
    folder = place / "base"
    begin(replace(config_for("web"), output_dir=folder))
    checkpoint = folder / "checkpoints/step_00000010"
    shutil.copy(folder / "config.json", checkpoint)
    write_weights(checkpoint, "ten")
    return folder


def write_weights(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    (checkpoint / "weights").write_text(text)
    write_manifest(checkpoint, {})


def test_the_model_a_run_started_from_may_be_moved(place: Path, base: Path) -> None:
    config = replace(config_for("web"), init_from=Path("base"))
    begin(config)
    keep_initial(config, is_resumed=False)
    (place / "link").symlink_to("base")
    for path in (base, Path("./base"), Path("link")):
        assert "Resuming" in planned(replace(config, init_from=path))
    base.rename("moved")
    moved = replace(config, init_from=Path("moved"))
    assert "Resuming" in planned(moved)
    check_initial(config, open_data(config))  # nothing is read of it any more
    write_weights(place / "moved/checkpoints/step_00000010", "other")
    with pytest.raises(UserError, match=r"another run: init_from: .*base -> .*moved"):
        check_output_dir(moved)


@pytest.mark.parametrize(
    "options",
    [
        "--preset adapt --ladder-layers last:1",
        "--preset adapt",
        "--preset extend --data.seq-length 3000",
    ],
)
def test_the_model_a_run_started_from_may_be_gone(place: Path, base: Path, options: str) -> None:
    """The same command goes on: the run has its own checkpoints."""
    checkpoint = base / "checkpoints/step_00000010"
    saved = load_config(checkpoint / "config.json")
    save_config(
        replace(saved, model=replace(saved.model, residual="standard")), checkpoint / "config.json"
    )
    write_weights(checkpoint, "ten")
    argv = [*options.split(), "--init-from", "base", "--data.paths", "web", "--output-dir", "run"]
    config = parsed(*argv)
    begin(config)
    keep_initial(config, is_resumed=False)
    base.rename("gone")
    assert parsed(*argv) == config
    assert "Resuming" in planned(config)
    check_initial(config, open_data(config))
    if "--ladder-layers" in options:
        assert parsed(*argv, "--ladder-layers", "auto:3").model == config.model  # not measured here
        with pytest.raises(UserError, match=r"another run: model\.ladder_layers: 1 -> 2"):
            planned(parsed(*argv, "--ladder-layers", "last:2"))
    shutil.rmtree("run/checkpoints")
    with pytest.raises(UserError, match="run base does not exist"):
        parsed(*argv)


def test_a_teacher_that_was_trained_on_is_refused(place: Path, base: Path) -> None:
    adapt = AdaptConfig(distillation_weight=0.5)
    model = replace(config_for().model, residual="standard")
    config = replace(config_for("web"), model=model, init_from=base, adapt=adapt)
    begin(config)
    keep_initial(config, is_resumed=False)
    check_initial(config, open_data(config))
    newer = base / "checkpoints/step_00000020"
    shutil.copytree(base / "checkpoints/step_00000010", newer)
    write_weights(newer, "twenty")
    with pytest.raises(UserError, match=r"newest checkpoint, step_00000020, .* \(step_00000010\)"):
        check_initial(config, open_data(config))
    older = replace(config, init_from=base / "checkpoints/step_00000010")
    check_initial(older, open_data(older))
    assert "Resuming" in planned(older)


def test_what_a_run_started_from_is_noted_at_its_first_step_only(place: Path, base: Path) -> None:
    """A resumed run of an older version has no note, and the model may have been trained on since."""
    config = replace(config_for("web"), init_from=base)
    begin(config)
    keep_initial(config, is_resumed=True)
    assert started_from(place / "run") is None
    for text in ("ten", "other"):  # a start that ended before its first checkpoint is made again
        write_weights(base / "checkpoints/step_00000010", text)
        keep_initial(config, is_resumed=False)
        kept = started_from(place / "run")
        assert kept and kept["files"] == written_files(base / "checkpoints/step_00000010")


def train(place: Path, *argv: str) -> None:
    statuses, output = run_train(list(argv), place.parent / "log", 100)
    assert statuses == [0], output


def test_a_moved_run_goes_on_as_if_nothing_were(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself: run and data are moved and renamed, and the losses are an undisturbed run's."""
    options = ["--preset", "debug", "--save-interval", "4", "--eval-interval", "4"]
    options += ["--schedule.train-steps", "8", "--schedule.warmup-steps", "1", "--no-tensorboard"]
    train(place, *options, "--data.paths", "web", "code", "--output-dir", "run")
    shutil.copytree("run", "half")
    shutil.rmtree("half/checkpoints/step_00000008")
    (place.parent / "new").mkdir()
    for old, new in (("half", "archived"), ("web", "fineweb"), ("code", "code")):
        Path(old).rename(place.parent / "new" / new)
    monkeypatch.chdir("/")
    new = place.parent / "new"
    paths = ["--data.paths", str(new / "fineweb"), str(new / "code")]
    train(place, "--config", str(new / "archived/config.json"), *paths)
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (new / "archived", place / "run")
    )
    for kind, keys in (("train", ("step", "loss")), ("validation", ("step", "dataset", "loss"))):
        assert [[m[k] for k in keys] for m in ours if m["kind"] == kind] == [
            [m[k] for k in keys] for m in theirs if m["kind"] == kind
        ]
    assert load_config(new / "archived/config.json").data.paths[0] == new / "fineweb"
    capsys.readouterr()
    # What is done with a run afterwards, from within its folder.
    monkeypatch.chdir(new / "archived")
    assert main(["report", "."]) == 0
    assert main(["status", "."]) == 0
    assert "finished" in capsys.readouterr().out
    assert not os.path.lexists(place / "half")
