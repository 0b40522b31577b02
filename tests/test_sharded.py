"""Models in several files: the index is read, and its names stay inside the directory."""

import json
from pathlib import Path

import numpy as np
import pytest

from nplora.formats import safetensors, sharded
from nplora.formats.errors import FormatError, LimitError, UnsafeError


def index(directory: Path, weight_map: object) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    safetensors.save(tmp_path / "one.safetensors", {"a": np.arange(2), "b": np.arange(3)})
    safetensors.save(tmp_path / "two.safetensors", {"c": np.arange(4)})
    return tmp_path


@pytest.mark.parametrize("mmap", [True, False])
def test_the_tensors_of_all_shards_are_one_mapping(directory: Path, mmap: bool) -> None:
    path = index(directory, {"c": "two.safetensors", "a": "one.safetensors"})
    tensors = sharded.open(path, mmap=mmap)
    assert list(tensors) == ["c", "a"]
    assert len(tensors) == 2
    assert tensors.metadata == {"total_size": 16}
    np.testing.assert_array_equal(tensors["c"].numpy(), np.arange(4))
    with pytest.raises(KeyError, match="no tensor 'b', the nearest names"):
        tensors["b"]


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "/etc/passwd", "sub/one.safetensors", "..", "", "a\\b", "a\0"]
)
def test_a_shard_name_with_a_path_is_refused(directory: Path, shard: str) -> None:
    with pytest.raises(UnsafeError, match=r"weight_map: 'a' is .*, expected a name without a path"):
        sharded.open(index(directory, {"a": shard}))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_shard_that_is_a_link_is_refused(directory: Path, mmap: bool) -> None:
    (directory / "link.safetensors").symlink_to(directory / "one.safetensors")
    with pytest.raises(UnsafeError, match=r"link\.safetensors: a symbolic link"):
        sharded.open(index(directory, {"a": "link.safetensors"}), mmap=mmap)
    assert (
        len(safetensors.open(directory / "link.safetensors", mmap=mmap)) == 2
    )  # the user's own link is followed


@pytest.mark.parametrize(
    ("weight_map", "error", "words"),
    [
        ({"z": "one.safetensors"}, FormatError, "tensor 'z' is not in one.safetensors"),
        ({"a": 3}, FormatError, "'a' is 3, expected a file's name"),
        (["a"], FormatError, r"weight_map is \['a'\], expected an object"),
        ({str(i): f"{i}.safetensors" for i in range(1001)}, LimitError, "1,001 shards, at most 1,000"),
    ],
)
def test_an_index_that_is_wrong_gives_its_exact_error(
    directory: Path, weight_map: object, error: type[FormatError], words: str
) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        sharded.open(index(directory, weight_map))
    assert caught.type is error


def test_a_missing_shard_is_an_os_error(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sharded.open(index(directory, {"a": "three.safetensors"}))
