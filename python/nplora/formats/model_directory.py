"""A model's files under Hugging Face's names: config.json, and safetensors in one file or in shards."""

import contextlib
import errno
import gc
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from nplora.formats import files, safetensors, sharded
from nplora.formats.errors import FormatError, UnsafeError
from nplora.formats.files import NewFile, StrPath
from nplora.formats.safetensors import SafetensorsFile
from nplora.formats.sharded import ShardedFile
from nplora.platform.files import link

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # the name in a directory of PEFT
_COMPANIONS = (".json", ".txt", ".model", ".jinja")  # configuration, tokenizer, chat template
_MAX_COMPANION = 64 << 20
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Matches the name OWNER/NAME of a repository on the Hugging Face Hub, the repository's web address, and the
# addresses of its pages. A colon and the name of a quantisation may follow the name, as in Ollama's names.
_HUB_NAME = re.compile(
    r"(?P<host>(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?"
    r"(?P<name>(?!(?:datasets|spaces)/)[a-z\d][\w.-]*/(?P<local>[a-z\d][\w.-]*))(?::\w+)?"
    r"(?(host)(?:/(?P<page>tree|blob|resolve)/(?P<revision>[\w.-]+)(?:/(?P<file>[\w./-]+?))?)?)/?(?(host)(?:\?.*)?)",
    re.ASCII | re.IGNORECASE,
)
# Matches a name with the size of a model, such as SmolLM2-135M-Instruct.
_WITHOUT_OWNER = re.compile(r"[a-z\d][\w.-]*-\d[\d.]*[bm](-[\w.-]+)?", re.ASCII | re.IGNORECASE)
DATA_SET = "a data set"
_NO_HUB_NAMES = (".gguf", ".safetensors", ".json", ".jsonl", ".csv", ".txt", ".bin")  # suffixes of files

Tensors: TypeAlias = SafetensorsFile | ShardedFile


def is_index(path: StrPath) -> bool:
    return files.name(path).lower().endswith(".safetensors.index.json")


def require_no_hub_name(path: StrPath, kind: str = "a model") -> None:
    """Raise an error for a web address or a Hugging Face Hub name, such as "HuggingFaceTB/SmolLM2-135M".

    Paths that exist are accepted. Names that end in a file's suffix, such as "model.gguf", are accepted too.

    Args:
        kind: "a model", "an adapter" or `DATA_SET`, for the message.
    Raises:
        FileNotFoundError: the path is a Hub name or a web address. The message says how to download the
            files.
    """
    named = path.as_posix() if isinstance(path, Path) else files.name(path)
    found = _HUB_NAME.fullmatch(f"OWNER/{named}" if _WITHOUT_OWNER.fullmatch(named) else named)
    if found is None or os.path.lexists(path):
        return
    if found["host"] is None and files.suffix(path) in _NO_HUB_NAMES:
        return
    options, given = _download(found)
    if kind == DATA_SET:
        options, given = f"--repo-type dataset {options}", f"of a file in {given}"
    raise FileNotFoundError(
        errno.ENOENT,
        f"no such file or directory; if it is {kind} on the Hugging Face Hub, download it with "
        f"hf download {options} (pip install huggingface_hub), then use the path {given}",
        named,
    )


def _download(found: re.Match[str]) -> tuple[str, str]:
    """Return the arguments of `hf download` for a name on the Hub, and the path of the downloaded model."""
    name, local, revision, file = found.group("name", "local", "revision", "file")
    if file is None and "gguf" in name.lower():
        file = "FILE.gguf"
    words, given = [name], local
    if file is not None and file.lower().endswith(".gguf"):
        words, given = [name, file], f"{local}/{file}"
    elif file is not None and found["page"] == "tree":  # a folder of the repository
        given = f"{local}/{file}"
    if revision not in (None, "main"):
        words.append(f"--revision {revision}")
    return " ".join([*words, f"--local-dir {local}"]), given


