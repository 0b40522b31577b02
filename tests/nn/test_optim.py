"""Optimisers against the oracle, their state, the gradient norm, and schedules."""

import copy
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import SGD, AdamW, Parameter
from nplora.lora.delta import LoraDelta
from nplora.nn.optim import global_norm, schedule

SHAPES = {"fc.A": (7, 3), "fc.B": (3, 5), "A": (), "m": (40000,)}


def parameters(rng: np.random.Generator, dtype: Any = np.float64) -> list[Parameter]:
    return [
        Parameter(name, np.asarray(rng.standard_normal(s), dtype), np.asarray(rng.standard_normal(s), dtype))
        for name, s in SHAPES.items()
    ]


def copies(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.name, p.value.copy(), p.grad.copy()) for p in params]


class Foreign:
    """As another package's."""


Foreign.__module__ = "torch.nn.parameter"
ROW = Parameter("w", np.ones(3), np.ones(3))
NO_PARAMETERS: dict[str, tuple[Any, str]] = {
    "arrays": ([np.ones(3)], r"parameters\[0\] is a numpy.ndarray"),
    "an array": (np.ones((3, 3)), r"parameters\[0\] is a numpy.ndarray"),
    "a number in an array": (np.ones(()), "parameters is a numpy.ndarray"),
    "a layer": (nplora.LoRALinear(np.eye(3), 2), "parameters is a LoRALinear"),
    "layers": (nplora.Sequential(nplora.ReLU()), r"parameters\[0\] is a ReLU"),
    "a mapping": ({"w": ROW}, r"parameters\[0\] is 'w'"),
    "its arrays": ({"w": np.ones(3)}.values(), r"parameters\[0\] is a numpy.ndarray"),
    "one parameter": (ROW, r"parameters\[0\] is 'w'"),
    "another's parameters": ([ROW, Foreign()], r"parameters\[1\] is a torch\.nn\.parameter\.Foreign"),
    "pairs": ([("w", np.ones(3))], r"parameters\[0\] is a tuple"),
    "a text": ("w", "parameters is 'w'"),
    "nothing": (None, "parameters is a NoneType"),
}


@pytest.mark.parametrize("what", NO_PARAMETERS)
@pytest.mark.parametrize("make", [AdamW, lambda: SGD(lr=0.1)])
def test_what_are_no_parameters_is_refused_at_every_step(make: Any, what: str) -> None:
    given, got = NO_PARAMETERS[what]
    wanted = rf"{got}, expected a list of Parameter, such as model\.parameters\(\) returns$"
    optimizer = make()
    with pytest.raises(TypeError, match=rf"\.init: {wanted}"):
        optimizer.init(given)
    with pytest.raises(TypeError, match=f"^global_norm: {wanted}"):
        global_norm(given)
    for steps in range(2):
        with pytest.raises(TypeError, match=rf"\.step: {wanted}"):
            optimizer.step(given)
        assert optimizer.steps == steps
        optimizer.step([Parameter("w", np.ones(3), np.ones(3))])


def test_parameters_may_come_in_any_iterable(rng: np.random.Generator) -> None:
    params = parameters(rng)
    wanted, others = copies(params), [copies(params) for _ in range(3)]
    AdamW().step(wanted)
    ways = ({p.name: p for p in others[0]}.values(), iter(others[1]), [tuple(p) for p in others[2]])
    for given, params in zip(ways, others, strict=True):
        optimizer = AdamW()
        optimizer.step(given)  # type: ignore[arg-type]
        assert optimizer.steps == 1
        for p, w in zip(params, wanted, strict=True):
            np.testing.assert_array_equal(p.value, w.value)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-4)])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
