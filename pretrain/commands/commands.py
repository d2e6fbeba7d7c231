"""The subcommands other than `data`: options in, exit status out.

torch and megatron-core are imported inside: `--help` and mistakes are answered without them.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_ladder.errors import UserError
from pretrain.model.queues import set_queues
from pretrain.ranks import is_first_rank
from pretrain.start.arguments import parse_train

Command = Callable[[list[str]], int]


def _for_users(command: Command) -> Command:
    """Says users' mistakes, and the machine's, in a line or two; exit status 2."""

    @functools.wraps(command)
    def wrapper(argv: list[str]) -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        # megatron-core logs its whole configuration, and warns at every import of optional packages
        # that are missing; `doctor` says that once.
        logging.getLogger("megatron").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="megatron")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        if not is_first_rank():
            logging.getLogger().setLevel(logging.ERROR)
        try:
            return command(argv)
        except UserError as error:
            message = str(error)
        except ConnectionError:  # to another rank, which has ended
            raise
        except OSError as error:  # no space, no permission, a file that went away
            message = f"{error.filename or 'the operating system'}: {error.strerror or error}"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        if is_first_rank():
            print(f"megatron-ladder {command.__name__.rstrip('_')}: {message}", file=sys.stderr)
        return 2

    return wrapper


@_for_users
def train(argv: list[str]) -> int:
    """Trains a run, or goes on with it; starts the local ranks it needs when torchrun has not."""
    if any(option.split("=")[0] == "--plan-only" for option in argv):
        from pretrain.start.plan_only import plan_only

        return plan_only(argv)
    config, asked = parse_train(argv)
    set_queues(config)  # a look for a GPU may start CUDA
    if asked is not None and asked < 1:
        raise UserError(f"--nproc-per-node {asked}: start at least one rank")
    under_torchrun = "RANK" in os.environ
    from pretrain.start.launch import launch, local_ranks

    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun else local_ranks(config, asked)
    from pretrain.start.preflight import preflight

    config, folders, plan = preflight(config, ranks)
    log = logging.getLogger(__name__)
    if not plan:
        log.info(
            "%s: already trained to step %d, nothing to do", config.output_dir, config.train_steps
        )
        return 0
    if not under_torchrun and ranks > 1:
        assert config.output_dir is not None
        return launch(argv, ranks, config.output_dir)
    log.info(plan)
    from pretrain.loop.stopping import StopSignals
    from pretrain.loop.train import train as run_training

    with StopSignals() as signals:
        try:
            return run_training(config, folders, signals)
        except ConnectionError:  # to another rank, which has ended
            raise
        except OSError as error:  # the disk's, not the user's: another start may do better
            what = f"{error.filename or 'the operating system'}: {error.strerror or error}"
            print(f"megatron-ladder train: {what}", file=sys.stderr)
            return 1


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's checkpoint as a Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """The run's folder, or one of its checkpoints."""
    output_dir: tyro.conf.Positional[Path]
    """The folder to make."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the weights; None keeps the run's."""
    max_shard_size: str = "5GB"
    """Larger models are written as several files of at most this."""
    license: str | None = None
    """For the model card: the hub's name of it, such as apache-2.0."""
    push: str | None = None
    """Then upload the folder to Hugging Face's hub as USER/NAME."""
    private: bool = False
    """With --push: the repository, if it is made, is private."""


@_for_users
def export(argv: list[str]) -> int:
    """Writes a run as a Hugging Face folder."""
    options = tyro.cli(ExportOptions, args=argv, prog="megatron-ladder export")
    if options.private and options.push is None:
        raise UserError("--private says how to --push: give --push USER/NAME too")
    from pretrain.convert.export import export_run
    from pretrain.convert.push import check_repository, push_folder

    if options.push is not None:
        check_repository(options.push)
    export_run(
        options.run,
        options.output_dir,
        options.dtype,
        options.max_shard_size,
        options.license,
    )
    if options.push is not None:
        print(push_folder(options.output_dir, options.push, private=options.private))
    return 0


@dataclass(frozen=True)
class ImportOptions:
    """Make a run's folder of a Hugging Face model: to train on, to make some layers ladder, to export."""

    model: tyro.conf.Positional[Path]
    """A folder with config.json, safetensors and a tokenizer: Llama, Mistral, Qwen2, Qwen3."""
    output_dir: tyro.conf.Positional[Path]
    """A new folder."""
    ladder_layers: str | None = None
    """Make these ladder layers, with the weights as they are: last:N, all, layers from 0 (4,5,7), or
    auto:N, the N that stand it best on --sample."""
    sample: Path | None = None
    """For auto:N: a data set made with the model's tokenizer."""


@_for_users
def import_(argv: list[str]) -> int:
    """Converts a Hugging Face model into a checkpoint."""
    options = tyro.cli(ImportOptions, args=argv, prog="megatron-ladder import")
    from pretrain.convert.import_model import import_model

    print(import_model(options.model, options.output_dir, options.ladder_layers, options.sample))
    return 0


