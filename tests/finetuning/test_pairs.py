"""Rows of chosen and rejected answers: their prompt, and pairs that are none."""

from typing import Any

import pytest

from nplora.finetuning.data.comparisons import PairDataset, read_pairs
from nplora.finetuning.data.dataset import ReadOptions
from nplora.finetuning.data.sources import splits_of
from nplora.formats.errors import DataError
from nplora.models.packing import IGNORED
from nplora.tokenizer import Tokenizer, from_gguf
from vocabularies import byte_level, opened

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

CHATML = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
USER, YES = {"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}


def tokenizer(template: str = CHATML) -> Tokenizer:
    return from_gguf(opened(byte_level() | {"tokenizer.chat_template": template}))


def read(row: dict[str, Any], words: Tokenizer, **options: Any) -> list[tuple[str, str]]:
    """The text of both sequences, and the text of their trained tokens."""
    data = read_pairs(
        "test", splits_of("test", [row]).train, words, ReadOptions(**options), "dpo", PairDataset
    )
    return [(words.decode(ids), words.decode(labels[labels != IGNORED])) for ids, labels in data[0]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "yes", "rejected": "yes "},
        {"prompt": [USER], "chosen": [YES], "rejected": [{**YES, "weight": 1}]},
        {"prompt": [USER], "chosen": [YES], "rejected": [{**YES, "name": "b"}]},
    ],
    ids=["space", "weight", "name"],
)
def test_answers_that_the_template_writes_alike_are_no_pair(row: dict[str, Any]) -> None:
    words = tokenizer(CHATML.replace("m.content", "m.content | trim"))
    with pytest.raises(DataError, match="row 1: chosen and rejected have the same tokens, expected two answ"):
        read(row, words)
    with pytest.raises(DataError, match="no examples: 1 bad row skipped"):
        read(row, words, skip_bad=True)
