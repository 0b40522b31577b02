"""Text out of tokens that come one by one."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no character, or not yet
_LONGEST = 64  # tokens without one whole character at their end; then they are taken to be nonsense


class StreamDecoder:
    """Gives the text of tokens as they come, never half a character.

    A character of UTF-8 may be spread over several tokens, and whether a token begins with a space may depend
    on its being the first; so the last tokens that were given are decoded again with the new one.
    """

    def __init__(
        self,
        decode: Callable[[list[int], bool], str],
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._decode, self._skip = decode, skip_special_tokens
        self._ids = list(context)
        self._context = len(self._ids)  # tokens whose text was given before the others came
        self._given = len(decode(self._ids, self._skip))  # characters of the text of _ids that were given

    def push(self, id_: int) -> str:
        """The text that this token completes; "" where it completes none."""
        self._ids.append(id_)
        text = self._decode(self._ids, self._skip)
        waiting = len(self._ids) - self._context <= _LONGEST
        whole = len(text.rstrip(_REPLACEMENT) if waiting else text)
        piece = text[self._given : whole]
        self._given = max(self._given, whole)
        if piece and self._given == len(text):
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._given = len(self._decode(self._ids, self._skip))
        return piece

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was not completed."""
        piece = self._decode(self._ids, self._skip)[self._given :]
        self._ids, self._context, self._given = [], 0, 0
        return piece
