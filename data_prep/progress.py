"""How far a long reading is: a bar in a terminal, a line now and then in a log."""

import sys
import time

from tqdm import tqdm

LOG_EVERY_S = 10.0


class Progress:
    """Counts bytes read of a known total, on stderr."""

    def __init__(self, total_bytes: int, what: str) -> None:
        self._total, self._what = max(total_bytes, 1), what
        self._done = 0
        self._started = self._logged = time.monotonic()
        self._bar = (
            tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def add(self, count: int) -> None:
        self._done += count
        if self._bar:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            print(
                f"{self._what}: {100 * self._done / self._total:.0f} % of {self._total / 1e6:.0f} MB, "
                f"{rate / 1e6:.1f} MB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> float:
        """Seconds since the start."""
        if self._bar:
            self._bar.close()
        return time.monotonic() - self._started
