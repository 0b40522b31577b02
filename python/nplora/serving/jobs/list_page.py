"""Divides lists into pages, as OpenAI's API does."""

from __future__ import annotations

from collections.abc import Sequence

from nplora.formats.errors import brief
from nplora.serving.jobs.shapes import Shape
from nplora.serving.request_error import RequestError


def list_page(items: Sequence[Shape], after: str | None, limit: int, most: int) -> Shape:
    """Return a page of a list, in the form of OpenAI's API: items that follow the item with the id `after`.

    Args:
        after: the id of an item; None: the page begins with the first item.
        limit: the largest number of items in the page, from 1 to `most`.
    Raises:
        RequestError: `limit` is out of range, or no item has the id `after`.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= most:
        message = f"limit is {brief(limit)}, expected an integer from 1 to {most:,}"
        raise RequestError(message, param="limit", code="invalid_value")
    start = 0
    if after is not None:
        start = 1 + next((index for index, item in enumerate(items) if item["id"] == after), -1)
        if not start:
            raise RequestError(f"no item has the id {brief(after)}", param="after", code="invalid_value")
    found = list(items[start : start + limit])
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": start + limit < len(items),
    }
