"""Adapters and the layers of models: loading into existing arrays, attaching; a failure changes nothing."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_peft_files import failing_after

import nplora
from hostile import refused
from nplora.adapters import Adapter, load_adapter, read_for, rollback_on_error, save_adapter
from nplora.finetuning import attach_adapter
from nplora.formats import peft_adapter
from nplora.formats.errors import FormatError
from nplora.lora.delta import LoraDelta
from nplora.weights import buffers
from small_llama import save_small_llama
from small_net import IDS, Net, adapted_net, edit, perturbed, plain_net, rewrite, state

Array = np.ndarray[Any, Any]
PREFIX = peft_adapter.PREFIX


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"embedding": False, "use_dora": True},
        {"embedding": False, "freeze_B": True},
    ],
)
def test_a_saved_adapter_loads_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    model, other = perturbed(Net(**options), 1), perturbed(Net(**options), 2)
    live = [p.value for p in other.parameters()]
    save_adapter(model, tmp_path / "deep" / "adapter")
    report = load_adapter(other, tmp_path / "deep" / "adapter")
    assert state(other) == state(model)
    np.testing.assert_array_equal(other(IDS), model(IDS))
    assert all(p.value is array for p, array in zip(other.parameters(), live, strict=True))
    assert report.changes == ()
    assert report.layers == tuple(model.adapter_layers())


def test_the_rank_alpha_and_rslora_of_the_file_win_and_are_reported(tmp_path: Path) -> None:
    model = Net(rank=2, alpha=5, use_rslora=True)
    save_adapter(model, tmp_path, "digits")
    other = Net(rank=3, alpha=6)
    report = load_adapter(other, tmp_path)
    assert state(other) == state(model)
    assert report.base_model_name_or_path == "digits"
    assert report.changes == ("emb and 2 more: rank 3 -> 2, alpha 6 -> 5, use_rslora False -> True",)
    assert str(report).startswith(f"{tmp_path}: 3 layers loaded\nemb and 2 more: rank 3 -> 2")
    np.testing.assert_array_equal(other(IDS), model(IDS))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"freeze_B": True}])
def test_a_layer_with_a_new_rank_trains_on(options: dict[str, Any], tmp_path: Path) -> None:
    model, other = Net(rank=2, embedding=False, **options), Net(rank=3, embedding=False, **options)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    for net in (model, other):
        y, saved = net.forward(IDS)
        net.backward(np.ones_like(y), saved)
    for expected, got in zip(model.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(got.grad, expected.grad)
        assert expected.grad.any()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nplora.Sequential(nplora.ReLU()), "has no LoRA layer$"),
        (nplora.LoRALinear(np.ones((4, 4)), rank=1), "is a single LoRALinear"),
    ],
)
def test_a_model_that_peft_cannot_name_is_refused(model: nplora.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"save_adapter: .*{words}"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=f"load_adapter: .*{words}"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("call", [save_adapter, load_adapter])
def test_swapped_arguments_are_named(call: Any) -> None:
    words = f"^{call.__name__}: model is 'out', expected a model; pass the model first, then the directory$"
    with pytest.raises(TypeError, match=words):
        call("out", Net())


def test_a_float64_model_keeps_its_precision(tmp_path: Path) -> None:
    model = perturbed(Net(embedding=False, dtype="float64"), 1)
    save_adapter(model, tmp_path)
    other = Net(embedding=False, dtype="float64")
    load_adapter(other, tmp_path)
    assert other.blocks[0].A.dtype == np.float64
    assert state(other) == state(model)


def test_a_merged_model_saves_its_factors_and_does_not_load(tmp_path: Path) -> None:
    model, other = perturbed(Net(), 1), Net()
    model.merge()
    save_adapter(model, tmp_path)
    other.merge()
    with pytest.raises(RuntimeError, match="merged"):
        load_adapter(other, tmp_path)
    other.unmerge()
    load_adapter(other, tmp_path)
    assert state(other) == state(model)


# ---- what does not fit ----


def test_all_mismatches_are_listed_and_nothing_changes(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)

    def damage(tensors: dict[str, Array]) -> None:
        tensors[f"{PREFIX}blocks.7.lora_A.weight"] = np.zeros((3, 6), np.float32)
        tensors[f"{PREFIX}blocks.8.lora_A.weight"] = np.zeros((3, 6), np.float32)
        tensors[f"{PREFIX}blocks.8.lora_B.weight"] = np.zeros((7, 3), np.float32)
        tensors["stray"] = np.zeros(1, np.float32)
        tensors[f"{PREFIX}blocks.1.lora_magnitude_vector"] = np.zeros(5, np.float32)
        tensors[f"{PREFIX}blocks.0.lora_A.weight"] = np.zeros((2, 6), np.float32)
        tensors[f"{PREFIX}blocks.1.lora_A.weight"] = np.full((3, 7), np.inf, np.float32)
        tensors[f"{PREFIX}emb.lora_embedding_B"] = np.zeros((6, 3), np.int8)

    rewrite(tmp_path, damage)
    model = Net(rank=1, alpha=1)
    before = state(model)
    lines = [
        f"{tmp_path}: the adapter does not fit the model in 7 places:",
        f"  tensor '{PREFIX}blocks.1.lora_magnitude_vector' is not a LoRA factor of a layer",
        f"  tensor '{PREFIX}blocks.7.lora_B.weight' is missing, but the layer's other factor is present",
        "  tensor 'stray' is not a LoRA factor of a layer",
        "  'blocks.0': lora_A has shape (2, 6), lora_B (7, 3), expected rank 3",
        f"  tensor '{PREFIX}blocks.1.lora_A.weight' holds NaN or an infinity",
        "  'blocks.8': the model has no such layer, the nearest names: 'blocks.1', 'blocks.0'",
        f"  tensor '{PREFIX}emb.lora_embedding_B' is int8, expected floats",
    ]
    with refused(FormatError, "\n".join(lines), tmp_path):
        load_adapter(model, tmp_path)
    assert state(model) == before


def test_layers_that_the_adapter_or_the_model_lacks_and_other_kinds_are_named(tmp_path: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__(embedding=False)
            self.emb = nplora.LoRALinear(np.ones((11, 6)), rank=3)
            self.blocks = [nplora.LoRALinear(np.ones((7, 5)), rank=3), nplora.ReLU()]
            self.more = nplora.LoRALinear(np.ones((4, 4)), rank=3)

    save_adapter(Net(), tmp_path)
    lines = [
        f"{tmp_path}: the adapter does not fit the model in 4 places:",
        "  'blocks.0': the adapter is for a weight of shape (7, 6), but the model's layer has shape (7, 5)",
        "  'blocks.1': the model's layer is a ReLU, expected a LoRA layer",
        "  'emb': the adapter has an embedding, but the model's layer is a linear layer",
        "  'more': the adapter has no such layer",
    ]
    model = Other()
    before = state(model)
    with refused(FormatError, "\n".join(lines), tmp_path):
        load_adapter(model, tmp_path)
    assert state(model) == before


def test_arrays_of_layers_trained_whole_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def model(width: int, **options: Any) -> nplora.Module:
        head = nplora.Linear(np.ones((width, 6)), trainable=True, **options)
        return nplora.Sequential(nplora.LoRALinear(np.ones((6, 5)), rank=2, rng=1), head)

    save_adapter(model(3, bias=np.zeros(3)), tmp_path)
    words = (
        "in 2 places:\n"
        "  '1': the model has no fully trained 'bias' in this layer\n"
        f"  tensor '{PREFIX}1.weight' has shape (3, 6), expected (4, 6)"
    )
    with refused(FormatError, words, tmp_path):
        load_adapter(model(4), tmp_path)


def test_dora_in_the_file_alone_or_in_the_layer_alone_is_a_mismatch(tmp_path: Path) -> None:
    plain, dora = Net(embedding=False), Net(embedding=False, use_dora=True)
    save_adapter(plain, tmp_path)
    with pytest.raises(FormatError, match=r"'blocks\.0': use_dora is False in the adapter and True in"):
        load_adapter(dora, tmp_path)
    save_adapter(dora, tmp_path)
    with pytest.raises(FormatError, match=r"'blocks\.0': use_dora is True in the adapter and False in"):
        load_adapter(plain, tmp_path)


def test_unknown_keys_are_dropped_with_a_warning(tmp_path: Path) -> None:
    model, other = perturbed(Net(), 1), Net()
    save_adapter(model, tmp_path)
    edit(tmp_path, colour="red", flavour=3)
    with pytest.warns(UserWarning, match="unknown keys are ignored: 'colour', 'flavour'"):
        report = load_adapter(other, tmp_path, edited_config=True)
    assert report.dropped == ("colour", "flavour")
    assert state(other) == state(model)


def test_two_layers_of_one_name_are_refused(tmp_path: Path) -> None:
    class Twins(nplora.Module):
        def __init__(self) -> None:
            one, other = (nplora.LoRALinear(np.ones((2, 2)), rank=1) for _ in range(2))
            self.x = {"a.b": one, "a": {"b": other}}

    for op in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match=r"named 'x\.a\.b'"):
            op(Twins(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_memory_error_at_any_allocation_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(perturbed(Net(rank=2, use_rslora=True), 1), tmp_path)
    model = Net(rank=3)
    before = state(model)
    for function in ("array", "zeros_like"):
        for good_calls in range(6):
            with monkeypatch.context() as patch:
                patch.setattr(np, function, failing_after(good_calls, getattr(np, function), MemoryError()))
                with pytest.raises(MemoryError):
                    load_adapter(model, tmp_path)
            assert state(model) == before


# ---- put on plain layers ----


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_is_attached_at_its_own_ranks(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, model, x = adapted_net(**options), plain_net(), np.ones((3, 5), np.float32)
    for layer in trained.adapter_layers().values():
        layer.row_order = None  # type: ignore[attr-defined]
    if options.get("use_dora"):
        trained.adapter_layers()["0"].m[...] *= 2  # type: ignore[attr-defined]
    nplora.save_adapter(trained, tmp_path)
    ranks = []
    real = nplora.LoRALayer.__init__

    def init(layer: Any, weight: Any, rank: int, *arguments: Any, **more: Any) -> None:
        ranks.append(rank)
        real(layer, weight, rank, *arguments, **more)

    monkeypatch.setattr(nplora.LoRALayer, "__init__", init)
    Adapter.read(tmp_path).attach(model)
    assert ranks == [2, 3]
    np.testing.assert_array_equal(model(x), trained(x))
    assert repr(model) == repr(trained)
    with pytest.raises(ValueError, match="the model already has an adapter, on 2 layers"):
        Adapter.read(tmp_path).attach(model)


def test_a_model_without_the_layers_is_left_as_it_was() -> None:
    model = nplora.Sequential(nplora.Linear(np.ones((6, 5))), nplora.ReLU())
    before = list(model.named_modules())
    with pytest.raises(FormatError, match=r"in 1 place:\n  '2': the model has no such layer"):
        Adapter.from_model(adapted_net()).attach(model)
    assert list(model.named_modules()) == before


def test_a_layer_that_is_trained_whole_gets_no_adapter() -> None:
    head = nplora.Linear(np.ones((4, 6)), trainable=True)
    model = nplora.Sequential(nplora.Linear(np.ones((6, 5))), nplora.ReLU(), head)
    with pytest.raises(FormatError, match=r"in 1 place:\n  '2': the model's layer is fully trained"):
        Adapter.from_model(adapted_net()).attach(model)
    assert model[2] is head


def test_an_adapter_keeps_the_precision_of_a_float64_model(tmp_path: Path) -> None:
    def layer() -> nplora.LoRALinear:
        return nplora.LoRALinear(np.ones((6, 5)), 2, dtype="float64", init="gaussian", rng=0)

    trained, model = (
        nplora.Sequential(layer()),
        nplora.Sequential(nplora.Linear(np.ones((6, 5)), dtype="float64")),
    )
    nplora.save_adapter(trained, tmp_path)
    read_for(model, tmp_path, tmp_path).attach(model)
    np.testing.assert_array_equal(model[0].A, trained[0].A)


# ---- in the place of another adapter ----


def few() -> nplora.Module:
    """The weights of `plain_net` with an adapter on the first layer alone."""
    model = plain_net()
    Adapter("few", {"0": LoraDelta(np.ones((6, 1), "f4"), np.ones((1, 5), "f4"), 0.5)}).attach(model)
    return model


def modules_and_values(model: nplora.Module) -> tuple[dict[str, int], list[bytes]]:
    modules = {name: id(module) for name, module in model.named_modules()}
    return modules, [parameter.value.tobytes() for parameter in model.parameters()]


def dense(delta: LoraDelta, W: Array) -> Array:
    """W with an update, in float64."""
    merged = W + delta.scale * delta.A.astype(np.float64) @ delta.B.astype(np.float64)
    if delta.m is None:
        return merged
    return merged * (delta.m / np.linalg.norm(merged, axis=1))[:, None]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_of_all_layers_takes_the_place_of_one_of_fewer(options: dict[str, Any]) -> None:
    adapter, model, x = Adapter.from_model(adapted_net(**options)), few(), np.ones((3, 5), np.float32)
    W = [layer.weight.to_numpy().astype(np.float64) for layer in (plain_net()[0], plain_net()[2])]  # type: ignore[index]
    adapter.attach(model, replace=True)
    assert list(model.adapter_layers()) == ["0", "2"]
    hidden = np.maximum(x @ dense(adapter["0"], W[0]).T, 0)
    np.testing.assert_allclose(model(x), hidden @ dense(adapter["2"], W[1]).T, rtol=1e-5, atol=1e-5)
    y, saved = model.forward(x)
    model.backward(np.ones_like(y), saved)
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_layers_that_the_new_adapter_does_not_have_are_frozen_ones_again() -> None:
    model, x = plain_net(), np.ones((3, 5), np.float32)
    weights = [model[0].weight, model[2].weight]  # type: ignore[index]
    Adapter.from_model(adapted_net()).attach(model)
    trained = [parameter.value for parameter in model.parameters()]
    before = [value.copy() for value in trained]
    Adapter.from_model(few()).attach(model, replace=True)
    assert list(model.adapter_layers()) == ["0"]
    assert model[0].weight is weights[0]  # type: ignore[index]
    assert model[2].weight is weights[1]  # type: ignore[index]
    np.testing.assert_array_equal(model(x), few()(x))
    for value, old in zip(trained, before, strict=True):  # the arrays that an optimiser may hold
        np.testing.assert_array_equal(value, old)


def no_memory(*arguments: Any, **more: Any) -> Any:
    raise MemoryError


def test_a_replacement_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = few(), Adapter.from_model(adapted_net())
    before = modules_and_values(model)
    unfit = Adapter("unfit", {"0": adapter["0"], "9": adapter["2"]})
    with pytest.raises(FormatError, match="'9': the model has no such layer"):
        unfit.attach(model, replace=True)
    with pytest.raises(ValueError, match="already has an adapter, on 1 layer; replace=True removes it"):
        adapter.attach(model)
    real = buffers.value_and_gradient
    for good_calls in range(4):
        results = iter([real] * good_calls)
        with monkeypatch.context() as patch:
            patch.setattr(
                buffers,
                "value_and_gradient",
                lambda *given, r=results, **more: next(r, no_memory)(*given, **more),
            )
            with pytest.raises(MemoryError):
                adapter.attach(model, replace=True)
    assert modules_and_values(model) == before
    model.merge()
    with pytest.raises(RuntimeError, match=r"attach: the layer is merged; call unmerge\(\) first"):
        adapter.attach(model, replace=True)
    model.unmerge()
    assert modules_and_values(model) == before
    principal = nplora.LoRALinear(np.random.default_rng(0).normal(size=(6, 5)), 2, init="pissa")
    model = nplora.Sequential(principal, nplora.ReLU(), nplora.Linear(np.ones((4, 6))))
    with pytest.raises(ValueError, match="init='pissa' moved a part of the frozen weight"):
        adapter.attach(model, replace=True)
    assert model[0] is principal


def test_a_failure_after_a_replacement_brings_the_old_adapter_back() -> None:
    model, adapter = few(), Adapter.from_model(adapted_net())
    before = modules_and_values(model)
    with contextlib.suppress(KeyboardInterrupt), rollback_on_error(model):
        adapter.attach(model, replace=True)
        assert len(model.adapter_layers()) == 2
        raise KeyboardInterrupt
    assert modules_and_values(model) == before


@pytest.mark.parametrize("swaps", [0, 1, 2, 3])
def test_ctrl_c_while_layers_are_replaced_leaves_the_old_adapter(
    swaps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = few(), Adapter.from_model(adapted_net())
    before, exchange = modules_and_values(model), type(model).exchange

    def interrupted(self: nplora.Module, replaced: dict[int, nplora.Module]) -> None:
        monkeypatch.undo()
        exchange(self, dict(list(replaced.items())[:swaps]))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter.attach(model, replace=True)
    assert modules_and_values(model) == before


def test_a_language_model_takes_an_adapter_in_the_place_of_another(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf")
    ids, model, alone = [[1, 2, 3, 4]], nplora.load_model(path), nplora.load_model(path)
    plain_logits = model.logits(ids)
    alone.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(alone, tmp_path / "all")
    model.add_lora(rank=3, targets="q_proj", layers="last:1", init="gaussian")
    with pytest.raises(
        FormatError, match=r"'.*k_proj': the model's layer is a Linear, expected a LoRA layer"
    ):
        nplora.load_adapter(model, tmp_path / "all")
    with pytest.raises(ValueError, match="already has an adapter, on 1 layer; replace=True"):
        attach_adapter(model, tmp_path / "all")
    attach_adapter(model, tmp_path / "all", replace=True)
    assert model.adapter_layers().keys() == alone.adapter_layers().keys()
    np.testing.assert_array_equal(model.logits(ids), alone.logits(ids))
    assert model.train_step(ids, ids, nplora.AdamW(lr=1e-2)) > model.loss(ids, ids)
    attach_adapter(model, [(tmp_path / "all", 0.0)], replace=True)
    np.testing.assert_array_equal(model.logits(ids), plain_logits)


def test_at_most_ten_mismatches_are_listed(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)

    def damage(tensors: dict[str, Array]) -> None:
        for i in range(11):
            tensors[f"stray.{i:02}"] = np.zeros(1, np.float32)

    rewrite(tmp_path, damage)
    with pytest.raises(FormatError) as caught:
        load_adapter(Net(), tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("does not fit the model in 11 places:")
    assert [line.split("'")[1] for line in lines[1:-1]] == [f"stray.{i:02}" for i in range(10)]
    assert lines[-1] == "  …"
