"""A server in a thread, for tests that use real clients."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stand_in_engine import StandInEngine

import nplora
from nplora.serving.api import http_server
from nplora.serving.api.app import Application
from nplora.serving.api.models import Models
from nplora.serving.api.service import TextService
from small_llama import save_small_llama

CONTEXT = 512
# Qwen's notation, in short.
TEMPLATE = """{%- if tools %}{% for tool in tools %}<tools>{{ tool | tojson }}</tools>{% endfor %}{% endif -%}
{%- for m in messages -%}
{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] -%}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def save_model(directory: Path) -> Path:
    changes = {"llama.context_length": nplora.formats.gguf.Typed(CONTEXT, "UINT32")}
    return save_small_llama(directory / "small.gguf", changes=changes | {"tokenizer.chat_template": TEMPLATE})


def save_adapters(model: Path, directory: Path, count: int = 2) -> list[Path]:
    """Random adapters of different ranks."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        lm = nplora.load_model(model)
        lm.add_lora(rank=number + 1)
        for parameter in lm.parameters():
            parameter.value[...] += rng.normal(0, 0.3, parameter.value.shape)
        paths.append(directory / f"adapter{number}")
        nplora.save_adapter(lm, paths[-1])
    return paths


def application(directory: Path, **options: Any) -> Application:
    """An application on a small model with two adapters. `options`: of the application and its service."""
    model = save_model(directory)
    lm = nplora.load_model(model)
    models = Models(lm, "base")
    for number, path in enumerate(save_adapters(model, directory)):
        models.load(f"adapter{number}", path)
    engine = options.pop("engine", StandInEngine)(lm)
    outer = {name: options.pop(name) for name in ("keys", "origins", "hosts") if name in options}
    return Application(TextService(engine, models, **options), **outer)


@contextlib.contextmanager
def running(app: Application, drain_seconds: float = 5) -> Iterator[str]:
    """Serve the application, and yield its address."""
    listener = http_server.bind("127.0.0.1", 0)
    ready = threading.Event()
    server = http_server._server(app, drain_seconds, ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        assert ready.wait(10)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.handle_exit(0, None)
        thread.join(drain_seconds + 15)
        assert not thread.is_alive()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(url)), timeout=20)
