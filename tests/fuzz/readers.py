"""The readers of untrusted files, each as a function of bytes, for fuzzing and damage tests.

Each may raise FormatError and nothing else, and checks the content that it accepted. If a reader takes
several files, zero bytes separate them.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nplora import adapters
from nplora.finetuning.data import read_dataset
from nplora.formats import bitsandbytes, gguf, peft_adapter, safetensors, sharded, strict_json
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.formats.gguf.writer import MAX_NAME
from nplora.models import ModelConfig, families, gguf_config, hf_config
from nplora.tokenizer import Tokenizer, from_directory, from_gguf, gguf_metadata, split_pattern
from nplora.tokenizer.chat_template import ChatTemplate
from nplora.tokenizer.tokenizer import backend_package
from nplora.trainer import checkpoint
from nplora.trainer.history import History

TEXT = "a ab<s> <|end|>▁1é\n\x00"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<s>Hello"}]
COLUMNS = History().step_columns()
SHARD = safetensors.dumps({"a": np.ones(2)})
BASE = b'{"model_type": "llama", "num_attention_heads": 2}'


@functools.cache
def directory() -> Path:
    """The directory for readers that take a path. TMPDIR chooses its file system."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def file(name: str, data: bytes) -> Path:
    path = directory() / name
    path.write_bytes(data)
    return path


constant_file = functools.cache(file)


# ---- containers ----


def read_gguf(data: bytes) -> None:
    """Accepted content can be written and read again."""
    content = gguf.loads(data)
    for key in content.metadata:
        value = content.metadata[key]
        assert isinstance(value, str | int | float) or len(list(value)) == len(value)
    for tensor in content.values():
        with contextlib.suppress(UnsupportedError):
            assert tensor.numpy().shape == tensor.shape
    if all(len(name.encode()) <= MAX_NAME for name in content):
        written = gguf.dumps(content, content.metadata.typed())
        again = gguf.loads(written)
        assert gguf.dumps(again, again.metadata.typed()) == written


def read_safetensors(data: bytes) -> None:
    """Accepted content can be written and read again."""
    content = safetensors.loads(data)
    for name, entry in content.entries.items():
        assert content[name].numpy().shape == entry.shape
    written = safetensors.dumps(content, content.metadata)
    again = safetensors.loads(written)
    assert safetensors.dumps(again, again.metadata) == written
    for name in content:
        if bitsandbytes.holds(content, name):
            matrix = bitsandbytes.read(content, name)
            assert 2 * matrix.codes.size >= math.prod(matrix.shape)


def read_shard_index(data: bytes) -> None:
    constant_file("a.safetensors", SHARD)
    with contextlib.suppress(OSError):  # another plain name, for which there is no file
        assert set(sharded.open(file("model.safetensors.index.json", data))) <= {"a"}


# ---- adapters ----


def read_peft_adapter(data: bytes) -> None:
    """adapter_config.json, then adapter_model.safetensors."""
    config, _, tensors = data.partition(b"\0")
    file(peft_adapter.CONFIG, config)
    file(peft_adapter.TENSORS, tensors)
    _check_updates(adapters.read_adapter(directory()))


def read_gguf_adapter(data: bytes) -> None:
    base = constant_file("base.json", BASE)
    _check_updates(adapters.read_adapter(file("adapter.gguf", data), base))


def _check_updates(adapter: adapters.Adapter) -> None:
    for update in adapter.values():
        assert update.A.shape[1] == update.B.shape[0] >= 1
        assert np.isfinite(update.A).all()
        assert np.isfinite(update.B).all()
        assert math.isfinite(update.scale)


# ---- models ----


def read_gguf_config(data: bytes) -> None:
    _check_config(gguf_config.read(gguf.loads(data)))


def read_config_json(data: bytes) -> None:
    _check_config(hf_config.read(file("config.json", data)))


def _check_config(config: ModelConfig) -> None:
    assert np.isfinite(config.rope.frequencies(config.rotary_dim or config.head_dim)).all()
    for tensor in itertools.islice(families.of(config).tensors(config), 20):
        assert min(tensor.shape) >= 1
    assert len(config.sliding_windows) == config.num_hidden_layers
    assert min(config.sliding_windows) >= 0


