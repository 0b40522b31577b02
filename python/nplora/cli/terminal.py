"""Makes a model's text safe to print on a terminal."""

import sys

# Escape sequences begin with ESC or with a C1 control character. They could change the clipboard or earlier
# output. Unicode has visible symbols for the control characters below the space.
_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"},
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
    0x7F: "\u2421",
    ord("\r"): None,
}


def printed(text: str) -> str:
    """If stdout is a terminal, make the control characters of a text visible.

    Tabs and line feeds stay, and carriage returns are removed.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return text.translate(_SHOWN) if is_terminal else text
