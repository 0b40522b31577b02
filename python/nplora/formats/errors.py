"""The errors that file readers raise. All of the errors derive from FormatError."""

import difflib
import itertools
from collections.abc import Iterable, Sequence


class FormatError(ValueError):
    """The bytes do not follow the format.

    The message names the file and the field or tensor, then says what was found and what is allowed.

    >>> import nplora
    >>> nplora.formats.safetensors.loads(b"\\x02" + bytes(7) + b"[]")
    Traceback (most recent call last):
    nplora.formats.errors.FormatError: <bytes>: the header begins with '[]', expected '{'
    """


class TruncatedError(FormatError):
    """The file is shorter than its header says.

    >>> import nplora
    >>> whole = nplora.formats.safetensors.dumps({"w": np.ones(4)})
    >>> nplora.formats.safetensors.loads(whole[:-8])
    Traceback (most recent call last):
    nplora.formats.errors.TruncatedError: <bytes>: the tensors end at byte 96, but the file has 88 bytes
    """


class LimitError(FormatError):
    """A size or count exceeds a documented limit. Limits are checked before memory is allocated.

    >>> import nplora
    >>> nplora.formats.safetensors.loads((1 << 60).to_bytes(8, "little") + b"{}")
    Traceback (most recent call last):
    nplora.formats.errors.LimitError: <bytes>: ... expected at most 100,000,000
    """


class UnsupportedError(FormatError):
    """The file is well formed, but it uses a feature that nplora does not support.

    >>> import json, nplora
    >>> os.mkdir("gpt2")
    >>> with open("gpt2/config.json", "w") as file:
    ...     json.dump({"model_type": "gpt2"}, file)
    >>> nplora.formats.safetensors.save("gpt2/model.safetensors", {"wte.weight": np.ones((8, 8))})
    >>> nplora.load_model("gpt2")
    Traceback (most recent call last):
    nplora.formats.errors.UnsupportedError: gpt2/config.json: model_type is 'gpt2', expected one of ...
    """


class NotFetchedError(FormatError):
    """The file is a Git LFS pointer. The real content has not been downloaded.

    >>> import nplora
    >>> with open("pointer.gguf", "w") as file:
    ...     _ = file.write("version https://git-lfs.github.com/spec/v1")
    >>> nplora.load_model("pointer.gguf")
    Traceback (most recent call last):
    nplora.formats.errors.NotFetchedError: pointer.gguf: is a Git LFS pointer; ...
    """


class UnsafeError(FormatError):
    """Reading this file could run code, access files outside the file's directory, or hang.

    >>> import nplora
    >>> os.symlink("model.gguf", "link.safetensors")
    >>> nplora.formats.safetensors.open("link.safetensors", follow_links=False)
    Traceback (most recent call last):
    nplora.formats.errors.UnsafeError: link.safetensors: a symbolic link, expected a regular file
    """


class CorruptError(FormatError):
    """A file is damaged, was changed while it was in use, or does not fit the model or the training run.

    >>> import nplora
    >>> with open("adapter/adapter_config.json") as file:
    ...     config = file.read()
    >>> with open("adapter/adapter_config.json", "w") as file:
    ...     _ = file.write(config.replace('"lora_alpha": 16', '"lora_alpha": 32'))
    >>> nplora.read_adapter("adapter")
    Traceback (most recent call last):
    nplora.formats.errors.CorruptError: adapter/adapter_config.json: is not the file that was saved ...
    """


class DataError(FormatError):
    """A line of training data is invalid.

    >>> import nplora
    >>> with open("train.jsonl", "w") as file:
    ...     _ = file.write('{"question": "When are you open?", "answer": "From ten to six."}')
    >>> nplora.data.read_dataset("train.jsonl", nplora.load_model("model.gguf").tokenizer)
    Traceback (most recent call last):
    nplora.formats.errors.DataError: train.jsonl, line 1: the row has ['question', 'answer'], expected ...
    """


# These limits bound difflib's time, which is quadratic in a name's length and linear in the number of names.
_LONGEST_NAME = 256
_MOST_NAMES = 5_000


_MOST_PROBLEMS = 10  # problems listed in one message; the rest are only counted


def require_not_empty(size: int, source: str) -> None:
    """Raise TruncatedError if a file of `size` bytes is empty."""
    if not size:
        raise TruncatedError(f"{source}: the file is empty")


def in_places(problems: Sequence[str]) -> str:
    """Format a list of problems as the end of a message: "in 2 places:", then one line per problem."""
    shown = [*problems[:_MOST_PROBLEMS], *(["…"] if len(problems) > _MOST_PROBLEMS else [])]
    return f"in {counted(len(problems), 'place')}:" + "".join(f"\n  {problem}" for problem in shown)


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 step, 2 steps, 1,000 steps."""
    return f"{count:,} {noun}{'s'[: count != 1]}"


def nearest_names(name: str, names: Iterable[str], count: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return at most `count` of the `names`: the ones most similar to `name`, in order of similarity.

    A similarity of 1 means that two names are equal. Names below the similarity `cutoff` are left out.

    To limit the time, the search skips names of more than 256 characters, and all names after the first
    5,000.
    """
    short = [known for known in itertools.islice(names, _MOST_NAMES) if len(known) <= _LONGEST_NAME]
    return difflib.get_close_matches(name[:_LONGEST_NAME], short, n=count, cutoff=cutoff)


def missing_name(source: str, name: object, names: Iterable[str], kind: str = "tensor") -> KeyError:
    """Make the KeyError for a name that a mapping lacks. The message suggests the most similar names."""
    near = ", ".join(map(repr, nearest_names(str(name), names)))
    return KeyError(f"{source}: no {kind} {brief(name)}{near and f', the nearest names: {near}'}")


def quoted(data: bytes) -> str:
    """Bytes in quotes, such as 'GGUF', for use in a message."""
    return repr(data)[1:]


def brief(value: object, length: int = 80) -> str:
    """`repr(value)`, cut to `length` characters, for use in a message."""
    text = repr(value[: length + 1] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= length else text[: length - 1] + "…"
