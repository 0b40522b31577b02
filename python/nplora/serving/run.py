"""Runs a server until it is stopped."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nplora.finetuning.planning import parse_bytes
from nplora.finetuning.planning.choice import resident_memory
from nplora.lm import Encoder, LanguageModel
from nplora.platform.memory import current_memory
from nplora.runtime.time_share import TimeShare
from nplora.serving.adapter_memory import AdapterMemory
from nplora.serving.api import http_server
from nplora.serving.api.app import Application
from nplora.serving.api.models import Models, bytes_of_sums, default_name
from nplora.serving.api.protocols import AnyEngine
from nplora.serving.api.service import EncoderService, Service, TextService
from nplora.serving.encoder_engine import EncoderEngine
from nplora.serving.engine import Engine
from nplora.serving.jobs import FineTuning
from nplora.serving.options import ServeOptions
from nplora.serving.request_error import RequestError
from nplora.serving.served_encoder import ServedEncoder, read_adapter


def serve(
    model: LanguageModel | Encoder,
    options: ServeOptions,
    adapters: Sequence[tuple[str, str]] = (),
    *,
    any_base: bool = False,
    listener: socket.socket | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve a model and its adapters until SIGTERM or SIGINT.

    Args:
        model: a language model, which generates text; or an encoder, for embeddings and classes.
        adapters: pairs (name, path).
        any_base: whether to accept adapters that were trained on another model with the same shapes.
        listener: a listening socket; None: make a socket for `options.host` and `options.port`.
        report: called with texts for the person who runs the server. These texts contain the address and the
            memory plan when the server is ready, each event of a job, and the number of unfinished answers
            when the server stops.
    Raises:
        ModuleNotFoundError: starlette or uvicorn is not installed.
        OSError: the port is in use, or an adapter cannot be read.
        ValueError: an adapter does not fit the model, `options.adapter_dir` is not a directory, or the
            memory does not suffice.
    """
    require_packages()
    if options.adapter_dir is not None and not Path(options.adapter_dir).is_dir():
        raise ValueError(f"serve: adapter_dir is {options.adapter_dir!r}, expected an existing directory")
    listener = listener or http_server.bind(options.host, options.port)
    if isinstance(model, LanguageModel):
        prepared = _text_service(model, options, adapters, any_base, report)
    else:
        prepared = _encoder_service(model, options, adapters, any_base)
    with prepared as (service, text, start_jobs):
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def ready() -> None:
            report(f"serving at {url}\n{text}")
            start_jobs()

        http_server.serve(
            Application(service, options.api_key, options.allow_origin),
            listener,
            drain_seconds=options.drain,
            ready=ready,
            stopping=lambda number: report(last_words(service.engine, options.drain, number)),
        )


@contextmanager
def _text_service(
    lm: LanguageModel,
    options: ServeOptions,
    adapters: Sequence[tuple[str, str]],
    any_base: bool,
    report: Callable[[str], None],
) -> Iterator[tuple[Service, str, Callable[[], None]]]:
    """Yield a language model's service, a text that describes it, and a function that starts the jobs."""
    models = Models(lm, options.name or default_name(lm.source), any_base, dtype=options.adapter_dtype)
    _load(models, adapters)
    with running(lm, models, options, report) as (engine, jobs):
        service = TextService(engine, models, jobs, most_tokens=options.max_tokens, **_limits(options))
        yield service, description(engine, models, options), _nothing if jobs is None else jobs.start


@contextmanager
def _encoder_service(
    encoder: Encoder,
    options: ServeOptions,
    adapters: Sequence[tuple[str, str]],
    any_base: bool,
) -> Iterator[tuple[Service, str, Callable[[], None]]]:
    """Yield an encoder's service, a text that describes it, and a function that starts no jobs."""
    if options.jobs is not None:
        raise ValueError("serve: fine-tuning jobs need a language model that generates text")
    if options.adapter_dtype is not None:
        raise ValueError("serve: adapter_dtype needs a language model that generates text")
    served = ServedEncoder(encoder)
    models = Models(served, options.name or default_name(encoder.source), any_base, read_adapter)
    _load(models, adapters)
    engine = EncoderEngine(
        served,
        memory=options.memory,
        adapter_memory=options.adapter_memory,
        most_adapters=most_adapters(served, options),
        max_waiting=options.max_queue,
    )
    models.memory = AdapterMemory(engine.plan.adapters)
    engine.start()
    try:
        service = EncoderService(engine, models, **_limits(options))
        yield service, encoder_description(engine, models, options), _nothing
    finally:
        engine.close(drain=False)


def _load(models: Models[Any], adapters: Sequence[tuple[str, str]]) -> None:
    """Load the adapters that the command line names.

    Raises:
        ValueError: a name cannot be used, or an adapter does not fit the model.
    """
    for name, path in adapters:
        try:
            models.load(name, path)
        except RequestError as error:
            raise ValueError(f"serve: --adapter {name}={path}: {error}") from error


def _nothing() -> None:
    """Start no jobs."""


def _limits(options: ServeOptions) -> dict[str, Any]:
    """Return those arguments of `TextService` and `EncoderService` that the options set."""
    return {
        "adapter_dir": None if options.adapter_dir is None else Path(options.adapter_dir),
        "max_body": parse_bytes(options.max_body, "serve"),
        "max_file": parse_bytes(options.max_file, "serve"),
        "timeout": options.timeout,
    }


