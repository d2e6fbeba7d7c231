"""What all commands share: mistakes are reported in a line or two, and libraries log little."""

import functools
import logging
import sys
import warnings
from collections.abc import Callable

from megatron_ladder.errors import UserError
from pretrain.ranks import is_first_rank

Command = Callable[[list[str]], int]


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
        if not is_first_rank():
            logging.getLogger().setLevel(logging.ERROR)
        try:
            return command(argv)
        except UserError as error:
            message = str(error)
        except ConnectionError:  # the connection to another rank, which has ended
            raise
        except OSError as error:  # no space, no permission, a file that is gone
            message = f"{error.filename or 'the operating system'}: {error.strerror or error}"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        if is_first_rank():
            print(f"megatron-ladder {command.__name__.rstrip('_')}: {message}", file=sys.stderr)
        return 2

    return wrapper
