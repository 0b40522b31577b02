"""Exports a model, with or without an adapter, for Ollama: a directory with a GGUF file and a Modelfile."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nplora import _check, tokenizer
from nplora.adapters.gguf_files import adapter_to_gguf
from nplora.adapters.merge_files import merge_adapter
from nplora.adapters.sources import trained_with_template
from nplora.formats import files, gguf, model_directory
from nplora.formats.errors import FormatError, UnsupportedError, brief
from nplora.formats.files import NewFile, StrPath
from nplora.formats.gguf import GgufFile
from nplora.models import gguf_export
from nplora.platform.processes import command_line
from nplora.tokenizer import go_template

MODELFILE, MODEL, ADAPTER = "Modelfile", "model.gguf", "adapter.gguf"
_OP = "export"
_CONTEXT = 4096  # tokens; Ollama allocates memory for the whole context
# The names of Ollama's parameters (the structs Options and Runner in its api/types.go). Each key is a
# description of the values and a regular expression for them.
_NAMES = {
    ("a whole number", r"[+-]?[0-9]{1,18}"): (
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"),
        *("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"),
    ),
    ("a number", r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?"): (
        *("top_p", "min_p", "typical_p", "temperature"),
        *("repeat_penalty", "presence_penalty", "frequency_penalty"),
    ),
    ("true or false", "true|false"): ("use_mmap",),
    ("one line of text", r"[^\n]*[^\s][^\n]*"): ("stop",),
}
_VALUES = {name: values for values, names in _NAMES.items() for name in names}


@dataclass(frozen=True)
class OllamaExport:
    """What `export_ollama` wrote.

    Attributes:
        directory: the directory that was written.
        lines: a report for the user, in several lines.
        model: the GGUF file that the Modelfile names.
        adapter: the adapter that the Modelfile names, or None.
        template: whether the Modelfile has a TEMPLATE.

    >>> nplora.adapters.export_ollama("model.gguf", "for-ollama").template
    True
    """

    directory: str
    lines: tuple[str, ...]
    template: bool
    model: str
    adapter: str | None = None

    def __str__(self) -> str:
        adapter = [] if self.adapter is None else ["--adapter", str(self.adapter)]
        evaluate = command_line(["nplora", "eval", str(self.model), *adapter, "--data", "ROWS"])
        check_it = f"check it:  {evaluate} (the loss should be near the loss before the export)"
        create = command_line(["ollama", "create", "NAME", "-f", str(Path(self.directory, MODELFILE))])
        return "\n".join((*self.lines, check_it, f"import it: {create}"))


@_check.keywords
def export_ollama(
    model: StrPath,
    directory: StrPath,
    adapter: StrPath | None = None,
    dtype: str | None = None,
    *,
    keep_adapter: bool = False,
    system: str | None = None,
    parameters: Iterable[tuple[str, str]] = (),
    any_base: bool = False,
    lossy: bool = False,
    overwrite: bool = False,
) -> OllamaExport:
    """Write a directory that `ollama create NAME -f DIRECTORY/Modelfile` imports.

    The directory gets `model.gguf`, the model with the adapter merged into it, and a `Modelfile` with the
    chat template, the stop words and the parameters. The chat template is translated into Go's template
    language, if it only puts fixed texts around the messages. Otherwise, the Modelfile has no template, and
    Ollama uses the chat template in `model.gguf`. The translation leaves out tools, and does not strip white
    space from messages. If the model's template writes tools or strips white space, the result's attribute
    `lines` says so. If the adapter was trained on texts without the chat template, the template in the
    Modelfile is `{{ .Prompt }}`.

    Args:
        model: a GGUF file or a Hugging Face directory. If `model` is a GGUF file and no adapter is merged
            into it, the file is not copied. The Modelfile then contains the path of this file.
        directory: the directory to write, which may exist.
        adapter: a PEFT directory or, unless `keep_adapter` is set, a llama.cpp file.
        dtype: the storage type of the merged weights or, if `model` is a directory, of all matrices (default:
            "q8_0").
        keep_adapter: write `adapter.gguf` beside the model instead of merging the adapter. Only Ollama 0.34.0
            and older versions accept adapters.
        system: the system message of the model. If the text is empty, there is no system message.
        parameters: more parameters of Ollama as pairs (name, value), such as ("temperature", "0.7").
        any_base, lossy: as in `merge_adapter`. If `model` is a directory, how much of the adapter is left is
            only checked with dtype="same".
        overwrite: replace files of an earlier export in the directory. After an error, some of them may
            already be replaced.
    Raises:
        ValueError: a parameter has an invalid name or value; or `model` is some other file; or one of the
            reasons in `merge_adapter`.
        UnsupportedError: GGUF cannot hold the model's tokenizer; or one of the reasons in `adapter_to_gguf`.
        The other errors are those of `merge_adapter`, `model_to_gguf` and `adapter_to_gguf`.

    >>> print(nplora.adapters.export_ollama("model.gguf", "ollama", "adapter", system="Be brief."))
    ollama/model.gguf: ...
    check it:  nplora eval ollama/model.gguf --data ROWS (the loss should be near the loss before the export)
    import it: ollama create NAME -f ollama/Modelfile
    """
    files.require_named(_OP, model=model, directory=directory, adapter=adapter)
    model_directory.require_no_hub_name(model)
    if keep_adapter and adapter is None:
        raise ValueError(f"{_OP}: keep_adapter needs an adapter")
    given = _checked(parameters)
    if system:
        _require_quotable("system", system)
    is_merged = adapter is not None and not keep_adapter
    is_plain = adapter is not None and trained_with_template(adapter) is False
    writes_model = is_merged or not _is_gguf(model)
    if not writes_model:
        if dtype is not None:
            raise ValueError(f"{_OP}: dtype={dtype!r} has no effect: nothing is merged into the GGUF model")
        _require_quotable("model", str(Path(model).absolute()), is_one_line=True)
    dtype = "q8_0" if dtype is None else dtype
    if _is_gguf(model):
        tokenizer.from_gguf(gguf.open(model))  # raises an error if nplora cannot read the tokenizer
    else:
        os.stat(model)  # raises FileNotFoundError if nothing has this name
        model = _directory_of(Path(model))
        model_directory.require_config(model)
        _check.choice(_OP, "dtype", dtype, gguf_export.DTYPES)
        try:
            _require_tokenizer(model, model)
        except UnsupportedError:
            raise
        except FormatError:
            # The tokenizer may list tokens whose rows only the adapter adds. _write_model checks that.
            if not is_merged:
                raise
    target = Path(directory)
    files.require_directory(target)
    files.require_parent(target)
    path = target / MODEL if writes_model else Path(model)
    with files.creating_directory(target) as written:
        for name in (MODELFILE, *[MODEL] * writes_model, *[ADAPTER] * keep_adapter):
            files.require_new(target / name, overwrite)
        lines = list[str]()
        if adapter is not None and keep_adapter:  # first, because this takes less time than the model
            with _noting(target / ADAPTER, written):
                done = adapter_to_gguf(
                    adapter, target / ADAPTER, model, any_base=any_base, overwrite=overwrite
                )
                lines.append(str(done))
        if writes_model:
            with _noting(path, written):
                merged = None if keep_adapter else adapter
                lines.append(_write_model(model, merged, path, dtype, any_base, lossy, overwrite))
        template, settings, lacks = _settings(gguf.open(path), is_plain, given)
        lines += lacks
        text = [f"FROM ./{MODEL}" if path == target / MODEL else f"FROM {path.absolute()}"]
        text += [f"ADAPTER ./{ADAPTER}"] if keep_adapter else []
        text += [
            f"{name} {_quoted(it)}"
            for name, it in (("TEMPLATE", template), ("SYSTEM", system or None))
            if it is not None
        ]
        text += [f"PARAMETER {name} {_quoted(it) if name == 'stop' else it}" for name, it in settings]
        raw = "".join(f"{line}\n" for line in text).encode()
        files.require_new(target / MODELFILE, overwrite)  # it may be newer than the first check
        try:
            files.replace([NewFile(target / MODELFILE, len(raw), [raw])])
        except BaseException:
            with contextlib.suppress(OSError):
                if (target / MODELFILE).read_bytes() == raw:
                    written.clear()  # the new Modelfile is in place, and it needs the other files
            raise
        kept = files.name(target / ADAPTER) if keep_adapter else None
        return OllamaExport(files.name(directory), tuple(lines), template is not None, files.name(path), kept)


def _is_gguf(model: StrPath) -> bool:
    return not Path(model).is_dir() and files.suffix(model) == ".gguf"


def _directory_of(model: Path) -> Path:
    """The directory of a Hugging Face model. `model` may also be its file of weights or its config.json."""
    directory = model_directory.of(model)
    if model in (directory, directory / model_directory.CONFIG, model_directory.weights_of(directory)):
        return directory
    raise ValueError(f"{_OP}: model is {files.name(model)!r}, expected a GGUF file or a directory")


def _checked(parameters: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    found = [(str(name), str(value)) for name, value in parameters]
    for name, value in found:
        if name not in _VALUES:
            near = _check.suggestion(name, _VALUES) or f"; expected one of {', '.join(sorted(_VALUES))}"
            raise ValueError(f"{_OP}: Ollama has no parameter {brief(name)}{near}")
        expected, pattern = _VALUES[name]
        if re.fullmatch(pattern, value) is None or _quoted(value) is None:
            raise ValueError(f"{_OP}: parameter {name}={brief(value)}, expected {expected}")
    return found


def _write_model(
    model: StrPath,
    adapter: StrPath | None,
    path: Path,
    dtype: str,
    any_base: bool,
    lossy: bool,
    overwrite: bool,
) -> str:
    """Write a GGUF model, with the adapter merged into it if one is given.

    If `model` is a directory, a merge stores the weights in float32 first. Thus each weight is rounded to
    `dtype` only once. With dtype="same", the merge already rounds the weights to their types.
    """
    if adapter is None:
        return str(gguf_export.model_to_gguf(model, path, dtype, overwrite))
    if _is_gguf(model):
        return str(merge_adapter(model, adapter, path, dtype, any_base, overwrite, lossy))
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=path.parent) as made:
        merged = Path(made, "model")
        merged_dtype = "same" if dtype == "same" else "float32"
        merge_adapter(model, adapter, merged, merged_dtype, any_base, lossy=lossy)
        _require_tokenizer(merged, model)  # it may have new tokens
        return str(gguf_export.model_to_gguf(merged, path, dtype, overwrite))


def _require_tokenizer(directory: Path, name: StrPath) -> None:
    """Raise an error if GGUF cannot hold the tokenizer. The message says `name` instead of `directory`."""
    try:
        why_not = gguf_export.why_no_tokenizer(directory)
    except FormatError as error:
        raise type(error)(str(error).replace(str(directory), files.name(name))) from None
    if why_not:
        why_not = why_not.replace(str(directory), files.name(name))
        raise UnsupportedError(f"{_OP}: Ollama needs the tokenizer in the GGUF file: {why_not}")


@contextlib.contextmanager
def _noting(path: Path, written: dict[Path, os.stat_result]) -> Iterator[None]:
    """Add the file that the `with` body writes to `written`, unless the file replaces an older one."""
    is_new = not os.path.lexists(path)
    yield
    if is_new:
        written[path] = os.stat(path)


# ---- the Modelfile ----


def _settings(
    file: GgufFile, is_plain: bool, given: list[tuple[str, str]]
) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """The template in Go's language, all parameters, and lines for the user about what the template omits."""
    template, stops, lacks = ("{{ .Prompt }}", list[str](), list[str]()) if is_plain else _template(file)
    architecture = file.metadata.string("general.architecture")
    context = min(int(file.metadata.number(f"{architecture}.context_length", _CONTEXT)), _CONTEXT)
    settings = [] if any(name == "num_ctx" for name, _ in given) else [("num_ctx", str(context))]
    return template, [*settings, *(("stop", stop) for stop in stops), *given], lacks


