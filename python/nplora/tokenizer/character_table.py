"""Checks SentencePiece's table of characters (`precompiled_charsmap`), which normalises texts for Unigram.

A table consists of three parts: the number of bytes of a search tree, the tree, and the replacements. Each
replacement is a UTF-8 text that ends with a zero byte. The tree has the double-array format of the library
darts-clone: it is an array of 32-bit integers ("units"), in blocks of 256 units. A path from the root spells
the bytes of one or more characters. A node of the tree is a unit, whose label is the last byte of the path to
the node. Each node also stores an index, its base. The child of the node for the byte b is the unit with the
index base ^ b. If the characters of a path have a replacement, the unit with the index `base` holds the byte
offset of this replacement in the third part of the table.
"""

from __future__ import annotations

import numpy as np

from nplora.formats.errors import FormatError

MAX_GROWTH = 100  # how many times longer a text may become
_SIZE = 4  # bytes of the size of the tree
_BLOCK = 4 * 256  # bytes of a block of the tree
_LABEL = 1 << 31 | 0xFF  # the bits of a unit's label; the highest bit says that the unit holds a position
_IS_REPLACED = 1 << 8  # set in a node whose characters have a replacement
_IS_FAR = 1 << 9  # set in a node whose offset to its base is shifted left by 8 bits (_IS_FAR >> 6)


def growth(table: bytes, source: str) -> int:
    """Return the largest factor by which the table can lengthen a text.

    This factor is the number of characters in the longest replacement (18 for the table "nmt_nfkc"), but at
    least 1.

    Raises:
        FormatError: the table is damaged. With a damaged table, the package `tokenizers` would print
            a stack trace and fail, perhaps only for a text with certain characters.
    """
    size = int.from_bytes(table[:_SIZE], "little")
    tree, replacements = table[_SIZE : _SIZE + size], table[_SIZE + size :]
    try:
        longest = max(map(len, replacements.decode().split("\0")))
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: precompiled_charsmap is damaged: {error}") from error
    if not size or size % _BLOCK or len(tree) < size or not _is_whole(tree, replacements):
        raise FormatError(f"{source}: precompiled_charsmap is damaged")
    return max(1, longest)


def _is_whole(tree: bytes, replacements: bytes) -> bool:
    """Whether each base is the index of a unit, and each replacement begins at the start of a character."""
    units = np.frombuffer(tree, "<u4")
    bases = np.arange(len(units), dtype=np.uint32) ^ ((units >> 10) << ((units & _IS_FAR) >> 6))
    is_node = units & _LABEL <= 0xFF
    is_node[0] = True  # the root
    if bases[is_node].max() >= len(units):
        return False
    places = units[bases[is_node & (units & _IS_REPLACED != 0)]] & ~np.uint32(1 << 31)
    starts = np.append(np.frombuffer(replacements, np.uint8) & 0xC0 != 0x80, True)
    return bool(places.max(initial=0) < len(starts) and starts[places].all())
