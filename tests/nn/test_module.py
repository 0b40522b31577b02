"""Module: parts found by name, parameters, merging and randomness of a whole model."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import Linear, LoRALinear, Module, ReLU, Sequential
from nplora.nn.module import saved_nbytes

Array = np.ndarray[Any, Any]


def lora(d_out: int = 6, d_in: int = 6, **options: Any) -> LoRALinear:
    return LoRALinear(np.eye(d_out, d_in), **{"rank": 2, "rng": 0, **options})


class Net(Module):
    """Parts in every place where they are looked for, in no order but that of their definition."""

    def __init__(self) -> None:
        self.shared = lora()
        self.zeta = lora(dropout=0.5)
        self.blocks = [lora(), {"up": lora(), "down": (lora(), ReLU())}]
        self.again = self.shared
        self.heads = {"a": [Linear(np.eye(6)), self.shared]}
        self.number, self.array, self.words = 3, np.ones(3), ["no", "modules"]

    def forward(self, x: Any) -> tuple[Array, Any]:
        h, first = self.shared.forward(x)
        y, second = self.zeta.forward(h)
        return y, (first, second)

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Any:
        return self.shared.backward(self.zeta.backward(dy, saved[1]), saved[0], need_dx)


def trained_net() -> Net:
    """A net whose adapters change its results."""
    net = Net()
    for p in net.parameters():
        p.value[...] = 0.5
    return net


NAMES = ["shared", "zeta", "blocks.0", "blocks.1.up", "blocks.1.down.0"]


def test_parts_are_found_by_name_in_the_order_of_their_definition() -> None:
    net = Net()
    found = list(net.named_modules())
    assert found[0] == ("", net)
    assert [name for name, _ in found[1:]] == [*NAMES, "blocks.1.down.1", "heads.a.0"]
    assert list(net.adapter_layers()) == NAMES
    assert [p.name for p in net.parameters()] == [f"{name}.{part}" for name in NAMES for part in "AB"]


def test_an_attribute_may_be_a_tuple_of_parts() -> None:
    class Pair(Module):
        def __init__(self) -> None:
            self.parts = (lora(), ReLU())

    assert [name for name, _ in Pair().named_modules()] == ["", "parts.0", "parts.1"]


def test_parameters_are_live() -> None:
    net = Net()
    parameter = net.parameters()[2]
    parameter.value[...], parameter.grad[...] = 5, 7
    assert np.all(net.zeta.A == 5)
    assert np.all(net.zeta.dA == 7)
    net.zero_grad()
    assert not net.zeta.dA.any()


def test_a_module_that_holds_itself_is_walked_once() -> None:
    net = Net()
    net.heads["me"] = [net]
    assert len(list(net.named_modules())) == 8


def test_elements_are_counted_once_however_often_they_are_shared() -> None:
    net = Net()
    assert net.num_trainable == 5 * 2 * 12
    assert net.num_parameters == 5 * (36 + 24) + 36
    fw = nplora.FrozenWeight(np.eye(6))
    tied = Sequential(LoRALinear(fw, rank=2), LoRALinear(fw, rank=2), Linear(fw))
    assert tied.num_parameters == 36 + 2 * 24
    frozen = Sequential(Linear(np.eye(6)))
    assert (frozen.num_trainable, frozen.num_parameters) == (0, 36)


def test_the_trainable_line_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    LoRALinear(np.ones((1024, 1024)), rank=8).print_trainable_parameters()
    expected = "trainable params: 16,384 || all params: 1,064,960 || trainable%: 1.5385\n"
    assert capsys.readouterr().out == expected
    ReLU().print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


class Counted(Module):
    """A module with two children, which counts how often its line in a `repr` is made."""

    lines = 0

    def __init__(self, *parts: Module) -> None:
        self.parts = parts

    def _heading(self) -> str:
        Counted.lines += 1
        return super()._heading()


def test_the_repr_of_a_module_makes_one_line_for_each_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "lines", 0)
    model: Module = ReLU()
    for _ in range(8):
        model = Counted(model, model)
    line = "Counted: 0 of 0 values trained"
    assert repr(model).splitlines() == [line, f"  parts.0: {line}", f"  parts.1: {line}"]
    assert Counted.lines == 3


def test_a_line_of_a_users_own_repr_stands_in_the_repr_of_its_container() -> None:
    class Own(Counted):
        def __repr__(self) -> str:
            return "Own: first\nsecond"

    assert repr(Counted(Own())).splitlines()[1] == "  parts.0: Own: first"


def test_calling_a_users_module_drops_nothing_and_keeps_nothing() -> None:
    net, x = Net(), np.ones((3, 6))
    net.zeta.A[...] = 1
    before = net.random_state()
    np.testing.assert_array_equal(net(x), net.zeta(net.shared(x)))
    assert net.random_state() == before
    trained, saved = net.forward(x)
    assert np.any(trained != net(x))
    assert saved_nbytes(saved) > 0
    with pytest.raises(ValueError, match="last axis 5"):
        net(np.ones((3, 5)))
    assert net.forward(x)[1][0].z is not None, "an error while inferring left the module inferring"


def test_a_shared_buffer_is_counted_once_in_what_is_saved() -> None:
    x = np.ones((10, 6), np.float32)
    model = Sequential(ReLU(), lora(), lora())
    _, saved = model.forward(x)
    assert saved.nbytes == x.nbytes + 10 * 2 * 4 + x.nbytes + 10 * 2 * 4  # relu's y is the first layer's x
    assert saved_nbytes({"a": [x, None], "b": (x, x[:5], "text")}) == x.nbytes + x.nbytes // 2


def test_a_module_without_its_passes_says_so() -> None:
    class Bare(Module):
        pass

    with pytest.raises(NotImplementedError, match="Bare has no forward"):
        Bare()(1)
    with pytest.raises(NotImplementedError, match="Bare has no backward"):
        Bare().backward(np.ones(1), None)


# ---- merging ----


def test_a_model_merges_and_unmerges_as_a_whole() -> None:
    net, x = Net(), np.linspace(-1, 1, 6)
    for p in net.parameters():
        p.value[...] = np.linspace(0, 1, p.value.size).reshape(p.value.shape)
    before = net(x)
    net.merge()
    assert all(layer.merged for layer in net.adapter_layers().values())
    np.testing.assert_allclose(net(x), before, rtol=1e-5)
    net.unmerge()
    assert not any(layer.merged for layer in net.adapter_layers().values())
    np.testing.assert_array_equal(net(x), before)


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("method", ["merge", "merge_and_unload"])
def test_a_failure_at_any_layer_leaves_all_layers_as_they_were(
    method: str, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    layers = list(net.adapter_layers().values())

    def fail() -> Array:
        raise MemoryError("no room")

    monkeypatch.setattr(layers[failing], "merged_weight", fail)
    before = [layer.weight.to_numpy().tobytes() for layer in layers]
    with pytest.raises(MemoryError):
        getattr(net, method)()
    assert list(net.adapter_layers().values()) == layers
    assert not any(layer.merged for layer in layers)
    assert [layer.weight.to_numpy().tobytes() for layer in layers] == before
    assert all(p.value.flags.writeable for p in net.parameters())


def test_a_half_merged_model_is_refused_and_not_changed() -> None:
    net = Net()
    net.shared.merge()
    with pytest.raises(RuntimeError, match=r"LoRALinear\.unmerge: the layer is not merged"):
        net.unmerge()
    assert net.shared.merged
    net.shared.unmerge()
    net.zeta.merge()
    with pytest.raises(RuntimeError, match=r"LoRALinear\.merge: the layer is merged"):
        net.merge()
    with pytest.raises(RuntimeError, match=r"LoRALinear\.unmerge: the layer is not merged"):
        net.unmerge()
    with pytest.raises(RuntimeError, match=r"LoRALinear\.seed: the layer is merged"):
        net.seed(0)
    assert [name for name, layer in net.adapter_layers().items() if layer.merged] == ["zeta"]


def test_unloading_replaces_every_layer_wherever_it_is_kept() -> None:
    net, x = Net(), np.linspace(-1, 1, 6)
    net.shared.A[...] = 1
    before, relu = net(x), net.blocks[1]["down"][1]
    shared = net.shared
    assert net.merge_and_unload() is net
    assert not net.adapter_layers()
    assert [name for name, m in net.named_modules() if type(m) is Linear] == [*NAMES, "heads.a.0"]
    assert net.shared is net.again is net.heads["a"][1]
    assert isinstance(net.blocks[1]["down"], tuple)
    assert net.blocks[1]["down"][1] is relu
    np.testing.assert_allclose(net(x), before, rtol=1e-6)
    with pytest.raises(AttributeError, match="this layer was unloaded"):
        shared.forward(x)


# ---- the adapter switched off ----


def test_disabling_reaches_every_layer_and_ends_with_the_block() -> None:
    net, x = Net(), np.linspace(0, 1, 6)
    for p in net.parameters():
        p.value[...] = 1
    with net.disable_adapter():
        np.testing.assert_allclose(net(x), x, rtol=1e-6)  # every W is the identity
        with net.zeta.disable_adapter():
            pass
        np.testing.assert_allclose(net(x), x, rtol=1e-6)
    assert np.abs(net(x) - x).max() > 1
    with pytest.raises(ZeroDivisionError), net.disable_adapter():
        _ = 1 / 0
    assert net.zeta.adapter_enabled


def in_two_threads(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Both at a time; raises what either raised."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()


def test_disabling_is_for_the_thread_that_does_it_alone() -> None:
    net, x = trained_net(), np.linspace(0, 1, 6)
    with_adapter = net(x)
    with net.disable_adapter():
        without = net(x)
    assert not np.array_equal(with_adapter, without)
    inside, outside = threading.Event(), threading.Event()

    def disabled() -> None:
        for _ in range(200):
            with net.disable_adapter():
                inside.set()
                np.testing.assert_array_equal(net(x), without)
                outside.wait(0.001)
            np.testing.assert_array_equal(net(x), with_adapter)

    def enabled() -> None:
        inside.wait(5)
        for _ in range(400):
            np.testing.assert_array_equal(net(x), with_adapter)
            assert net.zeta.adapter_enabled
        outside.set()

    in_two_threads(disabled, enabled)


def test_a_block_that_another_context_ends_disables_nothing_there() -> None:
    net, x = trained_net(), np.linspace(0, 1, 6)
    with_adapter = net(x)

    def pieces() -> Iterator[Array]:
        with net.disable_adapter():
            yield net(x)
            yield net(x)

    contexts = [contextvars.copy_context() for _ in range(2)]
    first, second = pieces(), pieces()
    for context, generator in zip(contexts, (first, second), strict=True):
        assert not np.array_equal(context.run(next, generator), with_adapter)
    np.testing.assert_array_equal(net(x), with_adapter)
    second.close()  # in this context, not in its own
    np.testing.assert_array_equal(net(x), with_adapter)
    with net.disable_adapter():
        first.close()
        assert not net.zeta.adapter_enabled
    assert net.zeta.adapter_enabled


def test_blocks_that_end_out_of_order_leave_what_the_others_disabled() -> None:
    net = trained_net()
    outer, inner = net.disable_adapter(), net.zeta.disable_adapter()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert (net.shared.adapter_enabled, net.zeta.adapter_enabled) == (True, False)
    inner.__exit__(None, None, None)
    assert net.zeta.adapter_enabled


def test_merging_in_another_thread_changes_a_result_by_rounding_alone() -> None:
    net, x = trained_net(), np.linspace(0, 1, 6)
    wanted, done = net(x), threading.Event()

    def merge() -> None:
        for _ in range(100):
            net.merge()
            net.unmerge()
        done.set()

    def call() -> None:
        while not done.is_set():
            np.testing.assert_allclose(net(x), wanted, rtol=1e-5)

    in_two_threads(merge, call)
    np.testing.assert_array_equal(net(x), wanted)


# ---- what a pass keeps ----

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
IDS = np.array([[1, 3], [0, 1]])
KINDS: dict[str, tuple[Callable[[], Module], Array]] = {
    "LoRALinear": (lambda: LoRALinear(np.ones((5, 4)), 2, init="gaussian", rng=0), X),
    "LoRALinear, dropout": (lambda: LoRALinear(np.ones((5, 4)), 2, dropout=0.5, init="gaussian", rng=0), X),
    "LoRALinear, DoRA": (lambda: LoRALinear(np.ones((5, 4)), 2, use_dora=True, init="gaussian", rng=0), X),
    "LoRALinear, B frozen": (lambda: LoRALinear(np.ones((5, 4)), 2, freeze_B=True, rng=0), X),
    "LoRAEmbedding": (lambda: nplora.LoRAEmbedding(np.ones((5, 4)), 2, init="gaussian", rng=0), IDS),
    "Linear": (lambda: Linear(np.ones((5, 4))), X),
    "Linear, trained": (lambda: Linear(np.ones((5, 4)), np.ones(5), trainable=True), X),
    "Embedding": (lambda: nplora.Embedding(np.ones((5, 4))), IDS),
    "Embedding, trained": (lambda: nplora.Embedding(np.ones((5, 4)), trainable=True), IDS),
    "LayerNorm": (lambda: nplora.LayerNorm(np.ones(4), np.ones(4), trainable=True), X),
    "RMSNorm": (lambda: nplora.RMSNorm(np.ones(4)), X),
    "ReLU": (ReLU, X),
    "Tanh": (nplora.Tanh, X),
    "SiLU": (nplora.SiLU, X),
    "GELU": (nplora.GELU, X),
    "Sequential": (lambda: Sequential(LoRALinear(np.ones((5, 4)), 2, init="gaussian", rng=0), ReLU()), X),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_adds_the_same_gradients_again(kind: str) -> None:
    make, x = KINDS[kind]
    layer = make()
    y, saved = layer.forward(x)
    dy = np.linspace(1, 2, y.size, dtype=np.float32).reshape(y.shape)
    dx = layer.backward(dy, saved)
    once = [p.grad.copy() for p in layer.parameters()]
    again = layer.backward(dy, saved)
    assert (dx is None) == (again is None)
    np.testing.assert_array_equal(again, dx)
    for parameter, grad in zip(layer.parameters(), once, strict=True):
        assert grad.any(), parameter.name
        most = 2e-6 * np.abs(grad).max()  # sums of six products, which go on from other beginnings
        np.testing.assert_allclose(parameter.grad, 2 * grad, rtol=0, atol=most, err_msg=parameter.name)


@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pass_of_another_layer_alike_is_refused(kind: str, need_dx: bool) -> None:
    make, x = KINDS[kind]
    layer = make()
    y, saved = make().forward(x)
    with pytest.raises(ValueError, match="`saved` comes from a forward pass of another"):
        layer.backward(np.ones_like(y), saved, need_dx)
    assert not any(p.grad.any() for p in layer.parameters())


def test_a_pass_through_another_number_of_modules_is_refused() -> None:
    short, long = Sequential(ReLU()), Sequential(ReLU(), ReLU())
    for model, other in ((short, long), (long, short)):
        wanted = f"saved is from a pass through {len(other)} modules, expected {len(model)}"
        with pytest.raises(ValueError, match=wanted):
            model.backward(X, other.forward(X)[1])


# ---- randomness ----


def values(model: Module) -> dict[str, bytes]:
    return {p.name: p.value.tobytes() for p in model.parameters()}


def test_a_seed_reaches_each_layer_by_its_name() -> None:
    one, two = Net(), Net()
    one.seed(7)
    two.zeta.A[...] = 3
    two.seed(7)
    assert values(one) == values(two)
    assert one.random_state() == two.random_state()
    draws = [p.value.tobytes() for p in one.parameters() if p.name.endswith("B")]
    assert len(set(draws)) == 5, "layers of equal shape must differ"
    two.seed(8)
    assert values(one) != values(two)

    class Fewer(Module):
        def __init__(self) -> None:
            self.zeta = lora()

    fewer = Fewer()
    fewer.seed(7)
    np.testing.assert_array_equal(fewer.zeta.B, one.zeta.B)


def test_the_random_state_goes_on_where_it_was_taken() -> None:
    net, x = Net(), np.ones((3, 6))
    net.zeta.A[...] = 1
    net.forward(x)
    state = net.random_state()
    assert state["zeta"][1] == 1
    expected = net.forward(x)[0]
    net.forward(x)
    net.set_random_state(state)
    np.testing.assert_array_equal(net.forward(x)[0], expected)
    assert all(isinstance(v, int) for entry in state.values() for v in entry)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nobody": [1, 2]}, ValueError, r"not in the model: \['nobody'\]"),
        ({"zeta": [1]}, ValueError, r"the state of 'zeta' is \[1\], expected \[seed, calls\]"),
        ({"zeta": [1, -1]}, ValueError, "the number of calls of 'zeta' is -1, expected at least 0"),
        ({"zeta": [1.5, 0]}, TypeError, "the seed of 'zeta' is 1.5, expected an integer"),
    ],
)
def test_a_random_state_that_does_not_fit_changes_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = Net()
    before = net.random_state()
    with pytest.raises(error, match=message):
        net.set_random_state({name: [5, 5] for name in before} | change)
    with pytest.raises(ValueError, match=r"layers missing from the state: \['blocks.0'"):
        net.set_random_state({})
    assert net.random_state() == before


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_a_seed_is_an_integer_of_at_least_zero(seed: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="seed: seed is"):
        Net().seed(seed)


def test_two_modules_of_one_name_are_refused() -> None:
    class Clash(Module):
        def __init__(self, parts: Any) -> None:
            self.parts = parts

    for parts, name in (
        ({"a.b": lora(), "a": {"b": lora()}}, "parts.a.b"),
        ({1: lora(), "1": lora()}, "parts.1"),
    ):
        with pytest.raises(ValueError, match=rf"Clash: two modules are named '{name}'"):
            Clash(parts).parameters()
    shared = lora()
    assert len(Clash({"a.b": shared, "a": {"b": shared}}).parameters()) == 2


def test_a_list_that_holds_itself_is_walked_once() -> None:
    net = Net()
    net.blocks.append(net.blocks)
    net.heads["heads"] = (net.heads,)
    assert list(net.adapter_layers()) == NAMES
    net.merge_and_unload()
    assert not net.adapter_layers()
    assert net.blocks[-1] is net.blocks
    assert net.heads["heads"][0] is net.heads


@pytest.mark.parametrize("returned", [np.ones((2, 3)), None, (np.ones(2),), [np.ones(2), None], (1, 2, 3)])
def test_a_forward_that_returns_no_pair_is_told_so(returned: Any) -> None:
    class Odd(Module):
        def forward(self, x: Any) -> Any:
            return returned

    with pytest.raises(TypeError, match=r"Odd\.forward returned .*, expected the pair \(y, saved\)"):
        Odd()(1)


def test_names_of_equal_length_have_different_streams() -> None:
    model = Sequential(lora(), ReLU(), lora())
    model.seed(7)
    assert model[0].B.tobytes() != model[2].B.tobytes()  # type: ignore[attr-defined]
    seeds = [seed for seed, _ in model.random_state().values()]
    assert len(set(seeds)) == 2, "layers must not drop the same elements"
    net = Net()
    net.seed(7)
    assert len({seed for seed, _ in net.random_state().values()}) == 5


def test_a_users_module_can_say_its_bytes() -> None:
    net = Net()
    x = np.ones((3, 6), np.float32)
    assert nplora.saved_nbytes(net.forward(x)[1]) == 2 * x.nbytes + 2 * 3 * 2 * 4


def test_the_children_may_be_listed_while_a_layer_gets_an_attribute() -> None:
    """Inference in one thread keeps prepared objects in the layers that another thread copies."""
    net = nplora.Sequential(nplora.ReLU())
    for number, _ in enumerate(net.named_children()):
        setattr(net, f"new{number}", number)
    assert len(list(net.named_children())) == 1
