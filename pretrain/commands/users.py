"""What all commands share: mistakes are reported in a line or two, and libraries log little."""

import functools
import logging
import sys
import warnings
from collections.abc import Callable

from megatron_ladder.errors import UserError
from pretrain.ranks import RankError, is_first_rank

Command = Callable[[list[str]], int]

# Commands that may run as one of several ranks. For the others a RANK in the environment means nothing.
ON_RANKS = ("train", "generate", "serve", "bench")


def for_users(command: Command) -> Command:
    """Makes a command report mistakes of users and failures of the machine in a line or two: status 2."""

    @functools.wraps(command)
    def wrapper(argv: list[str]) -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        # megatron-core logs its whole configuration, and at every import it warns of optional packages
        # that are missing. `doctor` lists these.
        logging.getLogger("megatron").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="megatron")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        says = is_first_rank() or command.__name__ not in ON_RANKS
        if not says:
            logging.getLogger().setLevel(logging.ERROR)
        try:
            return command(argv)
        except RankError as error:
            message, says = str(error), True
        except UserError as error:
            message = str(error)
        except ConnectionError:  # the connection to another rank, which has ended
            raise
        except OSError as error:  # no space, no permission, a file that is gone
            message = f"{error.filename or 'the operating system'}: {error.strerror or error}"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        if says:
            print(f"megatron-ladder {command.__name__.rstrip('_')}: {message}", file=sys.stderr)
        return 2

    return wrapper
