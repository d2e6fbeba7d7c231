"""A script on the stand-in kernels: `python -m tests.te_stand_in.script benchmarks/precision.py OPTIONS`.

Losses and gradients mean something then, times and memory do not.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":  # not in processes that it spawns
    from tests.te_stand_in import kernels

    kernels.install()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
