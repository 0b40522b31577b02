"""Answer: one prompt, and the tokens that are generated after the prompt, as ids and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nplora.lm.sampling import Sampling, choose
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]

_CONTEXT = 8  # the tokens at a prompt's end that decide whether the first generated token begins with a space


class Guide(Protocol):
    """Decides which tokens an answer may contain, for example by a grammar. Each answer needs a new guide.

    >>> class OnlyEven:
    ...     def restrict(self, scores):
    ...         scores[1::2] = -np.inf
    ...
    ...     def advance(self, token):
    ...         pass
    >>> engine = nplora.serving.Engine(nplora.load_model("model.gguf"))
    >>> ticket = engine.submit([5, 6, 7], guide=OnlyEven())
    >>> any(token.id % 2 for chunk in ticket for token in chunk.tokens)
    False
    """

    def restrict(self, scores: Array) -> None:
        """Change `scores` (vocab,) in place: each token that is not allowed gets the score -inf.

        At least one score must stay finite. The guide may rule out end tokens too.
        """

    def advance(self, token: int) -> None:
        """Update the guide: `token` was chosen as the answer's next token."""


class Answer:
    """One prompt and the tokens generated after it.

    Args:
        index: the index of the answer. The answer's random numbers depend on the seed and on this index.
    Attributes:
        ids: the tokens of the prompt and of the answer, without an end token.
        prompt: the number of tokens at the start of `ids` that belong to the prompt.
        generated: the number of generated tokens, including an end token.
        ended: whether the answer has ended.
        cut_off: whether the answer ended because the cache was full.
    """

    def __init__(
        self, tokenizer: Tokenizer, index: int, ids: list[int], sampling: Sampling, guide: Guide | None = None
    ) -> None:
        self.index, self.ids, self.prompt = index, ids, len(ids)
        self.generated, self.ended, self.cut_off = 0, False, False
        self._sampling, self._ends, self._guide = sampling, tokenizer.eos_ids, guide
        self._vocab = tokenizer.vocab_size  # the model's embedding may be padded with more rows
        self._text = tokenizer.stream(context=ids[-_CONTEXT:])
        self._stop = StopText(sampling.stop)
        seed = np.random.SeedSequence(sampling.seed, spawn_key=(index,))
        self._rng = np.random.Generator(np.random.PCG64(seed))

    @property
    def count(self) -> int:
        """The number of generated tokens in `ids`: like `generated`, but without the end token."""
        return len(self.ids) - self.prompt

    @property
    def reason(self) -> str | None:
        """Why the answer has ended: "stop" (an end token or a stop text) or "length" (a limit was reached).

        None: the answer has not ended.
        """
        if not self.ended:
            return None
        return "stop" if self._stop.found or self.count < self.generated else "length"

    def own_scores(self, scores: Array) -> Array:
        """The elements of `scores` that belong to tokens of the tokenizer.

        The other elements belong to rows that only pad the embedding.
        """
        return scores[: self._vocab]

    def advance(self, scores: Array, capacity: int) -> str:
        """Choose the next token. Return the new text, without characters that `StopText` still holds back.

        Args:
            capacity: the answer ends when prompt and answer together have this number of tokens.
        """
        scores = self.own_scores(scores)
        if self._guide is not None:
            scores = np.array(scores, np.float64)
            self._guide.restrict(scores)
        token = choose(scores, self.ids, self._sampling, self._rng, self.prompt)
        if self._guide is not None:
            self._guide.advance(token)
        self.generated += 1
        piece = ""
        if token in self._ends:
            self.ended = True
        else:
            self.ids.append(token)
            piece = self._stop.push(self._text.push(token))
            self.ended = self._stop.found or self.generated >= self._sampling.max_new_tokens
            self.cut_off = not self.ended and len(self.ids) >= capacity
            self.ended = self.ended or self.cut_off
        return piece + self._rest() if self.ended else piece

    def _rest(self) -> str:
        return "" if self._stop.found else self._stop.push(self._text.flush()) + self._stop.flush()


class StopText:
    """Receives a text in pieces, and cuts the text before the first stop text.

    Characters that may be the beginning of a stop text are held back until more text arrives.

    Attributes:
        found: whether a stop text was found. After a stop text, no more text is returned.

    >>> stop = StopText(["END"])
    >>> [stop.push(piece) for piece in ("one E", "ven two E", "ND three")]
    ['one ', 'Even two ', '']
    >>> stop.found
    True
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.found = tuple(stop), "", False

    def push(self, piece: str) -> str:
        """Add a piece of text. Return the new text, without an end that may be the beginning of a stop text.

        >>> stop = StopText(["END"])
        >>> stop.push("text E"), stop.push("ND")
        ('text ', '')
        """
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        longest = max(map(len, self._stop), default=1) - 1
        begun = (size for size in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-size:]))
        keep = len(text) - next(begun, 0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """End the text, and return the characters that were held back.

        >>> stop = StopText(["END"])
        >>> stop.push("text E"), stop.flush()
        ('text ', 'E')
        """
        held, self._held = self._held, ""
        return held

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
