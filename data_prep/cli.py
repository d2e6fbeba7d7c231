"""`megatron-ladder data` and `python -m data_prep`."""

import sys
from typing import Annotated

import tyro

from data_prep.clean.clean import Clean, clean
from data_prep.clean.grade import Grade, grade
from data_prep.dataset.blend import Blend, blend
from data_prep.dataset.inspect import Inspect, inspect
from data_prep.dataset.merge import Merge, merge
from data_prep.dataset.stats import Stats, stats
from data_prep.dataset.tokenize import Tokenize, tokenize
from data_prep.dataset.verify import Verify, verify
from data_prep.encode.train_tokenizer import TrainTokenizer, train_tokenizer
from data_prep.errors import UserError

Command = (
    Annotated[TrainTokenizer, tyro.conf.subcommand("train-tokenizer")]
    | Annotated[Clean, tyro.conf.subcommand("clean")]
    | Annotated[Grade, tyro.conf.subcommand("grade")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Stats, tyro.conf.subcommand("stats")]
    | Annotated[Blend, tyro.conf.subcommand("blend")]
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. 2: a user's mistake, said in a line or two."""
    try:
        options = tyro.cli(
            Command,
            args=argv,
            prog="megatron-ladder data",
            description="Text to data sets. (`megatron-ladder index` makes a training's index files.)",
        )
        match options:
            case TrainTokenizer():
                print(f"Tokenizer: {train_tokenizer(options)}")
            case Clean():
                print(clean(options))
            case Grade():
                print(grade(options))
            case Tokenize():
                print(tokenize(options))
            case Merge():
                print(merge(options))
            case Inspect():
                print(inspect(options))
            case Verify():
                print(verify(options))
            case Stats():
                print(stats(options))
            case Blend():
                print(blend(options))
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # broken_pipe.py
        raise
    except OSError as error:  # no space, no permission, a file that went away
        message = f"{error.filename or 'the operating system'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"megatron-ladder data: {message}", file=sys.stderr)
    return 2
