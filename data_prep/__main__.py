"""`python -m data_prep`, for job arrays."""

import sys

if __name__ == "__main__":  # not in the processes of the pool, which import this file too
    from data_prep.cli import main

    sys.exit(main())
