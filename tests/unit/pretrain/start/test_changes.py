"""What may change when a run goes on: the guide's table, line by line, and what then is trained on."""

import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.errors import UserError
from pretrain.config import changes
from pretrain.config.past import Past, PastBatchSize, PastBlend
from pretrain.config.places import with_absolute_paths
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig, save_config, to_dict
from pretrain.data.checks import open_data, with_vocab_size
from pretrain.data.folders import keep_facts
from pretrain.run.folder import check_output_dir, checkpoint_at, plan_of, write_config
from pretrain.start.arguments import parse_train
from pretrain.start.going_on.changes import going_on_from, with_past
from tests.data_sets import write_data_set

GUIDE = Path(__file__).parents[4] / "docs/guides/change-a-run.md"
# Options of the run, and the step of its newest checkpoint.
RUNS = {
    "any": ("--schedule.decay wsd", 10),
    "wsd, before it goes down": ("--schedule.decay wsd", 10),
    "wsd, going down": ("--schedule.decay wsd", 18),
    "cosine": ("", 10),
}


@dataclass(frozen=True)
class Line:
    change: str
    of: str
    holds: str
    why: str

    def __str__(self) -> str:
        return f"{self.change} ({self.of})"


def table() -> list[Line]:
    """The lines of the guide's table."""
    rows = GUIDE.read_text().partition("| change | of a run |")[2].partition("\n\n")[0]
    lines = [row.strip(" |").split(" |") for row in rows.splitlines()[2:]]
    return [Line(*(cell.strip() for cell in [*line, ""][:4])) for line in lines]


def command(*options: str) -> TrainConfig:
    base = "--preset debug --data.weights 3 1 --output-dir run"
    if "--config" in options:  # as `data blend` writes it, with data sets and weights
        base = "--preset debug --output-dir run"
    else:
        base += " --data.paths a b"
    return with_vocab_size(parse_train([*shlex.split(base), *options])[0])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with three data sets."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        write_data_set(tmp_path / name, seed=seed)
    phases = [{"from_tokens": 12 * 8 * 64, "weights": [1, 3]}]
    data: dict[str, Any] = {"paths": ["a", "b"], "weights": [3, 1], "phases": phases}
    (tmp_path / "later.json").write_text(json.dumps({"data": data}))
    return tmp_path


def begin(config: TrainConfig, step: int) -> None:
    """The run's folder as its checkpoint of a step leaves it."""
    assert config.output_dir is not None
    config = with_absolute_paths(config)
    write_config(config)
    keep_facts(Path("run"), open_data(config))
    checkpoint = checkpoint_at(Path("run"), step)
    checkpoint.mkdir(parents=True)
    save_config(config, checkpoint / "config.json")


def go_on(config: TrainConfig) -> TrainConfig:
    """The configuration that the run is resumed with."""
    check_output_dir(config)
    return with_past(config, open_data(config))[0]


@pytest.mark.parametrize("line", table(), ids=str)
def test_the_table_of_the_guide_holds(line: Line, place: Path) -> None:
    options, step = RUNS[line.of]
    begin(command(*shlex.split(options)), step)
    options = f"{options} {line.change.strip('`')}"
    if line.holds == "refused":
        with pytest.raises(UserError) as refused:
            go_on(command(*shlex.split(options)))
        said = re.sub(r"\s+", " ", str(refused.value))
        assert line.why in said
        return
    config = go_on(command(*shlex.split(options)))
    assert (config.past != Past()) <= (line.holds == "from here on")
    assert "changed: " in plan_of(config)
    name = shlex.split(line.change.strip("`"))[0]
    if name != "--config":
        field = re.sub(r"^--|no-", "", name).replace("-", "_")
        assert changes.may_change(field)
        any_time = field.startswith(changes._ANY_TIME)
        assert line.holds == ("any time" if any_time else "from here on")


def fields(value: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, item in value.items()
        for name in (fields(item, f"{prefix}{key}.") if isinstance(item, dict) else [prefix + key])
    ]


def test_the_table_has_every_kind_of_option() -> None:
    """Each option is decided by a line of code, and each such line by one of the table or by its text."""
    every = [name for name in fields(to_dict(PRESETS["debug"]())) if not name.startswith("past.")]
    deciding = {
        name: next(
            prefix
            for prefix in (*changes._ANY_TIME, *changes._FROM_HERE_ON, *changes._WHY_NOT)
            if name.startswith(prefix)
        )
        for name in every
    }
    text = " ".join(line.change for line in table()).replace("--no-", "--").replace("-", "_")
    said = {prefix for prefix in deciding.values() if f"__{prefix}" in text}
    # In the guide's text.
    said |= {"data.phases", "init_from", "branch_from", "output_dir", "fp8."}
    assert set(deciding.values()) - said == set()
    for name, prefix in deciding.items():
        assert changes.may_change(name) == (prefix not in changes._WHY_NOT)


