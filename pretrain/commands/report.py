"""`megatron-ladder report`: the report of runs, and of the layers of a model."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from pretrain.commands.users import for_users


@dataclass(frozen=True)
class ReportOptions:
    """Draw one or several runs side by side: an HTML page and PNGs.

    `report depth MODEL` looks into the layers of a model instead (`report depth --help`); a run in a
    folder of that name is `./depth`. Of a sweep's folder the report is the sweep's.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; the first is the one others are compared with. Or one folder of `sweep`."""
    output_dir: Path | None = None
    """Where to write; None: `report` in the first run's folder."""


@for_users
def report(argv: list[str]) -> int:
    """Writes the report of runs, or of the layers of a model."""
    if argv[:1] == ["depth"]:
        from pretrain.depth.command import DepthOptions, main_depth

        return main_depth(
            tyro.cli(DepthOptions, args=argv[1:], prog="megatron-ladder report depth")
        )
    options = tyro.cli(ReportOptions, args=argv, prog="megatron-ladder report")
    from pretrain.sweep.folder import is_sweep

    if len(options.runs) == 1 and is_sweep(options.runs[0]):
        from pretrain.sweep.report import write_sweep_report

        page, text = write_sweep_report(options.runs[0], options.output_dir)
        print(f"{text}\n\nReport: {page}")
        return 0
    from pretrain.report.report import write_report

    print(f"Report: {write_report(list(options.runs), options.output_dir)}")
    return 0
