"""Runs a server until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nplora.finetuning.planning import parse_bytes
from nplora.finetuning.planning.choice import resident_memory
from nplora.lm import LanguageModel
from nplora.runtime.time_share import TimeShare
from nplora.serving.api import http_server
from nplora.serving.api.app import Application
from nplora.serving.api.models import Models, default_name
from nplora.serving.api.protocols import ServingEngine, TuningJobs
from nplora.serving.api.service import Service
from nplora.serving.engine import Engine
from nplora.serving.jobs import FineTuning
from nplora.serving.options import ServeOptions


def serve(
    lm: LanguageModel,
    options: ServeOptions,
    adapters: Sequence[tuple[str, str]] = (),
    *,
    any_base: bool = False,
    listener: socket.socket | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a model and its adapters until SIGTERM or SIGINT.

    Args:
        adapters: pairs (name, path).
        any_base: accept adapters that were trained on another model of the same shapes.
        listener: a socket that listens; None: one for `options.host` and `options.port` is made.
        ready: called with the server's address when requests are accepted.
    Raises:
        ModuleNotFoundError: starlette or uvicorn is not installed.
        OSError: the port is in use, or an adapter cannot be read.
        ValueError: an adapter does not fit the model, or the memory does not suffice.
    """
    require_packages()
    listener = listener or http_server.bind(options.host, options.port)
    models = Models(lm, options.name or default_name(lm.source), any_base)
    for name, path in adapters:
        models.load(name, path)
    with running(lm, models, options) as (engine, jobs):
        service = Service(
            engine,
            models,
            jobs,
            None if options.adapter_dir is None else Path(options.adapter_dir),
            options.max_tokens,
            parse_bytes(options.max_body, "serve"),
            parse_bytes(options.max_file, "serve"),
            options.timeout,
        )
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        app = Application(service, options.api_key, options.allow_origin)
        http_server.serve(app, listener, drain_seconds=options.drain, ready=lambda: ready(url))


@contextmanager
def running(
    lm: LanguageModel, models: Models, options: ServeOptions
) -> Iterator[tuple[ServingEngine, TuningJobs | None]]:
    """The engine and the fine-tuning jobs. Both are stopped at the end of this context."""
    turns = None if options.jobs is None else TimeShare(options.train_share)
    with ExitStack() as stack:
        jobs = None
        if options.jobs is not None:
            jobs = FineTuning(
                lm,
                options.jobs,
                model=models.name,
                turns=turns,
                publish=lambda name, directory: models.load(name, directory, replace=True),
                withdraw=models.unload,
                memory=options.memory,
                max_file_bytes=parse_bytes(options.max_file, "serve"),
            )
            stack.callback(jobs.close)
            jobs.publish_earlier()  # before the engine divides the memory that is left
        engine = Engine(
            lm,
            memory=engine_memory(lm, options),
            max_requests=options.max_requests,
            max_waiting=options.max_queue,
            turn=turns,
        )
        stack.callback(engine.close, drain=False)
        engine.start()
        if jobs is not None:
            jobs.start()
        yield engine, jobs


def engine_memory(lm: LanguageModel, options: ServeOptions) -> int | None:
    """The memory limit of the engine. If there are jobs, half of what the model leaves is for training."""
    if options.memory is None:
        return None
    memory = parse_bytes(options.memory, "serve")
    left = max(0, memory - sum(resident_memory(lm)))
    return memory if options.jobs is None else memory - left // 2


def require_packages() -> None:
    """Raise ModuleNotFoundError if a package of the extra `serve` is missing."""
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        message = f'the server needs the package {error.name}: pip install "nplora[serve]"'
        raise ModuleNotFoundError(message, name=error.name) from error
