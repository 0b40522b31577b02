"""The picture of README, and the script that draws it."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import make_readme_picture as script

from nplora.cli.demo import dictionary

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SVG = "{http://www.w3.org/2000/svg}"


def report(answer: str = "A short answer.") -> SimpleNamespace:
    """The parts of a `DictionaryReport` that are drawn."""
    samples = tuple(SimpleNamespace(before="A <word> & more.", after=answer) for _ in dictionary.WORDS)
    history = SimpleNamespace(loss=list(np.linspace(4.7, 3.6, 107)))
    run = SimpleNamespace(history=history, samples=samples, loss_before=4.61, loss_after=3.63)
    return SimpleNamespace(run=run)


def texts(svg: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f".//{SVG}text")


def test_the_picture_shows_the_held_out_losses_and_the_answers() -> None:
    words = [element.text for element in texts(script.drawn(report()))]
    assert "4.61 held out" in words
    assert "3.63" in words
    assert words.count("A <word> & more.") == words.count("A short answer.") == len(script.SHOWN)


@pytest.mark.parametrize("answer", ["word " * 60, "A short answer."])
def test_every_text_is_inside_the_picture(answer: str) -> None:
    found = texts(script.drawn(report(answer)))
    assert all(0 < float(element.attrib["x"]) < script.WIDTH for element in found)
    assert all(0 < float(element.attrib["y"]) < script.HEIGHT - 8 for element in found)
    answers = [element for element in found if float(element.attrib["x"]) == script.TEXT_LEFT]
    assert max(len(element.text or "") for element in answers) <= script.CHARACTERS + 2


def test_the_picture_in_the_repository_is_small_and_is_that_of_readme() -> None:
    assert f"]({script.PICTURE.relative_to(ROOT).as_posix()})" in README
    svg = script.PICTURE.read_text()
    assert len(svg) < 20_000
    losses = re.search(r"from (\d\.\d\d) to (\d\.\d\d) on held-out entries", README)
    assert losses
    words = [element.text for element in texts(svg)]
    assert {f"{losses[1]} held out", losses[2]} <= set(words)
