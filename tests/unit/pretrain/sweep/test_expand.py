"""From a sweep's file to its runs, and what is refused before the first one starts."""

from pathlib import Path

import pytest

from megatron_ladder.errors import UserError
from pretrain import cli
from pretrain.sweep.checks import checked_runs
from pretrain.sweep.expand import PlannedRun, planned_runs
from pretrain.sweep.file import read_sweep
from tests.unit.pretrain.sweep.sweeps import write_sweep

ROOT = Path(__file__).parents[4]
PRODUCT = """
preset = "debug"
[fields]
model.num_query_groups = "None"
[axes]
model.residual = ["standard", "ladder"]
optimizer.lr = [1e-3, 4e-3]
tokens_per_parameter = [2, 4]
[sizes.small]
model.hidden_size = 32
[sizes.large]
held_out = true
model.hidden_size = 64
optimizer.lr = 2e-3
tokens = 51_200
[[leave_out]]
size = "small"
tokens_per_parameter = 4
optimizer.lr = [4e-3, 9e-3]
"""


def planned(folder: Path, text: str) -> list[PlannedRun]:
    file = folder / "sweep.toml"
    file.write_text(text)
    return planned_runs(read_sweep(file), folder / "runs")


def test_the_product_of_the_axes_for_each_size(tmp_path: Path) -> None:
    runs = planned(tmp_path, PRODUCT)
    small = [
        f"small_residual-{kind}_lr-{rate}_tokens_per_parameter-{ratio}"
        for kind in ("standard", "ladder")
        for rate, ratio in (("0.001", 2), ("0.001", 4), ("0.004", 2))
    ]
    large = [f"large_residual-{kind}_lr-0.002" for kind in ("standard", "ladder")]
    assert [run.name for run in runs] == small + large
    assert [run.held_out for run in runs] == [False] * 6 + [True] * 2
    first = runs[0].config
    # By hand: 4 layers of q, k, v and o (4 x 32 x 32) and three of 32 x 192, two norms each; a norm.
    parameters = 4 * (4 * 32 * 32 + 3 * 32 * 192 + 2 * 32) + 32
    assert runs[0].parameters == parameters
    step = 8 * 64  # the preset's
    assert runs[0].tokens == -(-2 * parameters // step) * step
    assert runs[-1].tokens == 51_200
    assert (first.optimizer.lr, first.model.residual, first.model.num_query_groups) == (
        *(1e-3, "standard"),
        None,
    )
    assert first.output_dir == (tmp_path / "runs" / runs[0].name).absolute()
    assert first.schedule.train_steps is None


def test_any_field_is_an_axis(tmp_path: Path) -> None:
    runs = planned(
        tmp_path,
        'preset = "tiny"\n[axes]\nmodel.residual_scaling = ["none", "1/sqrt-n"]\n'
        'model.ladder_layers = ["None", [0, 2]]\nseed = [1]\n',
    )
    assert [run.name for run in runs] == [
        "residual_scaling-none_ladder_layers-None_seed-1",
        "residual_scaling-none_ladder_layers-0+2_seed-1",
        "residual_scaling-1_sqrt-n_ladder_layers-None_seed-1",
        "residual_scaling-1_sqrt-n_ladder_layers-0+2_seed-1",
    ]
    assert runs[1].config.model.ladder_layers == (0, 2)
    assert runs[0].config.schedule.train_steps == 700  # the preset's


@pytest.mark.parametrize(
    ("name", "count"),
    [("kinds", 3 * 4 * (6 + 5 + 5) + 2 * (6 + 6 + 6)), ("residual-scaling", 2 * 2 * 4 * 4)],
)
def test_the_projects_own_sweeps(name: str, count: int, tmp_path: Path) -> None:
    runs = planned_runs(read_sweep(ROOT / "benchmarks" / "sweeps" / f"{name}.toml"), tmp_path)
    assert len(runs) == count


AXES = "[axes]\nseed = [1, 2]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AXES, "nothing says which defaults to start from: give preset"),
        ('preset = "tinny"\n' + AXES, "no preset 'tinny' (did you mean tiny?)"),
        ('preset = "adapt"\n' + AXES, "preset adapt starts from a model that exists"),
        ('preset = "tiny"\n', "nothing is swept"),
        ('preset = "tiny"\n[axis]\nseed = [1]', "no entry axis: did you mean axes?"),
        ('preset = "tiny"\n[axes]\nseed = 1', "axes.seed is 1: it must be a list"),
        ('preset = "tiny"\n[axes]\nseed = [1, 1]', "axes.seed has 1 twice"),
        ('preset = "tiny"\n[axes]\nsed = [1]', "run sed-1: no field sed"),
        ('preset = "tiny"\n[axes]\nmodel.hiden = [1]', "run hiden-1: no field model.hiden"),
        ('preset = "tiny"\n[axes]\nmodel = [1]', "run model-1: no field model"),
        ('preset = "tiny"\n[axes]\noptimizer.lr = [1e-3, "x"]', "optimizer.lr is 'x'"),
        ('preset = "tiny"\n[axes]\noptimizer.lr = [1e-3, -1.0]', "optimizer.lr is -1.0"),
        ('preset = "tiny"\n[axes]\nmodel.residual = ["laddr"]', "model.residual is 'laddr'"),
        ('preset = "tiny"\n[axes]\ntokens = [100_000, 0]', "schedule.train_tokens is 0"),
        ('preset = "tiny"\n[axes]\ntokens_per_parameter = [0]', "must be a number above 0"),
        (
            'preset = "tiny"\nfields.tokens_per_parameter = 2\n[axes]\ntokens = [100000]',
            "both given",
        ),
        ('preset = "tiny"\nfields.seed = 2\n' + AXES, "seed is in [fields] and in [axes]"),
        ('preset = "tiny"\nfields.output_dir = "x"\n' + AXES, "output_dir is not to be given"),
        ('preset = "tiny"\nfields.schedule.train_tokens = 9\n' + AXES, "give tokens or tokens_per"),
        ('preset = "tiny"\n[sizes.a]\nheld_out = true\nseed = 1', "every size is held_out"),
        ('preset = "tiny"\n' + AXES + "[[leave_out]]\nsede = 1", "leave_out.sede is not swept"),
        ('preset = "tiny"\n' + AXES + "[[leave_out]]\nseed = [1, 2]", "leaves out every run"),
        (
            'preset = "tiny"\n[axes]\noptimizer.lr = [1e-3, 1.0000001e-3]',
            "two runs would have the name",
        ),
        ("x = [", "it is not TOML"),
        ("x = [" * 30_000, "it is not TOML"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        planned(tmp_path, text)
    assert message in str(refused.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=message):
            read_sweep(path)


def test_every_run_is_checked_before_the_first(tmp_path: Path, capsys) -> None:
    """The last run's layout does not fit; nothing is written."""
    file = write_sweep(
        tmp_path, "[axes]\nschedule.train_steps = [2]\nglobal_batch_size = [4, 6]\n[fields.x]\n"
    )
    text = file.read_text().replace("[fields.x]\n", "").replace("global_batch_size = 4\n", "")
    file.write_text(text)
    runs = tmp_path / "runs"
    assert cli.main(["sweep", str(file), "--output-dir", str(runs)]) == 2
    assert "run train_steps-2_global_batch_size-6: global_batch_size 6 is not a multiple" in (
        capsys.readouterr().err
    )
    assert not runs.exists()


def test_a_data_set_without_validation_is_refused(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, "[axes]\nschedule.train_steps = [2]\n", validation_documents=0)
    with pytest.raises(UserError, match="no sequence to validate on: tokenize it with a larger"):
        checked_runs(file, tmp_path / "runs")


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys) -> None:
    file = write_sweep(tmp_path, "[axes]\nseed = [1, 2]\ntokens = [256]\n")
    runs = tmp_path / "runs"
    assert cli.main(["sweep", str(file), "--output-dir", str(runs), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "seed-2_tokens-256" in said and "2 runs, 0 done; 512 tokens to train" in said
    assert not runs.exists()
