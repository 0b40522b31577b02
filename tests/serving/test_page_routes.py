"""The page of the server: its files are served as they are, and nothing else is."""

from pathlib import Path

import live_server
import pytest
from test_hostile_clients import connect, request

from nplora.serving.api import app as application

pytest.importorskip("uvicorn")


def get(url: str, path: str) -> tuple[int, bytes, bytes]:
    """The status, the head and the body."""
    with connect(url) as client:
        client.sendall(request(path, b"", "GET"))
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


def test_the_files_of_the_page_are_served_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page"
    page.mkdir()
    for name in ("index.html", "page.js", "style.css", "notes.txt"):
        (page / name).write_text(name)
    files = application.page_files(page)
    assert set(files) == {"/", "/index.html", "/page.js", "/style.css"}
    monkeypatch.setattr(application, "page_files", lambda: files)
    app = live_server.application(tmp_path, keys=("secret",))
    with live_server.running(app) as url:
        for path, content in (("/", b"index.html"), ("/page.js", b"page.js"), ("/style.css", b"style.css")):
            status, head, body = get(url, path)
            assert (status, body) == (200, content)
            assert b"content-security-policy: default-src 'self'" in head
        assert b"content-type: text/html" in get(url, "/")[1]
        assert b"content-type: text/javascript" in get(url, "/page.js")[1]
        for path in ("/notes.txt", "/../secret", "/page/index.html", "/%2e%2e/small.gguf"):
            assert get(url, path)[0] == 401
    with live_server.running(live_server.application(tmp_path)) as url:
        assert get(url, "/notes.txt")[0] == 404


def test_a_directory_without_a_page_has_no_files(tmp_path: Path) -> None:
    assert application.page_files(tmp_path) == {}
