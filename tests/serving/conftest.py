"""A running server on a small model, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nplora.serving.api.app import Application


@pytest.fixture(scope="module")
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """The application, with the stand-in of the engine; a file with `ENGINE = "real"` gets the engine."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    import live_server
    from stand_in_engine import StandInEngine

    from nplora.serving import Engine

    is_real = getattr(request.module, "ENGINE", None) == "real"
    directory: Path = tmp_path_factory.mktemp("served")
    made = live_server.application(
        directory, engine=Engine if is_real else StandInEngine, adapter_dir=directory
    )
    made.service.engine.start()
    yield made
    made.service.engine.close(drain=False)


@pytest.fixture(scope="module")
def url(app: Application) -> Iterator[str]:
    import live_server

    with live_server.running(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    """OpenAI's client."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def lm(app: Application) -> Any:
    """The model that the application serves."""
    return app.service.models.lm
