"""Writing GGUF: the same bytes as PyPI's gguf writes, and never half a file."""

import errno
import os
from pathlib import Path
from typing import Any

import gguf as oracle
import ml_dtypes
import numpy as np
import pytest

import nplora
from nplora.formats import files, gguf
from nplora.formats.gguf import Stream, Tensor, Typed
from nplora.formats.gguf.ggml_types import GGML_TYPES
from nplora.weights import storages
from nplora.weights.storages import GGML_NAMES, STORAGES

Array = np.ndarray[Any, Any]

BLOCKS = np.random.default_rng(0).integers(0, 256, (3, 2 * 144), dtype=np.uint8)
BITS = np.arange(6, dtype=np.uint16).reshape(2, 3)

VALUES: dict[str, tuple[Any, str, list[Any] | Any]] = {
    # our value, the oracle's type, the oracle's value
    "u8": (np.uint8(255), "UINT8", 255),
    "i8": (Typed(-128, "INT8"), "INT8", -128),
    "u16": (Typed(65535, "UINT16"), "UINT16", 65535),
    "i16": (np.int16(-5), "INT16", -5),
    "u32": (Typed(np.int64(7), "UINT32"), "UINT32", 7),
    "i32": (np.int32(-7), "INT32", -7),
    "u64": (Typed(2**64 - 1, "UINT64"), "UINT64", 2**64 - 1),
    "i64": (Typed(-(2**63), "INT64"), "INT64", -(2**63)),
    "f32": (np.float32(0.1), "FLOAT32", float(np.float32(0.1))),
    "f32 from an integer": (Typed(3, "FLOAT32"), "FLOAT32", 3.0),
    "f64": (Typed(0.1, "FLOAT64"), "FLOAT64", 0.1),
    "inf": (Typed(float("inf"), "FLOAT32"), "FLOAT32", float("inf")),
    "yes": (True, "BOOL", True),
    "no": (np.False_, "BOOL", False),
    "text": ("naïve \U0001f600", "STRING", "naïve \U0001f600"),
    "ids": (np.arange(3, dtype=np.int32), "INT32", [0, 1, 2]),
    "big-endian ids": (np.arange(3, dtype=">u2"), "UINT16", [0, 1, 2]),
    "scores": (Typed([0.5, 1], "FLOAT32"), "FLOAT32", [0.5, 1.0]),
    "truths": ([True, False], "BOOL", [True, False]),
    "words": (("a", "", "né"), "STRING", ["a", "", "né"]),
}
ARRAYS: dict[str, Array] = {
    "f64": np.arange(4.0),
    "f32": np.float32([[1, 2], [3, 4]]),
    "f16": np.ones((2, 3, 4, 5), np.float16),
    "i8": np.int8([[-1, 2, 3]]),
    "i16": np.int16([5]),
    "i32": np.arange(7, dtype=np.int32),
    "i64": np.arange(3),
}


