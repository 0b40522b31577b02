"""Sequential: order, names, and gradients through the whole."""

from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import (
    GELU,
    Embedding,
    LayerNorm,
    Linear,
    LoRAEmbedding,
    LoRALinear,
    ReLU,
    RMSNorm,
    Sequential,
    SiLU,
)


def network(rng: np.random.Generator) -> Sequential:
    """One of everything that takes numbers, in float64, no factor zero."""

    def lora(d_out: int, d_in: int, **options: Any) -> LoRALinear:
        W = rng.standard_normal((d_out, d_in))
        return LoRALinear(W, rank=2, init="gaussian", dtype="float64", rng=1, **options)

    return Sequential(
        lora(7, 5, dropout=0.2),
        SiLU(),  # smooth, unlike ReLU
        LayerNorm(np.ones(7), np.ones(7), trainable=True, dtype="float64"),
        lora(6, 7, bias=np.ones(6), freeze_B=True),
        GELU("tanh"),
        RMSNorm(np.ones(6), dtype="float64"),
        Linear(rng.standard_normal((3, 6)), np.ones(3), dtype="float64", trainable=True),
    )


def test_gradients_of_a_whole_network_match_central_differences(rng: np.random.Generator) -> None:
    model, x = network(rng), rng.standard_normal((9, 5))
    state = model.random_state()
    y, saved = model.forward(x)
    c = rng.standard_normal(y.shape)
    dx = model.backward(c, saved)

    def loss() -> float:
        model.set_random_state(state)
        return float((c * model.forward(x)[0]).sum())

    pairs = [(x, dx), *[(p.value, p.grad) for p in model.parameters()]]
    assert reference.gradient_error(loss, pairs, rng) <= 1e-6


def test_names_are_numbers_as_in_torch(rng: np.random.Generator) -> None:
    model = network(rng)
    names = ["0.A", "0.B", "2.weight", "2.bias", "3.A", "6.weight", "6.bias"]
    assert [p.name for p in model.parameters()] == names
    nested = Sequential(model, ReLU())
    assert [p.name for p in nested.parameters()] == [f"0.{name}" for name in names]
    assert (len(model), model[1], list(model)[1]) == (7, model.modules[1], model.modules[1])


def test_the_lowest_layer_skips_the_frozen_product_on_request(rng: np.random.Generator) -> None:
    model, x = network(rng), rng.standard_normal((9, 5))
    y, saved = model.forward(x)
    assert model.backward(y, saved, need_dx=False) is None
    lean = [p.grad.copy() for p in model.parameters()]
    model.zero_grad()
    assert model.backward(y, saved).shape == x.shape
    for p, gradient in zip(model.parameters(), lean, strict=True):
        np.testing.assert_array_equal(p.grad, gradient)


def test_an_embedding_may_come_first_and_only_first(rng: np.random.Generator) -> None:
    table, ids = rng.standard_normal((9, 5)), np.array([[1, 2], [8, 1]])
    for first in (Embedding(table), LoRAEmbedding(table, rank=2), Embedding(table, trainable=True)):
        model = Sequential(first, LoRALinear(np.ones((3, 5)), rank=2))
        y, saved = model.forward(ids)
        assert model.backward(y, saved) is None
    model = Sequential(ReLU(), Embedding(table))
    saved_relu = model[0].forward(np.ones(2))[1]
    y, saved_rows = model[1].forward([1, 2])
    with pytest.raises(
        RuntimeError, match=r"Sequential\.backward: module 1 returned no gradient of its input"
    ):
        model.backward(y, nplora.nn.sequential.SequentialSaved((saved_relu, saved_rows)))


def test_a_shared_module_adds_up_its_gradients(rng: np.random.Generator) -> None:
    shared = LoRALinear(rng.standard_normal((4, 4)), rank=2, init="gaussian", dtype="float64", rng=0)
    model, x = Sequential(shared, shared), rng.standard_normal((3, 4))
    assert [p.name for p in model.parameters()] == ["0.A", "0.B"]
    y, saved = model.forward(x)
    c = rng.standard_normal(y.shape)
    pairs = [(x, model.backward(c, saved)), *[(p.value, p.grad) for p in model.parameters()]]
    assert reference.gradient_error(lambda: float((c * model(x)).sum()), pairs, rng) <= 1e-6


def test_unloading_replaces_modules_in_their_places(rng: np.random.Generator) -> None:
    model, x = network(rng), rng.standard_normal((9, 5))
    before = model(x)
    assert model.merge_and_unload() is model
    assert [type(m) for m in model] == [Linear, SiLU, LayerNorm, Linear, GELU, RMSNorm, Linear]
    np.testing.assert_allclose(model(x), before, rtol=1e-10)
    assert [p.name for p in model.parameters()] == ["2.weight", "2.bias", "6.weight", "6.bias"]


def test_an_empty_sequence_is_the_identity() -> None:
    model, x = Sequential(), np.ones(3)
    y, saved = model.forward(x)
    np.testing.assert_array_equal(y, x)
    assert model.backward(y, saved) is y


def test_only_modules_are_taken() -> None:
    with pytest.raises(TypeError, match="Sequential: argument 1 is a list, expected a Module"):
        Sequential(ReLU(), [ReLU()])  # type: ignore[arg-type]


def test_a_slice_is_a_sequence_of_the_same_modules(rng: np.random.Generator) -> None:
    model, x = network(rng), rng.standard_normal((9, 5))
    head = model[:3]
    assert isinstance(head, Sequential)
    assert list(head) == list(model)[:3]
    np.testing.assert_array_equal(model[3:](head(x)), model(x))
    assert len(model[7:]) == 0
    assert model[-1] is model.modules[-1]


def test_an_error_names_the_module_that_raised_it(rng: np.random.Generator) -> None:
    inner = network(rng)
    model = Sequential(ReLU(), Sequential(ReLU(), inner))
    message = r"^layer '1\.1\.0': LoRALinear\.forward: x has last axis 6, expected d_in=5$"
    for call in (model, model.forward):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                call(np.ones((9, 6)))
    y, saved = model.forward(np.ones((9, 5)))
    with pytest.raises(ValueError, match=r"^layer '1\.1\.6': Linear\.backward: dy has shape \(8, 3\)"):
        model.backward(y[:8], saved)


def test_an_error_inside_a_users_module_has_the_dotted_name_of_its_layer(rng: np.random.Generator) -> None:
    class Block(nplora.Module):
        def __init__(self) -> None:
            self.stack = Sequential(ReLU(), network(rng))

        def forward(self, x: Any) -> Any:
            return self.stack.forward(x)

    for model, name in ((Sequential(ReLU(), Block()), r"1\.stack\.1\.0"), (Block(), r"stack\.1\.0")):
        with pytest.raises(ValueError, match=rf"^layer '{name}': LoRALinear\.forward: x has last axis 6"):
            model(np.ones((9, 6)))


def test_an_error_of_another_make_passes_as_it_is() -> None:
    class Reads(nplora.Module):
        def forward(self, x: Any) -> Any:
            return b"\xff".decode(), None

    with pytest.raises(UnicodeDecodeError, match=r"^'utf-8' codec can't decode"):
        Sequential(Reads())(1)


def test_a_forward_of_a_child_gives_a_pair() -> None:
    class OnlyY(nplora.Module):
        def forward(self, x: Any) -> Any:
            return np.ones((2, 3))

    with pytest.raises(TypeError, match=r"OnlyY\.forward returned ndarray, expected the pair \(y, saved\)"):
        Sequential(OnlyY()).forward(1)
