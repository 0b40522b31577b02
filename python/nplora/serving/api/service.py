"""Service: what all routes share."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

from nplora.serving.api.models import Models
from nplora.serving.api.protocols import ServingEngine, TuningJobs
from nplora.serving.api.text_request import Reader
from nplora.serving.api.ticket_stream import TicketStream


@dataclasses.dataclass
class Service:
    """What all routes share.

    Attributes:
        engine: generates the answers.
        models: the base model and the adapters.
        jobs: files and fine-tuning jobs; None: the server has none.
        adapter_dir: the directory that adapters may be loaded from while the server runs; None: none may.
        most_tokens: the largest accepted `max_tokens`.
        max_body: the largest body in bytes.
        max_file: the largest uploaded file in bytes.
        timeout: seconds after which an answer is cancelled.
        draining: whether the server is shutting down.
    """

    engine: ServingEngine
    models: Models
    jobs: TuningJobs | None = None
    adapter_dir: Path | None = None
    most_tokens: int | None = None
    max_body: int = 8 << 20
    max_file: int = 512 << 20
    timeout: float = 600.0
    draining: bool = False

    def __post_init__(self) -> None:
        self.reader = Reader(self.models, self.engine.context, self.most_tokens)
        self._answers: weakref.WeakSet[TicketStream] = weakref.WeakSet()
        self._is_stopped = False

    def follow(self, answers: TicketStream) -> TicketStream:
        """Remember answers that have begun, for `stop_answers`."""
        self._answers.add(answers)
        if self._is_stopped:
            answers.stop()
        return answers

    def stop_answers(self) -> None:
        """End all answers with an error, also those that begin later. Call it in the server's event loop."""
        self._is_stopped = True
        for answers in list(self._answers):
            answers.stop()
