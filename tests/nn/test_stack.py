"""Layers that read one input: stack_forward and stack_backward."""

import copy
import dataclasses
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import Linear, LoRALinear, _core, stack_backward, stack_forward
from nplora.lora.delta import LoraDelta
from nplora.nn.int8 import without_int8
from nplora.nn.module import inference
from nplora.nn.stack import StackSaved, stack_infer
from reference import gamma

D_IN, RANK = 97, 5
OUTPUTS = (130, 48, 61)


def layers_of(seed: int = 0, **options: object) -> list[LoRALinear]:
    rng = np.random.default_rng(seed)
    layers = []
    for i, d_out in enumerate(OUTPUTS):
        W = rng.standard_normal((d_out, D_IN), np.float32)
        bias = rng.standard_normal(d_out, np.float32) if i else None
        layer = LoRALinear(W, RANK, bias=bias, rng=i, **options)  # type: ignore[arg-type]
        layer.A[...] = rng.standard_normal(layer.A.shape)
        layers.append(layer)
    return layers


def passes(n: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, D_IN), np.float32)
    return x, [rng.standard_normal((n, d_out), np.float32) for d_out in OUTPUTS]


def magnitude(layer: LoRALinear) -> np.ndarray:
    """|W| + scale |A| |B|, (d_out, d_in), where dropout's survivors count for the others."""
    update = abs(layer.scale) / (1 - layer.dropout) * np.abs(layer.A) @ np.abs(layer.B)
    return np.abs(layer.weight.to_numpy()) + update


@pytest.mark.parametrize("n", [0, 1, 5, 8, 9, 40, 300])
def test_stack_forward_matches_float64(n: int) -> None:
    layers, (x, _) = layers_of(), passes(n)
    ys, _ = stack_forward(layers, x)
    for layer, y in zip(layers, ys, strict=True):
        w = layer.merged_weight().astype(np.float64)
        bias = 0 if layer.bias is None else layer.bias.astype(np.float64)
        bound = 2 * gamma(D_IN + RANK + 4) * (np.abs(x) @ magnitude(layer).T + np.abs(bias))
        assert (np.abs(y - (x.astype(np.float64) @ w.T + bias)) <= bound).all()


@pytest.mark.parametrize("n", [1, 7, 33, 300])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"freeze_B": True}, {"dropout": 0.3}])
def test_stack_agrees_with_each_layer_alone(n: int, options: dict[str, object]) -> None:
    together, alone, (x, dys) = layers_of(**options), layers_of(**options), passes(n)
    ys, saved = stack_forward(together, x)
    dx = stack_backward(together, dys, saved)
    want_dx = np.zeros_like(x)
    for one, other, y, dy in zip(alone, together, ys, dys, strict=True):
        want, kept = one.forward(x)
        want_dx += one.backward(dy, kept)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
        for parameter, twin in zip(one.local_parameters(), other.local_parameters(), strict=True):
            np.testing.assert_allclose(twin.grad, parameter.grad, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-3, atol=1e-3)


# Odd ranks, whose pairs of bfloat16 lie across layers; layers that share no product with others; one without
# an update; at 100 rows, backward, one that is folded beside others that are not.
UNLIKE: list[dict[str, Any]] = [
    {},
    {"freeze_B": True},
    {"rank": 3},
    {"dropout": 0.3},
    {"alpha": 0.0},  # WITHOUT_UPDATE
    {"rank": 60},
    {"dropout": 0.5},
    {"freeze_B": True, "rank": 4},
]
WITHOUT_UPDATE = 4


def unlike_layers(dtype: str, compute: str, d_in: int = D_IN) -> list[LoRALinear]:
    rng = np.random.default_rng(2)
    layers = []
    for i, kind in enumerate(UNLIKE):
        W = nplora.FrozenWeight(rng.standard_normal((61, d_in)), dtype, compute)
        layers.append(
            LoRALinear(W, **{"rank": RANK, "init": "gaussian", "compute": compute, "rng": i, **kind})
        )
    return layers


