"""The type of the fixture `figure`."""

from collections.abc import Callable

Figure = Callable[[str, float], None]  # what is measured, and its value
