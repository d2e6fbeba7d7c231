"""Progress of a long reading: a bar in a terminal, a line every ten seconds in a log."""

import sys
import time

from tqdm import tqdm

LOG_EVERY_S = 10.0


class Progress:
    """Shows on stderr how many bytes of a known total are read, and how many tokens they gave."""

    def __init__(self, total_bytes: int, what: str) -> None:
        self._total, self._what = max(total_bytes, 1), what
        self._done = self._tokens = 0
        self._started = self._logged = time.monotonic()
        self._bar = (
            tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def add(self, count: int) -> None:
        """`count` more bytes are read."""
        self.reached(self._done + count)

    def reached(self, count: int, tokens: int = 0) -> None:
        """`count` bytes are read in all, and gave `tokens` tokens."""
        more, self._done, self._tokens = count - self._done, count, tokens
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if self._bar:
            self._bar.update(more)
            if tokens:
                self._bar.set_postfix_str(f"{tokens / seconds / 1e6:.2f}M tokens/s", refresh=False)
            return
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            rate = self._done / seconds
            left = max(0, self._total - self._done) / max(rate, 1e-9)
            to_go = f", {left:.0f} s left" if self._done else ""
            per_s = f", {tokens / seconds / 1e6:.2f}M tokens/s" if tokens else ""
            print(
                f"{self._what}: {100 * self._done / self._total:.0f} % of {self._total / 1e6:.0f} MB, "
                f"{rate / 1e6:.1f} MB/s{per_s}{to_go}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> float:
        """Ends the bar; returns the seconds since the start."""
        if self._bar:
            self._bar.close()
        return time.monotonic() - self._started
