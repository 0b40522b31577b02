"""The type of the fixture `figure`."""

from collections.abc import Callable

Figure = Callable[[str, float], None]  # the name of the figure, and its value
