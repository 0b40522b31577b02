"""A client leaves the real engine: its running and waiting requests end, and their pages become free."""

import json
import time
from typing import Any

import pytest
from live_server import connect

from nplora.lm import LanguageModel
from nplora.serving.api.app import Application

ENGINE = "real"
ANSWERS = 10  # the engine computes 8 requests at the same time


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_the_requests_of_a_client_that_leaves_give_back_their_pages(
    url: str, app: Application, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    engine: Any = app.service.engine
    usual = LanguageModel.decode

    def slow(self: LanguageModel, *arguments: Any) -> Any:
        time.sleep(0.02)
        return usual(self, *arguments)

    def counts() -> tuple[int, int, int, bool]:
        metrics = engine.metrics()
        return metrics.running, metrics.waiting, metrics.finished.get("cancelled", 0), metrics.pages_used > 0

    def wait_until_counts_are(*expected: int) -> None:
        end = time.monotonic() + 10
        while (found := counts()) != expected:
            assert time.monotonic() < end, found
            time.sleep(0.005)

    monkeypatch.setattr(LanguageModel, "decode", slow)
    before = counts()[2]
    never = {str(end): -100 for end in engine.lm.tokenizer.eos_ids}
    options = {"model": "base", "max_tokens": 400, "temperature": 0, "logit_bias": never}
    chat = {"messages": [{"role": "user", "content": "hello " * 30}], "n": ANSWERS, "stream": stream}
    body = json.dumps(options | chat).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with connect(url) as client:
        client.sendall(head.encode() + body)
        if stream:
            assert client.recv(4096)
        wait_until_counts_are(8, ANSWERS - 8, before, True)
    wait_until_counts_are(0, 0, before + ANSWERS, False)
