"""The figures of /metrics, in Prometheus' text format."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_ladder.inference.cache import BLOCK_TOKENS
from megatron_ladder.inference.engine import DynamicEngine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)


class Metrics:
    """The figures of one server, in a Prometheus registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "megatron_ladder", "registry": self._registry}
        self.requests = Counter(
            "requests", "HTTP requests, by status.", ["path", "status"], **common
        )
        self.tokens = Counter("generated_tokens", "Tokens generated.", **common)
        self.running = Gauge("requests_running", "Requests that the engine works on.", **common)
        self.waiting = Gauge("requests_waiting", "Requests that wait to be started.", **common)
        self.free = Gauge("cache_free_tokens", "Free tokens in the key-value cache.", **common)
        self.first_token = Histogram(
            "first_token_seconds",
            "Time from a request to its first token.",
            buckets=_SECONDS,
            **common,
        )
        self.duration = Histogram(
            "request_seconds", "Time from a request to its end.", buckets=_SECONDS, **common
        )

    def look_at(self, engine: DynamicEngine, new_tokens: int) -> None:
        """Reads the engine's figures; call it after every step.

        Args:
            new_tokens: the tokens that the step has generated.
        """
        self.tokens.inc(new_tokens)
        self.running.set(engine.num_running)
        self.waiting.set(engine.num_waiting)
        self.free.set(engine.free_blocks * BLOCK_TOKENS)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
