"""A script on the stand-in kernels: `python -m tests.te_stand_in.script benchmarks/precision.py OPTIONS`.

Losses and gradients mean something then, times and memory do not.
"""

import runpy
import sys

if __name__ == "__main__":  # not in processes that it spawns
    from tests.te_stand_in import kernels

    kernels.install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