def of_the_oracle(path: Path, alignment: int) -> bytes:
    writer = oracle.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, (_, kind, value) in VALUES.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, oracle.GGUFValueType.ARRAY, oracle.GGUFValueType[kind])
        else:
            writer.add_key_value(key, value, oracle.GGUFValueType[kind])
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    writer.add_tensor("bf16", BITS.view(np.uint8), raw_dtype=oracle.GGMLQuantizationType.BF16)
    writer.add_tensor("q4_k", BLOCKS, raw_dtype=oracle.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_a_file_is_written_byte_for_byte_as_the_oracle_writes_it(alignment: int, tmp_path: Path) -> None:
    metadata: dict[str, Any] = {"general.architecture": "llama"}
    if alignment != 32:
        metadata["general.alignment"] = Typed(alignment, "UINT32")
    metadata |= {key: value for key, (value, _, _) in VALUES.items()}
    tensors = ARRAYS | {"bf16": BITS.view(ml_dtypes.bfloat16), "q4_k": Tensor("", "Q4_K", (3, 512), BLOCKS)}
    gguf.save(tmp_path / "ours.gguf", tensors, metadata)
    assert (tmp_path / "ours.gguf").read_bytes() == of_the_oracle(tmp_path / "theirs.gguf", alignment)
    assert gguf.dumps(tensors, metadata) == (tmp_path / "ours.gguf").read_bytes()


def test_the_oracle_reads_every_type_of_tensor_that_is_written(tmp_path: Path) -> None:
    tensors = {}
    for name, kind in GGML_TYPES.items():
        if name != "Q8_1":  # the oracle has a wrong size for it
            data = np.random.default_rng(kind.number).integers(
                0, 256, 3 * 2 * kind.block_nbytes, dtype=np.uint8
            )
            tensors[name] = Tensor(name, name, (3, 2 * kind.block), data)
    gguf.save(tmp_path / "a.gguf", tensors)
    found = oracle.GGUFReader(tmp_path / "a.gguf").tensors
    assert [(t.name, t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in found] == [
        (t.name, t.type, list(t.shape[::-1]), t.data.tobytes()) for t in tensors.values()
    ]


def test_a_copy_made_from_a_file_has_the_same_bytes() -> None:
    metadata = {key: value for key, (value, _, _) in VALUES.items()} | {"none": Typed([], "INT8")}
    data = gguf.dumps(ARRAYS | {"q": Tensor("q", "Q4_K", (3, 512), BLOCKS)}, metadata)
    file = gguf.loads(data)
    assert gguf.dumps(file, file.metadata.typed()) == data


def test_any_strides_and_byte_order_are_written_row_major_and_little_endian() -> None:
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    bits = np.arange(24, dtype=np.uint16).reshape(4, 6).view(ml_dtypes.bfloat16)
    arrays = {
        "transposed": a.T,
        "sliced": a[::2, ::-1],
        "fortran": np.asfortranarray(a),
        "big": a.astype(">f4"),
    }
    file = gguf.loads(gguf.dumps(arrays | {"bfloat16": bits.T}))
    for name, array in arrays.items():
        np.testing.assert_array_equal(file[name].numpy(), array)
    np.testing.assert_array_equal(file["bfloat16"].numpy(), bits.T.view(np.uint16))


@pytest.mark.parametrize("storage", [name for name in STORAGES if name != "nf4"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("shape", [(5, 512), (0, 256)])
def test_a_frozen_weight_is_written_in_its_storage(
    storage: str,
    mapped: bool,
    shape: tuple[int, int],
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storages, "_ELEMENTS_AT_A_TIME", 1024)  # two rows
    path = tmp_path / "w.gguf"
    fw = nplora.FrozenWeight(rng.standard_normal(shape), storage)
    gguf.save(path, {"w": fw})
    if mapped:
        fw = nplora.FrozenWeight.from_gguf(path, "w")
        gguf.save(path := tmp_path / "again.gguf", {"w": fw})
    (tensor,) = oracle.GGUFReader(path).tensors
    kind, values = tensor.tensor_type, tensor.data
    assert kind.name == GGML_NAMES[storage]
    if storage != "float64" and values.size:  # gguf leaves those as they are
        values = oracle.quants.dequantize(values, kind)
    np.testing.assert_array_equal(values.reshape(shape), fw.to_numpy())
    given = fw.to_gguf("w")
    assert isinstance(given, Tensor) or not mapped  # a mapped matrix is not copied
    assert isinstance(given, Stream) or not given.data.flags.writeable


def test_a_mapped_matrix_is_written_with_the_bits_that_it_has(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)  # includes signalling NaNs
    for kind in ("BF16", "F16"):
        path = tmp_path / f"{kind}.gguf"
        gguf.save(path, {"w": Tensor("w", kind, bits.shape, bits.view(np.uint8))})
        again = gguf.dumps({"w": nplora.FrozenWeight.from_gguf(path, "w")})
        assert again == path.read_bytes()


TOO_LONG = "n" * 64


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"w": np.zeros(2, complex)}, TypeError, "'w' is complex128, expected one of float32, "),
        ({"w": np.zeros(2, bool)}, TypeError, "'w' is bool"),
        ({"w": np.zeros(2, np.uint8)}, TypeError, "'w' is uint8"),
        ({1: np.zeros(2)}, TypeError, "1 cannot be the name of a tensor"),
        ({"": np.zeros(2)}, ValueError, "'' cannot be the name of a tensor, expected 1 to 63 bytes"),
        ({"w\0": np.zeros(2)}, ValueError, "without NUL"),
        ({"\ud800": np.zeros(2)}, ValueError, "half a surrogate pair"),
        ({TOO_LONG: np.zeros(2)}, ValueError, "1 to 63 bytes"),
        ({"w": np.zeros((1,) * 5)}, ValueError, "'w' has 5 axes, expected at most 4"),
        ({"w": Tensor("w", "Q9_9", (32,), BLOCKS)}, ValueError, "'w' is 'Q9_9', expected one of F32"),
        ({"w": Tensor("w", "Q4_K", (100,), BLOCKS)}, ValueError, "rows of a multiple of 256 elements"),
        ({"w": Tensor("w", "Q4_K", (), BLOCKS)}, ValueError, "rows of a multiple of 256 elements"),
        ({"w": Tensor("w", "Q4_K", (-3, 512), BLOCKS)}, ValueError, r"has shape \(-3, 512\)"),
        ({"w": Tensor("w", "Q4_K", (4, 512), BLOCKS)}, ValueError, "has 864 bytes, .* takes 1,152"),
        (
            {"w": Tensor("w", "F32", (4,), np.zeros(4, "f4"))},
            TypeError,
            "has data of type float32, expected an array of uint8",
        ),
        ({"w": Tensor("w", "Q4_0", (8, 64), bytes(288))}, TypeError, "has data of type bytes, expected"),
        (
            {"w": nplora.FrozenWeight(np.ones((2, 64)), "nf4")},
            TypeError,
            "'w' is nf4, expected one of float32",
        ),
        ({"w": nplora.FrozenWeight}, TypeError, "'w' is object"),
        ({"w": Tensor("w", "F32", (4.0,), BLOCKS)}, TypeError, "float"),
    ],
)
def test_a_tensor_that_the_format_cannot_hold_is_refused(
    tensors: dict[str, Array], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        gguf.dumps(tensors)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (
            3,
            TypeError,
            r'\'k\' is 3, whose type in the file is ambiguous: give the type, as in Typed\(value, "UINT32"\)',
        ),
        (0.5, TypeError, "'k' is 0.5"),
        ([1, 2], TypeError, r"'k' is \[1, 2\]"),
        ([], TypeError, r"'k' is \[\]"),
        (["a", 1], TypeError, r"'k' is \['a', 1\]"),
        (None, TypeError, "'k' is None"),
        (b"raw", TypeError, "'k' is b'raw'"),
        ({"a": 1}, TypeError, "'k' is"),
        (np.float16(1), TypeError, "'k' is"),
        (Typed(1, "INT128"), TypeError, "'INT128' is not a type of GGUF metadata"),
        (Typed(1, "ARRAY"), TypeError, "'ARRAY' is not a type of GGUF metadata"),
        (Typed("1", "INT8"), TypeError, "'k' is .*, expected INT8"),
        (Typed(1.0, "INT8"), TypeError, "expected INT8"),
        (Typed(True, "INT8"), TypeError, "expected INT8"),
        (Typed(1, "BOOL"), TypeError, "expected BOOL"),
        (Typed(1, "STRING"), TypeError, "'k' is 1, expected text"),
        (Typed([[1], [2]], "INT8"), TypeError, "expected INT8"),
        (Typed(None, "FLOAT32"), TypeError, "expected FLOAT32"),
        (Typed(2**64, "UINT64"), TypeError, "expected UINT64"),
        (Typed(256, "UINT8"), ValueError, r"'k' is \[256\], beyond the range of UINT8"),
        (Typed(-1, "UINT64"), ValueError, "beyond the range of UINT64"),
        (Typed([0, 2**31], "INT32"), ValueError, "beyond the range of INT32"),
        (Typed(1e39, "FLOAT32"), ValueError, "beyond the range of FLOAT32"),
        ("\ud800", ValueError, "half a surrogate pair"),
    ],
)
def test_a_value_that_the_format_cannot_hold_is_refused(
    value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        gguf.dumps({}, {"k": value})


def test_a_key_that_the_format_cannot_hold_is_refused() -> None:
    for key in ("", "a\0b", "k" * 65_536):
        with pytest.raises(
            ValueError, match="cannot be the name of a metadata entry, expected 1 to 65,535 bytes without NUL"
        ):
            gguf.dumps({}, {key: "x"})
    with pytest.raises(TypeError, match="3 cannot be the name of a metadata entry"):
        gguf.dumps({}, {3: "x"})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [np.int32(32), Typed(13, "UINT32"), np.uint32(0), np.uint32(1 << 21), "32"])
