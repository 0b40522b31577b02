"""The digest of a base model, as the files of adapters have it."""

import re

from nplora.formats.errors import FormatError, brief


def parsed(text: str, where: str) -> str:
    """A digest as a file has it, which nobody vouches for.

    Raises:
        FormatError: it is none.
    """
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise FormatError(f"{where} is {brief(text)}, expected 64 hexadecimal digits")
    return text
