"""Whether memory grows while a test runs: by one bad file at once, or a little with each."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

AT_ONCE, IN_ALL = 400 << 20, 120 << 20


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Fails when the peak inside was more than 400 MB above the beginning, or 120 MB of it are kept."""
    gc.collect()
    before = _memory("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    yield
    peak = _memory("VmHWM") - before
    gc.collect()
    kept = _memory("VmRSS") - before
    assert peak < AT_ONCE, f"{peak >> 20} MB more than before, at once"
    assert kept < IN_ALL, f"{kept >> 20} MB more than before"


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) << 10
