"""Lines for the shell: it splits them into the words that they were made of."""

import pytest

import systems
from nplora.platform import processes

PATHS = [
    "a",
    r"C:\x\y",
    r"C:\my models\m.gguf",
    r"C:\a b" + "\\",
    "a&b",
    "(c)\\",
    "",
    "ä 漢",
    'say "hi"',
    "it's",
]


@pytest.mark.parametrize("word", PATHS)
def test_a_line_is_split_into_the_words_that_it_was_made_of(word: str) -> None:
    words = ["nplora", "finetune", word, "--data", word]
    assert systems.words_of(processes.command_line(words)) == words