def test_adamw_matches_the_oracle(
    dtype: Any, rtol: float, grad_scale: float, rng: np.random.Generator
) -> None:
    params = parameters(rng, dtype)
    optimizer = AdamW(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2, lr_ratio=4)
    expected = {p.name: (p.value.astype(np.float64), 0.0, 0.0) for p in params}
    for t in range(1, 5):
        for p in params:
            p.grad[...] = rng.standard_normal(p.grad.shape)
            lr = 0.4 if p.name in ("fc.A", "A") else 0.1
            value, m, v = expected[p.name]
            g = grad_scale * p.grad.astype(np.float64)
            expected[p.name] = reference.adamw(value, g, m, v, t, lr, 0.8, 0.95, 1e-6, 0.2)
        optimizer.step(params, grad_scale=grad_scale)
    assert optimizer.steps == 4
    for p in params:
        np.testing.assert_allclose(p.value, expected[p.name][0], rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.7, False), (0.7, True)])
def test_sgd_matches_the_oracle(momentum: float, nesterov: bool, rng: np.random.Generator) -> None:
    params = parameters(rng)
    optimizer = SGD(0.1, momentum, weight_decay=0.2, nesterov=nesterov, lr_ratio=3)
    expected = {p.name: (p.value.copy(), np.zeros_like(p.value)) for p in params}
    for _ in range(4):
        for p in params:
            p.grad[...] = rng.standard_normal(p.grad.shape)
            lr = 0.3 if p.name in ("fc.A", "A") else 0.1
            expected[p.name] = reference.sgd(
                expected[p.name][0], p.grad, expected[p.name][1], lr, momentum, 0.2, nesterov
            )
        optimizer.step(params)
    for p in params:
        np.testing.assert_allclose(p.value, expected[p.name][0], rtol=1e-12)
    assert len(optimizer.state_dict()) == 1 + (4 if momentum else 0)


def test_float32_and_float64_parameters_may_be_mixed(rng: np.random.Generator) -> None:
    params = [parameters(rng)[0], parameters(rng, np.float32)[1]]
    before = copies(params)
    AdamW().step(params)
    assert all(np.any(p.value != b.value) for p, b in zip(params, before, strict=True))


def test_the_rate_of_a_step_overrides_the_base_rate(rng: np.random.Generator) -> None:
    params = parameters(rng)
    before = copies(params)
    AdamW(lr=1).step(params, lr=0)
    for p, b in zip(params, before, strict=True):
        np.testing.assert_array_equal(p.value, b.value)


@pytest.mark.usefixtures("thread_limit")
def test_a_step_is_the_same_to_the_bit_on_any_number_of_threads() -> None:
    results = set()
    for threads in (1, 2, 3):
        nplora.set_num_threads(threads)
        params = parameters(np.random.default_rng(0), np.float32)
        AdamW().step(params)
        SGD(0.1, momentum=0.9).step(params)
        results.add((global_norm(params), *(p.value.tobytes() for p in params)))
    assert len(results) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.7, False), (0.7, True)])
def test_sgd_takes_every_length_in_both_dtypes(
    dtype: Any, momentum: float, nesterov: bool, rng: np.random.Generator
) -> None:
    params = [
        Parameter(f"p{n}", *rng.standard_normal((2, n)).astype(dtype)) for n in (0, 1, 15, 16, 17, 33, 16385)
    ]
    before = copies(params)
    optimizer = SGD(0.1, momentum, weight_decay=0.2, nesterov=nesterov)
    optimizer.step(params)
    optimizer.step(params)
    for p, b in zip(params, before, strict=True):
        wanted, buf = b.value.astype(np.float64), np.zeros(b.value.shape)
        for _ in range(2):
            wanted, buf = reference.sgd(wanted, p.grad, buf, 0.1, momentum, 0.2, nesterov)
        np.testing.assert_allclose(p.value, wanted, rtol=1e-5, atol=8 * np.finfo(dtype).eps)


# ---- clipping ----


MAKERS: list[Any] = [AdamW, lambda: SGD(0.1, momentum=0.9, nesterov=True), lambda: SGD(0.1)]


