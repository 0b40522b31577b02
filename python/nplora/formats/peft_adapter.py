"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, read and written as a pair.

Two files cannot be replaced at the same instant. So when nplora saves an adapter, the metadata in
adapter_model.safetensors hold a copy of the configuration, the SHA-256 of that copy, and the SHA-256 of the
configuration file that the save replaces. The new adapter takes effect when adapter_model.safetensors is
renamed into place. If a reader then still finds the old adapter_config.json, the reader uses the copy in the
metadata. If adapter_config.json matches neither SHA-256, nplora concludes that the file was edited by hand.

The metadata also hold a digest of the base model (`model_digest`). PEFT neither reads nor writes any of these
metadata entries. If a file lacks a digest, nplora skips the check that needs this digest.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from nplora.formats import (
    base_digest,
    bfloat16,
    files,
    label_record,
    model_directory,
    peft_config,
    run_files,
    safetensors,
    strict_json,
    tokenizer_json,
)
from nplora.formats.errors import CorruptError, FormatError, LimitError, UnsafeError, brief, counted
from nplora.formats.files import StrPath
from nplora.formats.label_record import LabelRecord
from nplora.formats.peft_config import PeftConfig
from nplora.formats.safetensors import SafetensorsFile, Tensors
from nplora.formats.tokenizer_json import AddedToken
from nplora.platform.files import remove_in

CONFIG = model_directory.ADAPTER_CONFIG
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG_DIGEST = "adapter_config.sha256"
REPLACED_DIGEST = "replaced_adapter_config.sha256"
BASE_DIGEST = "base_norms.sha256"
CHAT_TEMPLATE = "chat_template"
ADDED_TOKENS = "added_tokens"
LABELS = "labels"
PREFIX = "base_model.model."  # precedes each layer's name
# (r, d_in) and (d_out, r); for a convolution (r, c_in, height, width) and (c_out, r, 1, 1)
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")  # (r, vocab) and (dim, r)
MAGNITUDE = ".lora_magnitude_vector"
TOKENS = ".token_adapter.trainable_tokens_delta"  # (k, dim): the rows of the trained tokens
BASE_COPY = ".base_layer.weight"  # PEFT copies the frozen weight of an adapted embedding or head
_TOKEN_ADAPTER = ".token_adapter"
_ORIGINAL = ".original_module.weight"
_UNNAMED = ".modules_to_save.weight"  # PEFT may store the trained layer a second time
_RESIZED = ("embed_tokens", "lm_head")  # PEFT copies these layers if their number of rows was changed
_TIED = {"embed_tokens": "lm_head"}
_MOST_REPLACED = 100  # attempts to read both files of one adapter while other processes replace it
MAX_PATTERN_WORK = 1 << 22  # layers times characters of patterns; this much work takes about a second
_LONG_NAME = 256  # characters; a name with more counts as several layers


