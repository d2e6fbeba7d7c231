"""The options of `generate` and `serve`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_ladder.config import AllReduce, ParallelConfig
from megatron_ladder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Layout:
    tensor_model_parallel_size: int = 1
    """The layout to run at, whatever the model was trained at."""
    pipeline_model_parallel_size: int = 1
    all_reduce: AllReduce = "exact"
    """Of a sub-module's outputs over the tensor-parallel ranks. int8: a quarter to a half of the bytes on
    the link, and other tokens now and then; for links that are slow."""

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(_Layout):
    """Continue prompts with a run's newest checkpoint, or with an exported folder."""

    model: tyro.conf.Positional[Path]
    """A run, one of its checkpoints, or a folder written by `megatron-ladder export`."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(name="prompt")]
    """One or several texts to continue."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability; with --top-k, among those."""
    seed: int = 1234
    batching: Literal["dynamic", "static"] = "dynamic"
    """Of a run: which of megatron-core's engines; the tokens are the same."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(_Layout):
    """Serve a run or an exported folder over HTTP, as OpenAI's API."""

    model: tyro.conf.Positional[Path]
    """A run, one of its checkpoints, or an exported folder."""
    host: str = "127.0.0.1"
    """0.0.0.0: for other machines too. There is no password: put a proxy in front."""
    port: int = 8000
    """0: a free one."""
    served_model_name: str | None = None
    """What clients call it; None: the folder's name."""
    max_requests: int = 8
    """That run at a time."""
    max_waiting: int = 64
    """That wait for room; more are refused (429)."""
    cache_tokens: int | None = None
    """Size of the key-value cache; None: max_requests whole contexts, or what the memory has room for."""
    max_body_bytes: int = 4 << 20
    """Of a request; larger ones are refused (413)."""
    allow_origins: tuple[str, ...] = ()
    """Of web pages whose scripts may ask the server, such as http://localhost:3000; "*": of all."""
    shutdown_s: int = 30
    """Seconds that running requests get to finish after a signal."""
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, least in (
            *(("max_requests", 1), ("max_waiting", 0), ("max_body_bytes", 1), ("shutdown_s", 0)),
            ("port", 0),
        ):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)}: give at least {least}")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
                raise UserError(
                    f"--allow-origins {origin}: give a page's origin as browsers send it, such as "
                    'http://localhost:3000 (no path, no slash at the end), or "*"'
                )
