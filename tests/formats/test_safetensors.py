"""safetensors: literal bytes, the exact error of each hostile file, and the PyPI package as the oracle."""

import errno
import gc
import os
import random
import re
import socket
import stat
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors as oracle
import safetensors.numpy as oracle_numpy

import systems
from hostile import accepted, refused
from nplora.formats import files, safetensors
from nplora.formats.errors import (
    FormatError,
    LimitError,
    NotFetchedError,
    TruncatedError,
    UnsafeError,
    UnsupportedError,
)


def container(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]", name: str = "w") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def one(**fields: str) -> bytes:
    return container("{" + entry(**fields) + "}", bytes(4))


def test_a_file_of_literal_bytes_is_read() -> None:
    header = (
        '{"__metadata__":{"made":"by hand"},"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        '"n":{"dtype":"I8","shape":[],"data_offsets":[16,17]}}'
    )
    data = b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x00\x00\x00\x00\x80\x7f\xfe"
    tensors = safetensors.loads(container(header, data))
    assert list(tensors) == ["w", "n"]
    assert tensors.metadata == {"made": "by hand"}
    assert tensors["w"].dtype == "float32"
    assert tensors["w"].shape == (2, 2)
    np.testing.assert_array_equal(tensors["w"].numpy(), [[1.0, -2.0], [0.0, np.inf]])
    assert tensors["n"].numpy() == -2


