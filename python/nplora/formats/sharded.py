"""A model in several safetensors files. `model.safetensors.index.json` maps each tensor to its file."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nplora.formats import files, safetensors, strict_json
from nplora.formats.errors import FormatError, LimitError, UnsafeError, brief, missing_name
from nplora.formats.files import Stamp, StrPath
from nplora.formats.safetensors import SafetensorsFile, Tensor

MAX_INDEX = 1 << 25  # bytes; an index of 90,000 tensors takes 8 million
MAX_SHARDS = 1_000  # each mapped file uses a file descriptor


class ShardedFile(Mapping[str, Tensor]):
    """A mapping from the name of each tensor in the shards to its `Tensor`, in the index's order.

    `metadata` holds the index's metadata.

    >>> import json, nplora
    >>> nplora.formats.safetensors.save("part.safetensors", {"w": np.eye(2)})
    >>> index = json.dumps({"metadata": {}, "weight_map": {"w": "part.safetensors"}})
    >>> _ = Path("model.safetensors.index.json").write_text(index)
    >>> file = nplora.formats.sharded.open("model.safetensors.index.json")
    >>> list(file), file["w"].shape, sorted(file.shards)
    (['w'], (2, 2), ['part.safetensors'])
    """

    def __init__(self, source: str, shards: dict[str, SafetensorsFile], metadata: dict[str, Any]) -> None:
        self.source = source
        self.metadata = metadata
        self._shards = shards

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shards:
            raise missing_name(self.source, name, self._shards)
        return self._shards[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    @property
    def shards(self) -> frozenset[str]:
        """The names of the files that hold the tensors."""
        return frozenset(shard.source for shard in self._shards.values())

    @property
    def mapped(self) -> tuple[Stamp, ...]:
        """The `Stamp` of each mapped shard. A stamp can show later whether the file was changed."""
        return tuple(dict.fromkeys(stamp for shard in self._shards.values() for stamp in shard.mapped))


def open(path: StrPath, mmap: bool = True, wanted: Callable[[str], bool] = lambda name: True) -> ShardedFile:
    """Open an index and the shards that it names.

    Args:
        path: the file `*.safetensors.index.json`. The shards are in the same directory.
        mmap: whether to map the shards into memory (see `safetensors.open`).
        wanted: a function that returns whether the tensor of a given name is needed. A shard without needed
            tensors is not opened.
    Raises:
        UnsafeError: a shard's name leads out of the directory, or the shard is a symbolic link (except in
            Hugging Face's cache).
        FormatError: the index or a shard breaks its format, or a shard lacks a tensor.
        OSError: a file cannot be read.
    """
    source = files.name(path)
    index = strict_json.loads(bytes(files.read(path, MAX_INDEX)), source)
    names = {name: shard for name, shard in _weight_map(index, source).items() if wanted(name)}
    metadata = index.get("metadata", {})
    if not isinstance(metadata, dict):
        raise FormatError(f"{source}: metadata is {brief(metadata)}, expected an object")
    opened = {
        shard: safetensors.open(files.cached(Path(path).parent / shard), mmap, follow_links=False)
        for shard in dict.fromkeys(names.values())
    }
    for name, shard in names.items():
        if name not in opened[shard]:
            raise FormatError(f"{source}: tensor {brief(name)} is not in {shard}")
    return ShardedFile(source, {name: opened[shard] for name, shard in names.items()}, metadata)


def _weight_map(index: object, source: str) -> dict[str, str]:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise FormatError(f"{source}: weight_map is {brief(names)}, expected an object")
    for name, shard in names.items():
        if not isinstance(shard, str):
            raise FormatError(
                f"{source}: weight_map: the shard of {brief(name)} is {brief(shard)}, expected a file's name"
            )
        if shard in ("", ".", "..") or any(sign in shard for sign in "/\\:\0"):
            raise UnsafeError(
                f"{source}: weight_map: the shard of {brief(name)} is {brief(shard)}, "
                "expected a name without a path"
            )
    count = len(set(names.values()))
    if count > MAX_SHARDS:
        raise LimitError(f"{source}: the index names {count:,} shards, expected at most {MAX_SHARDS:,}")
    return names
