"""Reads the adapters on a command line, given as NAME=PATH or PATH."""

import os
from collections.abc import Iterable
from pathlib import Path

from nplora.cli.errors import UsageError


def named_adapters(given: Iterable[str]) -> dict[str, str]:
    """Return {name: path} for texts such as "tone=out/tone" and "out/tone".

    A text with "=" is read as NAME=PATH. But the whole text is a PATH if a file or directory of this name
    exists, or if the part before "=" is not a valid name. An adapter without a name gets the name of its file
    or directory.

    Raises:
        UsageError: a path is empty, or two adapters have the same name.
    """
    from nplora.serving.api.models import default_name
    from nplora.serving.model_name import is_name

    found = dict[str, str]()
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not is_name(name) or os.path.exists(text):
            name, path = "", text
        if not path:
            raise UsageError(f"--adapter is {text!r}, expected NAME=PATH")
        name = name or default_name(Path(os.path.abspath(path)))
        if name in found:
            raise UsageError(f"two adapters have the name {name!r}; choose another with --adapter NAME=PATH")
        found[name] = path
    return found