def _template(file: GgufFile) -> tuple[str | None, list[str], list[str]]:
    """The template in Go's language, its stop words, and lines for the user about what the template omits."""
    words = tokenizer.from_gguf(file)
    found = go_template.of(words)
    if found is None or _quoted(str(found)) is None:
        return None, [], ["the Modelfile has no TEMPLATE: Ollama uses the chat template in the GGUF file"]
    lacks = []
    if found.has_tools:
        lacks.append("TEMPLATE does not write the definitions of tools: Ollama refuses requests with tools")
    if found.trimmed:
        roles = ", ".join(found.trimmed)
        lacks.append(
            f"TEMPLATE keeps spaces at the ends of messages; the model's template removes them ({roles})"
        )
    return str(found), go_template.special_tokens(words, found), lacks


def _require_quotable(name: str, text: str, is_one_line: bool = False) -> None:
    if _quoted(text) is None or (is_one_line and "\n" in text):
        raise ValueError(f'{_OP}: {name} has control characters or """, which a Modelfile cannot hold')


def _quoted(text: str) -> str | None:
    """A text between triple quotes; None if Ollama's parser would change the text."""
    is_printable = all(part.isprintable() for line in text.split("\n") for part in line.split("\t"))
    return f'"""{text}"""' if is_printable and '"""' not in text and not text.endswith('"') else None
