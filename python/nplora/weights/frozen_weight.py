"""FrozenWeight: a matrix that is never trained, packed in memory or read directly from a mapped file."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.weights import buffers, int8_error, storages

if TYPE_CHECKING:  # the file readers take most of the import time, and only some callers need them
    from nplora.formats import gguf, safetensors, sharded
    from nplora.formats.files import StrPath

Array = npt.NDArray[Any]

FLOAT_COMPUTES = ("float32", "bfloat16")
COMPUTES = (*FLOAT_COMPUTES, "int8")
_UNROUNDED_ROWS = _core.constants.float_batch

# The smallest magnitude that becomes infinite: the largest finite value plus half a unit in its last place.
# A float64 value is rounded to float32 first, and then to a 16-bit type. So half a unit in the last place of
# float32 is subtracted for 16-bit types.
_INFINITE_FROM = {
    "float64": np.inf,
    "float32": (2 - 2.0**-24) * 2.0**127,
    "bfloat16": (2 - 2.0**-8 - 2.0**-24) * 2.0**127,
    "float16": 65520 - 2.0**-9,
}


class FrozenWeight:
    """A frozen, immutable (d_out, d_in) matrix, packed for the kernels. Layers may share a weight.

    Forward and backward products use the same copy of the matrix. Sums are computed in float32, or in float64
    for float64 storage. Products with a low-bit matrix decode only a few blocks at a time. `from_gguf` and
    `from_safetensors` use a matrix directly in its file, without a copy.

    Args:
        W: a float array (d_out, d_in), which is copied. Pass bfloat16 as an ml_dtypes array, or as uint16 bit
            patterns with dtype="bfloat16".
        dtype: the storage format.

            - "float32" (the default), "float64", "bfloat16" or "float16". Values are rounded to nearest, ties
              to even.
            - "q8_0", "q4_0", "q4_k", ...: the block formats of GGUF, with the names of ggml's types in lower
              case. Each block holds neighbouring values of one row.
            - "nf4": blocks of 64 values with a float32 absmax, the largest magnitude (Dettmers et al. 2023).
        compute: the arithmetic of the products. A float64 weight always computes in float64.

            - "float32".
            - "bfloat16": x, W, the LoRA factor B and the gradient dy of the output are rounded to bfloat16.
              In the backward pass, or if x has many rows, the LoRA factor A and z = x Bᵀ are also rounded.
              Sums are computed in float32. Products are twice as fast if the CPU has bfloat16 instructions.
              If x has up to 8 rows, products are still computed in float32.
            - "int8": W is rounded to 8 bits with one scale for each row, and x to 8 bits with one scale for
              every 64 values. In the backward pass, column i of dy is multiplied by the scale of row i of
              W, and then each row of dy is rounded to 8 bits with one scale. If d_out is above 4032, each
              row of dy is divided into several equal parts, and each part has a scale. The 8-bit values are
              multiplied and summed as integers. Products with the LoRA factors are computed as with
              "bfloat16". If x has up to 8 rows and W is stored in a GGUF format, x is multiplied with the
              blocks of W directly, and x gets one scale for every 32 values. If W is stored in any other
              format, up to 8 rows of x are multiplied in float32. `matmul_t` multiplies dy in float32 if dy
              has up to 4 rows. Magnitudes above 6e32 in x can make an output infinite or NaN, even if the
              exact output is finite. If all magnitudes with a common scale are below 1.5e-36, they count as
              0. Layers round W to 8 bits only in training. In inference, if x has more than 8 rows, layers
              compute as with "bfloat16". The head of a language model computes its backward pass in bfloat16,
              or in int8 with stochastic rounding (see the arguments `int8` and `dither_key` of
              `stack_backward`). In your own models, use "bfloat16" for a layer whose outputs go into a
              softmax over many classes.
        double_quant: also quantise the absmax of NF4 to 8 bits. A value of W then takes 4.13 bits instead of
            4.5.
    Raises:
        ValueError: W does not have two axes; dtype or compute is not one of the above; W is stored as
            "float64" and compute is not the default "float32"; d_in is not a multiple of the block length; a
            value is not finite or too large for the blocks; or double_quant is used with a format other than
            "nf4".
        TypeError: W does not hold floats, or `dtype` is neither a name nor a dtype.
    Warns:
        UserWarning: finite values exceed the range of the storage format and become infinite.

    >>> weight = FrozenWeight(np.ones((3, 64), np.float32), dtype="q8_0")
    >>> weight
    FrozenWeight(shape=(3, 64), dtype='q8_0', nbytes=204)
    >>> weight.matmul(np.ones((2, 64), np.float32)).round()
    array([[64., 64., 64.],
           [64., 64., 64.]], dtype=float32)
    """

    __slots__ = ("_arrays", "_packed")

    _packed: _core.PackedWeight
    _arrays: tuple[Array, ...]  # arrays that the core reads in place: blocks with scales, or a mapped file

    def __init__(
        self,
        W: npt.ArrayLike,
        dtype: npt.DTypeLike | None = None,
        compute: str = "float32",
        double_quant: bool = False,
    ) -> None:
        op = "FrozenWeight"
        storage = _check.choice(op, "dtype", dtype_name(op, dtype), storages.STORAGES)
        core_compute = _core_compute(op, storage, compute)
        given = _check.as_array(op, "W", W)
        values = _values(given, storage)
        if double_quant and storage != "nf4":
            raise ValueError(f"{op}: double_quant=True with dtype={storage!r}, expected 'nf4'")
        if storage in storages.BLOCKS:
            arrays = _quantized(op, values, storage)
            if double_quant:
                arrays = (arrays[0], *_quantized_absmax(arrays[1]))
            self._hold(storage, values.shape, arrays, core_compute)
            return
        self._arrays = ()
        self._packed = _core.PackedWeight(values, storage, core_compute)
        lost = become_infinite(given, storage)
        if lost.size:
            warnings.warn(
                f"FrozenWeight: {lost.size} finite values of W, the largest {lost.max():.6g}, "
                f"are infinite in {storage}",
                stacklevel=2,
            )

    def _hold(self, storage: str, shape: tuple[int, ...], arrays: tuple[Array, ...], compute: str) -> None:
        """Use `arrays` as the matrix of this weight, without a copy.

        NF4 has two arrays (codes and absmax), or five if the absmax is quantised. Every other format has one.
        """
        d_out, d_in = shape
        self._arrays = arrays
        if storage == "nf4" and len(arrays) == 2:
            self._packed = _core.PackedWeight.of_nf4(*arrays, d_out, d_in, compute)
        elif storage == "nf4":
            codes, absmax, levels, scales, offset = arrays
            self._packed = _core.PackedWeight.of_nested_nf4(
                codes, absmax, levels, scales, float(offset), d_out, d_in, compute
            )
        elif storage in storages.BLOCKS:
            self._packed = _core.PackedWeight.of_blocks(arrays[0], storage, d_in, compute)
        else:
            bits = arrays[0].view(np.uint16) if arrays[0].itemsize == 2 else arrays[0]
            self._packed = _core.PackedWeight.of_array(bits, storage, compute)

    @classmethod
    def from_gguf(cls, file: StrPath | gguf.GgufFile, name: str, compute: str = "float32") -> Self:
        """Return a weight that uses a matrix of a GGUF file in place.

        Matrices of all types are used without a copy.

        The weight keeps the file mapped into memory. The system may drop pages of the file and read them
        again.

        Args:
            file: a path, or a file opened with `formats.gguf.open` if several tensors are needed.
            name: the tensor's name.
            compute: as in the constructor.
        Raises:
            UnsupportedError: nplora does not decode the tensor's type.
            FormatError, OSError: as in `formats.gguf.open`.
            KeyError: the file has no tensor of that name. The message suggests similar names.
            ValueError: the tensor does not have two axes, or `compute` is not available.

        >>> import nplora
        >>> nplora.formats.gguf.save("toy.gguf", {"w": np.eye(2, dtype=np.float32)})
        >>> FrozenWeight.from_gguf("toy.gguf", "w").matmul([3.0, 4.0])
        array([3., 4.], dtype=float32)
        """
        from nplora.formats import UnsupportedError, gguf

        op = "FrozenWeight.from_gguf"
        opened = file if isinstance(file, gguf.GgufFile) else gguf.open(file)
        tensor = opened[name]
        where = _require_matrix(op, opened.source, name, tensor.shape)
        storage = storages.GGML_FLOATS.get(tensor.type, tensor.type.lower())
        if storage not in storages.STORAGES:
            known = ", ".join(storages.GGML_NAMES.values())
            raise UnsupportedError(f"{where} is {tensor.type}, expected one of {known}")
        if storage in storages.BLOCKS:
            d_out, d_in = tensor.shape
            blocks = tensor.data.reshape(d_out, storages.row_nbytes(storage, d_in))
            return cls._of(op, storage, tensor.shape, compute, blocks)
        return cls._of(op, storage, tensor.shape, compute, tensor.numpy())

    @classmethod
    def from_safetensors(
        cls,
        file: StrPath | safetensors.SafetensorsFile | sharded.ShardedFile,
        name: str,
        compute: str = "float32",
    ) -> Self:
        """Return a weight that uses a matrix of a safetensors file in place.

        The matrix is float32, float64, bfloat16, float16 or NF4. NF4 means the format of bitsandbytes, with
        or without double quantisation. The weight keeps the file mapped into memory.

        Args:
            file: a path, or a file opened with `formats.safetensors.open` (or `formats.sharded.open`) if
                several tensors are needed.
            name: the tensor's name.
            compute: as in the constructor.
        Raises:
            UnsupportedError: the tensor holds neither floats nor NF4.
            FormatError, OSError: as in `formats.safetensors.open`.
            KeyError: the file has no tensor of that name. The message suggests similar names.
            ValueError: the tensor does not have two axes, or `compute` is not available.

        >>> import nplora
        >>> nplora.formats.safetensors.save("toy.safetensors", {"w": np.eye(2, dtype=np.float16)})
        >>> FrozenWeight.from_safetensors("toy.safetensors", "w")
        FrozenWeight(shape=(2, 2), dtype='float16', nbytes=8)
        """
        from nplora.formats import UnsupportedError, bitsandbytes, safetensors

        op = "FrozenWeight.from_safetensors"
        opened = file if isinstance(file, Mapping) else safetensors.open(file)
        if bitsandbytes.holds(opened, name):
            nf4 = bitsandbytes.read(opened, name)
            where = _require_matrix(op, opened.source, name, nf4.shape)
            if not np.array_equal(nf4.levels, _nf4_levels()):
                raise UnsupportedError(f"{where} has its own 4-bit levels, expected NF4's levels")
            arrays: tuple[Array, ...] = (nf4.codes, nf4.absmax)
            if nf4.nested is not None:
                arrays += (nf4.nested.levels, nf4.nested.scales, np.asarray(nf4.nested.offset, np.float32))
            return cls._of(op, "nf4", nf4.shape, compute, *arrays)
        tensor = opened[name]
        where = _require_matrix(op, opened.source, name, tensor.shape)
        if tensor.dtype not in storages.FLOATS:
            raise UnsupportedError(f"{where} is {tensor.dtype}, expected one of {', '.join(storages.FLOATS)}")
        return cls._of(op, tensor.dtype, tensor.shape, compute, tensor.numpy())

    @classmethod
    def of_rows(cls, raw: Array, storage: str, d_in: int, compute: str = "float32") -> Self:
        """Return a weight that consists of the encoded rows `raw`, a result of `storages.encode`.

        The bytes are used in place, except that the bytes of NF4 are copied.
        """
        shape = (len(raw), d_in)
        if storage == "nf4":
            arrays: tuple[Array, ...] = storages.split_nf4(raw, d_in)
        elif storage in storages.BLOCKS:
            arrays = (raw,)
        else:
            arrays = (raw.reshape(-1).view(storages.FLOATS[storage]).reshape(shape),)
        return cls._of("FrozenWeight.of_rows", storage, shape, compute, *arrays)

    @classmethod
    def _of(cls, op: str, storage: str, shape: tuple[int, ...], compute: str, *arrays: Array) -> Self:
        weight = cls.__new__(cls)
        weight._hold(storage, shape, arrays, _core_compute(op, storage, compute))
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self._packed.shape

    @property
    def size(self) -> int:
        """The number of elements."""
        d_out, d_in = self.shape
        return d_out * d_in

    @property
    def dtype(self) -> str:
        """The name of the storage format."""
        return self._packed.storage

    @property
    def nbytes(self) -> int:
        """The size of the matrix in bytes, in memory or in its file."""
        return self._packed.nbytes

    def with_compute(self, compute: str) -> FrozenWeight:
        """Return a weight with the same matrix, but a different arithmetic for its products.

        If the matrix is quantised or used in place, the two weights share its memory. If the constructor has
        copied the matrix as floats, the matrix is copied again.

        Args:
            compute: as in the constructor.
        Raises:
            ValueError: `compute` is not available.

        >>> weight = FrozenWeight(np.ones((3, 64), np.float32), dtype="q8_0")
        >>> weight.with_compute("int8").compute
        'int8'
        """
        if compute == self.compute:
            return self
        if not self._arrays:
            return FrozenWeight(self.to_numpy(), self.dtype, compute)
        weight = type(self).__new__(type(self))
        op = "FrozenWeight.with_compute"
        weight._hold(self.dtype, self.shape, self._arrays, _core_compute(op, self.dtype, compute))
        return weight

    @property
    def compute(self) -> str:
        """The arithmetic of products: "bfloat16" (with float32 sums), "int8", "float32" or "float64"."""
        return self.compute_dtype.name if self._packed.compute == "float" else self._packed.compute

    @property
    def rounds(self) -> bool:
        """Whether `compute` is "bfloat16" or "int8", so that some products round their operands."""
        return self._packed.compute != "float"

    @property
    def meets_int8(self) -> bool:
        """Whether products are computed in int8 even if x has few rows (up to 8)."""
        return self.compute == "int8" and self.dtype in storages.BLOCKS and self.dtype != "nf4"

    def keep_int8(self) -> None:
        """Keep W in memory as 8-bit integers too, so that products in int8 do not convert W again.

        `matmul` becomes faster if x has more than 8 rows, and `matmul_t` if dy has more than 4 rows. The
        results are the same to the bit. The gain is largest for a few dozen rows, or if W is stored in 16 or
        32 bits. The integers take `int8_nbytes` bytes, until the weight is deleted or `drop_int8` is called.

        Raises:
            ValueError: the weight's compute is not "int8".

        >>> weight = FrozenWeight(np.ones((32, 64), np.float32), compute="int8")
        >>> weight.keep_int8()
        >>> weight.keeps_int8, weight.int8_nbytes
        (True, 2048)
        """
        self._require_int8("FrozenWeight.keep_int8")
        self._packed.keep_int8()

    def drop_int8(self) -> None:
        """Free the memory that `keep_int8` took. Products convert W again.

        >>> weight = FrozenWeight(np.ones((32, 64), np.float32), compute="int8")
        >>> weight.keep_int8()
        >>> weight.drop_int8()
        >>> weight.keeps_int8
        False
        """
        self._packed.drop_int8()

    @property
    def keeps_int8(self) -> bool:
        """Whether W is kept in memory as 8-bit integers (see `keep_int8`)."""
        return self._packed.keeps_int8

    @property
    def int8_nbytes(self) -> int:
        """The number of bytes that `keep_int8` takes: about one for each element."""
        return self._packed.int8_nbytes

    def _require_int8(self, op: str) -> None:
        if self.compute != "int8":
            cure = "" if self.compute == "float64" else "; use weight.with_compute('int8')"
            raise ValueError(f"{op}: the weight has compute={self.compute!r}, expected 'int8'{cure}")

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """The dtype of inputs, outputs and sums: float64 for float64 storage, else float32."""
        return np.dtype(np.float64 if self.dtype == "float64" else np.float32)

    @property
    def packed(self) -> _core.PackedWeight:
        """The object that the compiled core uses for this weight."""
        return self._packed

    def to_numpy(self) -> Array:
        """Return the decoded matrix as a new array (d_out, d_in).

        The array's dtype is float64 for float64 storage, else float32. Decoding is exact.

        >>> FrozenWeight(np.eye(2), dtype="bfloat16").to_numpy()
        array([[1., 0.],
               [0., 1.]], dtype=float32)
        """
        out = np.empty(self.shape, self.compute_dtype)
        self._packed.unpack(out)
        return out

    def contents(self) -> Iterator[Array]:
        """Yield arrays that together hold the whole matrix.

        If the weight holds arrays of blocks, or arrays of a mapped file, yield these arrays. Otherwise, yield
        arrays of decoded rows.

        >>> weight = FrozenWeight(np.eye(2, dtype=np.float32))
        >>> [part.shape for part in weight.contents()]
        [(2, 2)]
        """
        if self._arrays:
            yield from self._arrays
            return
        for block in storages.row_blocks(*self.shape):
            yield self.take(np.arange(block.start, block.stop))

    def to_gguf(self, name: str) -> gguf.Tensor | gguf.Stream:
        """Return the matrix as a tensor for `gguf.save`, in its storage format.

        A matrix that is used in place is not copied.

        Raises:
            TypeError: the storage format is "nf4", which GGUF does not have.

        >>> FrozenWeight(np.ones((2, 32), np.float32), dtype="q4_0").to_gguf("w")
        Tensor('w', Q4_0, (2, 32))
        """
        from nplora.formats import gguf
        from nplora.formats.errors import brief

        if self.dtype not in storages.GGML_NAMES:
            known = ", ".join(storages.GGML_NAMES)
            raise TypeError(f"FrozenWeight.to_gguf: {brief(name)} is {self.dtype}, expected one of {known}")
        kind = storages.GGML_NAMES[self.dtype]
        if self._arrays:
            raw = self._arrays[0].reshape(-1).view(np.uint8)
            raw.flags.writeable = False
            return gguf.Tensor(name, kind, self.shape, raw)

        def rows() -> Iterator[memoryview]:
            for block in storages.row_blocks(*self.shape):
                some = self.take(np.arange(block.start, block.stop))
                yield storages.encode(some, self.dtype).reshape(-1).data

        return gguf.Stream(kind, self.shape, rows)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("FrozenWeight: the matrix is packed, so an array of its values is always a copy")
        return self.to_numpy() if dtype is None else self.to_numpy().astype(dtype, copy=False)

    def matmul(self, x: npt.ArrayLike, out: Array | None = None) -> Array:
        """Multiply: x @ W.T.

        Args:
            x: array (..., d_in), which is converted to `compute_dtype` if needed.
            out: C-contiguous array (..., d_out) for the result. If None, a new array is created.
        Returns:
            array (..., d_out) in `compute_dtype`.
        Raises:
            ValueError: the last axis of x is not d_in, or `out` has the wrong shape, is read-only or
                overlaps x.
            TypeError: x does not hold numbers, or `out` has the wrong dtype.

        >>> FrozenWeight([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).matmul([1.0, 10.0])
        array([21., 43., 65.], dtype=float32)
        """
        d_out, d_in = self.shape
        rows, lead = _check.rows("FrozenWeight.matmul", "x", x, d_in, "d_in", self.compute_dtype)
        y = buffers.output("FrozenWeight.matmul", "out", out, (*lead, d_out), self.compute_dtype, ("x", rows))
        _core.matmul(self._packed, rows, None, y.reshape(len(rows), d_out))
        return y

    def matmul_t(self, dy: npt.ArrayLike, out: Array | None = None) -> Array:
        """Multiply with the transpose: dy @ W.

        Args:
            dy: array (..., d_out), which is converted to `compute_dtype` if needed.
            out: C-contiguous array (..., d_in) for the result. If None, a new array is created.
        Returns:
            array (..., d_in) in `compute_dtype`.
        Raises:
            ValueError: the last axis of `dy` is not d_out, or `out` has the wrong shape, is read-only or
                overlaps `dy`.
            TypeError: `dy` does not hold numbers, or `out` has the wrong dtype.

        >>> FrozenWeight([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).matmul_t([1.0, 0.0, 1.0])
        array([6., 8.], dtype=float32)
        """
        d_out, d_in = self.shape
        rows, lead = _check.rows("FrozenWeight.matmul_t", "dy", dy, d_out, "d_out", self.compute_dtype)
        op = "FrozenWeight.matmul_t"
        dx = buffers.output(op, "out", out, (*lead, d_in), self.compute_dtype, ("dy", rows))
        _core.matmul_t(self._packed, rows, dx.reshape(len(rows), d_in))
        return dx

    def matmul_unrounded(self, x: npt.ArrayLike) -> Array:
        """Like `matmul`, but in float32 even if the weight computes in bfloat16 or int8.

        >>> weight = FrozenWeight(np.full((1, 64), 1.0, np.float32), compute="bfloat16")
        >>> x = np.full((16, 64), 1.001, np.float32)
        >>> weight.matmul(x)[0], weight.matmul_unrounded(x)[0].round(2)
        (array([64.], dtype=float32), array([64.06], dtype=float32))
        """
        plain = self.with_compute("float32") if self.meets_int8 else self
        return _few_at_a_time(plain.matmul, x) if plain.rounds else plain.matmul(x)

    def matmul_t_unrounded(self, dy: npt.ArrayLike) -> Array:
        """Like `matmul_t`, but in float32 even if the weight computes in bfloat16 or int8.

        >>> weight = FrozenWeight(np.full((64, 1), 1.0, np.float32), compute="bfloat16")
        >>> dy = np.full((16, 64), 1.001, np.float32)
        >>> weight.matmul_t(dy)[0], weight.matmul_t_unrounded(dy)[0].round(2)
        (array([64.], dtype=float32), array([64.06], dtype=float32))
        """
        return _few_at_a_time(self.matmul_t, dy) if self.rounds else self.matmul_t(dy)

    def int8_error(
        self,
        x: npt.ArrayLike,
        transposed: bool = False,
        dither_key: int | None = None,
        samples: int = int8_error.SAMPLES,
    ) -> int8_error.Int8Error:
        """Measure how much rounding to int8 changes `matmul(x)`, or `matmul_t(x)` if `transposed` is set.

        A sample of the elements is compared with the product in float64. The result also has a bound, which
        the error cannot exceed. The error and the bound are those of products with many rows (see `compute`
        above), even if x has few rows. They hold as long as no sum overflows float32.

        Args:
            x: array (..., d_in), or (..., d_out) if `transposed` is set.
            transposed: whether the product is that of a backward pass, dy @ W, with dy = x. Then all of W is
                decoded. Otherwise, only a few rows of W are decoded.
            dither_key: only if `transposed` is set: a key for stochastic rounding of dy, as in
                `stack_backward`.
            samples: the most rows of x, and the most elements of each row of the product, in the sample.
        Raises:
            ValueError: the weight's compute is not "int8"; the last axis of x has the wrong length; `samples`
                is below 1; or `dither_key` is given, but `transposed` is not set.

        >>> rng = np.random.default_rng(0)
        >>> weight = FrozenWeight(rng.standard_normal((64, 128)), dtype="q8_0", compute="int8")
        >>> x = rng.standard_normal((32, 128))
        >>> x[:, 7] *= 100  # one large column makes the codes of its neighbours coarse
        >>> weight.int8_error(x)
        Int8Error(measured=0.015, bound=0.17, of 16 rows and 16 outputs)
        """
        op, (d_out, d_in) = "FrozenWeight.int8_error", self.shape
        self._require_int8(op)
        _check.integer(op, "samples", samples, least=1)
        if transposed:
            rows, _ = _check.rows(op, "x", x, d_out, "d_out", self.compute_dtype)
            return int8_error.measure_t(self._packed, rows, samples, dither_key)
        if dither_key is not None:
            raise ValueError(f"{op}: dither_key={dither_key} needs transposed=True: x is rounded to nearest")
        rows, _ = _check.rows(op, "x", x, d_in, "d_in", self.compute_dtype)
        return int8_error.measure(self._packed, rows, samples)

    def take(self, ids: npt.ArrayLike) -> Array:
        """Return the decoded rows W[ids].

        Args:
            ids: integer array (...).
        Returns:
            array (..., d_in) in `compute_dtype`.
        Raises:
            TypeError: ids are not integers.
            ValueError: an id is not in [0, d_out).

        >>> FrozenWeight([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).take([2, 0])
        array([[5., 6.],
               [1., 2.]], dtype=float32)
        """
        (d_out, d_in), op = self.shape, "FrozenWeight.take"
        rows = _check.in_range(op, "ids", _check.integers(op, "ids", ids), d_out)
        out = buffers.empty((rows.size, d_in), self.compute_dtype)
        self._packed.gather_rows(rows.reshape(-1), out)
        return out.reshape(*rows.shape, d_in)

    def __repr__(self) -> str:
        compute = f", compute={self.compute!r}" if self.rounds else ""
        return f"FrozenWeight(shape={self.shape}, dtype={self.dtype!r}{compute}, nbytes={self.nbytes})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # immutable: a copied model shares its frozen weights

    @property
    def float_dtype(self) -> str:
        """The storage format that `like` uses for a changed W.

        For a low-bit format, the result is float32, so that no change is lost.
        """
        return "float32" if self.dtype in storages.BLOCKS else self.dtype

    def like(self, W: Array) -> FrozenWeight:
        """Return a weight that stores the matrix W as `float_dtype`, with this weight's `compute`."""
        return FrozenWeight(W, self.float_dtype, self._compute_word())

    def like_rows(self, raw: Array, storage: str) -> FrozenWeight:
        """Return a weight from the bytes of its rows, with this weight's `compute`."""
        return FrozenWeight.of_rows(raw, storage, self.shape[1], self._compute_word())

    def with_rows(self, ids: Array, rows: Array) -> FrozenWeight:
        """Return a copy of this weight in the same storage format, with new values in the rows `ids`.

        The other rows keep their bytes, except that NF4 is quantised again.

        >>> weight = FrozenWeight(np.zeros((3, 2), np.float32))
        >>> weight.with_rows(np.array([1]), np.ones((1, 2), np.float32)).to_numpy()
        array([[0., 0.],
               [1., 1.],
               [0., 0.]], dtype=float32)
        """
        if self.dtype not in storages.BLOCKS or self.dtype == "nf4":
            W = self.to_numpy()
            W[ids] = rows
            return FrozenWeight(W, self.dtype, self._compute_word())
        raw = self._arrays[0].copy()
        raw[ids] = storages.encode(rows, self.dtype)
        return self.like_rows(raw, self.dtype)

    def _compute_word(self) -> str:
        """The value of the constructor's argument `compute` that gives this weight's arithmetic."""
        return self.compute if self.rounds else "float32"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.dtype not in storages.BLOCKS:
            return FrozenWeight, (self.to_numpy(), self.dtype, self._compute_word())
        return _restored, (self.dtype, self.shape, self._arrays, self._packed.compute)


@contextlib.contextmanager
def keeping_int8(weights: Iterable[FrozenWeight]) -> Iterator[None]:
    """In the `with` block, keep these weights in memory as 8-bit integers too (see `keep_int8`).

    >>> weight = FrozenWeight(np.ones((32, 64), np.float32), compute="int8")
    >>> with keeping_int8([weight]):
    ...     weight.keeps_int8
    True
    >>> weight.keeps_int8
    False
    """
    new = [weight for weight in weights if not weight.keeps_int8]
    try:
        for weight in new:
            weight.keep_int8()
        yield
    finally:
        for weight in new:
            weight.drop_int8()


def _restored(storage: str, shape: tuple[int, int], arrays: tuple[Array, ...], compute: str) -> FrozenWeight:
    """Rebuild a pickled weight from its arrays, without quantising again."""
    weight = FrozenWeight.__new__(FrozenWeight)
    weight._hold(storage, shape, arrays, compute)
    return weight


def _core_compute(op: str, storage: str, compute: str) -> str:
    """Return the core's name for `compute`. "float" means float64 for a float64 weight, else float32."""
    _check.choice(op, "compute", compute, COMPUTES)
    if storage == "float64" and compute != "float32":
        raise ValueError(
            f"{op}: a float64 weight computes in float64, got compute={compute!r}; "
            "use dtype='float32' instead"
        )
    return "float" if compute == "float32" else compute


def _quantized(op: str, W: Array, storage: str) -> tuple[Array, ...]:
    """Quantise a float32 W to an array of blocks (d_out, row bytes), or to NF4's two arrays."""
    (d_out, d_in), (length, nbytes) = W.shape, storages.BLOCKS[storage]
    try:
        if storage == "nf4":
            codes, absmax = np.empty(-(-W.size // 2), np.uint8), np.empty(-(-W.size // length), np.float32)
            _core.quantize_nf4(W, codes, absmax)
            return codes, absmax
        if d_in % length:
            raise ValueError(f"d_in={d_in}, but {storage} has blocks of {length} values along a row")
        blocks = np.empty((d_out, d_in // length * nbytes), np.uint8)
        _core.quantize(W, storage, blocks)
    except ValueError as error:
        raise ValueError(f"{op}: W: {error}") from None
    return (blocks,)


def _quantized_absmax(absmax: Array) -> tuple[Array, ...]:
    """Quantise the absmax of NF4; return four arrays: codes, levels, scales and the offset (0-d)."""
    group, book = _core.constants.nf4_group, _core.constants.nf4_book
    codes, levels = np.empty(absmax.size, np.uint8), np.empty(book, np.float32)
    scales = np.empty(-(-absmax.size // group), np.float32)
    offset = _core.quantize_absmax(absmax, codes, levels, scales)
    return codes, levels, scales, np.asarray(offset, np.float32)


def _nf4_levels() -> Array:
    """Return the values of NF4's sixteen codes."""
    codes = np.frombuffer(bytes.fromhex("0123456789abcdef"), np.uint8)
    levels = np.empty(16, np.float32)
    _core.dequantize_nf4(codes, np.ones(1, np.float32), levels)
    return levels


def _require_matrix(op: str, source: str, name: str, shape: tuple[int, ...]) -> str:
    """Check that a tensor has the two axes of a weight. Return the tensor's name for messages."""
    from nplora.formats.errors import brief

    where = f"{op}: {source}: tensor {brief(name)}"
    if len(shape) != 2:
        raise ValueError(f"{where} has shape {shape}, expected (d_out, d_in)")
    return where


def _few_at_a_time(product: Callable[[Array], Array], x: npt.ArrayLike) -> Array:
    """Compute a product a few rows at a time. A product of few rows does not round its operands."""
    x = np.asarray(x)
    lead, width = x.shape[:-1], x.shape[-1]
    rows = x.reshape(math.prod(lead), width)
    parts = [product(rows[i : i + _UNROUNDED_ROWS]) for i in range(0, max(1, len(rows)), _UNROUNDED_ROWS)]
    return np.concatenate(parts).reshape(*lead, parts[0].shape[1])


def freeze(
    op: str, W: npt.ArrayLike | FrozenWeight, dtype: npt.DTypeLike | None, compute: str | None = None
) -> FrozenWeight:
    """Pack W if it is an array. If W is a FrozenWeight, check `dtype` and `compute`, and return W itself.

    Args:
        compute: None: the arithmetic of W if W is a FrozenWeight, and "float32" if W is an array.
    """
    if not isinstance(W, FrozenWeight):
        return FrozenWeight(W, dtype_name(op, dtype), "float32" if compute is None else compute)
    if dtype is not None and dtype_name(op, dtype) != W.dtype:
        raise ValueError(
            f"{op}: dtype={dtype_name(op, dtype)!r}, but W is a FrozenWeight stored as {W.dtype}"
        )
    # A matrix in float64 computes in float64. compute="float32" is accepted for it, as for an array.
    accepted = (W.compute, "float32") if W.dtype == "float64" else (W.compute,)
    if compute is None or _check.choice(op, "compute", compute, COMPUTES) in accepted:
        return W
    way = f"; pass W.with_compute({compute!r}) instead"
    if W.dtype == "float64":
        way = f"; pass FrozenWeight(W.to_numpy(), dtype='float32', compute={compute!r}) instead"
    raise ValueError(f"{op}: compute={compute!r}, but W is a FrozenWeight that computes in {W.compute}{way}")


def dtype_name(op: str, dtype: npt.DTypeLike | None) -> str:
    """Return the name of a dtype: "float32" for np.float32, np.dtype(np.float32) and None.

    A string is returned unchanged.
    """
    if dtype is None:
        return "float32"
    try:
        return dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        words = ", ".join(map(repr, storages.STORAGES))
        raise TypeError(f"{op}: dtype is {dtype!r}, expected one of {words}") from None


def become_infinite(W: Array, storage: str) -> Array:
    """Return the magnitudes, shape (n,), of the n finite elements of W that become infinite in `storage`."""
    if _check.is_bfloat16(W) and storage == "float16":
        W = W.astype(np.float32)
    if W.dtype.kind != "f" or not W.size:  # bfloat16 stays finite in the others
        return np.empty(0)
    limit = np.float64(_INFINITE_FROM[storage])
    if max(float(np.fmax.reduce(W, axis=None)), -float(np.fmin.reduce(W, axis=None))) < limit:
        return np.empty(0)  # the usual case, in which no copy of W is made
    magnitudes = np.abs(W[np.isfinite(W)])
    return magnitudes[magnitudes >= limit]


def _values(array: Array, storage: str) -> Array:
    """Return W in the form that the core takes: 16-bit patterns, float32, or float64 for float64 storage."""
    _check.matrix("FrozenWeight", "W", array)
    bits = array.dtype == np.uint16 and storage == "bfloat16"
    if array.dtype.kind != "f" and not _check.is_bfloat16(array) and not bits:
        hint = (
            '; if W holds bit patterns of bfloat16, pass dtype="bfloat16"' if array.dtype == np.uint16 else ""
        )
        raise TypeError(f"FrozenWeight: W has dtype {array.dtype}, expected floats{hint}")
    if bits or (array.dtype.name == storage and array.itemsize == 2 and array.dtype.isnative):
        return np.require(array.view(np.uint16), requirements=("C", "A"))
    with np.errstate(over="ignore"):  # the constructor warns about infinite values and counts them
        return _check.floats("FrozenWeight", "W", array, np.float64 if storage == "float64" else np.float32)
