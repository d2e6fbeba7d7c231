"""`megatron-ladder submit`: checks the commands of a chain, and passes them to `slurm`.

So a mistake is refused now, and not by a job that has waited for its nodes for a day. Files that earlier
jobs of the chain will write cannot be checked yet; for later jobs only the options are checked.
"""

import os
import sys
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from data_prep.cli import Command as DataCommand
from megatron_ladder.config import check_layout
from megatron_ladder.errors import UserError
from pretrain.commands.convert import ExportOptions, ImportOptions, MergeOptions
from pretrain.commands.index import parse_index
from pretrain.commands.report import ReportOptions
from pretrain.commands.sweep import SweepOptions
from pretrain.commands.users import for_users
from pretrain.config.train import TrainConfig
from pretrain.data.checks import open_data, with_vocab_size
from pretrain.start.arguments import parse_train
from slurm.cli import Submit, parse_submit
from slurm.errors import UserError as SlurmError
from slurm.jobs.folders import job_folders
from slurm.submit.chain import Step, take_tasks
from slurm.submit.placement import Placement, from_environment, placed
from slurm.submit.profile import Profile, load_profile
from slurm.submit.render import Resources
from slurm.submit.submit import dry_run
from slurm.submit.submit import submit as submit_chain
from slurm.watch.status import facts_of

if TYPE_CHECKING:  # because the command line starts without torch
    from pretrain.sweep.checks import CheckedRun


@for_users
def submit(argv: list[str]) -> int:
    """Submits a chain of commands."""
    try:
        options, commands = parse_submit(argv)
        profile, notes = _profile(options)
        resources = Resources(
            options.nodes,
            options.ranks_per_node or profile.gpus_per_node or 1,
            options.time,
            options.spare_nodes,
            options.signal_lead,
        )
        ranks = resources.nodes * resources.ranks_per_node
        sweep = _sweep(commands, ranks)
        if options.estimate:
            configs = [run.config for run in sweep.runs] if sweep else _trainings(commands)
            print("\n\n".join(_estimates(configs, ranks, options, resources.limit_s)))
            return 0
        if sweep:
            chains = sweep.chains(one_after_another=profile.launcher == "local")
        else:
            chains = [
                [
                    _step(command, ranks, is_first=i == 0 and options.after is None)
                    for i, command in enumerate(commands)
                ]
            ]
        for note in notes:
            print(f"megatron-ladder submit: {note}", file=sys.stderr)
        if sweep and not options.dry_run:
            sweep.write()
        for steps in chains:
            if options.dry_run:
                dry_run(steps, profile, resources, options.after)
            else:
                print(submit_chain(steps, profile, resources, options.profile, options.after))
        return 0
    except SlurmError as error:
        raise UserError(str(error)) from error


def _profile(options: Submit) -> tuple[Profile, list[str]]:
    """The profile with submit's own options and what the environment says; lines about the latter."""
    profile = load_profile(options.profile)
    asked = {field.name: getattr(options, field.name) for field in fields(Placement)}
    if profile.launcher == "local":
        given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value]
        if given:
            raise UserError(f'{", ".join(given)}: SLURM\'s, and the profile has launcher = "local"')
        return profile, []
    return from_environment(placed(profile, asked), os.environ)


@dataclass(frozen=True)
class _Sweep:
    """A sweep to submit: the runs that are neither done nor in the queue."""

    file: Path
    folder: Path
    runs: list["CheckedRun"]

    def chains(self, *, one_after_another: bool) -> list[list[Step]]:
        """A job for each run: at the same time on a cluster, or one after another on this machine."""
        from pretrain.sweep.folder import train_command

        steps = [
            Step(tuple(train_command(self.folder, run.plan.name)), self.folder / run.plan.name)
            for run in self.runs
        ]
        return [steps] if one_after_another else [[step] for step in steps]

    def write(self) -> None:
        """Writes the runs' configurations, which the jobs read."""
        from pretrain.sweep.checks import write_plan

        write_plan(self.file, self.folder)


def _sweep(commands: list[list[str]], ranks: int) -> _Sweep | None:
    """The sweep that is to be submitted; None: another command is.

    Raises:
        UserError: there are other commands too, a run is refused, or none is left.
    """
    if all(command[0] != "sweep" for command in commands):
        return None
    if len(commands) > 1:
        raise UserError(
            "a sweep makes a job of each run, so no command of a chain can come before or after it: submit "
            "it alone. `megatron-ladder report DIR` writes its page"
        )
    from pretrain.sweep.checks import checked_runs, read_plan

    asked = tyro.cli(SweepOptions, args=commands[0][1:], prog="megatron-ladder sweep")
    if asked.dry_run:
        raise UserError("--dry-run of `sweep` trains nothing: give submit's own, before `sweep`")
    folder = asked.output_dir.absolute()
    plan = read_plan(asked.file, folder)
    queued = {run.name for run in plan if _is_queued(folder / run.name)}
    runs = checked_runs(asked.file, folder, ranks, left_out=queued)
    left = [run for run in runs if run.state != "done"]
    print(
        f"{len(plan)} runs: {len(runs) - len(left)} are done, {len(queued)} in the queue",
        file=sys.stderr,
    )
    if not left:
        raise UserError(f"nothing to submit: every run of {asked.file} is done or in the queue")
    return _Sweep(asked.file, folder, left)