# ---- tokenizers ----


def read_gguf_tokenizer(data: bytes) -> None:
    _use(from_gguf(gguf.loads(data)))


def read_tokenizer_json(data: bytes) -> None:
    """tokenizer.json, tokenizer_config.json, then generation_config.json."""
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name, part in itertools.zip_longest(names, data.split(b"\0", len(names) - 1), fillvalue=b"{}"):
        file(name, part)
    with contextlib.suppress(FormatError):
        gguf.dumps({}, gguf_metadata.from_directory(directory(), 300))
    _use(from_directory(directory()))


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=True, parse_special=True)
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in [*ids, *tokenizer.eos_ids])
    assert len(tokenizer.decode(ids)) <= 1000 * len(TEXT)
    if tokenizer.chat_template is not None:
        with contextlib.suppress(ValueError):  # it may refuse the chat
            tokenizer.apply_chat_template(CHAT)


def read_split_pattern(data: bytes) -> None:
    """A search for an accepted pattern ends before Oniguruma gives up and Rust panics."""
    pattern = data.decode(errors="replace")
    if split_pattern.is_safe(pattern):
        text = "a" * 40 + pattern + " \n"
        try:
            regex = backend_package().Regex(pattern)
        except Exception as error:
            raise FormatError("no regular expression") from error
        pieces = backend_package().pre_tokenizers.Split(regex, "isolated").pre_tokenize_str(text)
        assert "".join(piece for piece, _ in pieces) == text


def read_chat_template(data: bytes) -> None:
    """The template is also parsed here, because the fuzzer cannot see into the rendering process."""
    from jinja2.parser import Parser

    text = data.decode(errors="replace")
    with contextlib.suppress(Exception):
        Parser(jinja(), text).parse()
    with contextlib.suppress(ValueError):  # it may refuse the chat
        ChatTemplate(text, "the model").render(CHAT, bos_token="<s>")


@functools.cache
def jinja() -> Any:
    from jinja2 import Environment

    return Environment(extensions=["jinja2.ext.loopcontrols"])


# ---- runs ----


def read_checkpoint(data: bytes) -> None:
    """The state in a checkpoint's metadata, then the run's log."""
    raw, _, log = data.partition(b"\0")
    state = checkpoint._fields(strict_json.loads(raw, "the state"), directory())
    history = History()
    with contextlib.suppress(ValueError, TypeError):  # resuming turns these into CorruptError
        history.restore(COLUMNS, state["epochs"], state["evaluations"])
    history.add_log(log, state["step"], state["epoch"])
    assert all(record.step <= state["step"] for record in [*history.steps, *history.evaluations])


ROW_FILES = {"a": ".json", "c": ".csv", "s": ".tsv", "t": ".txt", "z": ".jsonl.gz", "y": ".json.gz"}
ROW_FILES["n"] = ".conll"
if importlib.util.find_spec("pyarrow"):
    ROW_FILES |= {"p": ".parquet", "w": ".arrow"}


def read_rows(data: bytes) -> None:
    """A letter for the kind of file, then a file of training data."""
    suffix = ROW_FILES.get(data[:1].decode(errors="replace"), ".jsonl")
    path = file(f"train{suffix}", data[1:])
    for ids, labels in read_dataset(path, _tokenizer(), max_length=512, skip_bad=True):
        assert 2 <= len(ids) == len(labels) <= 512


@functools.cache
def _tokenizer() -> Tokenizer:
    from seeds import gguf_tokenizer_seeds

    return from_gguf(gguf.loads(gguf_tokenizer_seeds()["byte level"]))


READERS: dict[str, Callable[[bytes], None]] = {
    "gguf": read_gguf,
    "safetensors": read_safetensors,
    "shard_index": read_shard_index,
    "peft_adapter": read_peft_adapter,
    "gguf_adapter": read_gguf_adapter,
    "gguf_config": read_gguf_config,
    "config_json": read_config_json,
    "gguf_tokenizer": read_gguf_tokenizer,
    "tokenizer_json": read_tokenizer_json,
    "split_pattern": read_split_pattern,
    "chat_template": read_chat_template,
    "checkpoint": read_checkpoint,
    "rows": read_rows,
}
