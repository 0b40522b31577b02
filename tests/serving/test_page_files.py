"""The files of the web page, as they are installed."""

import re

from serving.stand_in import PAGE


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 60_000
    for file in PAGE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://[a-z]", text), file