@pytest.mark.slow
@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("n", [3, 7, 40, 100, 300])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float64", "float32"),
        ("q8_0", "float32"),
        ("q8_0", "bfloat16"),
    ],
)
def test_a_stack_of_unlike_layers_agrees_with_each_alone(
    dtype: str, compute: str, n: int, need_dx: bool
) -> None:
    d_in = 96 if dtype == "q8_0" else D_IN
    together, alone = (unlike_layers(dtype, compute, d_in) for _ in range(2))
    together[WITHOUT_UPDATE].A[...] = np.nan  # is not read
    float_type = together[0].weight.compute_dtype
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, d_in)).astype(float_type)
    dys = [rng.standard_normal((n, 61)).astype(float_type) for _ in together]
    ys, saved = stack_forward(together, x)
    dx = stack_backward(together, dys, saved, need_dx=need_dx)
    want_dx, dx_size = np.zeros_like(x), np.zeros_like(x)
    # Both round the same numbers to bfloat16 and differ in the order of sums: of 61 terms of W and at most 60
    # of the update from each layer, scaled and dropped. But forward, a layer alone may round z and A too.
    bound = 2 * gamma(len(UNLIKE) * (61 + 60) + 4, float_type)
    y_bound = 2 * 4.1 * 2.0**-8 if compute == "bfloat16" else bound
    for one, other, y, dy in zip(alone, together, ys, dys, strict=True):
        want, kept = one.forward(x)
        want_dx += one.backward(dy, kept)
        assert (np.abs(y - want) <= y_bound * (np.abs(x) @ magnitude(one).T)).all()
        dx_size += np.abs(dy) @ magnitude(one)
        for parameter, twin in zip(one.local_parameters(), other.local_parameters(), strict=True):
            # To the bit, whichever way either takes: every sum runs over its depth in order (ops/blocking.h).
            np.testing.assert_array_equal(twin.grad, parameter.grad)
    if need_dx:
        assert (np.abs(dx - want_dx) <= bound * dx_size).all()
    else:
        assert dx is None


@pytest.mark.parametrize("n", [3, 7, 40, 100, 300])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_stack_that_trains_one_factor_gives_the_gradients_of_each_layer(n: int, compute: str) -> None:
    together, alone = (layers_of(freeze_B=True, compute=compute) for _ in range(2))
    x, dys = passes(n)
    _, saved = stack_forward(together, x)
    dx = stack_backward(together, dys, saved)
    want_dx = sum(one.backward(dy, one.forward(x)[1]) for one, dy in zip(alone, dys, strict=True))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(other.dA, one.dA)
    size = sum(np.abs(dy) @ magnitude(one) for one, dy in zip(alone, dys, strict=True))
    bound = 2 * gamma(sum(OUTPUTS) + 3 * RANK + 4)  # as many terms, and scales
    assert (np.abs(dx - want_dx) <= bound * size).all()


@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float64", "float32")],
)
def test_a_stack_of_unlike_layers_gives_the_same_bits_on_any_threads(dtype: str, compute: str) -> None:
    rng = np.random.default_rng(1)
    results = []
    x, dys = rng.standard_normal((100, D_IN)), [rng.standard_normal((100, 61)) for _ in UNLIKE]
    for threads in (1, 2, 3, 7):
        nplora.set_num_threads(threads)
        layers = unlike_layers(dtype, compute)
        ys, saved = stack_forward(layers, x)
        dx = stack_backward(layers, dys, saved)
        grads = [parameter.grad for layer in layers for parameter in layer.local_parameters()]
        results.append([*ys, dx, *grads])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


def test_stack_keeps_leading_axes_and_skips_dx() -> None:
    layers, x = layers_of(), np.ones((2, 3, D_IN), np.float32)
    ys, saved = stack_forward(layers, x)
    assert [y.shape for y in ys] == [(2, 3, d_out) for d_out in OUTPUTS]
    assert stack_backward(layers, ys, saved, need_dx=False) is None
    assert stack_backward(layers, ys, saved).shape == x.shape
    assert all(np.abs(layer.dA).max() > 0 for layer in layers)