@dataclass(frozen=True)
class PeftAdapter:
    """An open adapter directory.

    Attributes:
        directory: the directory's name in error messages.
        tensors: the tensors. Each tensor is read from disk when it is accessed.
        config: the configuration. If the configuration file was edited after it was saved with the tensors,
            `config` holds the edited values.
        paired: False if the configuration file's SHA-256 shows that the file was edited, else True.
        base_digest: a hash that identifies the base model (`models.model_digest.of`); None if the file has no
            such hash.
        chat_template: whether the chat template was applied to the training data; None if that is not known.
        is_ours: whether nplora wrote the files.
    """

    directory: str
    config: PeftConfig
    tensors: SafetensorsFile
    paired: bool
    base_digest: str | None
    chat_template: bool | None
    is_ours: bool = False

    def added_tokens(self, wanted: Collection[int]) -> tuple[AddedToken, ...]:
        """Read the tokens that the adapter adds to the vocabulary.

        nplora stores these tokens in the metadata. Other programs store them in a tokenizer.json.

        Args:
            wanted: the ids of the tokens to return from a tokenizer.json, which also lists tokens that the
                adapter does not add. `wanted` has no effect on the tokens in the metadata.
        Raises:
            FormatError: the metadata or the tokenizer.json is damaged.
        """
        source = str(Path(self.directory, TENSORS))
        if self.is_ours:
            text = self.tensors.metadata.get(ADDED_TOKENS)
            return () if text is None else tokenizer_json.loads(text, f"{source}: {ADDED_TOKENS}")
        path = Path(self.directory, tokenizer_json.TOKENIZER)
        if not wanted or not path.is_file():
            return ()
        raw = bytes(files.read(path, tokenizer_json.MAX_BYTES))
        return tokenizer_json.added_tokens(raw, str(path), wanted)

    def labels(self) -> LabelRecord | None:
        """Read the description of a classifier's outputs from the metadata; None if there is no description.

        Raises:
            FormatError: the metadata are damaged.
        """
        text = self.tensors.metadata.get(LABELS) if self.is_ours else None
        source = f"{Path(self.directory, TENSORS)}: {LABELS}"
        return None if text is None else label_record.loads(text, source)

    def copy_of(self, layer: str) -> str | None:
        """The name of the tensor in which PEFT stored a layer's frozen weight; None if no tensor holds it."""
        endings = (_TOKEN_ADAPTER + BASE_COPY, _ORIGINAL, BASE_COPY, ".weight")
        names = (f"{PREFIX}{layer}{ending}" for ending in endings)
        return next((name for name in names if name in self.tensors and self._is_base_copy(name)), None)

    def whole(self) -> dict[str, dict[str, str]]:
        """Find the layers of `modules_to_save`, which were trained without LoRA.

        The result is a dictionary: layer -> {parameter: name of the tensor}.

        Raises:
            LimitError: there are too many tensors and names to compare in reasonable time.
        """
        names = self._saved_names
        self._limit(len(self.tensors), "tensors", sum(map(len, names)), "names of modules_to_save")
        found: dict[str, dict[str, str]] = {}
        for tensor in self.tensors:
            layer, _, parameter = tensor.removeprefix(PREFIX).rpartition(".")
            is_factor = tensor.endswith((*LINEAR, *EMBEDDING, MAGNITUDE, TOKENS)) or self._is_base_copy(
                tensor
            )
            if not is_factor and tensor.startswith(PREFIX) and any(name in f"{layer}." for name in names):
                found.setdefault(layer, {})[parameter] = tensor
        return found

    @property
    def _saved_names(self) -> list[str]:
        """The names in `modules_to_save`, with a dot appended to each name.

        PEFT saves every module whose name ends in one of the names in `modules_to_save`: the name
        "classifier" also selects the module "pre_classifier".
        """
        saved = self.config.modules_to_save
        if self.config.ensure_weight_tying:  # PEFT then also stores the layers that share the weight
            saved += (
                tuple(_TIED.values()) if _TIED.keys() & {name.rpartition(".")[2] for name in saved} else ()
            )
        return [f"{name}." for name in saved]

    def tokens(self, problems: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return a dictionary of the trained tokens: layer -> (name of the tensor, token ids).

        A message is added to `problems` if a tensor's shape does not fit the token ids in the configuration.
        A message is also added if the configuration names tokens, no tensor holds trained rows, and
        `problems` is still empty.
        """
        named = self.config.trainable_token_indices
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tensor in self.tensors:
            if not (tensor.endswith(TOKENS) and tensor.startswith(PREFIX)):
                continue
            layer = tensor.removeprefix(PREFIX).removesuffix(TOKENS)
            lists = named.items() if isinstance(named, Mapping) else [("", named)]
            ids = next(
                (ids for key, ids in lists if ids and f".{layer}".endswith(f".{key}" if key else "")), ()
            )
            shape = self.tensors.entries[tensor].shape
            if len(shape) != 2 or shape[0] != len(ids):
                problems.append(
                    f"tensor {brief(tensor, 200)} has shape {shape}, but trainable_token_indices names "
                    f"{counted(len(ids), 'token')} for this layer"
                )
            else:
                found[layer] = tensor, ids
        if named and not found and not problems:
            problems.append("trainable_token_indices names tokens, but there is no tensor with their rows")
        return found

    def factors(
        self, problems: list[str], whole: Mapping[str, Mapping[str, str]]
    ) -> dict[str, tuple[str, str]]:
        """Map each layer to the names of its two factor tensors.

        A message is added to `problems` for each missing factor, and for each tensor that does not belong to
        an adapter. Besides the factors, these tensors belong to an adapter: the tensors that `whole` names,
        rows of trained tokens, copies of frozen weights, and DoRA's magnitudes if the adapter uses DoRA.

        Raises:
            LimitError: there are too many layers and patterns to find each layer's rank in reasonable time.
        """
        found: dict[str, tuple[str, str]] = {}
        in_whole = {tensor for parameters in whole.values() for tensor in parameters.values()}
        others = (TOKENS, MAGNITUDE) if self.config.use_dora else (TOKENS,)
        for tensor in self.tensors:
            if tensor in in_whole or tensor.endswith(others) or self._is_base_copy(tensor):
                continue
            kind = next((kind for kind in (LINEAR, EMBEDDING) if tensor.endswith(kind)), None)
            if kind is None or not tensor.startswith(PREFIX):
                problems.append(f"tensor {brief(tensor, 200)} is not a LoRA factor of a layer")
                continue
            stem = tensor[: -len(kind[0])]
            halves = (stem + kind[0], stem + kind[1])
            missing = [half for half in halves if half not in self.tensors]
            if missing:
                problems.append(
                    f"tensor {brief(missing[0], 200)} is missing, but the layer's other factor is present"
                )
            elif found.setdefault(stem.removeprefix(PREFIX), halves) != halves:
                problems.append(
                    f"tensor {brief(tensor, 200)}: the layer has both linear and embedding factors"
                )
        self._limit_patterns(sum(1 + len(name) // _LONG_NAME for name in found))
        return found

    def base_copies(self) -> list[str]:
        """The layers for which the file also holds a frozen weight, besides the adapter's tensors.

        Such a weight is usually a copy of the base model's weight.
        """
        found = [tensor.removeprefix(PREFIX) for tensor in filter(self._is_base_copy, self.tensors)]
        endings = (_TOKEN_ADAPTER + BASE_COPY, BASE_COPY, _ORIGINAL, _UNNAMED, ".weight")
        layers = [tensor[: -len(next(filter(tensor.endswith, endings)))] for tensor in found]
        return list(dict.fromkeys(layers))

    def _is_base_copy(self, tensor: str) -> bool:
        """Whether a tensor is a copy of a frozen weight.

        The function decides by the tensor's name and by the shapes of the layer's LoRA factors.
        """
        stem = tensor.removesuffix(BASE_COPY)
        if stem == tensor:
            return self._is_resized_copy(tensor)
        if stem.removesuffix(_TOKEN_ADAPTER) + TOKENS in self.tensors:
            return True
        entries = self.tensors.entries
        for (name_a, name_b), is_table in ((LINEAR, False), (EMBEDDING, True)):
            if stem + name_a in entries and stem + name_b in entries:
                of_b, of_a = entries[stem + name_b].shape[:1], entries[stem + name_a].shape[-1:]
                return entries[tensor].shape == (of_a + of_b if is_table else of_b + of_a)
        return False

    def _is_resized_copy(self, tensor: str) -> bool:
        """Whether a tensor is an embedding or head that PEFT stored because the vocabulary was resized."""
        if not tensor.startswith(PREFIX):
            return False
        name = tensor.removeprefix(PREFIX)
        for ending in (_ORIGINAL, _UNNAMED):
            if name.endswith(ending):
                return name.removesuffix(ending).rpartition(".")[2] in _RESIZED
        layer = name.removesuffix(".weight")
        is_saved = any(saved in f"{layer}." for saved in self._saved_names)
        return layer != name and layer.rpartition(".")[2] in _RESIZED and not is_saved

    def _limit_patterns(self, layers: int) -> None:
        """Raise LimitError if matching this number of layers with all patterns would take too long."""
        both = (self.config.rank_pattern, self.config.alpha_pattern)
        text = sum(len(pattern.text) for patterns in both for _, pattern in patterns.inexact)
        self._limit(layers, "layers", text, "patterns")

    def _limit(self, count: int, things: str, text: int, kind: str) -> None:
        if count * text > MAX_PATTERN_WORK:
            raise LimitError(
                f"{self.directory}: {count:,} {things} times {text:,} characters of {kind}, "
                f"expected a product of at most {MAX_PATTERN_WORK:,}"
            )

    def require_rank(self, name: str, halves: tuple[str, str]) -> None:
        """Raise FormatError if a layer's factors do not have the rank that the configuration gives."""
        shape_a, shape_b = (self.tensors.entries[half].shape for half in halves)
        rank = self.config.rank(name)
        axes = (2, 2) if kernel(shape_a) is None else (4, 4)
        fits = (len(shape_a), len(shape_b)) == axes and (shape_a[0], shape_b[1]) == (rank, rank)
        if not fits or shape_b[2:] not in ((), (1, 1)):
            raise FormatError(
                f"{brief(name)}: lora_A has shape {shape_a}, lora_B {shape_b}, expected rank {rank}"
            )

    def array(self, name: str, dtype: npt.DTypeLike = np.float32) -> NDArray[Any]:
        """Read a float tensor as a new array.

        Raises:
            FormatError: the tensor is not of a float type, or holds NaN or an infinity.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in ("float32", "float16", "bfloat16", "float64"):
            raise FormatError(f"tensor {brief(name, 200)} is {tensor.dtype}, expected floats")
        array = bfloat16.widen(tensor.array) if tensor.dtype == "bfloat16" else tensor.array
        with np.errstate(over="ignore"):
            converted = np.array(array, dtype, order="C")
        if not np.isfinite(converted).all():
            raise FormatError(f"tensor {brief(name, 200)} holds NaN or an infinity")
        return converted

    def require_pair(self) -> None:
        """Raise CorruptError if the configuration was not saved together with these tensors."""
        if not self.paired:
            raise CorruptError(
                f"{Path(self.directory, CONFIG)}: is not the file that was saved with {TENSORS} "
                "(its SHA-256 differs): the file was edited, or a save of an older nplora was cut short; "
                "if you edited it, pass edited_config=True in Python"
            )


@contextlib.contextmanager
def reading(directory: StrPath) -> Iterator[PeftAdapter]:
    """Open a directory's tensors together with the configuration that belongs to them.

    Raises:
        FormatError: a file breaks its format.
        UnsafeError: the weights are a pickle (adapter_model.bin), or the configuration could run code.
        OSError: a file cannot be read.
    """
    files.require_named("adapter", directory=directory)
    model_directory.require_no_hub_name(directory, "an adapter")
    os.stat(directory)  # if the directory is missing, the error names the directory, not one of its files
    files.require_directory(directory)
    require_finished(directory)
    config_path, tensors_path, pickle = (Path(directory, name) for name in (CONFIG, TENSORS, PICKLE))
    os.stat(config_path)  # if both files are missing, the error names the configuration
    if not tensors_path.exists() and pickle.exists():
        raise UnsafeError(f"{pickle}: a pickle can run any code; expected {TENSORS}")
    with contextlib.ExitStack() as opened:
        tensors, text, paired = _pair(config_path, tensors_path, opened)
        config = peft_config.loads(text, str(config_path))
        digest = tensors.metadata.get(BASE_DIGEST)
        if digest is not None:
            digest = base_digest.parsed(digest, f"{tensors_path}: {BASE_DIGEST}")
        is_ours = CONFIG_DIGEST in tensors.metadata
        template = _with_template(tensors)
        yield PeftAdapter(files.name(directory), config, tensors, paired, digest, template, is_ours)


def kernel(lora_a: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return a convolution's kernel shape (c_in, height, width), given the shape of lora_A.

    Return None if the layer is not a convolution.
    """
    if len(lora_a) != 4:
        return None
    _, channels, height, width = lora_a
    return channels, height, width


def trained_with_template(path: StrPath) -> bool | None:
    """Whether the chat template was applied to the training data of the adapter in a directory.

    Returns None if this is unknown, for example if another program wrote the file.
    """
    tensors = Path(path, TENSORS)
    if not tensors.is_file():
        return None
    with files.reading(tensors) as reader:
        return _with_template(SafetensorsFile(reader, files.name(tensors)))


def _with_template(tensors: SafetensorsFile) -> bool | None:
    return {"true": True, "false": False}.get(tensors.metadata.get(CHAT_TEMPLATE, ""))


def require_finished(directory: StrPath) -> None:
    """Raise FileNotFoundError if a directory holds a training run that has not written its adapter yet."""
    if not run_files.holds_run(directory):
        return
    is_whole = all(map(os.path.lexists, files_of(directory)))
    if not is_whole or is_dropped(directory):
        reason = (
            "the directory holds a run that has no adapter yet: continue it with --resume (resume=True); if "
            "Trainer.fit made the run, save the adapter with nplora.save_adapter"
        )
        raise FileNotFoundError(errno.ENOENT, reason, files.name(directory))


def is_dropped(directory: StrPath) -> bool:
    """Whether a directory's adapter is from an earlier run and will be overwritten by a newer run."""
    dropped = run_files.dropped_adapter(directory)
    return dropped is not None and tensors_digest(directory) == dropped


def tensors_digest(directory: StrPath) -> str | None:
    """The SHA-256 of a directory's tensors file, or None if there is no such file."""
    path = Path(directory, TENSORS)
    return files.sha256(path) if os.path.lexists(path) else None


def _pair(
    config_path: Path, tensors_path: Path, opened: contextlib.ExitStack
) -> tuple[SafetensorsFile, bytes, bool]:
    """Return (tensors, text of the configuration, whether the two files belong together).

    A save replaces the tensors first, and then the configuration. So this function opens the tensors first,
    and then reads the configuration. If the tensors file was replaced between these two steps, and the
    configuration's SHA-256 does not fit the opened tensors, both files are read again. If the tensors file
    was not replaced, no later save has written the configuration, because such a save would have replaced the
    tensors first.
    """
    for _ in range(_MOST_REPLACED):
        with contextlib.ExitStack() as attempt:
            reader = attempt.enter_context(files.reading(tensors_path))
            tensors = SafetensorsFile(reader, files.name(tensors_path))
            text = bytes(files.read(config_path, peft_config.MAX_BYTES))
            wanted, embedded = tensors.metadata.get(CONFIG_DIGEST), tensors.metadata.get(CONFIG, "").encode()
            if _digest(text) == tensors.metadata.get(REPLACED_DIGEST) and _digest(embedded) == wanted:
                text = embedded
            is_certain = _digest(text) == wanted
            if is_certain or reader.is_at(tensors_path):
                opened.push(attempt.pop_all())
                return tensors, text, is_certain or wanted is None
    raise CorruptError(f"{tensors_path}: the file was replaced {_MOST_REPLACED} times while it was read")


def lies_in(directory: StrPath) -> bool:
    """Whether a directory has a file that `save` would replace."""
    return any(map(os.path.lexists, files_of(directory)))


def files_of(path: StrPath) -> list[Path]:
    """The paths of the two files of an adapter directory, or only `path` if `path` is a file."""
    return [Path(path)] if Path(path).is_file() else [Path(path, name) for name in (CONFIG, TENSORS)]


def require_ours(directory: StrPath, overwrite: bool, with_tokenizer: bool = False) -> None:
    """Raise an error if `save` would replace a file that does not belong to an adapter.

    Args:
        overwrite: do not raise FileExistsError.
        with_tokenizer: whether `save` will also write the files of a tokenizer.
    Raises:
        UnsafeError: a file is a symbolic link.
        FormatError: a directory, FIFO or device has the name of a file that `save` writes.
        FileExistsError: a file does not belong to an adapter, and `overwrite` is not set.
    """
    checks: list[tuple[str, Callable[[files.Reader], bool]]] = [(CONFIG, _is_config), (TENSORS, _is_tensors)]
    if with_tokenizer:
        has_added = _has_added_tokens(directory)
        checks += [(name, lambda reader: has_added) for name in tokenizer_json.FILES]
    for name, is_ours in checks:
        path = Path(directory, name)
        if not os.path.lexists(path):
            continue
        with files.reading(path, follow_links=False) as reader:
            if not (overwrite or is_ours(reader)):
                reason = (
                    "the file does not belong to a LoRA adapter; name another directory, or replace the file "
                    "with --overwrite (overwrite=True)"
                )
                raise FileExistsError(errno.EEXIST, reason, files.name(path))


def _is_config(reader: files.Reader) -> bool:
    try:
        fields = strict_json.loads(bytes(reader[: peft_config.MAX_BYTES]), CONFIG)
    except FormatError:
        return False
    return isinstance(fields, dict) and fields.get("peft_type") == "LORA"


def _has_added_tokens(directory: StrPath | files.Directory) -> bool:
    """Whether a directory holds an adapter that nplora saved with added tokens.

    The tokenizer files in such a directory belong to the adapter.
    """
    try:
        with files.reading(Path(directory, TENSORS), follow_links=False) as reader:
            return ADDED_TOKENS in SafetensorsFile(reader, TENSORS).metadata
    except (FormatError, OSError):
        return False


def _is_tensors(reader: files.Reader) -> bool:
    try:
        names = SafetensorsFile(reader, TENSORS).entries
    except FormatError:
        return False
    return all(name.startswith(PREFIX) for name in names)


def save(
    directory: StrPath | files.Directory,
    config: PeftConfig,
    tensors: Tensors,
    base_digest: str | None = None,
    chat_template: bool | None = None,
    added_tokens: Sequence[AddedToken] = (),
    tokenizer: Mapping[str, bytes] | None = None,
    labels: LabelRecord | None = None,
) -> None:
    """Write both files of an adapter. The directory is created if needed.

    Both files are first written completely under temporary names. The tensors are renamed into place before
    the configuration. At every moment, even after a crash, nplora finds either the complete old or
    the complete new adapter.

    Args:
        added_tokens: the tokens that the adapter adds to the vocabulary.
        tokenizer: maps names of tokenizer files to their contents. Other programs read the added tokens from
            these files.
        labels: the description of a classifier's outputs.
    Raises:
        ValueError: the directory's name is empty.
        NotADirectoryError: the path is not a directory.
        FileExistsError: the directory holds a model.
    """
    files.require_named("adapter", output=directory)
    files.require_directory(directory)
    model_directory.require_no_model(directory)
    text = peft_config.dumps(config)
    metadata = {"format": "pt", CONFIG: text.decode(), CONFIG_DIGEST: _digest(text)}
    if base_digest is not None:
        metadata[BASE_DIGEST] = base_digest
    if chat_template is not None:
        metadata[CHAT_TEMPLATE] = str(chat_template).lower()
    if added_tokens:
        metadata[ADDED_TOKENS] = tokenizer_json.dumps(added_tokens)
    if labels is not None:
        metadata[LABELS] = label_record.dumps(labels)
    if not isinstance(directory, files.Directory):
        os.makedirs(directory, exist_ok=True)
    with files.Directory(directory) as held:
        is_stale = not tokenizer and _has_added_tokens(held)
        replaced = _digest_in(held)
        if replaced not in (None, metadata[CONFIG_DIGEST]):
            metadata[REPLACED_DIGEST] = str(replaced)
        files.replace(
            [
                *(files.NewFile(Path(directory, n), len(raw), [raw]) for n, raw in (tokenizer or {}).items()),
                safetensors.new_file(Path(directory, TENSORS), tensors, metadata),
                files.NewFile(Path(directory, CONFIG), len(text), [text]),
            ],
            held,
        )
        for name in tokenizer_json.FILES if is_stale else ():
            with contextlib.suppress(FileNotFoundError):
                remove_in(held.fd, name)


def _digest_in(directory: files.Directory) -> str | None:
    """The SHA-256 of a directory's configuration, or None if the file is missing or cannot be read."""
    try:
        return _digest(bytes(files.read(Path(directory, CONFIG), peft_config.MAX_BYTES)))
    except (FormatError, OSError):
        return None


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