def mixed(rng: np.random.Generator) -> list[Parameter]:
    """Parameters of both dtypes, in turns."""
    both = zip(parameters(rng, np.float32), parameters(rng), strict=True)
    return [a if i % 2 else b for i, (a, b) in enumerate(both)]


def everything(params: list[Parameter], optimizer: nplora.optim.Optimizer) -> list[bytes]:
    state = optimizer.state_dict()
    return [p.value.tobytes() for p in params] + [state[key].tobytes() for key in sorted(state)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("grad_scale", [1.0, -0.25])
def test_clipping_scales_the_gradients_of_a_step_down_to_the_norm(
    make: Any, grad_scale: float, rng: np.random.Generator
) -> None:
    params = mixed(rng)
    norm = global_norm(params) * abs(grad_scale)
    for max_norm, factor in ((math.inf, 1.0), (2 * norm, 1.0), (0.5 * norm, 0.5 * norm / norm)):
        clipped, scaled = copies(params), copies(params)
        one, other = make(), make()
        for _ in range(2):
            assert one.step(clipped, grad_scale=grad_scale, max_norm=max_norm) == norm
            other.step(scaled, grad_scale=grad_scale * factor)
        assert everything(clipped, one) == everything(scaled, other)
        assert one.steps == 2


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_that_is_not_finite_changes_nothing(make: Any, bad: float, rng: np.random.Generator) -> None:
    params, optimizer = mixed(rng), make()
    optimizer.step(params)
    before = everything(params, optimizer)
    params[-1].grad[-1] = bad
    for max_norm in (1.0, math.inf):
        norm = optimizer.step(params, max_norm=max_norm)
        assert norm is not None
        assert not math.isfinite(norm)
    assert everything(params, optimizer) == before
    assert optimizer.steps == 1


# ---- live buffers ----


@pytest.mark.parametrize("make", MAKERS)
def test_the_moments_of_a_parameter_follow_its_name_not_its_place(
    make: Any, rng: np.random.Generator
) -> None:
    params, optimizer = mixed(rng), make()
    optimizer.lr_ratio = 4
    twin_params, twin = copies(params), make()
    twin.lr_ratio = 4
    for turn in range(3):
        optimizer.step(params)
        twin.step(twin_params[::-1] if turn else twin_params)
    assert everything(params, optimizer) == everything(twin_params, twin)


@pytest.mark.parametrize("make", MAKERS)
def test_a_step_writes_the_arrays_that_it_is_given_and_keeps_none_of_them(
    make: Any, rng: np.random.Generator
) -> None:
    params, optimizer = parameters(rng, np.float32), make()
    optimizer.step(params)
    others, held = copies(params), [p.value.tobytes() for p in params]
    optimizer.step(others)
    assert [p.value.tobytes() for p in params] == held
    assert all(p.value.tobytes() != h for p, h in zip(others, held, strict=True))
    dead = [weakref.ref(array) for p in params for array in (p.value, p.grad)]
    del params
    assert not any(array() is not None for array in dead)


def test_factors_of_another_rank_are_noticed_before_anything_is_written() -> None:
    layer = nplora.LoRALinear(np.eye(8, dtype=np.float32), rank=2, init="gaussian", rng=0)
    head = nplora.LoRALinear(np.eye(8, dtype=np.float32), rank=2, init="gaussian", rng=1)
    model, optimizer = nplora.Sequential(head, layer), AdamW()
    for p in model.parameters():
        p.grad[...] = 1
    optimizer.step(model.parameters())
    layer.prepare_adopt(LoraDelta(np.ones((8, 3), np.float32), np.ones((3, 8), np.float32), 1.0))()
    before = everything(model.parameters(), optimizer)
    with pytest.raises(ValueError, match=r"exp_avg\.1\.A is float32 \(8, 2\), expected float32 \(8, 3\)"):
        optimizer.step(model.parameters())
    assert everything(model.parameters(), optimizer) == before
    optimizer.init(model.parameters())
    optimizer.step(model.parameters())
    assert layer.A.shape == (8, 3)


def test_a_merged_layer_is_refused_before_anything_is_written() -> None:
    layers = [nplora.LoRALinear(np.eye(8, dtype=np.float32), rank=2, rng=i) for i in range(2)]
    model, optimizer = nplora.Sequential(*layers), AdamW()
    optimizer.step(model.parameters())
    layers[1].merge()
    before = everything(model.parameters(), optimizer)
    with pytest.raises(RuntimeError, match=r"parameter '1\.A' is read-only; is its layer merged"):
        optimizer.step(model.parameters())
    assert everything(model.parameters(), optimizer) == before


def test_steps_on_several_threads_at_once_do_not_meet() -> None:
    def run(seed: int) -> list[bytes]:
        params, optimizer = parameters(np.random.default_rng(seed), np.float32), AdamW()
        for _ in range(50):
            optimizer.step(params, max_norm=0.5)
        return everything(params, optimizer)

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(4))) == alone


