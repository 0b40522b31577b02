"""Checks the digest that identifies an adapter's base model."""

import re

from nplora.formats.errors import FormatError, brief


def parsed(text: str, where: str) -> str:
    """Check the text of a digest from an untrusted file, and return it.

    Raises:
        FormatError: the text is not 64 hexadecimal digits.
    """
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise FormatError(f"{where} is {brief(text)}, expected 64 hexadecimal digits")
    return text
