"""`python -m data_prep`, for job arrays."""

import sys

from data_prep.cli import main

if __name__ == "__main__":
    sys.exit(main())