def test_a_change_is_said_once_and_asked_for_again_is_none(place: Path) -> None:
    begin(command(), 10)
    wider = ("--global-batch-size", "16")
    config = go_on(command(*wider))
    assert config.past.batch_sizes == (PastBatchSize(10, 8),)
    assert config.past.drawn == 20 * 8
    assert config.samples_after(10) == 80
    assert config.samples_after(12) == 80 + 2 * 16
    assert config.steps_for(80 * 64) == 10
    assert config.steps_for(80 * 64 + 1) == config.steps_for((80 + 16) * 64) == 11
    # The same command, before and after the next checkpoint.
    write_config(config)
    assert go_on(command(*wider)) == config
    checkpoint_at(Path("run"), 15).mkdir()
    save_config(config, checkpoint_at(Path("run"), 15) / "config.json")
    assert go_on(command(*wider)) == config
    # And back again.
    back = go_on(command())
    assert back.past.batch_sizes == (PastBatchSize(10, 8), PastBatchSize(15, 16))
    assert back.samples_after(16) == 80 + 5 * 16 + 8


def test_an_earlier_checkpoint_does_not_know_what_came_later(place: Path) -> None:
    begin(command(), 5)
    config = go_on(command("--global-batch-size", "16"))
    later = checkpoint_at(Path("run"), 10)
    later.mkdir()
    save_config(config, later / "config.json")
    now, changed = going_on_from(later, command("--global-batch-size", "16"), open_data(command()))
    assert (now.past, changed) == (config.past, {})
    first = checkpoint_at(Path("run"), 5)
    narrower = command("--global-batch-size", "4")
    now, changed = going_on_from(first, narrower, open_data(command()))
    assert now.past.batch_sizes == (PastBatchSize(5, 8),)
    assert changed == {"global_batch_size": (8, 4)}


def test_a_blend_from_here_on_keeps_what_was(place: Path) -> None:
    begin(command(), 10)
    config = go_on(command("--data.weights", "1", "1"))
    assert config.past == Past(blends=(PastBlend(1, (3.0, 1.0)),), blends_to=10)
    later = checkpoint_at(Path("run"), 15)
    later.mkdir()
    save_config(config, later / "config.json")
    write_config(config)
    three = go_on(command("--data.paths", "a", "b", "c", "--data.weights", "0", "1", "1"))
    assert three.past.blends_to == 15
    assert three.past.blends == (
        PastBlend(1, (3.0, 1.0, 0.0)),
        PastBlend(11, (1.0, 1.0, 0.0)),
    )
    with pytest.raises(UserError, match="past is not what `train` writes"):
        Past(blends=(PastBlend(2, (1.0,)),), blends_to=5)


def test_old_runs_have_no_past_and_go_on(place: Path) -> None:
    begin(command(), 10)
    for file in (Path("run/config.json"), checkpoint_at(Path("run"), 10) / "config.json"):
        values = json.loads(file.read_text())
        del values["past"], values["branch_from"], values["optimizer"]["ema_decay"]
        del values["schedule"]["wsd_decay_steps"]
        file.write_text(json.dumps(values))
    config = go_on(command())
    assert config.past == Past()
    assert "changed" not in plan_of(config)


def test_a_checkpoint_whose_configuration_is_damaged_is_left_to_the_check_of_its_files(
    place: Path,
) -> None:
    begin(command(), 10)
    (checkpoint_at(Path("run"), 10) / "config.json").write_text("{")
    assert go_on(command("--global-batch-size", "16")).past.batch_sizes == (PastBatchSize(10, 8),)


def test_warm_up_in_tokens_goes_on_with_its_batches(place: Path) -> None:
    tokens = ("--schedule.warmup-steps", "None", "--schedule.warmup-tokens", str(12 * 8 * 64))
    begin(command("--schedule.decay", "wsd", *tokens), 10)
    with pytest.raises(UserError, match=r"warm-up is not over at step 10, and would take 11 steps"):
        go_on(command("--schedule.decay", "wsd", *tokens, "--global-batch-size", "16"))


def test_desync_keeps_its_ranks(place: Path) -> None:
    desync = ("--model.residual", "desync")
    begin(command(*desync), 10)
    wider = command(*desync, "--parallel.tensor-model-parallel-size", "2")
    with pytest.raises(UserError, match="trained with desync-2 at"):
        going_on_from(checkpoint_at(Path("run"), 10), wider, open_data(wider))


def test_a_mean_is_not_trained_on(place: Path) -> None:
    begin(command(), 10)
    Path("run/merged.json").write_text("{}")
    with pytest.raises(UserError, match="holds a mean of checkpoints, which has no optimizer's"):
        check_output_dir(command())
    branch = replace(command(), output_dir=Path("other"), branch_from=Path("run@10"))
    with pytest.raises(UserError, match="has weights alone, and no optimizer's state: begin a run"):
        with_past(branch, open_data(branch))
