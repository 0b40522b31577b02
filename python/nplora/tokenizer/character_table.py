"""SentencePiece's table of characters (`precompiled_charsmap`), by which Unigram normalises a text."""

from __future__ import annotations

from nplora.formats.errors import UnsafeError

MAX_GROWTH = 100  # how many times longer a text may become
_SIZE = 4  # bytes of the size of the search tree, which precedes the replacements


def require_bounded(table: bytes, source: str) -> None:
    """Raise UnsafeError if the table replaces a character by a very long text.

    The replacements stand behind the search tree, and a 0 ends each of them. The longest one of the table
    "nmt_nfkc" has 18 characters.
    """
    tree = int.from_bytes(table[:_SIZE], "little")
    longest = max(map(len, table[_SIZE + tree :].decode("utf-8", "replace").split("\0")))
    if longest > MAX_GROWTH:
        raise UnsafeError(
            f"{source}: the table of characters could make a text over {MAX_GROWTH} times as long"
        )
