"""The `megatron-ladder` command: one subcommand a task."""

import difflib
import sys
from collections.abc import Callable
from functools import partial

from data_prep.broken_pipe import run

USAGE = """usage: megatron-ladder COMMAND [options]     (COMMAND --help says more)

  data      clean, grade, train-tokenizer, tokenize, merge, inspect, verify, stats, blend: text to data sets
  index     make a training's index files before it, as a job of its own
  train     pretrain a model on data sets
  import    make a run's folder of a Hugging Face model
  export    write a run's checkpoint as a Hugging Face folder
  merge     write the mean of several checkpoints of a run
  generate  continue prompts with a run or an exported folder
  serve     the same over HTTP, as OpenAI's API
  eval      perplexity, small offline tasks and lm-evaluation-harness on a run or an exported folder
  sweep     train sizes, learning rates and kinds from one file, and fit scaling laws to their losses
  report    loss curves of one or several runs, as a page and pictures; report depth: a model's layers
  bench     trace, kinds, plan: what the overlap hides, seen on local ranks and modelled for a cluster
  submit    one of these, or a chain of them, to SLURM: arrays, restarts, time limits
  status    of submitted runs: state, step, loss, what SLURM says
  logs      of a submitted run
  cancel    a submitted run, which saves a checkpoint first
  doctor    what is installed, and what is missing for GPU and FP8
"""
COMMANDS = [line.split()[0] for line in USAGE.splitlines() if line.startswith("  ")]


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status. 2: a user's mistake, said in a line or two."""
    arguments = sys.argv[1:] if argv is None else argv
    return run(lambda: _run(arguments))


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        print(f"megatron-ladder: no command {name!r}{hint}\n{USAGE}", end="", file=sys.stderr)
        return 2
    return _command(name)(argv[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    """A subcommand's function. Imported only now: data preparation must not wait for torch."""
    match name:
        case "data":
            from data_prep.cli import main as data

            return data
        case "index":
            from pretrain.commands.index import index

            return index
        case "train":
            from pretrain.commands.train import train

            return train
        case "import":
            from pretrain.commands.convert import import_

            return import_
        case "export":
            from pretrain.commands.convert import export

            return export
        case "merge":
            from pretrain.commands.convert import merge

            return merge
        case "generate":
            from pretrain.commands.inference import generate

            return generate
        case "serve":
            from pretrain.commands.inference import serve

            return serve
        case "eval":
            from pretrain.commands.evaluate import eval_

            return eval_
        case "report":
            from pretrain.commands.report import report

            return report
        case "sweep":
            from pretrain.commands.sweep import sweep

            return sweep
        case "bench":
            from pretrain.commands.bench import bench

            return bench
        case "submit":
            from pretrain.commands.submit import submit

            return submit
        case "doctor":
            from pretrain.commands.doctor import doctor

            return doctor
        case _:
            from slurm.cli import main as jobs

            return partial(jobs, name)


if __name__ == "__main__":
    sys.exit(main())
