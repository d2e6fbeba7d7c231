"""`megatron-ladder sweep`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from pretrain.commands.train import train
from pretrain.commands.users import for_users


@dataclass(frozen=True)
class SweepOptions:
    """Train the runs that a file says, one after another, and fit scaling laws to their losses.

    Runs that are done are skipped, and one that was cut off is resumed. `submit ... sweep FILE` makes jobs
    of them instead, and `report DIR` writes the page of what is trained so far.
    """

    file: tyro.conf.Positional[Path]
    """A TOML file: docs/guides/sweep.md."""
    output_dir: Path
    """The sweep's folder, with a folder for each run."""
    dry_run: bool = False
    """Check every run, print the table of runs, tokens and estimated time, and train nothing."""


@for_users
def sweep(argv: list[str]) -> int:
    """Trains the runs of a sweep."""
    options = tyro.cli(
        SweepOptions,
        args=argv,
        prog="megatron-ladder sweep",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    from pretrain.sweep.checks import checked_runs, write_plan
    from pretrain.sweep.fits.law import need_scipy
    from pretrain.sweep.table import table

    runs = checked_runs(options.file, options.output_dir)
    print(table(runs), flush=True)
    if options.dry_run:
        return 0
    from pretrain.sweep.in_turn import STOPPED, train_in_turn
    from pretrain.sweep.report import write_sweep_report

    need_scipy()  # before hours of training
    write_plan(options.file, options.output_dir)
    status = train_in_turn(runs, options.output_dir, train)
    if status != STOPPED:
        page, text = write_sweep_report(options.output_dir)
        print(f"\n{text}\n\nReport: {page}")
    return status