def test_a_merged_or_disabled_layer_answers_from_its_weight_alone() -> None:
    layers, (x, dys) = layers_of(), passes(20)
    expected = layers[0](x)
    layers[0].merge()
    ys, saved = stack_forward(layers, x)
    np.testing.assert_allclose(ys[0], expected, rtol=1e-4, atol=1e-4)
    layers[0].unmerge()
    with pytest.raises(RuntimeError, match="merged when this forward pass ran"):
        stack_backward(layers, dys, saved)
    with layers[1].disable_adapter():
        ys, saved = stack_forward(layers, x)
        dx = stack_backward(layers, dys, saved)
    assert layers[1].bias is not None
    np.testing.assert_allclose(
        ys[1], x @ layers[1].weight.to_numpy().T + layers[1].bias, rtol=1e-4, atol=1e-4
    )
    assert not layers[1].dA.any()
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("state", ["adapted", "dropout", "dora", "merged", "disabled"])
def test_inference_alone_gives_the_bits_of_the_forward_pass(state: str) -> None:
    layers = layers_of(dropout=0.5 if state == "dropout" else 0.0, use_dora=state == "dora")
    for layer in layers:
        layer.adapter_enabled = state != "disabled"
        if state == "merged":
            layer.merge()
    x = passes(3)[0]
    with inference():
        wanted, got = stack_forward(layers, x)[0], stack_infer(layers, x)
    for y, expected in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("state", ["merged", "disabled", "adapted"])