def description(engine: Engine, models: Models[LanguageModel], options: ServeOptions) -> str:
    """Return the lines that a server with a language model prints when it has started."""
    most, context = int(engine.lm.config.max_position_embeddings), engine.context
    why = f", limited by the memory; the model allows {most:,}" if context < most else ""
    limit = _limit(options)
    return (
        f"models: {', '.join(models.names)}\n"
        f"context: {context:,} tokens for a prompt and its answer{why}\n"
        f"requests at the same time: {options.max_requests}; {options.max_queue} more may wait\n"
        f"memory: {engine.plan.total / 1e6:,.0f} MB at most, not counting training ({limit})\n"
        f"{engine.plan.table(_later_adapters(options))}"
    )


def encoder_description(engine: EncoderEngine, models: Models[ServedEncoder], options: ServeOptions) -> str:
    """Return the lines that a server with an encoder prints when it has started."""
    served = engine.served
    found = served.classifier
    labels = () if found is None else found.labels
    more = ", …" if len(labels) > 8 else ""
    classes = f"; classes: {', '.join(labels[:8])}{more}" if labels else ""
    most = served.encoder.max_length
    why = f", limited by the memory; the model reads {most:,}" if engine.context < most else ""
    return (
        f"models: {', '.join(models.names)}\n"
        f"embeddings of {served.encoder.dim:,} values: {served.encoder.pooling!r}{classes}\n"
        f"texts of at most {engine.context:,} tokens{why}; {options.max_queue} requests may wait\n"
        f"memory: {engine.plan.total / 1e6:,.0f} MB at most ({_limit(options)})\n"
        f"{engine.plan.table(_later_adapters(options))}"
    )


def _later_adapters(options: ServeOptions) -> str:
    """Return a text that says which adapters can be added while the server runs."""
    found = ["adapters that requests load"] * (options.adapter_dir is not None)
    found += ["adapters of jobs"] * (options.jobs is not None)
    return " and ".join(found) or "sums of adapters (requests with `lora`)"


def _limit(options: ServeOptions) -> str:
    return "no limit was given" if options.memory is None else f"the limit is {options.memory}"


def last_words(engine: AnyEngine, seconds: float, number: int) -> str:
    """Return the line that a server prints when it stops, with the number of unfinished answers.

    Args:
        number: the number of the signal that stops the server.
    """
    metrics = engine.metrics()
    count = metrics.running + metrics.waiting
    # The rounds of an `EncoderEngine` may be long, and cannot be cancelled.
    when = "when the current texts are done" if isinstance(engine, EncoderEngine) else "at once"
    end = f"{'Ctrl-C again' if number == signal.SIGINT else 'a second signal'} ends the server {when}"
    if not count:
        return f"stopping; {end}"
    answers = "1 answer" if count == 1 else f"{count} answers"
    return f"stopping: waiting at most {seconds:g} s for {answers}; {end}"


@contextmanager
def running(
    lm: LanguageModel,
    models: Models[LanguageModel],
    options: ServeOptions,
    log: Callable[[str], None] | None = None,
) -> Iterator[tuple[Engine, FineTuning | None]]:
    """Yield the engine and the fine-tuning jobs. Both are stopped at the end of the context.

    The engine has been started, but the jobs have not: the caller starts the jobs after printing its own
    lines.

    Args:
        log: called with the events of jobs.
    """
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
                memory=None if options.memory is None else lambda: training_memory(options, engine),
                max_file_bytes=parse_bytes(options.max_file, "serve"),
                max_files_bytes=parse_bytes(options.max_files, "serve"),
                log=log,
            )
            stack.callback(jobs.close)
            jobs.publish_earlier()  # before the engine plans the remaining memory
        engine = Engine(
            lm,
            memory=engine_memory(lm, options),
            adapter_memory=options.adapter_memory,
            most_adapters=most_adapters(lm, options),
            max_requests=options.max_requests,
            max_waiting=options.max_queue,
            turn=turns,
        )
        stack.callback(engine.close, drain=False)
        models.memory = AdapterMemory(engine.plan.adapters)
        engine.start()
        yield engine, jobs


def engine_memory(lm: LanguageModel, options: ServeOptions) -> int | None:
    """Return the memory limit of the engine.

    If the server has jobs, the engine gets only half of the memory that the model leaves free. The other half
    is for training.
    """
    if options.memory is None:
        return None
    memory = parse_bytes(options.memory, "serve")
    left = max(0, memory - sum(resident_memory(lm)))
    return memory if options.jobs is None else memory - left // 2


def training_memory(options: ServeOptions, engine: Engine) -> int:
    """Return the memory limit of the process during training.

    The engine may still take memory that its plan reserves but that is not in use yet. So the result is
    `options.memory` minus this memory.
    """
    assert options.memory is not None
    return parse_bytes(options.memory, "serve") - max(0, engine.plan.total - current_memory())


def most_adapters(lm: LanguageModel | ServedEncoder, options: ServeOptions) -> int | None:
    """Return the most bytes that adapters can need if they are added while the server runs; None: not known.

    Without a directory of adapters and without jobs, only sums of the loaded adapters can be added. A sum
    stays in memory while a request uses it.
    """
    if options.adapter_dir is not None or options.jobs is not None:
        return None
    users = options.max_queue
    if isinstance(lm, LanguageModel):
        # Running requests also use sums. So do requests that have just ended, because the cache's `joint`
        # keeps their models until the engine calls the model again.
        users += 2 * options.max_requests
    return bytes_of_sums(sum(adapter.nbytes for adapter in lm.adapters.values()), users)


def require_packages() -> None:
    """Raise ModuleNotFoundError if a package of the extra `serve` is missing."""
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        message = f'the server needs the package {error.name}: pip install "nplora[serve]"'
        raise ModuleNotFoundError(message, name=error.name) from error
