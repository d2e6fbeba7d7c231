"""What all commands share: mistakes are reported in a line or two, and libraries log little."""

import errno
import functools
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_ladder.errors import UserError
from pretrain.ranks import RankError, is_first_rank
from pretrain.run.ends import Crash, first_cause, here, is_watched, leave
from pretrain.run.status import record_failure

Command = Callable[[list[str]], int]

# Commands that may run as one of several ranks. For the others a RANK in the environment means nothing.
ON_RANKS = ("train", "generate", "serve", "bench")

# A server or a network has failed. Other errors of files are mistakes: a path, a permission, a full disk.
_MAY_PASS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
)


def for_users(command: Command) -> Command:
    """Makes a command report mistakes of users and failures of the machine in a line or two: status 2."""
    name = command.__name__.rstrip("_")
    on_ranks = command.__name__ in ON_RANKS

    @functools.wraps(command)
    def wrapper(argv: list[str]) -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        # megatron-core logs its whole configuration, and at every import it warns of optional packages
        # that are missing. `doctor` lists these.
        logging.getLogger("megatron").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="megatron")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        if on_ranks and not is_first_rank():
            logging.getLogger().setLevel(logging.ERROR)
        try:
            return command(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except SystemExit as ended:
            if on_ranks and ended.code == 2:  # what tyro has printed
                leave(2, "")
            raise
        except Exception as error:
            return failed(name, error, on_ranks=on_ranks)

    return wrapper


def failed(
    name: str, error: Exception, *, on_ranks: bool = True, run_dir: Path | None = None
) -> int:
    """Says why a command failed, to people and to what has started it. Ranks that fail alike say it once.

    Args:
        name: the command's.
        on_ranks: this process may be one of several ranks.
        run_dir: the run's folder, where it is known.

    Returns:
        The exit status: 2 for a mistake of the user's, 1 for a failure that a new start may mend.

    Raises:
        Exception: the error itself, where nothing is known of it and no launcher waits for its sentence.
    """
    status, message = _in_words(error)
    watched = on_ranks and is_watched()
    if message is None and not watched:
        raise error
    said = f"{type(error).__name__}: {error}" if message is None else message
    if not on_ranks or leave(status, said) or isinstance(error, RankError):
        print(f"megatron-ladder {name}: {here(said) if on_ranks else said}", file=sys.stderr)
        if message is None:
            traceback.print_exception(error)
        if watched and run_dir:
            record_failure(run_dir, first_cause(here(said)))
    return status


def _in_words(error: Exception) -> tuple[int, str | None]:
    """The exit status, and a sentence for the user; None: the traceback says more."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Crash):
        return 1, str(error)
    # A ConnectionError is that of the connection to another rank, which has ended, or of a reader.
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return 1 if error.errno in _MAY_PASS else 2, of_the_system(error)
    return 1, None


def of_the_system(error: OSError) -> str:
    """A sentence: no space, no permission, a file that is gone."""
    return f"{error.filename or 'the operating system'}: {error.strerror or error}"
