"""Finds the base model that an adapter_config.json names: a path, or a model in Hugging Face's cache."""

import errno
import os
import re
from pathlib import Path

from nplora.formats import files, model_directory, peft_adapter
from nplora.formats.errors import brief
from nplora.formats.files import StrPath

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_OTHERS = "use --base MODEL (base)"


def find(directory: StrPath) -> Path:
    """Find the base model that the adapter_config.json of a PEFT adapter names.

    The name is first tried as a path, as PEFT does, and then as a model of the Hugging Face Hub in the local
    cache. The adapter is not trusted, so the name must lead to a GGUF file, a config.json, or a directory
    that holds a config.json.

    Raises:
        ValueError: the file names no model, or a model that is not found.
    """
    with peft_adapter.reading(directory) as adapter:
        name = adapter.config.base_model_name_or_path
    source = files.name(Path(directory, peft_adapter.CONFIG))
    if not name:
        raise ValueError(f"convert: {source} does not name the base model; {_OTHERS}")
    for path in (Path(name), *_cached(name)):
        if _is_base(path):
            return path
    hint = "" if os.path.isabs(name) else " (it may be a relative path from another directory)"
    raise ValueError(
        f"convert: {source} names the base model {brief(name)}, which is not found{hint}; {_OTHERS}"
    )


def _is_base(path: Path) -> bool:
    try:
        if path.is_dir():
            return (path / model_directory.CONFIG).is_file()
        return path.is_file() and (files.suffix(path) == ".gguf" or path.name == model_directory.CONFIG)
    except ValueError:  # the path holds "\0"
        return False
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _cached(name: str) -> list[Path]:
    """A list with a Hub model's directory in huggingface_hub's cache; empty if there is no such model."""
    if _HUB_NAME.fullmatch(name) is None:
        return []
    repository = _cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return []
    return [repository / "snapshots" / revision] if re.fullmatch(r"[0-9a-f]{40}", revision) else []


def _cache() -> Path:
    """The directory of Hugging Face's cache, from the environment variables that huggingface_hub reads."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
