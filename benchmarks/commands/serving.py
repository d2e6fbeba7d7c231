"""What are the latencies of `megatron-ladder serve` under many clients, and does it leak memory?

    python benchmarks/commands/serving.py MODEL --json FILE --picture FILE

Each client uses OpenAI's package and streams one completion after another. Some clients leave in the middle
of an answer, some send requests that are wrong. Every answer that is not the expected one counts as an
error. The server's memory and the free tokens of its cache are read every few seconds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `measuring` is

from measuring import facts, pictures
from measuring.options import parser_of

MAX_REQUESTS = 16
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "with"]
LOOK_S = 5.0
GROWTH = 1.02  # of memory from the first half to the second: more is a leak
# Wrong requests, and the status that each is answered with.
BAD: list[tuple[dict[str, Any] | bytes, int]] = [
    (b"{", 400),
    (b"[1, 2]", 400),
    ({"model": "nobody"}, 404),
    ({"prompt": ""}, 400),
    ({"prompt": "word " * 100_000}, 400),
    ({"max_tokens": -3}, 400),
    ({"temperature": "hot"}, 400),
    (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', 413),
]


class Clients:
    """All clients, and the times and errors that they have seen.

    Args:
        address: the server's.
        model: its name on the server.
        seed: decides what each client sends.
    """

    def __init__(self, address: str, model: str, seed: int) -> None:
        self._address, self._model, self._seed = address, model, seed
        self.first_token_s: list[float] = []
        self.token_s: list[float] = []
        """From one token to the next, a mean for each answer."""
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []

    async def run(self, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        client = openai.AsyncOpenAI(
            base_url=f"{self._address}/v1", api_key="none", max_retries=0, timeout=120
        )
        async with client, httpx.AsyncClient(timeout=120, limits=limits) as http:
            await asyncio.gather(
                *(
                    self._client(client, http, random.Random(self._seed + i), end)  # noqa: S311
                    for i in range(count)
                )
            )

    async def _client(
        self, client: openai.AsyncOpenAI, http: httpx.AsyncClient, draw: random.Random, end: float
    ) -> None:
        while time.monotonic() < end:
            kind = draw.random()
            try:
                if kind < 0.05:
                    await self._send_bad(http, draw)
                else:
                    await self._stream(client, draw, goes_away=kind < 0.2)
            except Exception as error:  # of whatever kind
                self.errors.append(f"{type(error).__name__}: {error}"[:300])

    async def _stream(
        self, client: openai.AsyncOpenAI, draw: random.Random, *, goes_away: bool
    ) -> None:
        asked = draw.randrange(8, 65)
        began = time.monotonic()
        times: list[float] = []
        stream = await client.completions.create(
            model=self._model,
            prompt=" ".join(draw.choices(WORDS, k=draw.randrange(3, 60))),
            max_tokens=asked,
            temperature=draw.choice((0, 0.8)),
            stream=True,
            stream_options={"include_usage": True},
        )
        leave_after = draw.randrange(1, 6) if goes_away else None
        usage = None
        async with stream:
            async for event in stream:
                times.append(time.monotonic())
                usage = event.usage or usage
                if leave_after is not None and len(times) >= leave_after:
                    self.done["went away"] += 1
                    return
        assert usage is not None and usage.completion_tokens <= asked, "a stream that was cut off"
        self.done["streamed"] += 1
        self.first_token_s.append(times[0] - began)
        if usage.completion_tokens > 1:
            self.token_s.append((times[-1] - times[0]) / (usage.completion_tokens - 1))

    async def _send_bad(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        content, status = draw.choice(BAD)
        if isinstance(content, dict):
            body = {"model": self._model, "prompt": "a", "max_tokens": 4, **content}
            content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        address = f"{self._address}/v1/completions"
        try:
            response = await http.post(address, content=content, headers=headers)
        except httpx.WriteError:  # refused before all of it was sent
            assert status == 413
        else:
            assert response.status_code == status, f"{response.status_code} instead of {status}"
        self.done["refused"] += 1


@contextlib.asynccontextmanager
async def serving(arguments: argparse.Namespace) -> AsyncIterator[tuple[str, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pretrain.cli", "serve", str(arguments.model)]
    command += ["--port", str(port)]
    command += ["--max-requests", str(MAX_REQUESTS), "--max-waiting", str(arguments.clients)]
    process = subprocess.Popen(  # noqa: S603 (a list, no shell)
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server does not start"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            await asyncio.sleep(0.5)
        yield address, psutil.Process(process.pid)
        process.terminate()
        await asyncio.to_thread(process.wait, 60)
        assert process.returncode == 0, f"the server ended with {process.returncode}"
    finally:
        process.kill()


async def figures(address: str) -> dict[str, float]:
    async with httpx.AsyncClient(timeout=60) as http:
        text = (await http.get(f"{address}/metrics")).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("megatron_ladder_"): float(value) for name, value in lines}


async def watch(address: str, process: psutil.Process, began: float) -> list[dict[str, float]]:
    """Reads the server's figures until it is cancelled."""
    seen: list[dict[str, float]] = []
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            now = await figures(address)
            look = {"s": time.monotonic() - began, "rss_mb": process.memory_info().rss / 1e6}
            names = ("cache_free_tokens", "requests_running", "requests_waiting")
            seen.append({**look, **{name: now[name] for name in names}})
            await asyncio.sleep(LOOK_S)
    return seen


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"p{p}": round(cuts[p - 1], 4) for p in (50, 90, 99)}


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    async with serving(arguments) as (address, process):
        model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        room = (await figures(address))["cache_free_tokens"]
        clients = Clients(address, model, arguments.seed)
        began = time.monotonic()
        watching = asyncio.create_task(watch(address, process, began))
        await clients.run(arguments.clients, arguments.seconds)
        seconds = time.monotonic() - began
        watching.cancel()
        seen = await watching
        await asyncio.sleep(2)
        after = await figures(address)
    # In the first fifth the caches of Python and of the allocator fill.
    settled = [look["rss_mb"] for look in seen if look["s"] > seconds / 5]
    half = len(settled) // 2
    return {
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "done": dict(clients.done),
        "errors": clients.errors,
        "first_token_s": percentiles(clients.first_token_s),
        "token_s": percentiles(clients.token_s),
        "tokens_per_second": round(after["generated_tokens_total"] / seconds, 1),
        "rss_mb": {
            "first half": round(statistics.median(settled[:half]), 1),
            "second half": round(statistics.median(settled[half:]), 1),
        },
        "cache_free_tokens": {"before": room, "after": after["cache_free_tokens"]},
        "left": {"running": after["requests_running"], "waiting": after["requests_waiting"]},
        "looks": seen,
    }


def draw(path: Path, looks: list[dict[str, float]]) -> None:
    """What must not grow, against time."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    for panel, name, label in zip(
        panels, ("rss_mb", "cache_free_tokens"), ("memory, MB", "free cache, tokens"), strict=True
    ):
        panel.plot([look["s"] for look in looks], [look[name] for look in looks])
        panel.set_ylim(bottom=0)
        panel.set_ylabel(label)
        pictures.plain(panel)
    panels[-1].set_xlabel("seconds")
    pictures.save(path, figure)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", type=Path, help="a run or an exported folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments))
    print(json.dumps({name: v for name, v in results.items() if name != "looks"}, indent=1))
    header = facts.header("cpu", arguments, "openai", "uvicorn")
    facts.write(arguments.json, {**header, **results})
    if arguments.picture:
        draw(arguments.picture, results["looks"])
    room, memory = results["cache_free_tokens"], results["rss_mb"]
    is_leaking = room["before"] != room["after"] or any(results["left"].values())
    is_growing = memory["second half"] > GROWTH * memory["first half"]
    sys.exit(1 if results["errors"] or is_leaking or is_growing else 0)


if __name__ == "__main__":
    main()
