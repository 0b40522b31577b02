"""`nplora chat`: through pipes, and in a terminal."""

import codecs
import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import nplora
from nplora import adapters, cli
from nplora.cli.chat_session import ChatSession
from nplora.cli.message_lines import PipedLines
from nplora.formats.gguf import Typed
from nplora.serving import Conversation
from small_llama import save_small_llama

SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("model")
    path = save_small_llama(
        directory / "model.gguf", changes={"llama.context_length": Typed(100_000, "UINT32")}
    )
    lm = nplora.load_model(path)
    lm.add_lora(rank=2, targets="all-linear")
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.5
    adapters.Adapter.from_model(lm).save(directory / "tone")
    return path


# ---- pipes ----


def piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")), encoding="utf-8")
    )
    status = cli.main(["chat", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(("slash", "more"), [("/", []), ("//", ["--commands"])])
def test_each_line_of_a_pipe_is_a_message_and_only_answers_are_printed(
    slash: str,
    more: list[str],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lm = nplora.load_model(model)
    chat: list[dict[str, str]] = [{"role": "system", "content": "sys"}]
    expected = []
    for text in ("one", "/two"):
        chat.append({"role": "user", "content": text})
        expected.append(str(lm.generate(chat, max_new_tokens=4)))
        chat.append({"role": "assistant", "content": expected[-1]})
    options = [model, "--max-new-tokens", 4, "--system", "sys"]
    status, out, err = piped(monkeypatch, capsys, f"one\n\n{slash}two\n", *options, *more)
    assert (status, out) == (0, "".join(f"{answer}\n" for answer in expected))
    assert err.splitlines() == ["(the answer was cut after 4 tokens)"] * 2


def test_the_commands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}')  # without the end of its line
    lines = [
        "/adapter", "one", "/adapter none", "/adapter", "/system be brief", "/reset", "two", f"/save {rows}",
        "/adapter tone", "/system", "/reset", "three", f"/save {rows}", "/help", "/exit", "never",
    ]  # fmt: skip
    options = [model, "--adapter", model.parent / "tone", "--max-new-tokens", 3, "--commands"]
    status, out, err = piped(monkeypatch, capsys, "\n".join(lines), *options)
    assert status == 0
    lm = nplora.load_model(model)
    brief = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]
    two = lm.generate(brief, max_new_tokens=3)
    lm.load_adapter(model.parent / "tone", "tone")
    lm.set_adapter("tone")
    one, three = (
        lm.generate([{"role": "user", "content": text}], max_new_tokens=3) for text in ("one", "three")
    )
    assert out.splitlines() == [one, two, three]
    assert err.splitlines()[:6] == [
        "* tone",
        "  none",
        "(the answer was cut after 3 tokens)",
        "answers come from the model without an adapter",
        "  tone",
        "* none",
    ]
    assert "/save FILE.jsonl" in err
    assert [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()][1:] == [
        {"messages": [*brief, {"role": "assistant", "content": two}]},
        {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": three}]},
    ]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("/adaptor x", ["--commands"], "no command /adaptor; did you mean /adapter?"),
        ("/adapter x", ["--commands"], "no adapter 'x', expected one of: none"),
        ("/save x.txt", ["--commands"], "expected a name that ends in .jsonl"),
        ("/save x.jsonl", ["--commands"], "there are no messages yet"),
        ("a\udcff", [], "the message is not UTF-8, at byte 1"),
        ("", ["--memory", "1M"], "memory is 1 MB, expected at least"),
        ("", ["--adapter", "a/b", "--adapter", "c/b"], "two adapters have the name 'b'"),
        ("", ["--temperature", "-1"], "temperature"),
    ],
)
def test_an_error_ends_a_chat_from_a_pipe(
    text: str,
    options: list[str],
    words: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = piped(monkeypatch, capsys, text, model, *options)
    assert status == 2
    assert words in err


class _Hostile:
    """A chat whose answers hold escape sequences."""

    finish_reason, usage = "stop", None

    def ask(self, text: str) -> Iterator[str]:
        yield from ("\x1b]0;title\x07", "\x1b", "[2J", "\x9b1A\r\x08\x7f", "tab\tline\nend")


@pytest.mark.parametrize(
    ("is_terminal", "expected"),
    [
        (True, "␛]0;title␇␛[2J\ufffd1A␈␡tab\tline\nend\n"),
        (False, "\x1b]0;title\x07\x1b[2J\x9b1A\r\x08\x7ftab\tline\nend\n"),
    ],
)
def test_escape_sequences_of_an_answer_do_not_reach_a_terminal(
    is_terminal: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n"), encoding="utf-8"))
    ChatSession(cast(Conversation, _Hostile()), PipedLines()).run("m")
    assert output.getvalue() == expected


def test_closed_standard_input_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat", str(model)]) == 2
    assert "standard input is closed" in capsys.readouterr().err


# ---- a terminal ----


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, home: Path, *arguments: object) -> None:
        import pty

        self._side, other = pty.openpty()
        environment = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb", "PYTHONWARNINGS": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nplora", "chat", *map(str, arguments)],
            stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True,
            preexec_fn=lambda: _take_terminal(other),
        )  # fmt: skip
        os.close(other)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a character may arrive in two pieces

    def interrupt_until(self, pattern: str) -> str:
        """Press Ctrl-C until a pattern appears. Just after a prompt, Python may miss the signal."""
        for _ in range(int(SECONDS)):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(pattern, seconds=1)
        raise AssertionError(self.seen)

    def until(self, pattern: str, seconds: float = SECONDS) -> str:
        """Read until a pattern appears, and return the text up to its end."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert select.select([self._side], [], [], max(0, end - time.monotonic()))[0], self.seen
            with contextlib.suppress(OSError):
                piece = os.read(self._side, 4096)
                assert piece, self.seen
                self.seen += self._decoder.decode(piece)
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._side)


def _take_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def terminal(model: Path, tmp_path: Path) -> Iterator[Terminal]:
    pytest.importorskip("termios", reason="this system has no pseudo-terminals")
    made = Terminal(tmp_path, model, "--adapter", f"calm={model.parent / 'tone'}", "--max-new-tokens", 90_000)
    yield made
    made.close()


@pytest.mark.slow
def test_a_chat_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    assert "model.gguf with calm. /help lists the commands." in terminal.until("> ")
    terminal.type("/adapter none\n")
    terminal.until("the model without an adapter\r\n> ")
    terminal.type("hello\n")
    terminal.until(r"hello\r\n[^\r]{20}")  # the answer has begun, and would go on for a minute
    terminal.type("\x03")
    terminal.until("\r\n> ")
    terminal.interrupt_until(r"\(Ctrl-D ends the chat\)\r\n> ")  # at the prompt
    terminal.type("/nonsense\n")
    terminal.until("nplora: error: no command /nonsense.*\r\n> ")
    terminal.type('"""one\n')
    terminal.until("… ")
    terminal.type('two"""\n')
    terminal.until(r'two"""\r\n[^\r]{20}')
    terminal.type("\x03")
    terminal.until("\r\n> ")
    terminal.type(f"/save {tmp_path / 'chat.jsonl'}\n")
    terminal.until("saved to")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(SECONDS) == 0
    messages = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [(m["role"], m["content"]) for m in messages[::2]] == [("user", "hello"), ("user", "one\ntwo")]
    assert all(len(m["content"]) >= 20 for m in messages[1::2])
    history = tmp_path / "nplora" / "chat_history"
    assert history.read_text(encoding="utf-8").splitlines()[:2] == ["/adapter none", "hello"]
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_closed_terminal_ends_the_chat(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello\r\n.")
    os.killpg(terminal.process.pid, signal.SIGHUP)
    assert terminal.process.wait(SECONDS) != 0
