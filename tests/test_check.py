"""Checks of user input that no other test reaches."""

import inspect
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import _check

# ---- keywords ----

NET = nplora.Sequential(nplora.Linear(np.eye(2), trainable=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nplora.LoRALinear(np.eye(2), r=1), "LoRALinear: unexpected keyword 'r'; did you mean rank?"),
        (lambda: nplora.LoRAEmbedding(np.eye(2), lora_alpha=1), "'lora_alpha'; did you mean alpha?"),
        (
            lambda: nplora.AdamW(learning_rate=1),
            "AdamW: unexpected keyword 'learning_rate'; did you",
        ),
        (lambda: nplora.SGD(learning_rate=1), "SGD: unexpected keyword 'learning_rate'; did you mean lr?"),
        (lambda: nplora.Trainer(NET, lr_scheduler_type="cosine"), "did you mean schedule?"),
        (lambda: nplora.Trainer(NET, gradient_accumulation_steps=2), "did you mean accumulate?"),
        (lambda: nplora.Trainer(NET, warmup_ratio=0.1), "did you mean warmup_steps, a number of steps?"),
        (lambda: nplora.Trainer(NET, max_grad_norm=1.0), "did you mean clip_norm?"),
        (lambda: nplora.Trainer(NET, epochs=3), "keyword 'epochs'; `fit` takes it: fit(..., epochs=...)"),
        (lambda: nplora.Trainer(NET, num_train_epochs=3), "; `fit` takes it: fit(..., epochs=...)"),
        (lambda: nplora.Trainer(NET, shuffle=False), "; `fit` takes it: fit(..., shuffle=...)"),
        (lambda: nplora.Trainer(NET, learning_rate=1e-3), "optimiser takes it: Trainer(..., optimizer="),
        (lambda: nplora.Trainer(NET).fit(None, lr=1e-3), "; the Trainer's optimiser takes it: Trainer(..., "),
        (lambda: nplora.Trainer(NET).fit(None, schedule="cosine"), "Trainer(..., schedule=...)"),
        (
            lambda: nplora.Trainer(NET).fit(None, num_train_epochs=2),
            "Trainer.fit: unexpected keyword 'num",
        ),
        (lambda: nplora.Trainer(NET).fit(None, per_device_train_batch_size=2), "did you mean batch_size?"),
        (lambda: nplora.Trainer(NET).fit(None, output_dir="out"), "did you mean checkpoint_dir?"),
        (lambda: nplora.LanguageModel.add_lora(None, target_modules="q_proj"), "did you mean targets?"),
        (lambda: nplora.LanguageModel.generate(None, "x", max_tokens=3), "did you mean max_new_tokens?"),
        (
            lambda: nplora.LanguageModel.generate(None, "x", max_length=3),
            "did you mean max_new_tokens, which does not count the prompt?",
        ),
        (lambda: nplora.LanguageModel.generate(None, "x", num_beams=3), "one text, without beam search"),
        (lambda: nplora.evaluate("m", "d", batch_size=3), "'batch_size'; nplora forms the batches itself"),
        (lambda: nplora.load_model("m", torch_dtype="bfloat16"), "did you mean compute?"),
        (lambda: nplora.load_model("m", device_map="auto"), "'device_map'; nplora computes on the CPU"),
        (lambda: nplora.LoRALinear(None, load_in_8bit=True), "did you mean dtype?"),
        (
            lambda: nplora.load_model("m", load_in_4bit=True),
            "; nplora keeps the weights in the dtype of",
        ),
    ],
)
def test_a_keyword_of_another_library_is_refused_with_ours(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert message in str(caught.value)


def test_the_keywords_of_a_checked_function_stay_visible() -> None:
    @_check.keywords
    def f(a: int, *, rank: int = 8) -> int:
        """Add."""
        return a + rank

    assert f(1) + f(1, rank=2) + f(a=1) == 9 + 3 + 9
    assert (str(inspect.signature(f)), f.__doc__) == ("(a: int, *, rank: int = 8) -> int", "Add.")
    with pytest.raises(TypeError, match=r"f: unexpected keyword 'zzz'$"):
        f(1, zzz=3)  # type: ignore[call-arg]
    assert {"rank", "alpha"} <= inspect.signature(nplora.LoRALinear).parameters.keys()


# ---- values ----


@pytest.mark.parametrize("value", [1, 1.5, np.float32(2), np.int8(3), Fraction(1, 2)])
def test_any_real_number_is_a_number(value: Any) -> None:
    assert _check.number("op", "n", value) == float(value)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, [1.0], np.ones(1)])
def test_other_things_are_not_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"op: n is .*, expected a number"):
        _check.number("op", "n", value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.float32("nan")])
def test_a_number_is_finite(value: Any) -> None:
    with pytest.raises(ValueError, match=r"op: n is .*, expected a finite number"):
        _check.number("op", "n", value)


