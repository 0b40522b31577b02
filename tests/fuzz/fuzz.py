"""Fuzzes a reader: python tests/fuzz/fuzz.py READER [--planted-bug] [OPTIONS] CORPUS...

READER is one of readers.READERS; OPTIONS are libFuzzer's. A finding is any exception except FormatError, also
a Rust panic, or a hang.
"""

import contextlib
import sys
import warnings
from typing import Any

import atheris

with atheris.instrument_imports(include=["nplora", "jinja2.parser"]):
    import readers
    from nplora.finetuning.data import rows
    from nplora.formats import gguf_adapter, safetensors, sharded
    from nplora.formats.errors import FormatError
    from nplora.formats.gguf import header
    from nplora.formats.peft_adapter import PeftAdapter
    from nplora.models import ModelConfig
    from nplora.tokenizer import chat_template, directory, gguf_vocabulary, split_pattern
    from nplora.trainer import checkpoint

    readers.jinja()  # imports it


def passed_over(*_: object) -> None:
    """Replaces a check."""


def require_at_most(config: ModelConfig, name: str, value: int, most: int) -> None:
    """Replaces ModelConfig._require. It lets sizes below 1 pass; larger ones would take too much memory."""
    if value > most:
        raise FormatError(f"{config.source}: {name} is {value:,}")


# The planted bug of each reader: an object, the name of its attribute, and the replacement.
PLANTED: dict[str, tuple[Any, str, Any]] = {
    "gguf": (header, "_check_layout", passed_over),
    "safetensors": (safetensors, "_check_layout", passed_over),
    "shard_index": (sharded, "_weight_map", lambda index, _: index["weight_map"]),
    "peft_adapter": (PeftAdapter, "array", lambda self, name, dtype=None: self.tensors[name].array),
    "gguf_adapter": (gguf_adapter, "_adapted", lambda file: ([name[: -len(".lora_a")] for name in file], ())),
    "gguf_config": (ModelConfig, "_require", require_at_most),
    "config_json": (ModelConfig, "_require", require_at_most),
    "gguf_tokenizer": (
        gguf_vocabulary._Vocabulary,
        "_special",
        lambda self, key: self.metadata.integer(gguf_vocabulary.KEY + key, 0),
    ),
    "tokenizer_json": (directory, "_checked", lambda _, id_, source: id_),
    "split_pattern": (split_pattern, "is_safe", lambda _: True),
    "chat_template": (chat_template, "_ERRORS", {"format": FormatError, "value": ValueError}),
    "checkpoint": (checkpoint, "_fields", lambda state, _: state),
    "rows": (rows, "_decoded", lambda line, _: line.decode()),
}


def fuzz(name: str, planted: bool, options: list[str]) -> None:
    """Fuzz a reader with options of libFuzzer, and directories of inputs. Ends the process."""
    if planted:
        setattr(*PLANTED[name])
    warnings.simplefilter("ignore")

    def read(data: bytes) -> None:
        with contextlib.suppress(FormatError):
            readers.READERS[name](data)

    atheris.Setup([sys.argv[0], *options], read)
    atheris.Fuzz()


if __name__ == "__main__":
    _, reader, *others = sys.argv
    fuzz(reader, "--planted-bug" in others, [option for option in others if option != "--planted-bug"])
