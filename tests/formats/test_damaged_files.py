"""Every reader on every truncation and every damaged byte of small files: FormatError or usable content."""

import pytest

from hostile import accepted
from readers import READERS
from seeds import SEEDS

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

SMALL_FILES = [
    ("safetensors", "nested nf4"),
    ("shard_index", "metadata"),
    ("peft_adapter", "dora"),
    ("peft_adapter", "patterns"),
    ("gguf_adapter", "embedding"),
    ("gguf_config", "large"),
    ("config_json", "llama 3"),
    ("gguf_tokenizer", "byte level"),
    ("gguf_tokenizer", "pieces"),
    ("gguf_tokenizer", "unigram"),
    ("tokenizer_json", "for gguf"),
    ("tokenizer_json", "word piece"),
    ("checkpoint", "best"),
    ("rows", "jsonl"),
    ("rows", "csv"),
    ("rows", "array"),
    ("rows", "gzip"),
    ("rows", "alpaca"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("reader", "name"), SMALL_FILES)
def test_every_cut_and_every_damaged_byte_give_format_errors_or_usable_content(
    reader: str, name: str
) -> None:
    data = SEEDS[reader]()[name]
    READERS[reader](data)
    assert list(accepted(data, READERS[reader]))