# ---- state ----


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("init_first", [False, True])
def test_a_run_goes_on_from_its_state_to_the_bit(
    make: Any, init_first: bool, rng: np.random.Generator
) -> None:
    params, optimizer = parameters(rng, np.float32), make()
    for _ in range(3):
        optimizer.step(params)
    state, twin_params, twin = optimizer.state_dict(), copies(params), make()
    if init_first:
        twin.init(twin_params)
    twin.load_state_dict(state)
    assert twin.steps == 3
    for _ in range(2):
        optimizer.step(params)
        twin.step(twin_params)
    assert [p.value.tobytes() for p in params] == [p.value.tobytes() for p in twin_params]


def test_the_state_is_named_after_moments_and_parameters(rng: np.random.Generator) -> None:
    params, optimizer = parameters(rng, np.float32), AdamW()
    optimizer.step(params)
    state = optimizer.state_dict()
    assert set(state) == {"steps"} | {f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in SHAPES}
    assert state["exp_avg.fc.A"].dtype == np.float32
    sgd = SGD(0.1, momentum=0.5)
    sgd.init(params)
    assert set(sgd.state_dict()) == {"steps"} | {f"momentum.{n}" for n in SHAPES}


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_optimizer_goes_on_alike(copy_of: Any, rng: np.random.Generator) -> None:
    params, optimizer = mixed(rng), AdamW()
    optimizer.step(params)
    twin_params, twin = copies(params), copy_of(optimizer)
    optimizer.step(params)
    twin.step(twin_params)
    assert everything(params, optimizer) == everything(twin_params, twin)


def test_the_state_is_a_copy_both_ways(rng: np.random.Generator) -> None:
    params, optimizer = parameters(rng), AdamW()
    optimizer.step(params)
    state = optimizer.state_dict()
    before = state["exp_avg.fc.A"].copy()
    optimizer.step(params)
    np.testing.assert_array_equal(state["exp_avg.fc.A"], before)
    optimizer.load_state_dict(state)
    optimizer.step(params)
    np.testing.assert_array_equal(state["exp_avg.fc.A"], before)


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_is_loaded_into_the_arrays_that_are_there(make: Any, rng: np.random.Generator) -> None:
    params, optimizer = parameters(rng), make()
    optimizer.step(params)
    live, state = optimizer.state_dict(copy=False), optimizer.state_dict()
    optimizer.step(params)
    optimizer.load_state_dict(state)
    for name in state.keys() - {"steps"}:
        assert optimizer.state_dict(copy=False)[name] is live[name]
        np.testing.assert_array_equal(live[name], state[name])


def test_init_starts_afresh(rng: np.random.Generator) -> None:
    params, optimizer = parameters(rng), AdamW()
    optimizer.step(params)
    optimizer.init(params[:2])
    assert optimizer.steps == 0
    assert not any(v.any() for v in optimizer.state_dict().values())
    optimizer.step(params[:2])


