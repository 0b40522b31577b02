"""Reads an adapter from a directory, a file, a model with LoRA layers, or an `Adapter`."""

import os
from pathlib import Path
from typing import TypeAlias

from nplora.adapters import gguf_files, layers, peft_files
from nplora.adapters.content import AdapterContent
from nplora.adapters.fitting import ANYTHING, Target
from nplora.formats import files, gguf_adapter, peft_adapter
from nplora.formats.files import StrPath
from nplora.nn.module import Module

Source: TypeAlias = StrPath | Module | AdapterContent


def read(
    path: StrPath,
    base: StrPath | None = None,
    edited_config: bool = False,
    any_base: bool = False,
    target: Target = ANYTHING,
) -> AdapterContent:
    """Read a PEFT directory or a llama.cpp file."""
    files.require_named("read_adapter", source=path)
    if Path(path).exists() and not Path(path).is_dir():
        return gguf_files.read(path, base, any_base)[0]
    return peft_files.read(path, target, edited_config, any_base)


def trained_with_template(path: StrPath) -> bool | None:
    """Whether an adapter's training data were formatted with the chat template; None if that is not known."""
    if Path(path).is_file():
        return gguf_adapter.trained_with_template(path)
    return peft_adapter.trained_with_template(path)


def read_any(
    source: Source, base: StrPath | None = None, edited_config: bool = False, any_base: bool = False
) -> AdapterContent:
    """Read an adapter from any `Source`."""
    if isinstance(source, Module):
        return layers.from_model(source, "read_adapter")
    if isinstance(source, str | os.PathLike):
        return read(source, base, edited_config, any_base)
    if isinstance(source, AdapterContent):
        return source
    raise TypeError(
        f"read_adapter: got {source!r}, expected a PEFT directory, a llama.cpp file, a model or an Adapter"
    )
