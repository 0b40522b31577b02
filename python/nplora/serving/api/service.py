"""Service: the objects and limits that all routes share."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nplora.lm import LanguageModel
from nplora.serving.api.encoder_request import EncoderReader
from nplora.serving.api.models import Models
from nplora.serving.api.protocols import AnyEngine, EncodingEngine, ServingEngine, TuningJobs
from nplora.serving.api.text_request import Reader
from nplora.serving.served_encoder import ServedEncoder

T = TypeVar("T")


class Stoppable(Protocol):
    """An object that represents running answers, and has a method to stop them."""

    def stop(self) -> None: ...


@dataclasses.dataclass
class Service:
    """The objects and limits that all routes share.

    Attributes:
        engine: computes the answers.
        models: the base model and the adapters.
        jobs: the files and the fine-tuning jobs; None: the server has no files and no jobs.
        adapter_dir: the directory from which requests may load adapters; None: requests cannot load adapters.
        most_tokens: for servers that generate text, the largest accepted `max_tokens`; None: no limit.
        max_body: the largest accepted size of a request's body, in bytes.
        max_file: the largest accepted size of an uploaded file, in bytes.
        timeout: seconds after which an answer is cancelled.
        draining: whether the server is shutting down.
    """

    engine: AnyEngine
    models: Models[Any]
    jobs: TuningJobs | None = None
    adapter_dir: Path | None = None
    most_tokens: int | None = None
    max_body: int = 8 << 20
    max_file: int = 512 << 20
    timeout: float = 600.0
    draining: bool = False

    def __post_init__(self) -> None:
        self._answers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_stopped = False
        # By default, there are as many threads as processors plus 4, at most 32. A thread tokenises a prompt
        # or writes an answer, so more threads would only wait for processors. The additional 4 threads may
        # wait until another process has rendered a chat template.
        self._threads = ThreadPoolExecutor(thread_name_prefix="nplora-answers")

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of the service's own threads, which are used only for answers.

        `asyncio.to_thread` would use the event loop's default threads. The default threads also read and
        write files, so they may all be waiting for the disk.
        """
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._threads, run, function, *arguments)

    def follow(self, answers: Stoppable) -> None:
        """Register running answers, so that `stop_answers` can stop them."""
        self._answers.add(answers)
        if self._is_stopped:
            answers.stop()

    def stop_answers(self) -> None:
        """Stop all running answers with an error. Answers that are registered later are stopped at once.

        Call this method in the server's event loop.
        """
        self._is_stopped = True
        for answers in list(self._answers):
            answers.stop()


@dataclasses.dataclass
class TextService(Service):
    """The `Service` of a server that generates text."""

    engine: ServingEngine
    models: Models[LanguageModel]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reader = Reader(self.models, self.engine.context, self.most_tokens)


@dataclasses.dataclass
class EncoderService(Service):
    """The `Service` of a server that computes embeddings and classes."""

    engine: EncodingEngine
    models: Models[ServedEncoder]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reader = EncoderReader(self.models, self.engine.longest)
