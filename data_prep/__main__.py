"""`python -m data_prep`, for job arrays."""

import sys

if __name__ == "__main__":  # processes that tokenize import this file too, and need no command line
    from data_prep.broken_pipe import run
    from data_prep.cli import main

    sys.exit(run(main))
