"""A running server on a small model, shared by the tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> object:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    import live_server

    directory: Path = tmp_path_factory.mktemp("served")
    return live_server.application(directory, adapter_dir=directory)


@pytest.fixture(scope="module")
def url(app: object) -> Iterator[str]:
    import live_server

    with live_server.running(app) as address:  # type: ignore[arg-type]
        yield address
