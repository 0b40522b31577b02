"""Convolutions and pooling beside plain float64 NumPy: outputs, gradients by small steps, merging, errors."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora.formats import safetensors
from nplora.formats.errors import FormatError
from nplora.nn import conv
from nplora.nn.module import inference
from nplora.nn.windows import Windows

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride and padding": {"stride": 2, "padding": 1},
    "pairs": {"stride": (1, 3), "padding": (2, 0)},
    "dilation": {"dilation": 2, "padding": (1, 2), "stride": (2, 1)},
}
KERNELS = [(3, 3), (1, 1), (2, 3)]


def layer_of(
    rng: np.random.Generator, kernel: tuple[int, int] = (3, 3), dtype: str = "float64", **options: Any
) -> nplora.LoRAConv2d:
    """A layer in the middle of its training: 5 outputs, 2 inputs."""
    options = {"rank": min(3, 2 * kernel[0] * kernel[1]), "alpha": 6, "init": "gaussian", "rng": 1} | options
    W, bias = rng.normal(size=(5, 2, *kernel)), rng.normal(size=5)
    return nplora.LoRAConv2d(W, bias=bias, dtype=dtype, **options)


def pairs(options: dict[str, Any]) -> dict[str, tuple[int, int]]:
    usual = {"stride": 1, "padding": 0, "dilation": 1}
    values = {name: options.get(name, default) for name, default in usual.items()}
    return {name: v if isinstance(v, tuple) else (v, v) for name, v in values.items()}


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_is_the_sum_over_its_windows(
    geometry: str, kernel: tuple[int, int], rng: np.random.Generator
) -> None:
    options = GEOMETRIES[geometry]
    layer = layer_of(rng, kernel, **options)
    x = rng.normal(size=(3, 2, 8, 9))
    expected = reference.convolution(x, layer.merged_kernel(), **pairs(options))
    expected += np.asarray(layer.bias)[:, None, None]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.forward(x)[0], expected, rtol=1e-12, atol=1e-12)
    frozen = reference.convolution(
        x, layer.frozen().weight.to_numpy().reshape(5, 2, *kernel), **pairs(options)
    )
    with layer.disable_adapter():
        np.testing.assert_allclose(
            layer(x), frozen + np.asarray(layer.bias)[:, None, None], rtol=1e-12, atol=1e-12
        )


def require_slopes(layer: nplora.Module, x: Any, rng: np.random.Generator) -> None:
    """Compare backward with central differences, along random directions of x and of every parameter."""
    y, saved = layer.forward(x)
    dy = rng.normal(size=y.shape)
    layer.zero_grad()
    dx = layer.backward(dy, saved)
    arrays = [(x, dx), *((p.value, p.grad) for p in layer.parameters())]
    for _ in range(5):
        for array, gradient in arrays:
            direction, step = rng.normal(size=array.shape), 1e-6
            start = array.copy()
            array[...] = start + step * direction
            above = np.sum(dy * layer(x))
            array[...] = start - step * direction
            below = np.sum(dy * layer(x))
            array[...] = start
            slope = (above - below) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_backward_matches_finite_differences(
    geometry: str, kernel: tuple[int, int], rng: np.random.Generator
) -> None:
    require_slopes(layer_of(rng, kernel, **GEOMETRIES[geometry]), rng.normal(size=(3, 2, 8, 9)), rng)


def test_a_trained_convolution_matches_finite_differences(rng: np.random.Generator) -> None:
    layer = nplora.Conv2d(
        rng.normal(size=(5, 2, 3, 2)),
        rng.normal(size=5),
        stride=2,
        padding=1,
        dtype="float64",
        trainable=True,
    )
    assert [(p.name, p.value.shape) for p in layer.parameters()] == [("weight", (5, 2, 3, 2)), ("bias", (5,))]
    require_slopes(layer, rng.normal(size=(3, 2, 8, 9)), rng)


@pytest.mark.parametrize("stride", [None, 1, (1, 3)], ids=str)
def test_pooling_takes_the_largest_value_and_gives_it_the_gradient(
    stride: Any, rng: np.random.Generator
) -> None:
    pool, x = nplora.MaxPool2d((2, 3), stride), rng.normal(size=(2, 3, 7, 8))
    down, right = pool.stride
    y = pool(x)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            window = x[:, :, i * down : i * down + 2, j * right : j * right + 3]
            np.testing.assert_array_equal(y[:, :, i, j], window.max(axis=(2, 3)))
    np.testing.assert_array_equal(pool.forward(x)[0], y)
    require_slopes(pool, x, rng)
    assert pool.forward(x.astype(np.float32))[0].dtype == np.float32


def test_groups_of_images_do_not_change_the_results(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy = rng.normal(size=(7, 2, 8, 8)), rng.normal(size=(7, 5, 6, 6))

    def results() -> list[Any]:
        layer = layer_of(np.random.default_rng(0))
        y, saved = layer.forward(x)
        for _ in range(2):  # the second pass adds to the gradients of the first
            dx = layer.backward(dy, saved)
        return [y, dx, layer.dA, layer.dB]

    one = results()
    monkeypatch.setattr(conv, "_MOST_VALUES", 3 * 36 * 18)  # three images at a time
    for found, expected in zip(results(), one, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_two_passes_in_groups_give_the_sum_of_their_gradients_bit_for_bit(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "_MOST_VALUES", 3 * 36 * 18)
    passes = [(rng.normal(size=(7, 2, 8, 8)), rng.normal(size=(7, 5, 6, 6))) for _ in range(2)]
    together = layer_of(np.random.default_rng(0), dtype="float32")
    apart = [layer_of(np.random.default_rng(0), dtype="float32") for _ in range(2)]
    for (x, dy), layer in zip(passes, apart, strict=True):
        together.backward(dy, together.forward(x)[1])
        layer.backward(dy, layer.forward(x)[1])
    np.testing.assert_array_equal(together.dA, apart[0].dA + apart[1].dA)
    np.testing.assert_array_equal(together.dB, apart[0].dB + apart[1].dB)


@pytest.mark.parametrize("fails", ["inference", "interrupt"])
def test_a_failed_backward_pass_leaves_the_earlier_gradients(
    fails: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "_MOST_VALUES", 3 * 36 * 18)  # three images at a time
    x, dy = rng.normal(size=(7, 2, 8, 8)), rng.normal(size=(7, 5, 6, 6))
    layer = layer_of(rng)
    layer.backward(dy, layer.forward(x)[1])
    earlier = [p.grad.copy() for p in layer.parameters()]
    if fails == "inference":
        with inference():
            saved = layer.forward(x)[1]
        with pytest.raises(RuntimeError, match="ran in inference mode and saved nothing"):
            layer.backward(dy, saved)
    else:
        saved, calls = layer.forward(x)[1], list[Any]()
        images = Windows.images

        def interrupted(self: Windows, *arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return images(self, *arguments)

        monkeypatch.setattr(Windows, "images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            layer.backward(dy, saved)
    for parameter, before in zip(layer.parameters(), earlier, strict=True):
        np.testing.assert_array_equal(parameter.grad, before)


def test_the_pass_keeps_the_images_and_not_their_windows(rng: np.random.Generator) -> None:
    layer = layer_of(rng, dtype="float32")
    x = rng.normal(size=(4, 2, 10, 10)).astype(np.float32)
    saved = layer.forward(x)[1]
    assert saved.nbytes == x.nbytes + 4 * 64 * 3 * 4  # x, and z of three values for each window


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_is_undone_and_can_be_final(use_dora: bool, rng: np.random.Generator) -> None:
    layer = layer_of(rng, use_dora=use_dora, padding=1)
    if layer.m is not None:
        layer.m[...] = rng.uniform(0.5, 2, 5)
    x = rng.normal(size=(3, 2, 6, 6))
    y = layer(x)
    expected = reference.convolution(x, layer.merged_kernel(), (1, 1), (1, 1), (1, 1))
    np.testing.assert_allclose(y, expected + np.asarray(layer.bias)[:, None, None], rtol=1e-11, atol=1e-11)
    layer.merge()
    np.testing.assert_allclose(layer(x), y, rtol=1e-11, atol=1e-11)
    with pytest.raises(RuntimeError, match="merged"):
        layer.backward(y, layer.forward(x)[1])
    layer.unmerge()
    np.testing.assert_array_equal(layer(x), y)
    plain = layer.merge_and_unload()
    assert isinstance(plain, nplora.Conv2d)
    np.testing.assert_allclose(plain(x), y, rtol=1e-11, atol=1e-11)


def test_copies_and_pickles_share_or_keep_the_kernel(rng: np.random.Generator) -> None:
    layer = layer_of(rng)
    x = rng.normal(size=(1, 2, 5, 5))
    assert copy.deepcopy(layer).weight is layer.weight
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def net(rng: np.random.Generator, kernel: tuple[int, int] = (3, 3), **options: Any) -> nplora.Sequential:
    return nplora.Sequential(layer_of(rng, kernel, **options), nplora.Flatten())


def test_the_file_has_four_axes_and_loads_again(tmp_path: Path, rng: np.random.Generator) -> None:
    model = net(rng, use_dora=True, dtype="float32")
    nplora.save_adapter(model, tmp_path)
    shapes = {
        name: entry.shape for name, entry in safetensors.open(tmp_path / "adapter_model.safetensors").items()
    }
    prefix = "base_model.model.0."
    assert shapes == {
        f"{prefix}lora_A.weight": (3, 2, 3, 3),
        f"{prefix}lora_B.weight": (5, 3, 1, 1),
        f"{prefix}lora_magnitude_vector": (1, 5, 1, 1),
    }
    fresh = net(np.random.default_rng(0), use_dora=True, dtype="float32", rank=2)
    nplora.load_adapter(fresh, tmp_path)
    for name in ("A", "B", "m"):
        np.testing.assert_array_equal(getattr(fresh[0], name), getattr(model[0], name))
    adapter = nplora.read_adapter(tmp_path)
    plain = nplora.Sequential(nplora.Conv2d(np.zeros((5, 2, 3, 3)), stride=2), nplora.Flatten())
    adapter.attach(plain)
    assert isinstance(plain[0], nplora.LoRAConv2d)
    assert plain[0].windows.stride == (2, 2)


def test_an_adapter_of_another_kind_or_kernel_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    nplora.save_adapter(net(rng, (3, 3), use_dora=False), tmp_path / "square")
    nplora.save_adapter(nplora.Sequential(nplora.LoRALinear(np.zeros((5, 18)), rank=3)), tmp_path / "linear")
    with pytest.raises(FormatError, match="the adapter has a convolution, but the model's layer is a linear"):
        nplora.load_adapter(
            nplora.Sequential(nplora.LoRALinear(np.zeros((5, 18)), rank=3)), tmp_path / "square"
        )
    with pytest.raises(
        FormatError, match="the adapter has a linear layer, but the model's layer is a convol"
    ):
        nplora.load_adapter(net(rng), tmp_path / "linear")
    other = nplora.Sequential(nplora.LoRAConv2d(np.zeros((5, 1, 6, 3)), rank=3))
    with pytest.raises(FormatError, match=r"kernels of shape \(2, 3, 3\), but .* of shape \(1, 6, 3\)"):
        nplora.load_adapter(other, tmp_path / "square")


def test_adapters_of_convolutions_are_added_up(rng: np.random.Generator) -> None:
    one, other = net(rng), net(rng)
    half = nplora.combine([(one, 0.5), (other, 0.25)])
    assert half["0"].kernel == (2, 3, 3)
    expected = 0.5 * one[0].delta_weight() + 0.25 * other[0].delta_weight()
    np.testing.assert_allclose(half["0"].A @ half["0"].B, expected, rtol=1e-4, atol=1e-5)
    linear = nplora.Sequential(nplora.LoRALinear(np.zeros((5, 18)), rank=3))
    with pytest.raises(ValueError, match=r"a convolution \(5, 2, 3, 3\) in .*, a linear layer \(5, 18\)"):
        nplora.combine([(one, 0.5), (linear, 0.5)])


def test_bad_arguments_are_named(rng: np.random.Generator) -> None:
    W = np.zeros((5, 2, 3, 3))
    with pytest.raises(ValueError, match=r"Conv2d: W has 2 axes, expected 4 \(c_out, c_in, height, width\)"):
        nplora.Conv2d(np.zeros((5, 18)))
    with pytest.raises(ValueError, match="LoRAConv2d: stride is 0, expected at least 1"):
        nplora.LoRAConv2d(W, stride=0)
    with pytest.raises(TypeError, match=r"padding is \(1, 2, 3\), expected an integer or a pair"):
        nplora.Conv2d(W, padding=(1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a FrozenWeight, but kernel_size is missing"):
        nplora.LoRAConv2d(nplora.FrozenWeight(W.reshape(5, 18)))
    with pytest.raises(ValueError, match="d_in=18, expected a multiple of height · width = 4"):
        nplora.Conv2d(nplora.FrozenWeight(W.reshape(5, 18)), kernel_size=2)
    with pytest.raises(ValueError, match=r"kernel_size is 2, but W has shape \(5, 2, 3, 3\)"):
        nplora.Conv2d(W, kernel_size=2)
    layer = nplora.LoRAConv2d(W, rank=1)
    with pytest.raises(ValueError, match=r"LoRAConv2d.forward: x has shape \(4, 3, 8, 8\), expected images"):
        layer(np.zeros((4, 3, 8, 8)))
    with pytest.raises(ValueError, match="smaller than a window"):
        layer(np.zeros((4, 2, 2, 8)))
    y, saved = layer.forward(np.zeros((4, 2, 8, 8)))
    with pytest.raises(ValueError, match=r"dy has shape \(4, 5, 5, 6\), expected \(4, 5, 6, 6\)"):
        layer.backward(y[:, :, 1:], saved)
    with pytest.raises(ValueError, match="another LoRAConv2d"):
        layer_of(rng).backward(y, saved)
    with pytest.raises(TypeError, match="layer 0 is of type LoRAConv2d, expected LoRALinear or Linear"):
        nplora.stack_forward([layer], np.zeros((4, 18)))
    assert nplora.LoRAConv2d(nplora.FrozenWeight(W.reshape(5, 18)), rank=1, kernel_size=3).kernel == (2, 3, 3)


def test_no_images_give_no_outputs() -> None:
    layer = nplora.LoRAConv2d(np.ones((5, 2, 3, 3)), rank=1)
    y, saved = layer.forward(np.zeros((0, 2, 8, 8)))
    assert y.shape == (0, 5, 6, 6)
    assert layer.backward(y, saved).shape == (0, 2, 8, 8)


@pytest.mark.parametrize(
    ("lora_a", "lora_b", "words"),
    [
        (
            (3, 2, 3, 3),
            (5, 3, 3, 3),
            r"lora_A has shape \(3, 2, 3, 3\), lora_B \(5, 3, 3, 3\), expected rank 3",
        ),
        ((3, 2, 3, 3), (5, 3), "expected rank 3"),
        ((3, 18), (5, 3, 1, 1), "expected rank 3"),
        ((3, 2, 9), (5, 3, 1), "expected rank 3"),
        ((2, 2, 3, 3), (5, 2, 1, 1), "expected rank 3"),
    ],
)
def test_factors_of_other_shapes_are_refused(
    lora_a: tuple[int, ...], lora_b: tuple[int, ...], words: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = net(rng, dtype="float32")
    nplora.save_adapter(model, tmp_path)
    prefix, shapes = "base_model.model.0.", {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
    tensors = {prefix + name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    safetensors.save(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(FormatError, match=words):
        nplora.load_adapter(model, tmp_path)
    with pytest.raises(FormatError, match=words):
        nplora.read_adapter(tmp_path)
