"""Protocols: what the HTTP interface needs from the engines, and from the object that runs training jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from numpy.typing import ArrayLike, NDArray

from nplora.lm import LanguageModel
from nplora.lm.answer import Guide
from nplora.lm.generation import Sampling
from nplora.serving.jobs.shapes import Shape
from nplora.serving.metrics import Metrics
from nplora.serving.served_encoder import Model
from nplora.serving.ticket import Ticket


class AnyEngine(Protocol):
    """The members of both `Engine` and `EncoderEngine` that the server uses."""

    @property
    def context(self) -> int: ...
    @property
    def most_requests(self) -> int: ...
    def start(self) -> None: ...
    def close(self, drain: bool = True, timeout: float | None = None) -> None: ...
    def metrics(self) -> Metrics: ...


class ServingEngine(AnyEngine, Protocol):
    """The members of `nplora.serving.Engine` that the server uses."""

    @property
    def lm(self) -> LanguageModel: ...
    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        adapter: str | LanguageModel | None = None,
        logprobs: int | None = None,
        client: str = "",
        priority: int = 0,
        index: int = 0,
        guide: Guide | None = None,
    ) -> Ticket: ...


class EncodingEngine(AnyEngine, Protocol):
    """The members of `nplora.serving.EncoderEngine` that the server uses."""

    @property
    def longest(self) -> int: ...

    def submit(
        self,
        ids: Sequence[ArrayLike],
        *,
        model: Model | None = None,
        classes: bool = False,
        normalize: bool | None = None,
        client: str = "",
        held: int = 0,
    ) -> Future[NDArray[Any]]: ...


class TuningJobs(Protocol):
    """Files and fine-tuning jobs. Most methods implement a route, and return an object of OpenAI's API.

    The methods may be called from any thread. On errors, the methods raise `RequestError`.
    """

    def start(self) -> None: ...
    def close(self) -> None: ...
    def create_file(
        self, content: bytes | BinaryIO | Iterable[bytes], filename: str, purpose: str = "fine-tune"
    ) -> Shape: ...
    def files(
        self, purpose: str | None = None, after: str | None = None, limit: int = 10_000, order: str = "desc"
    ) -> Shape: ...
    def file(self, file_id: str) -> Shape: ...
    def delete_file(self, file_id: str) -> Shape: ...
    def file_content(self, file_id: str) -> Path: ...
    def delete_model(self, name: str) -> bool: ...
    def create_job(self, request: Mapping[str, Any]) -> Shape: ...
    def jobs(
        self, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> Shape: ...
    def job(self, job_id: str) -> Shape: ...
    def events(self, job_id: str, after: str | None = None, limit: int = 20) -> Shape: ...
    def checkpoints(self, job_id: str, after: str | None = None, limit: int = 10) -> Shape: ...
    def cancel(self, job_id: str) -> Shape: ...
    def pause(self, job_id: str) -> Shape: ...
    def resume(self, job_id: str) -> Shape: ...