@pytest.mark.parametrize(
    "value", [None, object(), [[1], [1, 2]], "text", [1 + 1j], np.array(["2020"], "M8[Y]")]
)
def test_arrays_without_real_numbers_are_refused(value: Any) -> None:
    with pytest.raises(
        (TypeError, ValueError),
        match=r"op: x (has dtype .*, expected real numbers|is None, expected an array|is inhomogeneous)",
    ):
        _check.floats("op", "x", value, np.float32)


@pytest.mark.parametrize("value", ["text", b"text", None, {"text"}, ["text", 1], iter(["text"])])
def test_texts_must_be_in_a_list(value: Any) -> None:
    assert _check.texts("op", "t", ["a", "b"]) == ("a", "b")
    with pytest.raises(TypeError, match=r"^op: t is .*, expected a list of texts$"):
        _check.texts("op", "t", value)


def test_an_array_that_fits_is_not_copied() -> None:
    x = np.ones((3, 4), np.float32)
    assert _check.floats("op", "x", x, np.float32) is x
    rows, lead = _check.rows("op", "x", x, 4, "d", np.float32)
    assert np.shares_memory(rows, x)
    assert lead == (3,)


def test_an_unaligned_array_is_copied_to_an_aligned_one() -> None:
    x = np.zeros(17, np.uint8)[1:].view(np.float32)
    assert not x.flags.aligned
    assert _check.floats("op", "x", x, np.float32).flags.aligned


def test_overlap_is_exact_if_it_is_easy_to_find_and_assumed_otherwise() -> None:
    x = np.zeros((8, 8))
    assert not _check.overlap(x[:, :4], x[:, 4:])
    assert _check.overlap(x[:, :5], x[:, 4:])
    # Two lattices in one buffer, whose common points are hard to find.
    flat = np.zeros(10**6, np.uint8)
    shape, strides = (30, 30, 30, 30), (12345, 2341, 271, 23)
    hard = np.lib.stride_tricks.as_strided(flat, shape, strides)
    other = np.lib.stride_tricks.as_strided(flat[1:], shape, (12211, 2203, 307, 29))
    assert _check.overlap(hard, other)


def test_a_subclass_is_treated_as_the_array_it_is() -> None:
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0]])
    assert type(_check.floats("op", "x", matrix, np.float32)) is np.ndarray


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, Fraction(10**400)], ids=range(4))
def test_a_number_fits_float64(value: Any) -> None:
    with pytest.raises(ValueError, match="op: n is beyond the range of float64"):
        _check.number("op", "n", value)


def test_ragged_lists_are_refused_by_the_name_of_the_argument() -> None:
    for check in (lambda v: _check.floats("op", "x", v, np.float32), lambda v: _check.integers("op", "x", v)):
        with pytest.raises(ValueError, match="op: x is inhomogeneous"):
            check([[1], [1, 2]])


def test_unsigned_integers_beyond_int64_are_reported_unchanged() -> None:
    with pytest.raises(ValueError, match=r"op: n holds 18446744073709551615, expected at most 2\*\*63 - 1"):
        _check.integers("op", "n", np.array([3, 2**64 - 1], np.uint64))
    np.testing.assert_array_equal(_check.integers("op", "n", np.array([3], np.uint64)), [3])


@pytest.mark.parametrize(("seed", "error"), [("a", TypeError), (-1, ValueError), (1.5, TypeError)])
def test_a_seed_is_an_integer_of_at_least_zero(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"op: rng is .*, expected a numpy Generator, an integer of at least 0"):
        _check.generator("op", seed)
    given = np.random.default_rng(3)
    assert _check.generator("op", given) is given
    assert _check.generator("op", 3).integers(99) == np.random.default_rng(3).integers(99)
    _check.generator("op", None)


@pytest.mark.parametrize(("shape", "words"), [((), "0 axes"), ((2,), "1 axis"), ((1, 2, 3), "3 axes")])
def test_axes_are_counted_in_words(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^op: W has {words}, expected 2 axes \(d_out, d_in\)$"):
        _check.matrix("op", "W", np.ones(shape))


def test_the_prompt_of_an_encoder_is_not_suggested_for_its_texts() -> None:
    assert _check.suggestion("text", ["prompt", "max_new_tokens"]) == "; did you mean prompt?"
    assert "prompt" not in _check.suggestion("text", ["texts", "prompt"])


def test_a_suggestion_for_a_very_long_name_takes_no_time() -> None:
    begin = time.process_time()
    assert _check.suggestion("x" * 5_000_000, ["max_tokens"]) == ""
    assert _check.suggestion("max_token" + "s" * 5_000_000, ["max_tokens"]) == ""
    assert time.process_time() - begin < 0.5
