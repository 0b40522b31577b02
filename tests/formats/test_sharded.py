"""Models in several files: the index is read, and the names in it stay inside the directory."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from hostile import accepted, refused
from nplora.formats import safetensors, sharded
from nplora.formats.errors import FormatError, LimitError, TruncatedError, UnsafeError


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
    with pytest.raises(KeyError, match=r"no tensor 'b'\W?$"):
        tensors["b"]


def test_shards_without_a_wanted_tensor_are_not_opened(directory: Path) -> None:
    path = index(directory, {"a": "one.safetensors", "b": "one.safetensors", "c": "nowhere.safetensors"})
    assert list(sharded.open(path, wanted=lambda name: name == "b")) == ["b"]


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "/etc/passwd", "sub/one.safetensors", "..", "", "a\\b", "a\0", "C:a"]
)
def test_a_shard_name_with_a_path_is_refused(directory: Path, shard: str) -> None:
    with refused(
        UnsafeError, f"weight_map: the shard of 'a' is {shard!r}, expected a name without a path", directory
    ):
        sharded.open(index(directory, {"a": shard}))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_shard_that_is_a_link_is_refused(directory: Path, mmap: bool) -> None:
    (directory / "link.safetensors").symlink_to(directory / "one.safetensors")
    with refused(UnsafeError, "link.safetensors: a symbolic link", directory):
        sharded.open(index(directory, {"a": "link.safetensors"}), mmap=mmap)
    assert (
        len(safetensors.open(directory / "link.safetensors", mmap=mmap)) == 2
    )  # the link that the user gave is followed


@pytest.mark.parametrize("mmap", [True, False])
def test_the_links_of_hugging_faces_cache_are_followed_and_no_others(
    directory: Path, mmap: bool, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (directory / "one.safetensors").rename(blobs / "89ab")
    (snapshot / "one.safetensors").symlink_to("../../blobs/89ab")
    file = sharded.open(index(snapshot, {"a": "one.safetensors"}), mmap)
    np.testing.assert_array_equal(file["a"].numpy(), np.arange(2))
    (blobs / "cdef").symlink_to(directory / "two.safetensors")  # a link that leads out of the cache
    for target in ("../../blobs/cdef", directory / "two.safetensors", "../../../two.safetensors"):
        (snapshot / "two.safetensors").unlink(missing_ok=True)
        (snapshot / "two.safetensors").symlink_to(target)
        with pytest.raises(UnsafeError, match=r"two\.safetensors: a symbolic link"):
            sharded.open(index(snapshot, {"c": "two.safetensors"}), mmap)


@pytest.mark.parametrize(
    ("weight_map", "error", "words"),
    [
        ({"z": "one.safetensors"}, FormatError, "tensor 'z' is not in one.safetensors"),
        ({"a": 3}, FormatError, "'a' is 3, expected a file's name"),
        (["a"], FormatError, "weight_map is ['a'], expected an object"),
        (
            {str(i): f"{i}.safetensors" for i in range(1001)},
            LimitError,
            "1,001 shards, expected at most 1,000",
        ),
    ],
)
def test_an_index_that_is_wrong_gives_its_exact_error(
    directory: Path, weight_map: object, error: type[FormatError], words: str
) -> None:
    with refused(error, words, directory):
        sharded.open(index(directory, weight_map))


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (b"", FormatError, "not JSON"),
        (b"[]", FormatError, "weight_map is None, expected an object"),
        (b'{"weight_map": {"a": "one.safetensors"}, "metadata": 3}', FormatError, "metadata is 3"),
        (
            b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
            FormatError,
            "'a' appears twice",
        ),
        (b'{"weight_map": ' + b"[" * 10**5, LimitError, "100,001 deep, expected at most 64"),
        (b'{"weight_map": {"\xff": "one.safetensors"}}', FormatError, "not UTF-8"),
        (b'{"weight_map": {"a": "\\ud800"}}', FormatError, "half a surrogate pair"),
    ],
)
def test_hostile_text_gives_its_exact_error(
    directory: Path, raw: bytes, error: type[FormatError], words: str
) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_bytes(raw)
    with refused(error, words, path):
        sharded.open(path)


def test_an_index_over_32_mib_is_not_read(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, (1 << 25) + 1)
    with refused(LimitError, "33,554,433 bytes, expected at most 33,554,432", path):
        sharded.open(path)


@pytest.mark.parametrize("mmap", [True, False])
def test_only_regular_files_are_read(directory: Path, mmap: bool) -> None:
    os.mkfifo(directory / "fifo")
    (directory / "nested").mkdir()
    for name, kind in (("fifo", "a FIFO"), ("nested", "a directory")):
        with refused(FormatError, f"{name}: {kind}, expected a regular file", directory):
            sharded.open(directory / name, mmap)
        with refused(FormatError, f"{name}: {kind}, expected a regular file", directory):
            sharded.open(index(directory, {"a": name}), mmap)
    (directory / "zero").symlink_to("/dev/zero")
    with refused(FormatError, "zero: a character device", directory):
        sharded.open(directory / "zero", mmap)
    with refused(UnsafeError, "zero: a symbolic link", directory):
        sharded.open(index(directory, {"a": "zero"}), mmap)


def test_a_damaged_shard_is_named(directory: Path) -> None:
    data = (directory / "two.safetensors").read_bytes()
    (directory / "two.safetensors").write_bytes(data[:-1])
    with refused(TruncatedError, "the tensors end at byte", directory / "two.safetensors"):
        sharded.open(index(directory, {"a": "one.safetensors", "c": "two.safetensors"}))


@pytest.mark.slow
def test_every_cut_and_every_damaged_byte_of_an_index_give_format_errors_or_a_model(directory: Path) -> None:
    path = index(directory, {"a": "one.safetensors", "c": "two.safetensors"})

    def names(data: bytes) -> set[str]:
        path.write_bytes(data)
        try:
            return set(sharded.open(path))
        except FileNotFoundError as error:
            raise FormatError("the damage gave a shard another plain name") from error

    versions = list(accepted(path.read_bytes(), names))
    assert versions
    assert all(found == {"a", "c"} for _, found in versions)


def test_a_missing_shard_is_an_os_error(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sharded.open(index(directory, {"a": "three.safetensors"}))
