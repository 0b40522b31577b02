"""SentencePiece's table of characters (`precompiled_charsmap`), by which Unigram normalises a text."""

from __future__ import annotations

MAX_GROWTH = 100  # how many times longer a text may become
_SIZE = 4  # bytes of the size of the search tree, which precedes the replacements
_NODE = 4  # bytes of a node of the tree


def growth(table: bytes) -> int:
    """The largest number of characters by which the table replaces one character, at least 1.

    The replacements stand behind the search tree, and a 0 ends each of them. The longest one of the table
    "nmt_nfkc" has 18 characters.
    """
    tree = int.from_bytes(table[:_SIZE], "little") // _NODE * _NODE
    return max(1, *map(len, table[_SIZE + tree :].decode("utf-8", "replace").split("\0")))