def test_a_dora_layer_that_answers_alone_is_one_call_of_the_core(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, x = layers_of(use_dora=True), passes(3)[0]
    for layer in layers:
        layer.adapter_enabled = state != "disabled"
        if state == "merged":
            layer.merge()
    with inference():
        wanted = stack_forward(layers, x)[0]
    if state != "adapted":
        monkeypatch.setattr(_core, "lora_forward", None)
    for y, expected in zip(stack_infer(layers, x), wanted, strict=True):
        np.testing.assert_array_equal(y, expected)


def adopted(rank: int, rslora: bool) -> Callable[[LoRALinear], None]:
    def change(layer: LoRALinear) -> None:
        rng = np.random.default_rng(rank)
        a, b = (rng.standard_normal(shape, np.float32) for shape in ((len(layer.A), rank), (rank, D_IN)))
        layer.prepare_adopt(LoraDelta.of_alpha(a, b, layer.alpha, rslora, None, False))()

    return change


CHANGES: dict[str, Callable[[LoRALinear], Any]] = {
    "factors": lambda layer: layer.A.__imul__(2),
    "alpha": lambda layer: setattr(layer, "alpha", 5.0),
    "merged": LoRALinear.merge,
    "unmerged": LoRALinear.unmerge,
    "disabled": lambda layer: setattr(layer, "adapter_enabled", False),
    "enabled": lambda layer: setattr(layer, "adapter_enabled", True),
    "rsLoRA": adopted(RANK, True),
    "another rank": adopted(RANK + 3, False),
    "drawn again": lambda layer: layer.seed(9),
}


def test_inference_follows_whatever_changes_a_layer() -> None:
    layers, x = layers_of(), passes(2)[0]
    before = stack_infer(layers, x)
    for name, change in CHANGES.items():
        for layer in layers:
            change(layer)
        for copies in (layers, copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
            with inference():
                wanted = stack_forward(copies, x)[0]
            for y, expected in zip(stack_infer(copies, x), wanted, strict=True):
                np.testing.assert_array_equal(y, expected, err_msg=name)
        after = stack_infer(layers, x)
        assert not np.array_equal(after[0], before[0]), name
        before = after


def test_inference_follows_a_linear_layer_whose_arrays_are_exchanged() -> None:
    rng = np.random.default_rng(0)
    layer, x = Linear(rng.standard_normal((4, D_IN)), np.ones(4)), passes(2)[0]
    for _ in range(2):
        np.testing.assert_array_equal(stack_infer([layer], x)[0], layer(x))
        layer.weight, layer.bias = (
            nplora.FrozenWeight(rng.standard_normal((4, D_IN))),
            np.zeros(4, np.float32),
        )


def test_inference_does_not_take_a_new_weight_for_one_that_is_gone() -> None:
    """An object may lie where another one lay, and then has its id."""
    layer, x = Linear(np.ones((4, D_IN))), passes(2)[0]
    for scale in range(2, 22):
        stack_infer([layer], x)
        layer.weight = nplora.FrozenWeight(np.zeros((4, D_IN)))  # lets go of the one before
        layer.weight = nplora.FrozenWeight(np.full((4, D_IN), float(scale)))
        np.testing.assert_array_equal(stack_infer([layer], x)[0], layer(x))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("merged_first", [False, True])
def test_a_layer_that_another_thread_changes_is_asked_once(
    merged_first: bool, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be merged or unmerged between any two lines: y and what is saved are of one state."""
    layer, x = layers_of(use_dora=use_dora)[0], passes(3)[0]
    if merged_first:
        layer.merge()
    wanted = layer(x)
    asked = LoRALinear._lone_weight

    def changing(self: LoRALinear) -> tuple[nplora.FrozenWeight | None, bool]:
        found = asked(self)
        self.unmerge() if self.merged else self.merge()
        return found

    monkeypatch.setattr(LoRALinear, "_lone_weight", changing)
    (y,), saved = stack_forward([layer], x)
    np.testing.assert_array_equal(y, wanted)
    assert saved.items[0].alone == saved.items[0].merged == merged_first


@pytest.mark.parametrize("merged_first", [False, True])
def test_dora_is_finished_as_it_was_begun(merged_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layers_of(use_dora=True)[0], passes(1)[0]
    if merged_first:
        layer.merge()
    wanted = layer(x)
    for name in ("infer", "lora_forward"):
        call = getattr(_core, name)

        def changing(*arguments: Any, call: Callable[..., Any] = call) -> Any:
            found = call(*arguments)
            layer.unmerge() if layer.merged else layer.merge()
            return found

        monkeypatch.setattr(_core, name, changing)
    np.testing.assert_array_equal(stack_infer([layer], x)[0], wanted)


def test_what_inference_keeps_of_a_merged_layer_goes_with_the_merged_weight() -> None:
    layer, x = layers_of()[0], passes(1)[0]
    layer.merge()
    stack_infer([layer], x)
    assert "_prepared" in vars(layer)
    layer.unmerge()
    assert "_prepared" not in vars(layer)
    stack_infer([layer], x)
    assert "_prepared" not in layer.__getstate__()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_core_keeps_what_an_inference_layer_reads(dtype: type) -> None:
    rng = np.random.default_rng(0)
    w, a, b, bias = (rng.standard_normal(shape).astype(dtype) for shape in ((5, 7), (5, 2), (2, 7), (5,)))
    x = rng.standard_normal((3, 7)).astype(dtype)
    wanted = x @ (w + 0.5 * a @ b).T + bias
    layer = _core.InferenceLayer(w.copy(), a.copy(), b.copy(), 0.5, bias.copy())
    rubbish = [np.full(n, np.nan, dtype) for n in (35, 10, 14, 5) for _ in range(20)]
    np.testing.assert_allclose(_core.infer(x, [layer])[0], wanted, rtol=1e-5)
    assert len(rubbish) == 80


def test_the_core_refuses_what_does_not_fit() -> None:
    w, a, b = np.ones((5, 7), np.float32), np.ones((5, 2), np.float32), np.ones((2, 7), np.float32)
    layer = _core.InferenceLayer(w, a, b, 1.0, None)
    for x in (np.ones((1, 6), np.float32), np.ones((1, 7))):
        with pytest.raises(ValueError, match=r"x must have shape|another dtype"):
            _core.infer(x, [layer])
    for arguments in (
        (w, b, a, 1.0, None),
        (None, a, b, 1.0, None),
        (w, a, b, 1.0, a[0]),
        (w.T, a, b, 1.0, None),
    ):
        with pytest.raises((ValueError, TypeError)):
            _core.InferenceLayer(*arguments)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError)):
        _core.infer(np.ones((1, 7), np.float32), [layer, None])  # type: ignore[list-item]


@pytest.mark.usefixtures("thread_limit")
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_stack_of_few_rows_has_the_same_bits_on_any_number_of_threads(rows: int) -> None:
    rng = np.random.default_rng(2)
    weights = [rng.standard_normal((d_out, 608), np.float32) for d_out in (1500, 300, 777)]
    layers = [
        LoRALinear(nplora.FrozenWeight(W, storage, compute="int8"), RANK, rng=0)
        for W, storage in zip(weights, ("q4_1", "q8_0", "bfloat16"), strict=True)
    ]
    for layer in layers:
        layer.A[...] = rng.standard_normal(layer.A.shape)
    plain = Linear(weights[0], dtype="q4_1", compute="int8")
    x = rng.standard_normal((rows, 608), np.float32)
    results = []
    for threads in (1, 2):
        nplora.set_num_threads(threads)
        with inference():
            results.append(stack_infer([*layers, plain], x))
    for y, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(y, expected)


def test_layers_that_do_not_fit_are_refused() -> None:
    layers, (x, dys) = layers_of(), passes(4)
    with pytest.raises(ValueError, match="stack_forward: no layers"):
        stack_forward([], x)
    other = LoRALinear(np.ones((3, 5), np.float32), 1)
    with pytest.raises(ValueError, match="the layers differ: d_in=5 in float32, d_in=97 in float32"):
        stack_forward([*layers, other], x)
    with pytest.raises(ValueError, match="stack_forward: x has last axis 96, expected d_in=97"):
        stack_forward(layers, x[:, :96])
    _, saved = stack_forward(layers, x)
    with pytest.raises(ValueError, match="3 layers, 2 dys, 3 saved passes"):
        stack_backward(layers, dys[:2], saved)


def test_explain_tells_the_way_and_its_reason() -> None:
    layer = LoRALinear(np.ones((1536, 576), np.float32), 64)
    few, many, inference = layer.explain(1), layer.explain(512), layer.explain(100_000, training=False)
    assert "few rows" in few
    assert "the update is separate (" in few
    assert "outputs in the lanes" in many
    # merged into W, an update costs 2 r d_out d_in for any rows; separate, 2 r (d_in + d_out) for each
    assert "the update is merged into W on the fly (" in inference
    rounded = LoRALinear(nplora.FrozenWeight(np.ones((1536, 576), np.float32), compute="bfloat16"), 64)
    assert "bfloat16" in rounded.explain(9)
    assert "float32" in rounded.explain(8)
    assert "the update is merged" not in rounded.explain(100_000, training=False)
    square = np.ones((1024, 1024), np.float32)  # decoded blocks are cheaper to transpose than x and y
    assert "tokens in the lanes" in LoRALinear(square, 8).explain(128)
    assert "outputs in the lanes" in LoRALinear(square, 8, dtype="q4_0").explain(128)


@pytest.mark.parametrize("storage", ["float32", "q8_0"])
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 40])
def test_explain_follows_the_switches_of_int8(storage: str, rows: int) -> None:
    """Without int8, many rows are computed as by a layer in bfloat16. The switches do not change few rows."""
    int8, bfloat16 = (
        LoRALinear(nplora.FrozenWeight(np.ones((64, 96), np.float32), storage, compute), 2)
        for compute in ("int8", "bfloat16")
    )
    given = int8.explain(rows).splitlines()[:3]
    assert ("int8" in given[-1]) == (rows > 4)
    with without_int8():
        inside = int8.explain(rows).splitlines()
    int8.int8 = False
    assert int8.explain(rows).splitlines() == inside
    assert inside[0] == (given[0] if rows <= 8 else bfloat16.explain(rows).splitlines()[0])
    assert "int8" not in inside[-1]


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
@pytest.mark.parametrize(("rows", "differs"), [(4, False), (5, True), (8, True), (9, False)])
def test_explain_names_the_arithmetic_of_a_backward_pass_that_differs(
    compute: str, rows: int, differs: bool
) -> None:
    layer = LoRALinear(nplora.FrozenWeight(np.ones((64, 96), np.float32), compute=compute), 2)
    forward, _, backward = layer.explain(rows).splitlines()[:3]
    assert forward.startswith(f"computes in: {'float32' if rows <= 8 else compute}")
    assert backward.startswith(f"backward: computes in {compute}, ") == differs


def test_explain_has_the_error_of_rounding_to_int8_if_a_pass_rounds_to_int8() -> None:
    W = np.random.default_rng(0).standard_normal((96, 512), np.float32)
    layer = LoRALinear(W, 4, compute="int8")
    line = layer.explain(9).splitlines()[-1]
    measured, bound = re.findall(r"([\d.]+)%", line)
    x = np.random.default_rng(1).standard_normal((200, 512))
    error = layer.int8_error(x, samples=200)
    assert float(measured) / 100 == pytest.approx(error.measured, rel=0.2)
    assert float(bound) / 100 == pytest.approx(error.bound, rel=0.2)
    for text in (
        layer.explain(8),
        layer.explain(9, training=False),
        LoRALinear(W, 4, compute="bfloat16").explain(9),
    ):
        assert "rounding to int8" not in text
    layer.int8 = False
    assert "rounding to int8" not in layer.explain(9)


def test_explain_tells_of_no_pass_that_is_refused_and_no_update_that_is_not_computed() -> None:
    layer = layers_of()[0]
    assert "backward: " in layer.explain(40)
    assert "backward: " not in layer.explain(40, training=False)
    assert "no update" in LoRALinear(np.ones((8, 8), np.float32), 2, alpha=0).explain(40)
    layer.adapter_enabled = False
    assert "no update" in layer.explain(40)
    assert "backward: " in layer.explain(40)
    layer.adapter_enabled = True
    layer.merge()
    assert layer.explain(40).endswith("; no update")
    assert "backward: " not in layer.explain(40)
    layer.adapter_enabled = False
    assert "backward: " not in layer.explain(40)


def test_what_is_no_layer_of_a_stack_is_named() -> None:
    layers, (x, dys) = layers_of(), passes(9)
    _, saved = stack_forward(layers, x)
    with pytest.raises(
        TypeError,
        match=r"^stack_forward: layers is of type LoRALinear, expected a list of LoRALinear or Linear$",
    ):
        stack_forward(layers[0], x)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"^stack_forward: layer 1 is of type ReLU, expected LoRALinear or Linear$"
    ):
        stack_forward([layers[0], nplora.ReLU()], x)  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match=r"^stack_backward: layer 0: dy has shape \(9, 61\), expected \(9, 130\)"
    ):
        stack_backward(layers, dys[::-1], saved)
    with pytest.raises(
        TypeError, match=r"^stack_backward: saved is of type tuple, expected StackSaved, which"
    ):
        stack_backward(layers, dys, saved.items)  # type: ignore[arg-type]


SAME = {"W": np.ones((130, 97))}


@pytest.mark.parametrize(
    ("other", "change", "message"),
    [
        (
            {"rank": 6},
            {},
            r"layer 1: .* its z is float32 of shape \(9, 5\), expected float32 of shape \(9, 6\)$",
        ),
        (
            {"W": np.ones((130, 96))},
            {},
            r"layer 1: .* its x is .* shape \(9, 97\), expected .* shape \(9, 96\)$",
        ),
        ({"use_dora": True}, {}, "layer 1: saved is from a layer without DoRA$"),
        (SAME, {"u": np.ones((9, 7), np.float32)}, "layer 1: saved is from a layer with DoRA$"),
        (SAME, {"x": None}, "layer 1: this forward pass saved no x, which the gradient of B needs$"),
        (
            SAME,
            {"x": np.ones((3, 97), np.float32)},
            r"layer 1: .* its x is float32 of shape \(3, 97\), expected",
        ),
        (SAME, {"z": np.ones((9, 5))}, "layer 1: .* its z is float64 of shape"),
        (SAME, {"lead": (3, 3)}, "the entries of saved come from batches of different shapes$"),
    ],
)
def test_the_pass_of_another_stack_adds_nothing_to_any_layer(
    other: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    first, second = layers_of(use_dora=True)[0], layers_of()[0]
    third = LoRALinear(**{"W": np.ones((130, 97)), "rank": RANK, **other})
    ys, saved = stack_forward([first, second], passes(9)[0])
    saved = StackSaved((saved.items[0], dataclasses.replace(saved.items[1], **change)))
    if third.weight.shape[1] != D_IN:
        first = LoRALinear(np.ones((130, 96)), RANK, use_dora=True)  # a stack has one d_in
        saved = StackSaved((first.forward(np.ones((9, 96)))[1], saved.items[1]))
    dys = [y.reshape(*item.lead, 130) for y, item in zip(ys, saved.items, strict=True)]
    with pytest.raises(ValueError, match=f"^stack_backward: {message}"):
        stack_backward([first, third], dys, saved)
    gradients = [parameter.grad for layer in (first, third) for parameter in layer.local_parameters()]
    assert not any(gradient.any() for gradient in gradients)


def test_a_second_backward_of_a_stack_adds_the_same_again_and_another_stack_is_refused() -> None:
    layers, others = layers_of(), layers_of()
    ys, saved = stack_forward(layers, passes(9)[0])
    dx = stack_backward(layers, ys, saved)
    once = [p.grad.copy() for layer in layers for p in layer.local_parameters()]
    np.testing.assert_array_equal(stack_backward(layers, ys, saved), dx)
    twice = [p.grad for layer in layers for p in layer.local_parameters()]
    for first, both in zip(once, twice, strict=True):
        assert first.any()
        np.testing.assert_array_equal(both, 2 * first)
    with pytest.raises(ValueError, match=r"^stack_backward: layer 0: `saved` comes from a forward pass of"):
        stack_backward(others, ys, saved)
    assert not any(p.grad.any() for layer in others for p in layer.local_parameters())


def test_an_unloaded_layer_of_a_stack_says_so() -> None:
    layers = layers_of()
    layers[1].merge_and_unload()
    with pytest.raises(AttributeError, match="this layer was unloaded; use the layer that replaced it"):
        stack_forward(layers, passes(9)[0])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (0, ValueError, "is 0, expected at least 1"),
        (-1, ValueError, "is -1, expected at least 1"),
        (1 << 70, ValueError, f"is {1 << 70}, expected at most {sys.maxsize}"),
        (2.5, TypeError, "is 2.5, expected an integer"),
    ],
)
def test_explain_refuses_a_number_of_rows_that_is_none(
    rows: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^explain: rows {message}$"):
        LoRALinear(np.ones((32, 64), np.float32), 2).explain(rows)


@pytest.mark.parametrize("n", [1, 9, 60])
def test_plain_layers_stand_beside_adapted_ones(n: int) -> None:
    """Linear, frozen with a bias or trained as a whole, gives in a stack what it gives alone."""
    lora, (x, dys) = layers_of(), passes(n)
    rng = np.random.default_rng(2)
    frozen = Linear(rng.standard_normal((48, D_IN), np.float32), rng.standard_normal(48, np.float32))
    trained = [Linear(lora[2].weight.to_numpy(), np.ones(61, np.float32), trainable=True) for _ in range(2)]
    layers, alone = [lora[0], frozen, trained[0]], [layers_of()[0], frozen, trained[1]]
    ys, saved = stack_forward(layers, x)
    dx = stack_backward(layers, dys, saved)
    want_dx = np.zeros_like(x)
    for layer, other, y, dy in zip(layers, alone, ys, dys, strict=True):
        want, kept = other.forward(x)
        want_dx += other.backward(dy, kept)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
        for parameter, twin in zip(layer.local_parameters(), other.local_parameters(), strict=True):
            assert parameter.grad.any()
            np.testing.assert_allclose(parameter.grad, twin.grad, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-3, atol=1e-3)
    assert saved.items[1].x is None
    assert stack_backward([frozen], dys[1:2], stack_forward([frozen], x)[1], need_dx=False) is None


def test_x_may_be_forgotten_and_given_again() -> None:
    layers, (x, dys) = layers_of(), passes(20)
    saved = stack_forward(layers, x)[1]
    forgotten = saved.with_x(None)
    assert forgotten.nbytes < saved.nbytes - x.nbytes / 2
    stack_backward(layers, dys, saved)
    wanted = [layer.dB.copy() for layer in layers if layer.dB is not None]
    for layer in layers:
        layer.zero_grad()
    with pytest.raises(ValueError, match="this forward pass saved no x"):
        stack_backward(layers, dys, forgotten)
    for layer in layers:
        layer.zero_grad()
    stack_backward(layers, dys, forgotten.with_x(x))
    for layer, want in zip(layers, wanted, strict=True):
        np.testing.assert_array_equal(layer.dB, want)


def test_a_refused_stack_adds_nothing() -> None:
    """DoRA's dm and a trained Linear's gradients wait until no layer refuses its dy."""
    layers, (x, dys) = layers_of(use_dora=True), passes(20)
    trained = Linear(np.ones((61, D_IN), np.float32), np.ones(61, np.float32), trainable=True)
    stacked = [layers[0], trained, layers[1]]
    saved = stack_forward(stacked, x)[1]
    with pytest.raises(ValueError, match="dy has shape"):
        stack_backward(stacked, [dys[0], dys[2], dys[1][:5]], saved)
    assert not any(parameter.grad.any() for layer in stacked for parameter in layer.local_parameters())


@pytest.mark.slow
def test_a_few_rows_meet_many_large_layers() -> None:
    # Several times kTaskFlops: cut for Ctrl-C, into more pieces than there are threads.
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((4096, 4096), np.float32), rng.standard_normal((8, 4096), np.float32)
    layer = LoRALinear(W, RANK, rng=0)
    layer.A[...] = rng.standard_normal(layer.A.shape)
    ys, _ = stack_forward([layer] * 40, x)
    some = slice(None, None, 97)
    rows = W[some] + layer.scale * layer.A[some].astype(np.float64) @ layer.B
    magnitude = np.abs(x) @ (np.abs(W[some]) + layer.scale * np.abs(layer.A[some]) @ np.abs(layer.B)).T
    assert (np.abs(ys[0][:, some] - x @ rows.T) <= gamma(4096 + RANK) * magnitude).all()
    assert all(np.array_equal(y, ys[0]) for y in ys)
