"""Checks the names of models and adapters in the API."""

from __future__ import annotations

import re

from nplora.formats.errors import brief
from nplora.serving.request_error import RequestError

NAME = re.compile(r"[^\W_][\w.:@+-]*(/[^\W_][\w.:@+-]*)*")
LONGEST_NAME = 200


def checked_name(what: str, name: object, param: str = "lora_name") -> str:
    """Check the name of a model.

    A name consists of letters, digits and the characters ``._:@+-/``. At the start and after each "/", a
    letter or a digit is required, and ".." is not allowed.

    Raises:
        RequestError: the name breaks one of these rules, or has more than 200 characters.
    """
    if isinstance(name, str) and len(name) > LONGEST_NAME:
        message = f"{what} has {len(name)} characters, expected at most {LONGEST_NAME}: {brief(name)}"
        raise RequestError(message, param=param, code="invalid_value")
    if not isinstance(name, str) or not is_name(name):
        raise RequestError(
            f"{what} is {brief(name)}, expected letters, digits and any of . _ : @ + - /",
            param=param,
            code="invalid_value",
        )
    return name


def is_name(text: str) -> bool:
    """Whether a text can be the name of a model."""
    return len(text) <= LONGEST_NAME and NAME.fullmatch(text) is not None and ".." not in text
