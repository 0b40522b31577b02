"""The patterns of adapter_config.json, with `re` as the oracle for the supported syntax."""

import random
import re
import time

import pytest

from nplora.formats.errors import LimitError, UnsafeError
from nplora.formats.name_pattern import Name, NamePattern

NAMES = [
    "",
    "0",
    "1.0",
    "10",
    "fc1",
    "xfc1",
    "a.b-c",
    "enc.fc_1",
    "layers.3.k_proj",
    "model.layers.10.self_attn.q_proj",
]
PATTERNS = [
    "",
    "0",
    "^0",
    "fc1$",
    "a.b-c",
    r"a\.b\-c",
    "q_proj|k_proj",
    r"layers\.\d+\..*(q|k)_proj",
    r"layers\.[13]\.k_\w+",
    ".*?proj",
    "x?fc1",
    "(?:fc|x(f|g)c)1",
    "[^.]+_proj",
    "^model.*q_proj$",
    "enc/?.fc_1",
]


def as_peft(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("text", PATTERNS)
def test_a_pattern_matches_the_names_that_it_matches_in_peft(text: str) -> None:
    pattern = NamePattern(text, "test")
    for name in NAMES:
        assert pattern.matches(Name(name)) == as_peft(text, name), name


def test_random_patterns_are_refused_or_match_as_in_peft() -> None:
    pieces = [
        r"0",
        r"1",
        r".",
        r"*",
        r"+",
        r"?",
        r"(",
        r")",
        r"(?:",
        r"|",
        r"^",
        r"$",
        r"\d",
        r"\.",
        r"_",
        r"[0-9]",
        r"[^q]",
        r"a",
        r"layers",
        r"fc",
        r"{",
        r"]",
        r"\w",
    ]
    rng = random.Random(0)
    read = 0
    for _ in range(3_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 7)))
        try:
            pattern = NamePattern(text, "test")
        except UnsafeError:
            continue
        read += 1
        for name in NAMES:
            assert pattern.matches(Name(name)) == as_peft(text, name), (text, name)
    assert read > 500


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(a*)*",
        "(a|a)+",
        "(a){2}",
        "a{3}",
        "(?i)a",
        "(?=a)",
        r"\bfc",
        r"(a)\1",
        "a**",
        "*a",
        "(a",
        "a)",
        "a\\",
        "[",
        "[a",
        "[[a]",
        "(" * 20 + ")" * 20,
        "#",
        "\n",
    ],
)
def test_other_syntax_is_refused(text: str) -> None:
    with pytest.raises(UnsafeError, match=r"here: character \d+ of the pattern"):
        NamePattern(text, "here")


def test_a_pattern_of_more_than_512_characters_is_refused() -> None:
    NamePattern("a" * 512, "here")
    with pytest.raises(LimitError, match="513 characters, expected at most 512"):
        NamePattern("a" * 513, "here")


@pytest.mark.parametrize(
    "text", [".*" * 250, ".*?" * 100 + "b", "(.|.)" * 100, "(.*|.*|a*)" * 50 + "b", "a?" * 200 + "a" * 99]
)
def test_matching_takes_linear_time(text: str) -> None:
    pattern = NamePattern(text, "here")
    name = Name("a" * 100)
    begin = time.perf_counter()
    pattern.matches(name)
    assert time.perf_counter() - begin < 0.5  # a backtracking matcher would take years


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("^fc1", "fc1"),
        (r"^a\.b\-c", "a.b-c"),
        ("^[q]", "q"),
        ("fc1", None),
        ("^a.b", None),
        ("^fc1|^fc2", None),
        ("^(fc1)", None),
        ("^fc1$", None),
        ("^[qk]", None),
        ("^[^q]", None),
        (r"^\d", None),
        ("^a?b", None),
        ("", None),
    ],
)
def test_a_pattern_that_matches_only_one_name_knows_it(text: str, name: str | None) -> None:
    assert NamePattern(text, "here").only_name == name


def test_an_escaped_and_anchored_name_matches_itself_only() -> None:
    for name in NAMES[1:]:
        pattern = NamePattern("^" + re.escape(name), "here")
        assert [other for other in NAMES if pattern.matches(Name(other))] == [name]