def of(path: StrPath) -> Path:
    """The model's directory: `path` itself, or the directory that contains the file `path`."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def files_of(path: StrPath) -> list[Path]:
    """The files of a model: its configuration, its tokenizer, and its weights or the index of its shards.

    The shards themselves are not included.
    """
    directory, found = of(path), [Path(path)]
    if files.suffix(path) != ".gguf" and directory.is_dir():
        found += [file for file in directory.iterdir() if files.suffix(file) in _COMPANIONS]
        found += [directory / WEIGHTS] * Path(path).is_dir()
    return found


def require_no_model(directory: StrPath) -> None:
    """Raise an error if a directory holds a model, because an adapter must not be saved beside a model.

    Raises:
        FileExistsError: the directory holds a model's configuration or weights.
    """
    found = [path.name for name in (CONFIG, "model*.safetensors") for path in Path(directory).glob(name)]
    if found:
        reason = f"the directory holds a model ({found[0]}): name another directory"
        raise FileExistsError(errno.EEXIST, reason, files.name(directory))


def open_tensors(
    path: StrPath, mmap: bool = True, wanted: Callable[[str], bool] = lambda name: True
) -> Tensors:
    """Open a model's tensors from a safetensors file, an index of shards, or a directory.

    In a directory, a single weights file takes precedence over an index, as in transformers.

    Args:
        mmap: whether to map the files into memory (see `safetensors.open`).
        wanted: a function that returns whether the tensor of a given name is needed. A single
            file is always opened with all its tensors.
    Raises:
        UnsafeError: the directory's weights are a pickle.
        FormatError: the directory has no weights, or a file breaks its format.
        OSError: a file cannot be read.
    """
    path = _required_weights(Path(path)) if Path(path).is_dir() else Path(path)
    return sharded.open(path, mmap, wanted) if is_index(path) else safetensors.open(path, mmap)


def weights_of(directory: Path) -> Path | None:
    """The path of model.safetensors or, if it is missing, of the index; None if both are missing."""
    return next((directory / name for name in (WEIGHTS, INDEX) if os.path.lexists(directory / name)), None)


def _required_weights(directory: Path) -> Path:
    weights = weights_of(directory)
    if weights is not None:
        return weights
    pickles = [name for name in _PICKLES if (directory / name).exists()]
    if pickles:
        raise UnsafeError(f"{directory / pickles[0]}: a pickle can run any code; expected {WEIGHTS}")
    raise FormatError(
        f"{files.name(directory)}: the directory holds neither {WEIGHTS} nor {INDEX}{_but_adapter(directory)}"
    )


def require_config(directory: StrPath) -> None:
    """Raise FileNotFoundError if a directory holds no config.json."""
    if not Path(directory, CONFIG).exists():
        reason = f"the directory holds no {CONFIG}{_but_adapter(directory)}"
        raise FileNotFoundError(errno.ENOENT, reason, os.fspath(directory))


def _but_adapter(directory: StrPath) -> str:
    """The end of a message about a directory without a model; "" if the directory holds no adapter either."""
    if not Path(directory, ADAPTER_CONFIG).exists():
        return ""
    return ", but an adapter: give the base model, and this directory as the adapter"


def companions(source: Path, target: Path) -> list[NewFile]:
    """Read a model's configuration and tokenizer files. Return a `NewFile` in `target` for each.

    Raises:
        UnsafeError: a file is a symbolic link that does not belong to Hugging Face's cache.
        LimitError: a file is too large.
    """
    found = []
    for path in sorted(source.iterdir()):
        if files.suffix(path) in _COMPANIONS and not is_index(path) and path.is_file():
            text = files.read(files.cached(path), _MAX_COMPANION, follow_links=False)
            found.append(NewFile(target / path.name, len(text), [text]))
    return found


@contextlib.contextmanager
def linked(source: Path, weights: Path, changed: Mapping[str, Path] | None = None) -> Iterator[Path]:
    """Make a temporary directory with links to `weights`, and to the configuration and tokenizer in `source`.

    Args:
        source: the directory with the configuration and the tokenizer.
        weights: a safetensors file of any name.
        changed: a dict from names of files in `source` to the paths of the files that are linked instead.
    """
    with tempfile.TemporaryDirectory(prefix="nplora-", ignore_cleanup_errors=True) as made:
        for path in source.iterdir():
            if files.suffix(path) in _COMPANIONS and not is_index(path) and path.is_file():
                link((changed or {}).get(path.name, path).absolute(), Path(made, path.name))
        link(weights.absolute(), Path(made, WEIGHTS))
        try:
            yield Path(made)
        finally:
            gc.collect()  # Windows removes no file that is mapped by a model, which may be in a cycle
