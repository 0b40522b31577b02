"""message_of: what a reader without a traceback sees of an error. tests/cli/test_entry.py has more errors."""

import os

import pytest

from nplora.cli.errors import UsageError
from nplora.cli.parser import WrongArguments
from nplora.distributed import RankError
from nplora.formats.errors import DataError
from nplora.runtime.error_text import message_of


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("rank is 0"), "rank is 0"),
        (UsageError("--output is missing"), "--output is missing"),
        (DataError("a.jsonl, line 1: no text"), "a.jsonl, line 1: no text"),
        (FileNotFoundError(2, os.strerror(2), "x"), "no such file: x"),
        (RankError(1, "out of memory"), "rank 1: out of memory"),
        (WrongArguments("argument --lr: invalid"), "argument --lr: invalid"),
        (MemoryError(), "out of memory"),
        (KeyboardInterrupt(), "interrupted"),
        # the message alone says too little
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
        (ValueError(), "ValueError"),
        (SystemExit(143), "SystemExit: 143"),
        (SystemExit(), "SystemExit"),
    ],
)
def test_the_name_of_a_class_is_shown_only_if_the_message_says_too_little(
    error: BaseException, message: str
) -> None:
    assert message_of(error) == message
