"""Templates are limited also where the system limits no process, as on macOS and Windows."""

import time

import pytest

from nplora.formats.errors import UnsafeError
from nplora.platform import limits
from nplora.platform.memory import usage_of
from nplora.tokenizer import chat_template
from nplora.tokenizer.chat_template import ChatTemplate
from nplora.tokenizer.render_process import RenderProcess


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system like Windows, and a process of this test's own."""
    monkeypatch.setattr(limits, "LIMITS_MEMORY", False)
    monkeypatch.setattr(limits, "LIMITS_TIME", False)
    process = RenderProcess()
    monkeypatch.setattr(chat_template, "_PROCESS", process)
    yield
    process.stop()


def test_a_request_has_the_limits_that_the_process_can_set(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = limits.Limits(2.0, 0.5, 1 << 20)
    for memory, seconds in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(limits, "LIMITS_MEMORY", memory)
        monkeypatch.setattr(limits, "LIMITS_TIME", seconds)
        own, watched = all_of_them.set_by_process(), all_of_them.set_by_parent()
        assert (own.memory, own.compiling, own.rendering) == (memory << 20, 2.0 * seconds, 0.5 * seconds)
        assert tuple(a + b for a, b in zip(own, watched, strict=True)) == all_of_them


@pytest.mark.slow
@pytest.mark.usefixtures("no_limits")
def test_the_parent_ends_a_template_that_takes_memory() -> None:
    template = ChatTemplate(
        "{% set x = namespace(y='a' * 1000) %}{% for i in range(1000) %}"
        "{% set x.y = x.y + x.y %}{% endfor %}",
        "model",
    )
    with pytest.raises(UnsafeError, match="takes too much memory"):
        template.render([])
    assert ChatTemplate("{{ 1 + 1 }}", "model").render([]) == "2"


@pytest.mark.slow
@pytest.mark.usefixtures("no_limits")
def test_the_parent_ends_a_template_that_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_COMPILING", 0.1)
    monkeypatch.setattr(chat_template, "_RENDERING", 0.1)
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UnsafeError, match=r"takes more than 0\.1 s of CPU time"):
        ChatTemplate(template, "model").render([])


def test_the_use_of_a_process_that_is_gone_is_unknown() -> None:
    assert usage_of(2**22 + 1) is None  # more than Linux' largest number of a process


def test_watching_ends_with_its_body() -> None:
    killed = []
    with limits.watched(lambda: (1 << 40, 0.0), lambda: killed.append(1), limits.Limits(0, 0, 0)) as causes:
        time.sleep(0.02)
    assert not causes
    assert not killed