def _is_queued(run: Path) -> bool:
    """Whether a job of this run waits or runs. Where SLURM cannot be asked, it may."""
    return any(
        facts is None or any(fact.is_active for fact in facts)
        for facts in facts_of(job_folders(run)).values()
    )


def _trainings(commands: list[list[str]]) -> list[TrainConfig]:
    """The configurations of a chain's trainings, with the vocabulary sizes of their data."""
    trainings = [command[1:] for command in commands if command[0] == "train"]
    return [with_vocab_size(parse_train(arguments)[0]) for arguments in trainings]


def _estimates(
    configs: list[TrainConfig], ranks: int, options: Submit, limit_s: int | None
) -> list[str]:
    """A text for each training, with the estimate of what it will take."""
    from pretrain.plan.estimate import estimate, format_estimate, hardware_of

    hardware = hardware_of(options.device)
    texts = []
    for config in configs:
        found = estimate(
            config,
            ranks=ranks,
            hardware=hardware,
            mfu=options.mfu,
            time_limit_s=limit_s,
            lead_s=options.signal_lead,
        )
        texts.append(format_estimate(found))
    if not texts:
        raise UserError("--estimate needs a `train` command: only trainings are estimated")
    return texts


def _step(command: list[str], ranks: int, *, is_first: bool) -> Step:
    """A step of the chain. The command's arguments are checked as the command itself would check them."""
    command, tasks = take_tasks(command)
    name, arguments = command[0], command[1:]
    if {"-h", "--help"} & set(arguments):
        raise UserError(
            f"`submit` cannot submit --help: run `megatron-ladder {name} --help` instead"
        )
    output: Any
    if name == "train":
        output = _check_train(arguments, ranks, is_first=is_first)
    elif name == "index":
        output = _check_index(arguments, is_first=is_first)
    elif name == "data":
        parsed: Any = tyro.cli(DataCommand, args=arguments, prog="megatron-ladder data")
        output = getattr(parsed, "output_dir", None) or getattr(parsed, "output", None)
        output = output or parsed.data  # commands that only read data sets have no output folder
        output = output[0] if isinstance(output, tuple) else output
    elif name == "merge":
        merging = tyro.cli(MergeOptions, args=arguments, prog="megatron-ladder merge")
        output = merging.output_dir or merging.run
    elif name in ("export", "import"):
        options: Any = ExportOptions if name == "export" else ImportOptions
        output = tyro.cli(options, args=arguments, prog=f"megatron-ladder {name}").output_dir
    elif name == "report" and arguments[:1] != ["depth"]:
        output = tyro.cli(ReportOptions, args=arguments, prog="megatron-ladder report").runs[0]
    elif name == "eval":
        from pretrain.evaluation.options import EvalOptions

        output = tyro.cli(EvalOptions, args=arguments, prog="megatron-ladder eval").model
    else:
        raise UserError(
            f"submit {name}: submit takes train, index, data, import, export, merge, eval, report and sweep"
        )
    return Step(tuple(command), Path(output).absolute(), tasks)


def _check_index(arguments: list[str], *, is_first: bool) -> Path:
    """Checks the arguments of `index`, and the data if they are there; returns the run's folder."""
    config, _, _ = parse_index(arguments)
    if is_first:
        open_data(config)
    if config.output_dir is None:
        raise UserError("no --output-dir: give the folder of the run that will train")
    return config.output_dir


def _check_train(arguments: list[str], ranks: int, *, is_first: bool) -> Path:
    """Checks the arguments of `train`, and returns the run's folder.

    Args:
        ranks: the number of ranks in all.
        is_first: the job can start at once, so its data can be checked too.

    Raises:
        UserError: the job would be refused when it starts.
    """
    config, asked = parse_train(arguments)
    if asked is not None:
        raise UserError(
            "--nproc-per-node is not for `submit`: give submit's own options --nodes and --ranks-per-node"
        )
    if config.output_dir is None:
        raise UserError("no --output-dir: give the folder for the run's checkpoints and metrics")
    # The machine that submits may have no GPU and no Transformer Engine. The machines that train have them.
    is_here = config.transformer_impl != "transformer_engine" or find_spec("transformer_engine")
    if is_first and is_here:
        from pretrain.start.preflight import preflight

        checked, folders, _ = preflight(config, ranks)
        if config.watch.is_on:
            from pretrain.evaluation.beside import check_watch

            check_watch(checked, folders)
    else:
        from megatron_ladder.layers.attention.choice import check_attention

        # Any vocabulary size will do here: it is padded to a size that the layout divides.
        model = replace(config.model, vocab_size=config.model.vocab_size or 1)
        check_layout(model, config.parallel)
        check_attention(
            *(config.attention, "transformer_engine"), documents_divided=config.documents_divided
        )
        config.check_batches(config.parallel.data_parallel_size(ranks))
    return config.output_dir