def test_an_alignment_that_the_format_does_not_allow_is_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"general\.alignment is .*, expected a UINT32 that is a power of two, at most"
    ):
        gguf.dumps({}, {"general.alignment": value})


def test_values_at_the_limits_are_written() -> None:
    for alignment in (1, 1 << 20):
        file = gguf.loads(
            gguf.dumps({"n" * 63: np.int8([1])}, {"general.alignment": Typed(alignment, "UINT32")})
        )
        assert file["n" * 63].offset % alignment == 0  # type: ignore[operator]
        assert file.alignment == alignment
    empty = gguf.loads(gguf.dumps({"w": Tensor("w", "Q4_K", (0, 512), BLOCKS[:0])}))
    assert empty["w"].shape == (0, 512)
    metadata = gguf.loads(gguf.dumps({}, {"k" * 65_535: np.array(5, np.int32)})).metadata
    assert metadata.integer("k" * 65_535) == 5


def test_more_tensors_than_can_be_read_are_not_written() -> None:
    tensors = dict.fromkeys(map(str, range(65_537)), np.zeros(0, np.int8))
    with pytest.raises(ValueError, match="65,537 tensors, expected at most 65,536"):
        gguf.dumps(tensors)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    gguf.save(path, {"w": np.zeros(4)})
    before = path.read_bytes()
    real, left = os.write, 100

    def write(fd: int, data: memoryview) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(fd, data[:left])
        left -= count
        return count

    monkeypatch.setattr(files.os, "write", write)
    with pytest.raises(OSError, match="No space left on device: 100 of 128 bytes were written") as caught:
        gguf.save(path, {"w": np.ones(8)})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_the_size_announced_is_the_size_written() -> None:
    for tensors in ({}, {"w": np.zeros(3, np.int8)}, ARRAYS):
        new = gguf.new_file("a.gguf", tensors, {"k": "v"})
        assert sum(len(memoryview(chunk)) for chunk in new.chunks) == new.nbytes
