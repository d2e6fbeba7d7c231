"""A process that imports what training and benchmarks import, and then waits for the command to run.

On a GPU machine the imports take longer than many a measurement. So the process of the next part, or run,
is started while the current one still runs. It uses one thread and does not start CUDA: a second context
would take the GPU's memory and time. If an import fails, the process prints that and runs the command all
the same.
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
    "megatron_ladder",  # first: it names the cuDNN that Transformer Engine loads
    "torch",
    "transformer_engine.pytorch",
    "torch._inductor.compile_fx",
    "pretrain.bench.decoder",
    "pretrain.loop.train",
)


class Standby:
    """A python process.

    Args:
        session: the process gets a session of its own, and `end` ends all that it has started too.
        log: the file for what is printed; None: it is printed where this process prints.
        environment: variables besides this process's.
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
        """Runs `python WORDS`: a script, or -m and a module. If an import has ended the process, a new one
        runs the command."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(words).encode() + b"\n")
            self.process.stdin.close()
            return
        self.process = self._start(words, subprocess.DEVNULL)

    def end(self) -> int:
        """Kills the process, if it has not ended, and its session. Returns the exit status."""
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
    """Imports the modules of IMPORTED that are installed."""
    for name in IMPORTED:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            continue  # Transformer Engine need not be installed
        try:
            importlib.import_module(name)
        except Exception as error:  # of whatever kind: without it the script may still run
            print(f"standby: {name}: {type(error).__name__}: {error}", flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print("standby: an import has started CUDA, beside what is measured", flush=True)


def become(words: list[str]) -> None:
    """Runs `python WORDS` in this process."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = ""
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = ""  # not this file's folder: its modules could hide others
    prepare()
    line = sys.stdin.readline()
    if line:  # else the process that started this one wants nothing run
        become(json.loads(line))
