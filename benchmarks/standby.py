"""A process that has imported what GPU benchmarks import, and waits for what it is to run.

    python benchmarks/standby.py     # then, on its stdin, a line: the words after `python`, as JSON

gpu.py starts the next part's while a part runs, as starting takes longer than many a measurement. Importing
uses one thread, and CUDA is left alone: a second context would take the GPU's memory and time. What cannot
be imported is said, and the script runs all the same.
"""

import importlib
import json
import runpy
import sys
from pathlib import Path

IMPORTED = (
    "torch",
    "transformer_engine.pytorch",
    "torch._inductor.compile_fx",
    "pretrain.bench.decoder",
    "pretrain.train",
)


def prepare() -> None:
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # of whatever kind: without it the script may still run
            print(f"standby: {name}: {type(error).__name__}: {error}", flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print("standby: an import has started CUDA, beside the part that is measured", flush=True)


def become(words: list[str]) -> None:
    """Runs `python WORDS`: a script, or -m and a module."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = ""
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    prepare()
    line = sys.stdin.readline()
    if line:  # else nothing is to be run any more
        become(json.loads(line))
