"""PagePool: the pages of the key-value cache. A page is free, in use, or kept.

When all tokens of a page belong to the prompt and are computed, the page gets a key. The key is a hash that
identifies the adapter and all tokens from the start of the prompt to the end of the page. Another request
whose prompt begins with the same tokens finds the page by its key, and shares the page. When no request uses
the page any more, the page is kept for later prompts until its memory is needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from nplora.models.invocation import NEVER

Key = bytes


class PagePool:
    """Keeps track of which pages are free, in use or kept.

    Args:
        pages: the number of pages.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # the first pages are used first
        self._users = [0] * pages
        self._keys: list[Key | None] = [None] * pages
        self._by_key: dict[Key, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # unused pages with a key, the oldest first

    @property
    def available(self) -> int:
        """The number of pages that `new` can return: all free pages and all kept pages."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """The number of kept pages: no request uses them, but they hold the beginning of a prompt."""
        return len(self._kept)

    def new(self) -> int | None:
        """Return a page for a request. If no page is free, return a kept page, and forget its content.

        Return None if all pages are in use.
        """
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._users[page] = 1
        return page

    def share(self, key: Key) -> int | None:
        """Return the page with this key, which now has one more user; None if no page has this key."""
        page = self._by_key.get(key)
        if page is not None:
            self._kept.pop(page, None)
            self._users[page] += 1
        return page

    def has(self, key: Key) -> bool:
        """Whether a page has this key."""
        return key in self._by_key

    def is_used(self, key: Key) -> bool:
        """Whether a request uses the page with this key. Sharing a used page does not reduce `available`."""
        page = self._by_key.get(key)
        return page is not None and self._users[page] > 0

    def publish(self, page: int, key: Key) -> None:
        """Give a key to a page whose tokens are all computed, so that other requests can share the page."""
        if key not in self._by_key:
            self._by_key[key], self._keys[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Release the pages of a request. `pages` must be in the order of the request's tokens.

        A page is useless without the pages before it. So `new` reuses the last kept page of a request first.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page] and self._keys[page] is not None:
                self._kept[page] = None
            elif not self._users[page]:
                self._free.append(page)

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._by_key[key]
        self._keys[page] = None


def page_keys(root: str, ids: Sequence[int], page_tokens: int, start: int = int(NEVER)) -> Iterator[Key]:
    """Yield the key of each full page of a prompt.

    Args:
        root: a text that identifies the adapter. Attention keys and values depend on the adapter, so pages of
            different adapters need different keys.
        start: the position of the first token for which an activated LoRA is active.
    """
    tokens, key = np.asarray(ids, np.int64), hashlib.sha256(root.encode()).digest()
    for begin in range(0, len(tokens) - page_tokens + 1, page_tokens):
        acts = start if start < begin + page_tokens else -1
        part = acts.to_bytes(8, "little", signed=True) + tokens[begin : begin + page_tokens].tobytes()
        key = hashlib.sha256(key + part).digest()
        yield key
