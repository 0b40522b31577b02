"""Hostile GGUF files: the exact error of each, every truncation and every damaged byte."""

import contextlib
import itertools
import struct
import time
import tracemalloc
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from hostile import accepted, refused
from nplora.formats import gguf
from nplora.formats.errors import FormatError, LimitError, TruncatedError, UnsupportedError
from nplora.formats.gguf import Typed
from nplora.formats.gguf.ggml_types import VALUE_TYPES

INT64_MAX = 2**63 - 1


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def scalar(kind: str, raw: bytes, key: bytes = b"key") -> bytes:
    return text(key) + u32(VALUE_TYPES.index(kind)) + raw


def array(kind: str, count: int, raw: bytes = b"", key: bytes = b"key") -> bytes:
    return scalar("ARRAY", u32(VALUE_TYPES.index(kind)) + u64(count) + raw, key)


def alignment(value: int, kind: str = "UINT32") -> bytes:
    return scalar(kind, u32(value), b"general.alignment")


def tensor(
    ne: tuple[int, ...] = (4,),
    kind: int = 0,
    offset: int = 0,
    name: bytes = b"w",
    dimensions: int | None = None,
) -> bytes:
    sizes = b"".join(map(u64, ne))
    return (
        text(name)
        + u32(len(ne) if dimensions is None else dimensions)
        + sizes
        + struct.pack("<iQ", kind, offset)
    )


def container(
    metadata: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(64),
    version: int = 3,
    n_tensors: int | None = None,
    n_metadata: int | None = None,
) -> bytes:
    counts = u64(len(tensors) if n_tensors is None else n_tensors)
    counts += u64(len(metadata) if n_metadata is None else n_metadata)
    header = b"GGUF" + u32(version) + counts + b"".join(metadata + tensors)
    return header + bytes(-len(header) % 32) + data


def one(*args: tuple[int, ...], **fields: int) -> bytes:
    return container(tensors=(tensor(*args, **fields),))  # type: ignore[arg-type]


MANY = tuple(tensor((0,), name=b"%d" % i) for i in range(1 << 16))
HUGE_INT8 = tensor((INT64_MAX,), 24)

