"""What all commands share: mistakes are said in a line or two, and libraries keep quiet."""

import functools
import logging
import sys
import warnings
from collections.abc import Callable

from megatron_ladder.errors import UserError
from pretrain.ranks import is_first_rank

Command = Callable[[list[str]], int]


def for_users(command: Command) -> Command:
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
