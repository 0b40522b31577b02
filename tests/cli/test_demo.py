"""`nplora demo`: its arguments."""

from typing import Any

import pytest

from nplora import cli
from nplora.cli.demo import dictionary, digits


def test_the_arguments_reach_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dictionary, "run", lambda *arguments: calls.append(("dictionary", *arguments)))
    monkeypatch.setattr(digits, "run", lambda *arguments: calls.append(("digits", *arguments)))
    given = "--output d --rank 2 --seed 1"
    lines = (
        "demo",
        "demo digits",
        f"demo {given} --overwrite",
        f"demo digits {given} --overwrite",
    )
    for line in lines:
        assert cli.main(line.split()) == 0
    assert calls == [
        ("dictionary", "demo-dictionary", 8, 0, False),
        ("digits", "demo-digits", 4, 0, False),
        ("dictionary", "d", 2, 1, True),
        ("digits", "d", 2, 1, True),
    ]


def test_a_rank_of_0_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[int] = []
    for what in (dictionary, digits):
        monkeypatch.setattr(what, "run", lambda output, rank, *_: ranks.append(rank))
    assert cli.main(["demo", "--rank", "0"]) == cli.main(["demo", "digits", "--rank", "0"]) == 0
    assert ranks == [0, 0]