def test_a_state_that_does_not_fit_is_refused_with_all_reasons(rng: np.random.Generator) -> None:
    params, optimizer = parameters(rng), AdamW()
    optimizer.step(params)
    state = optimizer.state_dict()
    bad = {k: v for k, v in state.items() if k != "exp_avg.m"}
    bad |= {"exp_avg_sq.fc.A": np.ones((2, 2)), "exp_avg.fc.C": np.ones(3), "junk": np.ones(1)}
    with pytest.raises(ValueError, match=r"AdamW\.load_state_dict: the state does not fit") as caught:
        optimizer.load_state_dict(bad)
    for reason in (
        "unknown entry 'junk'",
        "exp_avg.m is missing",
        "exp_avg.fc.C is unknown",
        "exp_avg_sq.fc.A is float64 (2, 2), expected float64 (7, 3)",
    ):
        assert reason in str(caught.value)
    assert {k: v.tobytes() for k, v in optimizer.state_dict().items()} == {
        k: v.tobytes() for k, v in state.items()
    }
    for wrong, message in (
        ({}, "the state has no 'steps'"),
        ({"steps": np.array(-1)}, "steps is -1"),
        ({"steps": np.array(2.5)}, "steps is 2.5, expected an integer of at least 0"),
        ({"steps": np.ones(2, np.int64)}, r"steps is \[1 1\], expected an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW().load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"exp_avg_sq\.a is missing"):
        AdamW().load_state_dict({"steps": np.array(1), "exp_avg.a": np.ones(2)})


def test_other_parameters_than_those_of_the_state_are_refused(rng: np.random.Generator) -> None:
    params, optimizer = parameters(rng), AdamW()
    optimizer.step(params)
    before = [p.value.copy() for p in params]
    for others in (
        params[:-1],
        [*params, params[0]._replace(name="new")],
        [params[0]._replace(name="x"), *params[1:]],
    ):
        with pytest.raises(ValueError, match=r"AdamW\.step: the parameters do not fit the optimiser's state"):
            optimizer.step(others)
    with pytest.raises(ValueError, match="two parameters have the same name"):
        AdamW().step([params[0], params[0]])
    assert optimizer.steps == 1
    for p, b in zip(params, before, strict=True):
        np.testing.assert_array_equal(p.value, b)


@pytest.mark.parametrize(
    ("value", "grad", "error", "message"),
    [
        (np.ones(2, int), np.ones(2, int), TypeError, "AdamW: w is not an array of float32 or float64"),
        (
            np.ones(2),
            np.ones(2, np.float32),
            ValueError,
            r"w is float64 \(2,\), but its gradient is float32 \(2,\)",
        ),
        (np.ones(2), np.ones(3), ValueError, r"but its gradient is float64 \(3,\)"),
        (np.ones((3, 2)).T, np.ones((2, 3)), ValueError, "w is not C-contiguous"),
        (np.ones((2, 3)), np.ones((3, 2)).T, ValueError, "the gradient of w is not C-contiguous"),
        ([1.0], np.ones(1), TypeError, "w is not an array"),
    ],
)
def test_bad_parameters_are_refused(value: Any, grad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW().step([Parameter("w", value, grad)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(lr=-1), "AdamW: lr is -1, expected at least 0"),
        (lambda: AdamW(lr=np.nan), "AdamW: lr is nan, expected a finite number"),
        (lambda: AdamW(betas=(1.0, 0.9)), r"AdamW: betas\[0\] is 1.0, expected at least 0 and below 1"),
        (lambda: AdamW(eps=-1e-8), "AdamW: eps is"),
        (lambda: AdamW(weight_decay=-1), "AdamW: weight_decay is -1"),
        (lambda: AdamW(lr_ratio=-1), "AdamW: lr_ratio is -1"),
        (lambda: SGD(0.1, momentum=1), "SGD: momentum is 1"),
        (lambda: SGD(0.1, nesterov=True), "SGD: nesterov=True needs momentum above 0"),
        (lambda: AdamW().step([], lr=np.inf), r"AdamW\.step: lr is inf"),
        (lambda: AdamW().step([], grad_scale=np.nan), "grad_scale is nan"),
        (lambda: AdamW().step([], max_norm=0), r"AdamW\.step: max_norm is 0, expected above 0 or None"),
        (lambda: AdamW().step([], max_norm=np.nan), "max_norm is nan"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


IN_STEP = "pass the parameters to `step` instead"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW(p), f"AdamW: lr is a list, expected a number; {IN_STEP}"),
        (lambda p: AdamW(iter(p)), f"AdamW: lr is a list_iterator, expected a number; {IN_STEP}"),
        (lambda p: SGD(p[3].value), f"SGD: lr is a ndarray, expected a number; {IN_STEP}"),
        (lambda p: SGD(p, lr=1), f"SGD: lr is given twice: by position (a list) and by keyword; {IN_STEP}"),
        (lambda p: SGD(0.1, lr=1), "SGD: lr is given twice: by position (a float) and by keyword"),
        (
            lambda p: AdamW(1, (0, 0), betas=p),
            "AdamW: betas is given twice: by position (a tuple) and by keyword",
        ),
        (lambda p: AdamW(weight_decay=p), "AdamW: weight_decay is a list, expected a number"),
        (lambda p: AdamW(eps=p), "AdamW: eps is a list, expected a number"),
        (lambda p: SGD(0.1, p), "SGD: momentum is a list, expected a number"),
        (lambda p: AdamW(betas=0.9), "AdamW: betas is 0.9, expected two numbers (β₁, β₂)"),
        (lambda p: AdamW(betas=p), "AdamW: betas is a list of 4, expected two numbers (β₁, β₂)"),
        (lambda p: AdamW(betas=(p, 0.9)), "AdamW: betas[0] is a list, expected a number"),
    ],
)
def test_arrays_in_the_place_of_numbers_are_told_in_one_line(
    make: Any, message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(TypeError) as caught:
        make(parameters(rng))
    assert str(caught.value) == message


# ---- norm and schedules ----


def test_the_norm_runs_over_all_gradients(rng: np.random.Generator) -> None:
    for params in (
        parameters(rng),
        parameters(rng, np.float32),
        [parameters(rng)[0], parameters(rng, np.float32)[3]],
    ):
        squares = sum(float(np.square(p.grad.astype(np.float64)).sum()) for p in params)
        assert global_norm(params) == pytest.approx(math.sqrt(squares), rel=1e-13)
    assert global_norm([]) == 0
    params = parameters(rng)
    params[1].grad[0, 0] = np.nan
    assert math.isnan(global_norm(params))


def test_schedules_rise_to_one_and_then_take_their_course() -> None:
    for name in ("constant", "linear", "cosine"):
        warm = [schedule(name, step, 100, 4) for step in range(5)]
        np.testing.assert_allclose(warm, [0.2, 0.4, 0.6, 0.8, 1])
        assert schedule(name, 0, 100) == 1
    assert [schedule("constant", step, 10, 2) for step in (2, 5, 50)] == [1, 1, 1]
    np.testing.assert_allclose(
        [schedule("linear", s, 10, 2) for s in (2, 4, 6, 9, 10, 50)], [1, 0.75, 0.5, 0.125, 0, 0]
    )
    np.testing.assert_allclose([schedule("cosine", s, 8) for s in (0, 4, 8, 9)], [1, 0.5, 0, 0], atol=1e-15)
    assert 0 < schedule("cosine", 7, 8) < schedule("linear", 7, 8)
    assert schedule("linear", 3, 3, 3) == 1, "a run that ends with its warm-up divides by nothing"
    with pytest.raises(
        ValueError, match="name='step' is not available; possible: 'constant', 'linear', 'cosine'"
    ):
        schedule("step", 0, 1)
