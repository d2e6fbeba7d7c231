"""A process that imports what training and benchmarks import, and waits for what it is to run.

The next part's, or run's, is started while one goes on, as on a GPU machine importing takes longer than
many a measurement. It uses one thread, and leaves CUDA alone: a second context would take the GPU's memory
and time. What cannot be imported is said, and what is asked for runs all the same.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

IMPORTED = (
    "torch",
    "transformer_engine.pytorch",
    "torch._inductor.compile_fx",
    "pretrain.bench.decoder",
    "pretrain.loop.train",
)


class Standby:
    """A python process.

    Args:
        session: it has one of its own, and all that it starts ends with it.
        log: what it, and what it runs, prints; None: where this process does.
        environment: beside this process's.
    """

    def __init__(
        self,
        cwd: Path,
        *,
        session: bool,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._cwd, self._session, self._log = cwd, session, log
        self._environment = {**os.environ, **(environment or {})}
        if log is not None:
            log.write_text("")
        self.process = self._start([__file__], subprocess.PIPE)

    def go(self, words: list[str]) -> None:
        """Runs `python WORDS`, a script or -m and a module; without the imports when they have ended it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(words).encode() + b"\n")
            self.process.stdin.close()
            return
        self.process = self._start(words, subprocess.DEVNULL)

    def end(self) -> int:
        """Kills it, if it has not ended, and its session. Returns its exit status."""
        if self._session:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        return self.process.wait()

    def _start(self, words: list[str], stdin: int) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as stack:
            log: IO[str] | None = None
            if self._log is not None:
                log = stack.enter_context(self._log.open("a"))
            return subprocess.Popen(  # noqa: S603 (what the caller asks for)
                [sys.executable, *words],
                cwd=self._cwd,
                env=self._environment,
                stdin=stdin,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                start_new_session=self._session,
            )


def prepare() -> None:
    """Imports."""
    for name in IMPORTED:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            continue  # not installed: Transformer Engine, say
        try:
            importlib.import_module(name)
        except Exception as error:  # of whatever kind: without it the script may still run
            print(f"standby: {name}: {type(error).__name__}: {error}", flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print("standby: an import has started CUDA, beside what is measured", flush=True)


def become(words: list[str]) -> None:
    """Runs them as python would, in this process."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = ""
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = ""  # not this file's folder, whose names would hide others
    prepare()
    line = sys.stdin.readline()
    if line:  # else nothing is to be run any more
        become(json.loads(line))