HOSTILE = {
    "empty file": (b"", TruncatedError, "the file is empty"),
    "only the magic": (b"GGUF", TruncatedError, "4 bytes"),
    "bad magic": (b"GGML" + bytes(99), FormatError, "begins with 'GGML', expected 'GGUF'"),
    "a safetensors file": (
        b"\x08" + bytes(7) + b'{"w":{}}' + bytes(99),
        FormatError,
        "expected 'GGUF' (is it a safetensors file?)",
    ),
    "training data": (
        b'{"prompt": "a", "completion": "b"}\n',
        FormatError,
        "expected 'GGUF' (is it a data file, not a model or an adapter?)",
    ),
    "version 0": (container(version=0), UnsupportedError, "version 0, expected little-endian version 2"),
    "version 1": (container(version=1), UnsupportedError, "version 1"),
    "version 4": (container(version=4), UnsupportedError, "version 4"),
    "big-endian": (container(version=3 << 24), UnsupportedError, "big-endian"),
    "2^63 tensors": (
        container(n_tensors=2**63),
        LimitError,
        "9,223,372,036,854,775,808 tensors, expected at most 65,536",
    ),
    "2^63 metadata entries": (
        container(n_metadata=2**63),
        LimitError,
        "metadata entries, expected at most",
    ),
    "10^6 tensors": (
        container(n_tensors=10**6, data=bytes(25 * 10**6)),
        LimitError,
        "1,000,000 tensors, expected at most",
    ),
    "more tensors than bytes": (
        container(n_tensors=9),
        LimitError,
        "9 tensors, but the 72 bytes that follow hold at most 2",
    ),
    "more metadata than bytes": (container(n_metadata=9), LimitError, "9 metadata entries, but the 72 bytes"),
    "key length 2^64 - 1": (
        container((u64(2**64 - 1) + bytes(99),)),
        LimitError,
        "the key of metadata 0 has 18,446,744,073,709,551,615 bytes, expected at most 65,535",
    ),
    "key past the end": (container((u64(999) + bytes(99),)), TruncatedError, "takes 999 bytes, but the"),
    "empty key": (
        container((scalar("UINT8", b"\0", b""),), data=bytes(99)),
        FormatError,
        "is '', expected a non-empty name",
    ),
    "duplicate key": (container((scalar("UINT8", b"\0"),) * 2), FormatError, "metadata 'key' appears twice"),
    "key not UTF-8": (container((scalar("UINT8", b"\0", b"k\xff"),)), FormatError, "not UTF-8 at byte 33"),
    "key with NUL": (container((scalar("UINT8", b"\0", b"k\0"),)), FormatError, "is 'k\\x00', expected"),
    "text not UTF-8": (
        container((scalar("STRING", text(b"\xc3(")),)),
        FormatError,
        "metadata 'key' is not UTF-8",
    ),
    "value type 99": (
        container((text(b"key") + u32(99),)),
        FormatError,
        "'key': the type number at byte 35 is 99, expected 0 to 12",
    ),
    "value type 13": (container((text(b"key") + u32(13),)), FormatError, "the type number at byte 35 is 13"),
    "element type 99": (
        container((text(b"key") + u32(9) + u32(99),)),
        FormatError,
        "element type of metadata 'key': the type number at byte 39 is 99",
    ),
    "value missing": (
        container((text(b"k" * 99),))[:133],
        TruncatedError,
        "takes 4 bytes, but the file has 133",
    ),
    "text past the end": (container((scalar("STRING", u64(999)),)), TruncatedError, "takes 999 bytes"),
    "text of 2^64 - 1": (container((scalar("STRING", u64(2**64 - 1)),)), LimitError, "at most 100,000,000"),
    "arrays of arrays, 5,000 deep": (
        container((scalar("ARRAY", (u32(9) + u64(1)) * 5000),)),
        UnsupportedError,
        "metadata 'key' is an array of arrays",
    ),
    "array bytes wrap": (
        container((array("UINT64", 2**61),)),
        LimitError,
        "takes 18,446,744,073,709,551,616",
    ),
    "array of 2^64 - 1 bytes": (container((array("UINT8", 2**64 - 1),)), LimitError, "at most 100,000,000"),
    "array past the end": (container((array("UINT64", 99),)), TruncatedError, "takes 792 bytes"),
    "more strings than bytes": (container((array("STRING", 99),)), TruncatedError, "takes 792 bytes"),
    "string of an array past the end": (
        container((array("STRING", 2, text(b"a") + u64(999)),)),
        TruncatedError,
        "metadata 'key'",
    ),
    "last string without its length": (
        container((array("STRING", 2, text(b"a" * 99)),), data=b"")[:-20],
        TruncatedError,
        "metadata 'key'",
    ),
    "last string without its text": (
        container((array("STRING", 1, u64(9)),))[: 24 + len(array("STRING", 1, u64(9)))],
        TruncatedError,
        "metadata 'key'",
    ),
    "token of 1 GiB": (
        container((array("STRING", 2, text(b"a") + u64(1 << 30), b"tokenizer.ggml.tokens"),)),
        LimitError,
        "takes 1,073,741,841 bytes, but a header may have at most",
    ),
    "string of an array of 2^64 - 1": (
        container((array("STRING", 2, text(b"a") + u64(2**64 - 1)),)),
        LimitError,
        "at most 100,000,000",
    ),
    "bool = 2": (
        container((scalar("BOOL", b"\2"),)),
        FormatError,
        "metadata 'key': the BOOL at byte 39 is 2",
    ),
    "bool = 2 in an array": (
        container((array("BOOL", 3, b"\0\1\2"),)),
        FormatError,
        "a BOOL other than 0 and 1",
    ),
    "alignment 0": (
        container((alignment(0),)),
        FormatError,
        "general.alignment is 0, expected a power of two",
    ),
    "alignment 13": (container((alignment(13),)), FormatError, "general.alignment is 13"),
    "alignment 2^31": (container((alignment(2**31),)), LimitError, "2,147,483,648, expected at most"),
    "alignment as INT32": (
        container((alignment(32, "INT32"),)),
        FormatError,
        "is INT32, expected one UINT32",
    ),
    "alignment as an array": (
        container((array("UINT32", 1, u32(32), b"general.alignment"),)),
        FormatError,
        "expected one UINT32",
    ),
    "alignment as BOOL": (
        container((scalar("BOOL", b"\1", b"general.alignment"),)),
        FormatError,
        "is BOOL, expected one UINT32",
    ),
    "5 dimensions": (one((1,) * 5), FormatError, "tensor 'w' has 5 dimensions, expected at most 4"),
    "2^32 - 1 dimensions": (one((1,), dimensions=2**32 - 1), FormatError, "4,294,967,295 dimensions"),
    "a negative dimension": (
        one((2**64 - 1, 4)),
        FormatError,
        "tensor 'w': the shape holds the negative size -1",
    ),
    "elements wrap": (one((INT64_MAX, 2)), LimitError, "is larger than 2^63 bytes"),
    "elements wrap to a few": (one((2**62, 4)), LimitError, "is larger than 2^63 bytes"),
    "elements wrap beside a zero": (one((INT64_MAX, 2, 0)), LimitError, "is larger than 2^63 bytes"),
    "bytes near SIZE_MAX": (one((2**62 - 1,)), LimitError, "F32 of shape (4611686018427387903,) is larger"),
    "bytes wrap beside a zero": (one((0, 2**61)), LimitError, "is larger than 2^63 bytes"),
    "bytes wrap when padded": (container(tensors=(HUGE_INT8,)), LimitError, "end after byte 2^63"),
    "two sizes whose sum wraps": (
        container(tensors=(tensor((2**62,), 24), tensor((2**62,), 24, 2**62, b"v"))),
        LimitError,
        "tensor 'v': 4,611,686,018,427,387,904 bytes from offset 4,611,686,018,427,387,904 end after byte",
    ),
    "an unknown type": (
        one(kind=99),
        UnsupportedError,
        "tensor 'w' has type 99, which nplora does not know",
    ),
    "a removed type": (one(kind=4), UnsupportedError, "has type 4, which"),
    "a negative type": (one(kind=-1), UnsupportedError, "has type -1, which"),
    "rows that are no whole blocks": (
        one((33, 2), kind=2),
        FormatError,
        "rows of 33 elements, but Q4_0 needs a multiple of 32",
    ),
    "a scalar of a quantised type": (one((), kind=12), FormatError, "rows of 1 elements, but Q4_K needs"),
    "offset 2^64 - 1": (one(offset=2**64 - 1), FormatError, "begins at offset 18,446,744,073,709,551,615"),
    "an unaligned offset": (one(offset=4), FormatError, "'w': begins at offset 4, expected a multiple of 32"),
    "an aligned offset beyond 2^63": (one(offset=2**64 - 32), LimitError, "end after byte 2^63"),
    "overlap": (
        container(tensors=(tensor((9,)), tensor((1,), offset=32, name=b"v"))),
        FormatError,
        "tensor 'v' begins at byte 128, but another tensor ends at 132",
    ),
    "the same bytes twice": (
        container(tensors=(tensor(), tensor(name=b"v"))),
        FormatError,
        "tensor 'v' begins at byte 96, but another tensor ends at 112",
    ),
    "a tensor past the end": (one((17,)), TruncatedError, "'w' ends at byte 132, but the file has 128"),
    "blocks past the end": (one((2**58,), kind=2), TruncatedError, "tensor 'w' ends at byte"),
    "an empty tensor past the end": (one((0,), offset=96), TruncatedError, "tensor 'w' ends at byte 160"),
    "duplicate tensor": (
        container(tensors=(tensor(), tensor(offset=32))),
        FormatError,
        "the tensor 'w' appears twice",
    ),
    "an empty tensor name": (one(name=b""), FormatError, "the name of tensor 0 at byte 24 is ''"),  # type: ignore[arg-type]
    "a tensor name with NUL": (one(name=b"w\0"), FormatError, "is 'w\\x00'"),  # type: ignore[arg-type]
    "a tensor name not UTF-8": (one(name=b"\xff"), FormatError, "not UTF-8"),  # type: ignore[arg-type]
    "a tensor name of 1,025 bytes": (one(name=b"w" * 1025), LimitError, "1,025 bytes, expected at most"),  # type: ignore[arg-type]
    "a header over 100 MB": (
        container((scalar("STRING", u64(100_000_000)),)),
        LimitError,
        "but a header may have at most 100,000,000 bytes",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_its_exact_error_quickly_in_little_memory(name: str, tmp_path: Path) -> None:
    data, error, words = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    for mmap in (True, False):
        with refused(error, words, path):
            gguf.open(path, mmap=mmap)


@pytest.mark.slow
def test_as_many_tensors_as_the_limit_allows_take_little_memory_and_fewer_take_linear_time() -> None:
    data = container(tensors=MANY)
    tracemalloc.start()
    assert len(gguf.loads(data)) == 1 << 16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    some, few = (container(tensors=MANY[: len(MANY) // share]) for share in (2, 16))
    assert processor_time(some) < 30 * processor_time(few)  # a quadratic time would be 64 times as long


def processor_time(data: bytes) -> float:
    """The shortest of three times of reading a file."""
    begins = [time.process_time()]
    for _ in range(3):
        gguf.loads(data)
        begins.append(time.process_time())
    return min(end - begin for begin, end in itertools.pairwise(begins))


def test_a_file_may_end_with_its_metadata() -> None:
    words = array("STRING", 2, text(b"a") + text(b""))
    for entry in (words, array("INT16", 1, b"\1\0"), scalar("STRING", text(b"ab"))):
        data = container((entry,))[: 24 + len(entry)]
        assert len(gguf.loads(data).metadata) == 1
        with pytest.raises(TruncatedError):
            gguf.loads(data[:-1])


def test_counts_are_compared_with_the_smallest_entries() -> None:
    smallest = container((scalar("UINT8", b"\7", b"k"),))[: 24 + 14]
    assert gguf.loads(smallest).metadata == {"k": 7}
    with pytest.raises(LimitError, match="1 metadata entries, but the 13 bytes that follow hold at most 0"):
        gguf.loads(smallest[:-1])
    smallest = container(tensors=(tensor(()),))[: 24 + 25]
    with pytest.raises(TruncatedError, match="tensor 'w' ends at byte 68, but the file has 49"):
        gguf.loads(smallest)
    with pytest.raises(LimitError, match="1 tensors, but the 24 bytes that follow hold at most 0"):
        gguf.loads(smallest[:-1])


def test_a_dimension_of_zero_gives_an_empty_tensor() -> None:
    for ne in ((0,), (0, 4), (4, 0), (32, 0)):
        for kind in (0, 2):
            if ne[0] % 32 == 0 or kind == 0:
                file = gguf.loads(one(ne, kind=kind))
                assert (file["w"].shape, file["w"].nbytes) == (ne[::-1], 0)


# ---- every cut, every damaged byte ----


def small_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    blocks = gguf.Tensor("q", "Q4_0", (2, 32), rng.integers(0, 256, 36, dtype=np.uint8))
    scalars = {
        kind.lower(): Typed(1, kind) for kind in VALUE_TYPES if kind not in ("STRING", "ARRAY", "BOOL")
    }
    arrays = {
        "numbers": np.int16([1, 2, 3]),
        "truths": [True, False],
        "words": ["a", "naïve", ""],
        "none": Typed([], "UINT32"),
    }
    return {
        "nothing": gguf.dumps({}),
        "a tensor": gguf.dumps({"w": np.float32([[1, 2], [3, 4]])}),
        "scalars": gguf.dumps({}, scalars | {"yes": True, "text": "naïve"}),
        "arrays": gguf.dumps({}, arrays),
        "tensors": gguf.dumps(
            {"a": np.int8([1, 2, 3]), "q": blocks, "s": np.float64(1), "e": np.zeros((2, 0), "f2")}
        ),
        "aligned to 8": gguf.dumps(
            {"a": np.int8([1]), "b": np.float16([[1], [2]])}, {"general.alignment": Typed(8, "UINT32")}
        ),
        "an adapter": gguf.dumps(
            {
                "blk.0.attn_q.weight.lora_a": np.ones((1, 4), "f4"),
                "blk.0.attn_q.weight.lora_b": np.ones((4, 1), "f4"),
            },
            {"general.type": "adapter", "adapter.lora.alpha": np.float32(2)},
        ),
    }


def contents(file: gguf.GgufFile) -> list[tuple[object, ...]]:
    """Everything in a file: every value is read."""
    for key in file.metadata:
        list(np.atleast_1d(np.asarray(file.metadata[key], object)))
    for tensor in file.values():
        with contextlib.suppress(UnsupportedError):
            assert tensor.numpy().shape == tensor.shape
    return [(t.name, t.type, t.shape, t.data.tobytes()) for t in file.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", small_files())
def test_damaged_files_give_only_format_errors_and_the_oracle_accepts_what_we_accept(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.gguf"
    versions = list(accepted(small_files()[name], lambda data: contents(gguf.loads(data))))
    assert versions
    for data, found in versions:
        path.write_bytes(data)
        theirs = oracle.GGUFReader(path)
        assert found == [
            (t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data.tobytes())
            for t in theirs.tensors
        ]
        del theirs  # Windows writes to no file that is mapped
