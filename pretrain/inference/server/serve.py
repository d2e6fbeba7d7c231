"""`megatron-ladder serve`: serves a run or an exported folder over HTTP, compatible with OpenAI's API."""

import functools
import logging
import signal
import socket
import threading
import time

import torch.distributed as dist
import uvicorn

from megatron_ladder.errors import UserError
from megatron_ladder.inference.engine import DynamicEngine
from megatron_ladder.inference.requests import Output
from pretrain.inference.engine_loop import drive
from pretrain.inference.loaded import Found, find, load
from pretrain.inference.options import ServeOptions
from pretrain.inference.server.app import Served, make_app
from pretrain.inference.server.chat import Render, chat_renderer
from pretrain.inference.server.connections import Connection, most_connections
from pretrain.inference.server.frontdesk import FrontDesk
from pretrain.inference.server.metrics import Metrics
from pretrain.ranks import is_first_rank

logger = logging.getLogger(__name__)


def serve(options: ServeOptions) -> None:
    """Serves until a stop signal; then it finishes the running requests and takes no new ones.

    Every rank calls it. All ranks compute; the first rank also answers HTTP, in a thread.

    Raises:
        UserError: there is no such model, the layout does not fit, or the port is in use.
    """
    parallel = options.parallel()
    found = find(options.model, parallel, options.all_reduce)
    # A process is made for templates, so it comes before ports, threads and GPUs.
    render = chat_renderer(found.templates) if is_first_rank() else None
    listening = listen(options) if is_first_rank() else None
    chunk = load(found, parallel, options.seed, options.all_reduce)
    engine = DynamicEngine(
        chunk,
        found.model,
        end_ids=found.text.end_ids,
        max_requests=options.max_requests,
        cache_tokens=options.cache_tokens,
        seed=options.seed,
    )
    logger.info(
        "At most %d requests run at a time, %d of them of %s tokens, the most that one may have.",
        options.max_requests,
        min(options.max_requests, engine.cache.tokens // engine.cache.longest),
        f"{engine.cache.longest:,}",
    )
    metrics = Metrics()
    desk = FrontDesk(
        engine, metrics, max_running=options.max_requests, max_waiting=options.max_waiting
    )
    if listening is None or render is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # this rank stops when the first rank says so
        drive(engine, desk.inbox, _nothing)
    else:
        _serve_http(options, found, engine, desk, metrics, render, listening)
    dist.barrier()
    dist.destroy_process_group()


def _serve_http(
    options: ServeOptions,
    found: Found,
    engine: DynamicEngine,
    desk: FrontDesk,
    metrics: Metrics,
    render: Render,
    listening: socket.socket,
) -> None:
    served = Served(
        name=options.served_model_name or found.name,
        text=found.text,
        special_ids={
            token.content: token_id
            for token_id, token in found.text.tokenizer.get_added_tokens_decoder().items()
            if token.special
        },
        context_length=engine.cache.longest,
        render=render,
        created=int(time.time()),
    )
    app = make_app(served, desk, metrics, options.max_body_bytes, options.allow_origins)
    most = most_connections(options.max_requests + options.max_waiting)
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, most=most),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="error",  # a warning for each wrong request would fill the log
        timeout_graceful_shutdown=options.shutdown_s,
    )
    server = uvicorn.Server(config)

    def stop(number: int, _: object) -> None:
        logger.info(
            "%s: finishing the running requests, then stopping", signal.Signals(number).name
        )
        desk.close()
        server.should_exit = True

    def answer() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            desk.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    metrics.look_at(engine, 0)
    thread = threading.Thread(target=answer)
    thread.start()
    host, port = listening.getsockname()[:2]
    logger.info("%s at http://%s:%d/v1 (Ctrl-C stops)", served.name, host, port)
    try:
        drive(engine, desk.inbox, desk.deliver)
    finally:
        server.should_exit = True
        thread.join()


def listen(options: ServeOptions) -> socket.socket:
    """The socket to serve on.

    Raises:
        UserError: the host or the port cannot be used, such as a port that is in use.
    """
    try:
        return socket.create_server((options.host, options.port), backlog=2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on --host {options.host} --port {options.port}: {why}"
        ) from error


def _nothing(_: list[Output]) -> None:
    """For ranks other than the first, which have no clients: does nothing with the outputs."""