@_for_users
def generate(argv: list[str]) -> int:
    """Prints continuations of prompts."""
    from pretrain.inference.options import GenerateOptions

    options = tyro.cli(GenerateOptions, args=argv, prog="megatron-ladder generate")
    parallel = options.parallel()
    from pretrain.convert.plain_model import is_hf_folder

    choice = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p")}
    if is_hf_folder(options.model):
        if parallel.model_parallel_size > 1 or options.batching != "dynamic":
            raise UserError(
                f"{options.model} is a folder, which transformers runs in one process: layouts and "
                "batching are a run's (`serve` takes folders at any layout)"
            )
        from megatron_ladder.hf.generate import generate_text

        texts = generate_text(
            options.model,
            list(options.prompt),
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            **choice,
        )
    else:
        from megatron_ladder.inference.engine import Sampling
        from pretrain.inference.generate import generate_from_run
        from pretrain.inference.loaded import find

        sampling = Sampling(options.max_new_tokens, **choice)
        find(options.model, parallel, options.all_reduce)  # refused before ranks start
        _start_ranks("generate", argv, parallel.model_parallel_size)
        texts = generate_from_run(
            options.model,
            options.prompt,
            parallel,
            sampling,
            batching=options.batching,
            all_reduce=options.all_reduce,
            seed=options.seed,
        )
    if is_first_rank():
        print(("\n" + "-" * 80 + "\n").join(texts))
    return 0


@_for_users
def serve(argv: list[str]) -> int:
    """Serves a model over HTTP until it is told to stop."""
    from pretrain.inference.options import ServeOptions

    options = tyro.cli(ServeOptions, args=argv, prog="megatron-ladder serve")
    from pretrain.inference.loaded import find
    from pretrain.inference.serve import listen
    from pretrain.inference.serve import serve as serve_model

    # Refused before ranks start; a rank would find the port in use by the first one.
    if options.parallel().model_parallel_size > 1 and "RANK" not in os.environ:
        find(options.model, options.parallel(), options.all_reduce)
        listen(options).close()
    _start_ranks("serve", argv, options.parallel().model_parallel_size)
    serve_model(options)
    return 0


def _start_ranks(command: str, argv: list[str], ranks: int) -> None:
    """Goes on as so many ranks, unless torchrun has started them."""
    if ranks > 1 and "RANK" not in os.environ:
        from pretrain.bench.ranks import become_torchrun

        become_torchrun(ranks, "--module", "pretrain.cli", command, *argv)


@_for_users
def eval_(argv: list[str]) -> int:
    """Measures a model."""
    from pretrain.evaluation.options import EvalOptions

    options = tyro.cli(EvalOptions, args=argv, prog="megatron-ladder eval")
    from pretrain.evaluation.command import evaluate

    evaluate(options)
    return 0


@dataclass(frozen=True)
class ReportOptions:
    """Draw one or several runs side by side: an HTML page and PNGs.

    `report depth MODEL` looks into the layers of a model instead (`report depth --help`); a run in a
    folder of that name is `./depth`.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; the first is the one others are compared with."""
    output_dir: Path | None = None
    """Where to write; None: `report` in the first run's folder."""


@_for_users
def report(argv: list[str]) -> int:
    """Writes the report of runs, or of the layers of a model."""
    if argv[:1] == ["depth"]:
        from pretrain.depth.command import DepthOptions, main_depth

        return main_depth(
            tyro.cli(DepthOptions, args=argv[1:], prog="megatron-ladder report depth")
        )
    options = tyro.cli(ReportOptions, args=argv, prog="megatron-ladder report")
    from pretrain.report.report import write_report

    print(f"Report: {write_report(list(options.runs), options.output_dir)}")
    return 0


BENCH_USAGE = """usage: megatron-ladder bench trace|plan [options]     (--help says more)

  trace  one step on local ranks as timelines: which collectives fly while what computes
  plan   step time, memory and bubble of a model's layouts on a cluster, ranked (modelled)
"""


@_for_users
def bench(argv: list[str]) -> int:
    """Measures or models the overlap."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    prog = f"megatron-ladder bench {name}"
    if name == "trace":
        from pretrain.bench.trace import TraceOptions, main_trace

        # As the options of `train`: refused before ranks start.
        main_trace(tyro.cli(TraceOptions, args=rest, prog=prog), rest)
        return 0
    if name == "plan":
        from pretrain.plan.table import PlanOptions, main_plan

        return main_plan(tyro.cli(PlanOptions, args=rest, prog=prog))
    print(BENCH_USAGE, end="", file=sys.stdout if name in ("-h", "--help") else sys.stderr)
    return 0 if name in ("-h", "--help") else 2


@dataclass(frozen=True)
class DoctorOptions:
    """Say what is installed, and what is missing for GPU and FP8 use."""


@_for_users
def doctor(argv: list[str]) -> int:
    """Prints what this machine can do."""
    tyro.cli(DoctorOptions, args=argv, prog="megatron-ladder doctor")
    from pretrain.start.doctor import run_doctor

    return run_doctor()
