"""The command line of `train`.

The user gives a preset, a saved configuration, or both: the configuration then replaces fields of the
preset. For a branch the trunk's options take the preset's place. All other options change single fields of
the result.
"""

import argparse
import difflib
from dataclasses import replace
from pathlib import Path

import tyro

from megatron_ladder.config import PARALLEL, Residual
from megatron_ladder.errors import UserError
from pretrain.config.past import Past
from pretrain.config.places import found_from, run_of, with_names
from pretrain.config.presets import OF_A_MODEL, PRESETS
from pretrain.config.train import TrainConfig, load_config
from pretrain.ranks import is_first_rank
from pretrain.start.ladder_layers import is_auto, with_ladder_layers
from pretrain.start.usable import check_usable


def parse_train(argv: list[str]) -> tuple[TrainConfig, int | None]:
    """The configuration that `argv` asks for, and the number of local ranks (None: not given).

    Raises:
        UserError: the preset or the saved configuration does not exist, or values do not fit.
        SystemExit: `--help` was given, or an option does not exist (tyro prints it, with similar names).
    """
    # These options decide the defaults. They are read first; tyro then parses all the others.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--nproc-per-node", type=int)
    first.add_argument("--init-from", type=Path)
    first.add_argument("--branch-from", type=Path)
    first.add_argument("--ladder-layers")
    chosen, options = first.parse_known_args(argv)
    if chosen.branch_from:
        default = _of_branch(chosen, options)
    elif chosen.config and not chosen.preset:
        default = load_config(chosen.config)
    else:
        name = chosen.preset or ("debug" if {"-h", "--help"} & set(options) else "")
        if not name:
            raise UserError(
                "nothing says which defaults to start from: give --preset NAME "
                f"({', '.join(PRESETS)}) or --config FILE"
            )
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"no preset {name!r}{hint}: choose one of {', '.join(PRESETS)}")
        default = PRESETS[name]()
        if chosen.config:  # some of the fields, such as those that `data blend` writes
            default = load_config(chosen.config, onto=default)
    if chosen.config and not chosen.branch_from and (run := run_of(chosen.config)):
        default = found_from(run, default)
    default = replace(default, past=Past())  # what the steps so far had is read from the run
    begun: TrainConfig | None = None
    if chosen.init_from:
        # Imported here because it imports torch, which --help does not need.
        from pretrain.start.initial import going_on, starting_from

        run_dir = _output_dir(options) or default.output_dir
        begun = going_on(default, chosen.init_from, run_dir)
    if begun:
        default = begun
    elif chosen.init_from:
        # --ladder-layers chooses among the layers of the original model, before `import` changed any.
        unmodified = chosen.preset == "adapt-control" or chosen.ladder_layers is not None
        seq_length = default.data.seq_length
        default = starting_from(default, chosen.init_from, unmodified=unmodified)
        if chosen.preset == "extend":
            from pretrain.start.extend import with_longer_context

            default = with_longer_context(default, seq_length, options)
    elif chosen.preset in OF_A_MODEL and not {"-h", "--help"} & set(options):
        raise UserError(
            f"--preset {chosen.preset} starts from the weights of an existing model: give "
            "--init-from RUN, where RUN is a run or a folder that `import` wrote"
        )
    if chosen.ladder_layers and not (begun and is_auto(chosen.ladder_layers)):
        model = default.model
        # A preset has no weights yet, so its residual kind may change; a run that has begun has its layers.
        if begun or not chosen.init_from:
            fresh: Residual = "parallel" if model.residual in PARALLEL else "standard"
            model = replace(model, residual=fresh, ladder_layers=None)
        model = with_ladder_layers(model, chosen.ladder_layers, chosen.init_from)
        default = replace(default, model=model)
    config = tyro.cli(
        TrainConfig,
        default=default,
        args=options,
        prog="megatron-ladder train [--preset NAME] [--config FILE] [--nproc-per-node N] "
        "[--ladder-layers LAYERS] [--plan-only [GPU]]",
        description=_description(),
        console_outputs=is_first_rank(),
    )
    if chosen.nproc_per_node is not None and chosen.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node {chosen.nproc_per_node}: start at least one rank")
    check_usable(config)
    return with_names(config), chosen.nproc_per_node


def _of_branch(chosen: argparse.Namespace, options: list[str]) -> TrainConfig:
    """The defaults of a branch. Where it has begun, they are in its own folder."""
    for name in ("preset", "init_from", "ladder_layers"):
        if getattr(chosen, name) is not None:
            raise UserError(
                f"--branch-from takes model and options of the run that it branches off: leave "
                f"--{name.replace('_', '-')} out"
            )
    # Imported here because it imports more than --help needs.
    from pretrain.start.going_on.branch import options_of_trunk

    default = options_of_trunk(chosen.branch_from, _output_dir(options))
    return load_config(chosen.config, onto=default) if chosen.config else default


def _output_dir(options: list[str]) -> Path | None:
    """The run's folder, where it decides other options' defaults."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--output-dir", "--output_dir", type=Path)
    return own.parse_known_args(options)[0].output_dir


def _description() -> str:
    presets = "\n".join(
        f"  {name:13} {(f.__doc__ or '').splitlines()[0]}" for name, f in PRESETS.items()
    )
    return (
        f"Train a model. Defaults below are those of the chosen preset:\n\n{presets}\n\n"
        "LAYERS make layers of a standard or parallel model ladder layers: last:N, all, layers from 0 "
        "(4,5,7), or auto:N, the N that stand it best (`report depth` measures them).\n\n"
        "--plan-only trains nothing: it says whether the run fits in the memory of the GPU here, or of one "
        "by name, on N ranks in all (--nproc-per-node)."
    )
