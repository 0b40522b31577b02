"""Decodes tokens to text while they arrive, one by one."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # a decoder's output for bytes that are not (yet) a whole character
_LONGEST = 64  # after this many tokens without a whole character, the text is returned with U+FFFD


class StreamDecoder:
    """Decodes tokens one by one, and returns only whole characters.

    One UTF-8 character may span several tokens, and the first token of a decoded text may lose its leading
    space. So each new token is decoded together with the tokens just before it. `Tokenizer.stream` creates a
    decoder.

    >>> parts = [bytes([byte]) for byte in "€5".encode()]  # a euro sign has three bytes
    >>> decoder = StreamDecoder(lambda ids, skip: b"".join(parts[i] for i in ids).decode(errors="replace"))
    >>> [decoder.push(i) for i in range(4)]
    ['', '', '€', '5']
    """

    def __init__(
        self,
        decode: Callable[[list[int], bool], str],
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._decode, self._skip = decode, skip_special_tokens
        self._ids = list(context)
        self._context = len(self._ids)  # the first tokens of _ids, whose text was returned before
        self._given = len(decode(self._ids, self._skip))  # how many characters of _ids' text were returned

    def push(self, id_: int) -> str:
        """Add a token. Return the characters that this token completes, or an empty text.

        >>> decoder = StreamDecoder(lambda ids, skip: "".join("abc"[id_] for id_ in ids))
        >>> decoder.push(0), decoder.push(2)
        ('a', 'c')
        """
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
        """Return the text that `push` has not returned yet. U+FFFD replaces an incomplete character.

        >>> parts = [bytes([byte]) for byte in "€".encode()[:2]]  # two of the three bytes of a euro sign
        >>> read = lambda ids, skip: b"".join(parts[i] for i in ids).decode(errors="replace")
        >>> decoder = StreamDecoder(read)
        >>> decoder.push(0), decoder.push(1), decoder.flush()
        ('', '', '�')
        """
        piece = self._decode(self._ids, self._skip)[self._given :]
        self._ids, self._context, self._given = [], 0, 0
        return piece