def test_a_file_of_literal_bytes_is_written() -> None:
    header = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    padded = header.ljust(-(-len(header) // 8) * 8)
    expected = container(padded, b"\x00\x00\x80\x3f\x00\x00\x00\xc0")
    assert safetensors.dumps({"w": np.float32([[1, -2]])}, {"format": "pt"}) == expected


HOSTILE = {
    "no bytes": (b"", TruncatedError, "the file is empty"),
    "less than 8 bytes": (b"\x01\x00\x00", TruncatedError, "3 bytes"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        NotFetchedError,
        "is a Git LFS pointer; fetch the file with git lfs pull",
    ),
    "a GGUF file": (b"GGUF" + bytes(99), FormatError, "is a GGUF file, expected safetensors"),
    "header longer than the file": (b"\x40" + bytes(7) + b"{}", TruncatedError, "64 bytes"),
    "header over 100 MB": ((100_000_001).to_bytes(8, "little"), LimitError, "100,000,000"),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", LimitError, "18,446,744,073,709,551,615"),
    "empty header": (container(""), FormatError, "expected '{'"),
    "header is a list": (container("[]"), FormatError, "expected '{'"),
    "header begins with a space": (container(" {}"), FormatError, "expected '{'"),
    "not UTF-8": (container(b'{"\xff":{}}'), FormatError, "UTF-8 at byte 2"),
    "not JSON": (container('{"w"}'), FormatError, "not JSON"),
    "depth 10^5": (container('{"w":' + "[" * 10**5), LimitError, "100,001 deep, expected at most 64"),
    "NaN": (container('{"w":NaN}'), FormatError, "NaN"),
    "half a surrogate pair": (container('{"__metadata__":{"a":"\\ud800"}}'), FormatError, "surrogate"),
    "duplicate name": (
        container("{" + entry() + "," + entry() + "}", bytes(4)),
        FormatError,
        "'w' appears twice",
    ),
    "duplicate field": (
        container('{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        FormatError,
        "'dtype' appears twice",
    ),
    "entry is a list": (container('{"w":[]}'), FormatError, "tensor 'w'"),
    "field missing": (container('{"w":{"dtype":"F32","shape":[0]}}'), FormatError, "data_offsets"),
    "field of no meaning": (
        container('{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":1}}'),
        FormatError,
        "'x'",
    ),
    "begin after end": (one(offsets="[4,0]"), FormatError, "tensor 'w': data_offsets are [4, 0]"),
    "three offsets": (one(offsets="[0,4,4]"), FormatError, "data_offsets are [0, 4, 4]"),
    "hole at the front": (one(shape="[0]", offsets="[4,4]"), FormatError, "hole"),
    "hole between": (
        container("{" + entry() + "," + entry(name="v", offsets="[8,12]") + "}", bytes(12)),
        FormatError,
        "tensor 'v' leaves a hole",
    ),
    "overlap": (
        container("{" + entry() + "," + entry(name="v", offsets="[2,6]") + "}", bytes(6)),
        FormatError,
        "tensor 'v' overlaps",
    ),
    "the same bytes twice": (
        container("{" + entry() + "," + entry(name="v") + "}", bytes(4)),
        FormatError,
        "overlaps",
    ),
    "trailing bytes": (one() + b"\x00", FormatError, "but the last tensor ends at byte"),
    "data missing": (one()[:-1], TruncatedError, "end at byte"),
    "shape and extent differ": (one(shape="[2]"), FormatError, "takes 8 bytes, but data_offsets give 4"),
    "shape product wraps": (one(shape="[4294967296,4294967296]"), LimitError, "2^63"),
    "shape product wraps to the extent": (one(shape="[4611686018427387905,4]"), LimitError, "2^63"),
    "shape product wraps beside a zero": (
        one(shape="[9223372036854775807,4,0]", offsets="[0,0]"),
        LimitError,
        "2^63",
    ),
    "40 dimensions": (one(shape=str([1] * 40)), LimitError, "40 dimensions"),
    "negative size": (one(shape="[-1]"), FormatError, "shape holds -1"),
    "minus zero": (one(shape="[-0]", offsets="[0,0]"), FormatError, "shape holds -0.0"),
    "size 1e3": (one(shape="[1e3]"), FormatError, "shape holds 1000.0"),
    "size 1.0": (one(shape="[1.0]"), FormatError, "shape holds 1.0"),
    "size 2^64": (one(shape="[18446744073709551616]"), FormatError, "shape holds 18446744073709551616"),
    "size of 5,000 digits": (one(shape="[" + "9" * 5000 + "]"), LimitError, "5,000 characters"),
    "size true": (one(shape="[true]"), FormatError, "shape holds True"),
    "offset 2^64": (one(offsets="[0,18446744073709551616]"), FormatError, "data_offsets holds 184467"),
    "shape is a number": (one(shape="1"), FormatError, "shape is 1"),
    "dtype is a number": (
        container('{"w":{"dtype":1,"shape":[],"data_offsets":[0,4]}}'),
        FormatError,
        "dtype is 1",
    ),
    "unknown dtype": (one(dtype="F8_E4M3"), UnsupportedError, "dtype 'F8_E4M3', expected one of U64, "),
    "metadata is a list": (container('{"__metadata__":[]}'), FormatError, "__metadata__ is []"),
    "metadata is not text": (container('{"__metadata__":{"a":1}}'), FormatError, "'a' is 1, expected text"),
    "more than 131,072 tensors": (
        container('{"w":0' + ',"w":0' * 131_073 + "}"),
        LimitError,
        "131,074 values at depth 1, expected at most 131,073",
    ),
    "objects within objects": (
        container('{"w":' + "{" * 262_147),
        LimitError,
        "262,148 deep, expected at most 64",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_its_exact_error_quickly_in_little_memory(name: str, tmp_path: Path) -> None:
    data, error, words = HOSTILE[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    for mmap in (True, False):
        with refused(error, words, path):
            safetensors.open(path, mmap=mmap)


def test_a_boolean_other_than_0_and_1_is_refused() -> None:
    tensors = safetensors.loads(container("{" + entry("BOOL", "[2]", "[0,2]") + "}", b"\x01\x02"))
    with pytest.raises(FormatError, match="'w': a BOOL"):
        tensors["w"]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    kinds = {tmp_path: "a directory", Path(os.devnull): "a character"}
    if not systems.IS_WINDOWS:
        os.mkfifo(tmp_path / "fifo")
        kinds |= {tmp_path / "fifo": "a FIFO", Path("/dev/zero"): "a character"}
    for path, kind in kinds.items():
        for mmap in (True, False):
            with refused(FormatError, kind, path):
                safetensors.open(path, mmap=mmap)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        safetensors.open(tmp_path / "none.safetensors")


def test_hostile_headers_are_read_in_linear_time() -> None:
    headers = [
        b'{"' + b'\\"' * 2_000_000,
        b'{"' + b'\\"' * 2_000_000 + b"\\",
        b'{"w":' + b"[" * 4_000_000,
        b"{" + b",".join(b'"%d":0' % (i % 99) for i in range(200_000)) + b"}",
    ]
    for header in headers:
        begin = time.perf_counter()
        with pytest.raises(FormatError):
            safetensors.loads(container(header))
        assert time.perf_counter() - begin < 5  # a quadratic reader would take hours


def test_a_missing_name_is_a_key_error_with_the_nearest_names() -> None:
    tensors = safetensors.loads(safetensors.dumps({"layers.0.q_proj": np.zeros(1), "norm": np.zeros(1)}))
    with pytest.raises(KeyError, match=r"no tensor 'layers.0.q_prj', the nearest names: 'layers.0.q_proj'"):
        tensors["layers.0.q_prj"]
    assert "norm" in tensors
    assert tensors.get("nothing") is None


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = [
        "float64",
        "float32",
        "float16",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ]
    arrays = {name: rng.integers(0, 100, (3, 5)).astype(name) for name in names}
    return arrays | {"scalar": np.array(2.5), "empty": np.zeros((0, 4), np.int16), 'name é "q"': np.arange(3)}


def test_every_dtype_is_written_as_the_oracle_writes_it() -> None:
    for metadata in (None, {"format": "pt"}):
        assert safetensors.dumps(every_dtype(), metadata) == oracle_numpy.save(every_dtype(), metadata)


@pytest.mark.parametrize("mmap", [True, False])
def test_every_dtype_is_read_as_the_oracle_wrote_it(mmap: bool, tmp_path: Path) -> None:
    oracle_numpy.save_file(every_dtype(), tmp_path / "a.safetensors")
    tensors = safetensors.open(tmp_path / "a.safetensors", mmap=mmap)
    assert set(tensors) == set(every_dtype())
    for name, array in every_dtype().items():
        assert tensors[name].dtype == array.dtype.name
        assert tensors[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert not tensors[name].numpy().flags.writeable


def test_bfloat16_keeps_its_bits_and_its_tag() -> None:
    values = np.array([1.0, -2.5, 3e38], ml_dtypes.bfloat16)
    data = safetensors.dumps({"a": values, "b": safetensors.Tensor("b", "bfloat16", values.view(np.uint16))})
    tensors = safetensors.loads(data)
    for name in "ab":
        assert tensors[name].dtype == "bfloat16"
        np.testing.assert_array_equal(tensors[name].numpy(), np.array([0x3F80, 0xC020, 0x7F62], np.uint16))
    assert {fields["dtype"] for _, fields in oracle.deserialize(data)} == {"BF16"}
    assert safetensors.dumps(tensors) == data


def test_any_strides_and_byte_order_are_written_row_major_and_little_endian() -> None:
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "transposed": a.T,
        "sliced": a[::2, ::-1],
        "fortran": np.asfortranarray(a),
        "big": a.astype(">f4"),
    }
    data = safetensors.dumps(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(safetensors.loads(data)[name].numpy(), array)
        np.testing.assert_array_equal(oracle_numpy.load(data)[name], array)


def test_an_unaligned_tensor_is_copied_into_place() -> None:
    data = container("{" + entry("U8", "[1]", "[0,1]", "a") + "," + entry("F32", "[1]", "[1,5]", "b") + "}")
    array = safetensors.loads(data + b"\x07" + np.float32(1.5).tobytes())["b"].numpy()
    assert array.flags.aligned
    assert not array.flags.writeable
    assert array[0] == 1.5


@pytest.mark.slow
def test_an_array_keeps_the_mapping_alive(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.save(path, {"w": np.arange(1 << 16)})
    array = safetensors.open(path)["w"].numpy()
    path.unlink()
    gc.collect()
    np.testing.assert_array_equal(array, np.arange(1 << 16))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_a_mapped_file_is_not_read_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    size = 1 << 40  # sparse: a terabyte, which nothing could read
    header = "{" + entry("U8", f"[{size}]", f"[0,{size}]") + "}"
    path.write_bytes(container(header))
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    assert safetensors.open(path)["w"].numpy()[-1] == 0


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w": np.zeros(2, complex)}, "'w' is complex128"),
        ({"w": np.array([None])}, "'w' is object"),
        ({"w": np.array(["text"])}, "'w' is str"),
        (
            {"w": safetensors.Tensor("w", "float64", np.zeros(2, np.float32))},
            "is declared float64, but holds float32",
        ),
        (
            {"w": safetensors.Tensor("w", "bfloat16", np.zeros(2, np.float16))},
            "is declared bfloat16, but holds float16",
        ),
        (
            {"w": safetensors.Tensor("w", "bfloat16", np.zeros(2, np.int16))},
            "is declared bfloat16, but holds int16",
        ),
        ({1: np.zeros(2)}, "1 cannot be the name"),
        ({"__metadata__": np.zeros(2)}, "cannot be the name"),
    ],
)
def test_tensors_that_the_format_cannot_hold_are_type_errors(
    tensors: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        safetensors.dumps(tensors)


def test_metadata_that_is_not_text_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'step' to 3"):
        safetensors.dumps({}, {"step": 3})  # type: ignore[dict-item]


def test_a_file_without_tensors_is_written_and_read() -> None:
    assert safetensors.dumps({}) == oracle_numpy.save({})
    assert len(safetensors.loads(safetensors.dumps({}, {"a": "b"}))) == 0


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.save(path, {"w": np.zeros(4)})
    old = safetensors.open(path)["w"].numpy()
    safetensors.save(path, {"w": np.ones(4)})
    np.testing.assert_array_equal(old, np.zeros(4))  # the mapped old file still exists
    np.testing.assert_array_equal(safetensors.open(path)["w"].numpy(), np.ones(4))
    if systems.IS_WINDOWS:
        del old
        gc.collect()
        safetensors.save(path, {"w": np.ones(4)})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.safetensors"
    safetensors.save(path, {"w": np.zeros(4)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, limits[1])
    )  # the system shortens a write, then refuses
    try:
        with pytest.raises(OSError, match=r"10,000 of 80,072 bytes were written") as caught:
            safetensors.save(path, {"w": np.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_an_interrupt_at_any_call_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.save(path, {"w": np.zeros(4)})
    before = path.read_bytes()

    def interrupt(*_: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        safetensors.save(path, {"w": np.ones(4)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_directory_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none" / "a.safetensors", tmp_path / "file" / "a.safetensors", tmp_path):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            safetensors.save(path, {"w": np.zeros(4)})
        assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a character device", "a broken symbolic link"])
def test_only_a_regular_file_is_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "target"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.symlink_to("/dev/null" if kind == "a character device" else "nothing")
    before = path.lstat()
    with pytest.raises(  # which may read the link, and so change the time of its last access
        FileExistsError, match=re.escape(f"is {kind}, but only a regular file can be replaced: {str(path)!r}")
    ):
        safetensors.save(path, {"w": np.zeros(4)})
    after = path.lstat()
    assert (after.st_mode, after.st_ino, after.st_mtime_ns) == (
        before.st_mode,
        before.st_ino,
        before.st_mtime_ns,
    )
    assert os.listdir(tmp_path) == ["target"]


def test_a_link_to_a_regular_file_is_replaced_by_the_file(tmp_path: Path) -> None:
    safetensors.save(tmp_path / "a.safetensors", {"w": np.zeros(4)})
    before = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "link").symlink_to("a.safetensors")
    safetensors.save(tmp_path / "link", {"w": np.ones(4)})
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert safetensors.open(tmp_path / "link", follow_links=False)["w"].numpy()[0] == 1


def test_a_link_that_leads_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(UnsafeError, match="link: a symbolic link that leads to itself or through too many"):
        safetensors.open(tmp_path / "link")


def test_the_parent_of_a_link_is_that_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "there" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "inner")
    safetensors.save(tmp_path / "link" / ".." / "a.safetensors", {"w": np.zeros(4)})
    assert sorted(os.listdir(tmp_path / "there")) == ["a.safetensors", "inner"]
    with files.Directory(tmp_path / "link" / "..") as directory:
        assert os.path.samefile(directory, tmp_path / "there")


@systems.needs_flushing
def test_a_directory_that_cannot_be_flushed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"Input/output error: a\.safetensors is in place, but") as caught:
        safetensors.save(tmp_path / "a.safetensors", {"w": np.zeros(4)})
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_left_over_is_not_removed_while_another_save_is_under_way(tmp_path: Path) -> None:
    import fcntl

    left = tmp_path / ".a.safetensors.0123456789ab.tmp"
    left.write_bytes(b"half, or being written")
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_SH)
        safetensors.save(tmp_path / "a.safetensors", {"w": np.zeros(4)})
        assert left.exists()
    finally:
        os.close(other)
    safetensors.save(tmp_path / "a.safetensors", {"w": np.zeros(4)})
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_tensor_is_read_on_access_and_its_size_is_known_before(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.save(path, {"w": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 4), np.int8)})
    with safetensors.reading(path) as tensors:
        assert [(e.dtype, e.shape) for e in tensors.entries.values()] == [
            ("float64", (2, 3)),
            ("int8", (0, 4)),
        ]
        with path.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(np.float64(9).tobytes())
        np.testing.assert_array_equal(tensors["w"].numpy(), [[0, 1, 2], [3, 4, 9]])
        assert tensors["empty"].shape == (0, 4)
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(TruncatedError, match=re.escape(f"{path}: the file ends at byte")):
            tensors["w"]


def test_a_file_beyond_the_memory_is_named(tmp_path: Path) -> None:
    import resource

    path, size = tmp_path / "big.safetensors", 1 << 40
    header = "{" + entry("U8", f"[{size}]", f"[0,{size}]") + "}"
    path.write_bytes(container(header))
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 38, limits[1]))
    try:
        with pytest.raises(MemoryError, match=re.escape(f"{path}: no memory for 1,099,511,")):
            safetensors.open(path, mmap=False)
        path.write_bytes(b"zz nonsense")
        os.truncate(path, size)
        with pytest.raises(LimitError, match=r"announce a header of .* bytes, expected at most"):
            safetensors.open(path, mmap=False)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutations(data: bytes, count: int, rng: random.Random) -> list[bytes]:
    """Truncated, flipped, spliced and header-only damage, half of it in the header."""
    result = []
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(min(len(damaged), rng.choice([8, 200, len(damaged)])))
            match rng.randrange(5):
                case 0:
                    damaged[place] ^= 1 << rng.randrange(8)
                case 1:
                    damaged[place] = rng.choice(b'0123456789[]{},:"\\-. eE')
                case 2:
                    del damaged[place : place + rng.randint(1, 9)]
                case 3:
                    damaged[place:place] = rng.choice([b"0", b"[", b'"', b"\x00", b"-", b"9999999999"])
                case _:
                    del damaged[place:]
            if not damaged:
                break
        if rng.random() < 0.5 and len(damaged) >= 8:  # a correct header length, so that the JSON is parsed
            damaged[:8] = (len(damaged) - 8 - 40).to_bytes(8, "little", signed=True)
        result.append(bytes(damaged))
    return result


def small_files() -> dict[str, bytes]:
    bits = safetensors.Tensor("b", "bfloat16", np.uint16([0x3F80]))
    return {
        "nothing": safetensors.dumps({}),
        "metadata": safetensors.dumps({"w": np.float32([1, 2])}, {"format": "pt", "é": 'a"\\\n'}),
        "types": safetensors.dumps({"b": bits, "i": np.int64([[-1]]), "t": np.array([True, False])}),
        "shapes": safetensors.dumps({"s": np.float64(1), "e": np.zeros((0, 2), "f2"), "c": np.int8([[[3]]])}),
    }


def contents(data: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Everything in a file: every tensor is read."""
    return {name: (t.shape, t.numpy().tobytes()) for name, t in safetensors.loads(data).items()}


def oracle_contents(data: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (tuple(t["shape"]), bytes(t["data"])) for name, t in oracle.deserialize(data)}


@pytest.mark.parametrize("name", small_files())
def test_every_cut_and_every_damaged_byte_give_format_errors_or_the_content_that_the_oracle_reads(
    name: str,
) -> None:
    versions = list(accepted(small_files()[name], contents))
    assert versions or name == "nothing"
    for data, found in versions:
        assert found == oracle_contents(data)


def test_damaged_files_give_only_format_errors_and_the_oracle_accepts_what_we_accept() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "é": np.arange(4, dtype=np.int16),
        "c": np.ones(8, bool),
    }
    data = safetensors.dumps(arrays, {"format": "pt"})
    assert len(data) - 8 - 40 == int.from_bytes(data[:8], "little")
    survivors = 0
    for mutated in mutations(data, 4_000, random.Random(0)):
        try:
            found = contents(mutated)
        except FormatError:
            continue
        survivors += 1
        assert found == oracle_contents(mutated)
    assert survivors > 100
