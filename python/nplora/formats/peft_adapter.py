"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, read and written as a pair.

Two files cannot be replaced at one moment, so the tensors' metadata hold, beside PEFT's "format": "pt", the
SHA-256 of the configuration that belongs to them, and that of their base model (`model_digest`). PEFT passes
over them and writes none, and without them nothing is compared.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nplora.formats import bfloat16, files, model_digest, model_directory, peft_config, safetensors
from nplora.formats.errors import CorruptError, FormatError, LimitError, UnsafeError, brief
from nplora.formats.files import StrPath
from nplora.formats.peft_config import PeftConfig
from nplora.formats.safetensors import SafetensorsFile, Tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG_DIGEST = "adapter_config.sha256"
BASE_DIGEST = "base_norms.sha256"
PREFIX = "base_model.model."  # stands before a layer's name
LINEAR = (".lora_A.weight", ".lora_B.weight")  # (r, d_in) and (d_out, r)
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")  # (r, vocab) and (dim, r)
MAGNITUDE = ".lora_magnitude_vector"
MAX_PATTERN_WORK = 1 << 23  # layers times characters of patterns: seconds


@dataclass(frozen=True)
class PeftAdapter:
    """An opened directory.

    Attributes:
        directory: as messages name it.
        tensors: read when asked for, while the directory is open.
        paired: False where the configuration is not the one that was written with the tensors.
        base_digest: `model_digest.of` the base model, if it is known.
    """

    directory: str
    config: PeftConfig
    tensors: SafetensorsFile
    paired: bool
    base_digest: str | None

    def require_base(self, digest: str | None) -> None:
        """Raise FormatError where a model's digest is known, and not that of the adapter's base."""
        told = model_digest.refusal(self.config.base_model_name_or_path, self.base_digest, digest)
        if told:
            raise FormatError(f"{self.directory}: {told}")

    def factors(self, problems: list[str]) -> dict[str, tuple[str, str]]:
        """The names of each layer's two factors, by the layer's. What makes no pair is told in `problems`.

        DoRA's magnitudes are passed over.

        Raises:
            LimitError: so many layers and so many patterns that looking up ranks would take long.
        """
        found: dict[str, tuple[str, str]] = {}
        for tensor in self.tensors:
            if self.config.use_dora and tensor.endswith(MAGNITUDE):
                continue
            kind = next((kind for kind in (LINEAR, EMBEDDING) if tensor.endswith(kind)), None)
            if kind is None or not tensor.startswith(PREFIX):
                problems.append(f"tensor {brief(tensor, 200)} is no factor of a layer")
                continue
            stem = tensor[: -len(kind[0])]
            halves = (stem + kind[0], stem + kind[1])
            missing = [half for half in halves if half not in self.tensors]
            if missing:
                problems.append(f"tensor {brief(missing[0], 200)} is missing, its other half is there")
            elif found.setdefault(stem.removeprefix(PREFIX), halves) != halves:
                problems.append(f"tensor {brief(tensor, 200)}: the layer has factors of another kind too")
        self._limit_patterns(len(found))
        return found

    def _limit_patterns(self, layers: int) -> None:
        """Each layer of the file will be held against all the patterns that are more than one name."""
        both = (self.config.rank_pattern, self.config.alpha_pattern)
        text = sum(len(pattern.text) for patterns in both for _, pattern in patterns.inexact)
        if layers * text > MAX_PATTERN_WORK:
            raise LimitError(
                f"{self.directory}: {layers:,} layers and {text:,} characters of patterns, "
                f"their product may be at most {MAX_PATTERN_WORK:,}"
            )

    def require_rank(self, name: str, halves: tuple[str, str]) -> None:
        """Raise FormatError where the factors of a layer are not of the rank that the configuration says."""
        shape_a, shape_b = (self.tensors.entries[half].shape for half in halves)
        rank = self.config.rank(name)
        if len(shape_a) != 2 or len(shape_b) != 2 or (shape_a[0], shape_b[1]) != (rank, rank):
            raise FormatError(
                f"{brief(name)}: lora_A has shape {shape_a}, lora_B {shape_b}, expected rank {rank}"
            )

    def factor(self, name: str) -> NDArray[Any]:
        """A factor of any float type as float32. Raises FormatError if it is not, or not finite."""
        tensor = self.tensors[name]
        if tensor.dtype not in ("float32", "float16", "bfloat16", "float64"):
            raise FormatError(f"tensor {brief(name, 200)} is {tensor.dtype}, expected floats")
        array = bfloat16.widen(tensor.array) if tensor.dtype == "bfloat16" else tensor.array
        with np.errstate(over="ignore"):
            factor = array.astype(np.float32)
        if not np.isfinite(factor).all():
            raise FormatError(f"tensor {brief(name, 200)} holds NaN or an infinity")
        return factor

    def require_pair(self) -> None:
        """Raise CorruptError where the two files are not of one save."""
        if not self.paired:
            raise CorruptError(
                f"{Path(self.directory, CONFIG)}: not the one that was saved with {TENSORS} "
                "(its SHA-256 differs): a save was cut short, or the file was edited; "
                "if you edited it, pass edited_config=True in Python"
            )


@contextlib.contextmanager
def reading(directory: StrPath) -> Iterator[PeftAdapter]:
    """Hold a directory's tensors open; the configuration is checked first.

    Raises:
        FormatError: a file breaks its format. OSError: it cannot be read.
        UnsafeError: the weights are a pickle (adapter_model.bin), or the configuration could run or hang.
    """
    files.require_named("adapter", directory=directory)
    os.stat(directory)  # the error is to name what is not there, or is a file, and not one in it
    files.require_directory(directory)
    config_path, tensors_path, pickle = (Path(directory, name) for name in (CONFIG, TENSORS, PICKLE))
    if not tensors_path.exists() and pickle.exists():
        raise UnsafeError(f"{pickle}: a pickle can run any code; expected {TENSORS}")
    text = bytes(files.read(config_path, peft_config.MAX_BYTES))
    config = peft_config.loads(text, str(config_path))
    with safetensors.reading(tensors_path) as tensors:
        paired = tensors.metadata.get(CONFIG_DIGEST, _digest(text)) == _digest(text)
        digest = tensors.metadata.get(BASE_DIGEST)
        if digest is not None:
            digest = model_digest.parsed(digest, f"{tensors_path}: {BASE_DIGEST}")
        yield PeftAdapter(files.name(directory), config, tensors, paired, digest)


def lies_in(directory: StrPath) -> bool:
    """Whether a directory has a file that `save` would replace."""
    return any(os.path.lexists(Path(directory, name)) for name in (CONFIG, TENSORS))


def save(directory: StrPath, config: PeftConfig, tensors: Tensors, base_digest: str | None = None) -> None:
    """Write both files, into a directory that is made if needed.

    Both are complete on the disk before either takes its name, the configuration last.

    Raises:
        ValueError: the directory's name is empty. NotADirectoryError: it is something else.
        FileExistsError: it holds a model.
    """
    files.require_named("adapter", output=directory)
    files.require_directory(directory)
    model_directory.require_no_model(directory)
    text = peft_config.dumps(config)
    metadata = {"format": "pt", CONFIG_DIGEST: _digest(text)}
    if base_digest is not None:
        metadata[BASE_DIGEST] = base_digest
    os.makedirs(directory, exist_ok=True)
    files.replace(
        [
            safetensors.new_file(Path(directory, TENSORS), tensors, metadata),
            files.NewFile(Path(directory, CONFIG), len(text), [text]),
        ]
    )


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
