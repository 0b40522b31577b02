"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, read and written as a pair.

Two files cannot be replaced at one moment, so the tensors' metadata hold, beside PEFT's "format": "pt", the
SHA-256 of the configuration that belongs to them. PEFT passes over it and writes none, and without it nothing
is compared.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nplora.formats import files, peft_config, safetensors
from nplora.formats.errors import CorruptError, UnsafeError
from nplora.formats.files import StrPath
from nplora.formats.peft_config import PeftConfig
from nplora.formats.safetensors import SafetensorsFile, Tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG_DIGEST = "adapter_config.sha256"
PREFIX = "base_model.model."  # stands before a module's name


@dataclass(frozen=True)
class PeftAdapter:
    """An opened directory.

    Attributes:
        directory: as messages name it.
        tensors: read when asked for, while the directory is open.
        paired: False where the configuration is not the one that was written with the tensors.
    """

    directory: str
    config: PeftConfig
    tensors: SafetensorsFile
    paired: bool

    def require_pair(self) -> None:
        """Raise CorruptError where the two files are not of one save."""
        if not self.paired:
            raise CorruptError(
                f"{Path(self.directory, CONFIG)}: not the one that was saved with {TENSORS} "
                "(its SHA-256 differs): a save was cut short, or the file was edited; "
                "if you edited it, pass edited_config=True"
            )


@contextlib.contextmanager
def reading(directory: StrPath) -> Iterator[PeftAdapter]:
    """Hold a directory's tensors open; the configuration is checked first.

    Raises:
        FormatError: a file breaks its format. OSError: it cannot be read.
        UnsafeError: the weights are a pickle (adapter_model.bin), or the configuration could run or hang.
    """
    config_path, tensors_path, pickle = (Path(directory, name) for name in (CONFIG, TENSORS, PICKLE))
    if not tensors_path.exists() and pickle.exists():
        raise UnsafeError(f"{pickle}: a pickle can run any code; expected {TENSORS}")
    text = bytes(files.read(config_path, peft_config.MAX_BYTES))
    config = peft_config.loads(text, str(config_path))
    with safetensors.reading(tensors_path) as tensors:
        paired = tensors.metadata.get(CONFIG_DIGEST, _digest(text)) == _digest(text)
        yield PeftAdapter(files.name(directory), config, tensors, paired)


def save(directory: StrPath, config: PeftConfig, tensors: Tensors) -> None:
    """Write both files, into a directory that is made if needed.

    Both are complete on the disk before either takes its name, the configuration last.
    """
    text = peft_config.dumps(config)
    metadata = {"format": "pt", CONFIG_DIGEST: _digest(text)}
    os.makedirs(directory, exist_ok=True)
    files.replace(
        [
            safetensors.new_file(Path(directory, TENSORS), tensors, metadata),
            files.NewFile(Path(directory, CONFIG), len(text), [text]),
        ]
    )


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
