"""Conversation: a chat of several turns, which reuses the keys and values of earlier turns."""

from __future__ import annotations

from collections.abc import Generator

from nplora.lm.sampling import Sampling
from nplora.serving.engine import Engine, unselected
from nplora.serving.ticket import Usage


class Conversation:
    """A chat of several turns.

    The engine keeps the keys and values of the last prompt, as long as there is enough memory. So for the
    next turn, the engine computes only the keys and values of the last answer and of the new message. If the
    system message or the adapter changes, the engine computes the keys and values of all turns again.

        >>> lm = nplora.load_model("model.gguf")
        >>> with nplora.serving.Engine(lm) as engine:
        ...     chat = nplora.serving.Conversation(engine, nplora.generate.Sampling(max_new_tokens=4))
        ...     answer = "".join(chat.ask("Hi"))
        >>> [message["role"] for message in chat.messages], chat.messages[1]["content"] == answer
        (['user', 'assistant'], True)

    Args:
        engine: the engine, which may serve other conversations at the same time.
        sampling: how tokens are chosen. None: choose the most likely token each time, up to 128 tokens.
        system: the system message, or None.
        adapter: the name of one of the model's adapters; None: no named adapter.
    Attributes:
        turns: the messages of the user and the assistant, in order.
        finish_reason: how the last answer ended (see `Ticket.finish_reason`); None before the first answer.
        usage: the token counts of the last prompt and of the last answer; None before the first answer.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling | None = None,
        system: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self.engine, self.sampling, self.system, self.adapter = engine, sampling, system, adapter
        self.turns: list[dict[str, str]] = []
        self.finish_reason: str | None = None
        self.usage: Usage | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, if there is one, and all turns."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def ask(self, text: str) -> Generator[str, None, None]:
        """Send a user's message, and yield the answer in pieces.

        If the caller stops early (by an exception such as KeyboardInterrupt, or by `close()`), the request is
        cancelled, and the chat keeps the question and the answer so far. If the request fails, or is
        cancelled before any text was generated, the chat does not change.

        Raises:
            ValueError: the model has no chat template, or the chat fills the context.
            KeyError: the adapter is not loaded.
        """
        question = {"role": "user", "content": text}
        lm = self.engine.lm
        model = lm if self.adapter is None else lm.named_model(self.adapter)
        tokenizer = unselected(lambda: model.tokenizer)
        ids = tokenizer.encode_chat([*self.messages, question], True)
        ticket = self.engine.submit(ids, self.sampling, adapter=model)
        pieces, reason = list[str](), "cancelled"
        try:
            for chunk in ticket:
                pieces.append(chunk.text)
                if chunk.text:
                    yield chunk.text
            reason = ticket.finish_reason or reason
        except Exception:
            reason = "error"
            pieces.clear()
            raise
        finally:
            ticket.cancel()
            self.finish_reason, self.usage = reason, ticket.usage
            if any(pieces) or reason in ("stop", "length"):
                self.turns += [question, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget all turns, but keep the system message and the adapter."""
        self.turns.clear()
