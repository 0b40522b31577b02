"""Sequences of one cache with different adapters: each has the bits that it has alone."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.adapters import Adapter
from nplora.lm import LanguageModel, load_model, slot_models
from small_llama import save_small_llama

Array = np.ndarray[Any, Any]
SETTINGS: dict[str, dict[str, Any]] = {
    "few": {"targets": "q_proj", "rank": 2, "layers": "last:1"},
    "all": {"targets": "all-linear", "rank": 3, "use_rslora": True},
    "ends": {"targets": "embed_tokens,lm_head,v_proj", "rank": 2},
    "dora": {"targets": "up_proj", "rank": 2, "use_dora": True},
    "tokens": {"targets": "v_proj", "rank": 2, "trainable_tokens": [5, 7]},
    "added": {"targets": "v_proj", "rank": 2, "add_tokens": "<step>"},
    "activated": {"targets": "all-linear", "rank": 9, "invocation": [7, 8]},
}
IDS = np.array([[3, 7, 8, 9], [5, 5, 7, 8], [2, 7, 8, 1], [7, 8, 9, 5]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def paths(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of these settings with random factors."""
    rng, directory = np.random.default_rng(0), tmp_path_factory.mktemp("adapters")
    for name, options in SETTINGS.items():
        lm = load_model(model)
        lm.add_lora(**options)
        for parameter in lm.parameters():
            parameter.value[...] += rng.normal(0, 0.3, parameter.value.shape)
        nplora.save_adapter(lm, directory / name)
    return {name: directory / name for name in SETTINGS}


@pytest.fixture
def lm(model: Path, paths: dict[str, Path]) -> LanguageModel:
    lm = load_model(model)
    for name, path in paths.items():
        lm.load_adapter(path, name)
    return lm


def alone(lm: LanguageModel, adapter: str | None, ids: Array, pieces: tuple[int, ...]) -> list[Array]:
    """The logits after each piece of one sequence."""
    lm.set_adapter(adapter)
    cache = lm.new_cache(1, len(ids))
    bounds = np.cumsum((0, *pieces))
    found = [lm.decode([ids[first:end]], [0], cache)[0] for first, end in itertools.pairwise(bounds)]
    lm.set_adapter(None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (2, 1, 1), (3, 1), (4,)])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_each_slot_has_the_logits_of_its_adapter_alone(
    model: Path, paths: dict[str, Path], pieces: tuple[int, ...], compute: str
) -> None:
    lm = load_model(model, compute=compute)
    for name, path in paths.items():
        lm.load_adapter(path, name)
    names = [None, *SETTINGS, "all", None, "activated"]
    ids = np.array([IDS[i % len(IDS)] for i in range(len(names))])
    wanted = [alone(lm, name, row, pieces) for name, row in zip(names, ids, strict=True)]
    cache = lm.new_cache(len(names), 4)
    for slot, name in enumerate(names):
        cache.adapters[slot] = name
    order = np.random.default_rng(1).permutation(len(names))
    first = 0
    for step, count in enumerate(pieces):
        got = lm.decode(ids[order, first : first + count], order, cache)
        first += count
        for slot, row in zip(order, got, strict=True):
            one = wanted[slot][step]
            np.testing.assert_array_equal(row[: len(one)], one, err_msg=str(names[slot]))
            assert (row[len(one) :] == -np.inf).all()


def test_a_sequence_has_the_same_bits_with_any_other_sequences(lm: LanguageModel) -> None:
    rng = np.random.default_rng(2)
    names = [None, "all", "few", "all", "ends"] * 4
    ids = rng.integers(0, 9, (20, 6))
    wanted = [alone(lm, name, row, (1,) * 6)[-1] for name, row in zip(names, ids, strict=True)]
    for size in (1, 2, 3, 8, 9, 20):
        chosen = rng.permutation(20)[:size]
        cache = lm.new_cache(20, 6)
        for slot, name in enumerate(names):
            cache.adapters[slot] = name
        for step in range(6):
            got = lm.decode(ids[chosen, step], chosen, cache)
        for slot, row in zip(chosen, got, strict=True):
            np.testing.assert_array_equal(row, wanted[slot])


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
def test_pieces_of_different_lengths_are_computed_together(
    model: Path, paths: dict[str, Path], compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, batches = load_model(model, compute=compute), list[list[int]]()

    def counted(models: Any, pieces: Any, *rest: Any, few: Any = slot_models._decode_together) -> Any:
        batches.append([len(piece) for piece in pieces])
        return few(models, pieces, *rest)

    monkeypatch.setattr(slot_models, "_decode_together", counted)
    for name, path in paths.items():
        lm.load_adapter(path, name)
    rng = np.random.default_rng(4)
    names = [None, *SETTINGS, "all", None, "activated"] * 2
    pieces = [
        rng.integers(0, 9, (2, count))
        for count in (1, 30, 2, 9, 8, 64, 10, 3, 200, 1, 12, 5, 2, 40, 2, 1, 70, 9, 16, 6, 11, 4)
    ]
    cache = lm.new_cache(len(names), 400)
    for slot, name in enumerate(names):
        cache.adapters[slot] = name
    order = rng.permutation(len(names))
    for step in range(2):
        got = lm.decode([pieces[slot][step] for slot in order], order, cache)
        np.testing.assert_array_equal(cache.lengths, [(step + 1) * row.shape[1] for row in pieces])
    assert len(batches) < len(names)  # for two steps
    for counts in batches:
        few = slot_models._FEW
        assert sum(counts) <= few or (min(counts) > few and sum(counts) <= slot_models._MANY)
    for slot, scores in zip(order, got, strict=True):
        ids = pieces[slot].reshape(-1)
        wanted = alone(lm, names[slot], ids, (ids.size // 2, ids.size // 2))[-1]
        np.testing.assert_array_equal(scores[: len(wanted)], wanted, err_msg=str(names[slot]))


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([[1, 2], []], "a sequence without tokens"),
        ([], "no sequences"),
        ([[[1]], [[2]]], r"shape \(2, 1, 1\), expected \(m,\) or \(m, count\)"),
        ([[1], [2], [3]], r"slots have shape \(2,\), expected one slot for each of 3"),
        ([[1, 2], [3.0]], "expected integers"),
        ([[1, 99999], [3]], "token_ids holds 99999"),
        ([[1], [1] * 5], "a slot would hold 5 tokens"),
    ],
)
def test_wrong_pieces_change_nothing(lm: LanguageModel, token_ids: Any, message: str) -> None:
    cache = lm.new_cache(2, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        lm.decode(token_ids, [0, 1], cache)
    assert not cache.lengths.any()


def test_the_adapter_of_an_empty_slot_can_be_changed(lm: LanguageModel) -> None:
    cache = lm.new_cache(2, 4)
    assert list(cache.adapters) == [None, None]
    cache.adapters[0] = "all"
    lm.decode([1, 1], [0, 1], cache)
    with pytest.raises(ValueError, match="slot 0 has 1 tokens, expected an empty slot"):
        cache.adapters[0] = None
    cache.reset()
    cache.adapters[0], cache.adapters[1] = lm.adapters["few"], "all"
    got = lm.decode([1, 1], [0, 1], cache)
    np.testing.assert_array_equal(got[0], alone(lm, "few", np.array([1]), (1,))[0])
    np.testing.assert_array_equal(got[1], alone(lm, "all", np.array([1]), (1,))[0])
    cache.reset()
    with pytest.raises(KeyError, match=r"KVCache\.adapters: no adapter 'al'"):
        cache.adapters[0] = "al"
    for other in (3, nplora.load_model(lm.source), nplora.Linear(np.eye(2))):
        with pytest.raises(
            TypeError, match=r"^KVCache\.adapters: adapter is .*, expected a name or an Adapter"
        ):
            cache.adapters[0] = other


def test_a_slot_keeps_an_adapter_that_is_deleted(lm: LanguageModel) -> None:
    wanted, adapter = alone(lm, "all", IDS[0], (1, 1, 1, 1)), lm.adapters["all"]
    cache = lm.new_cache(2, 4)
    cache.adapters[0] = "all"
    lm.decode([3, 3], [0, 1], cache)
    lm.delete_adapter("all")
    assert isinstance(adapter, Adapter)
    got = lm.decode(IDS[[0, 0], 1], [0, 1], cache)
    np.testing.assert_array_equal(got[0], wanted[1])
    cache.lengths[1] = 0
    cache.adapters[1] = adapter
    np.testing.assert_array_equal(lm.decode([3], [1], cache)[0], wanted[0])


def test_the_models_own_adapter_may_change_between_calls(model: Path, paths: dict[str, Path]) -> None:
    lm = load_model(model)
    Adapter.read(paths["few"]).attach(lm)
    lm.load_adapter(paths["all"], "all")

    def both() -> Array:
        cache = lm.new_cache(2, 4)
        cache.adapters[1] = "all"
        return lm.decode([[3, 4], [3, 4]], [0, 1], cache)

    cache = lm.new_cache(2, 4)
    cache.adapters[1] = "all"
    before = lm.decode([[3, 4], [3, 4]], [0, 1], cache)
    lm.merge()
    cache.lengths[:] = 0
    np.testing.assert_array_equal(lm.decode([[3, 4], [3, 4]], [0, 1], cache), both())
    lm.unmerge()
    cache.lengths[:] = 0
    np.testing.assert_array_equal(lm.decode([[3, 4], [3, 4]], [0, 1], cache), before)
    lm.parameters()[0].value[...] *= 2
    cache.lengths[:] = 0
    assert not np.array_equal(lm.decode([[3, 4], [3, 4]], [0, 1], cache)[0], before[0])


def test_ids_are_checked_with_the_vocabulary_of_each_slot(lm: LanguageModel) -> None:
    new = lm.config.vocab_size
    cache = lm.new_cache(2, 4)
    cache.adapters[0] = "added"
    assert lm.decode([new, 1], [0, 1], cache).shape == (2, new + 1)
    with pytest.raises(ValueError, match=f"token_ids.*{new}"):
        lm.decode([1, new], [0, 1], cache)
    assert cache.lengths.tolist() == [1, 1]


def test_generate_with_an_adapter_for_each_prompt(lm: LanguageModel) -> None:
    names = [None, *SETTINGS]
    prompts = [f"{i}+1=" for i in range(len(names))]
    wanted = []
    for name, prompt in zip(names, prompts, strict=True):
        lm.set_adapter(name)
        wanted.append(lm.generate(prompt, 6))
    lm.set_adapter(None)
    assert lm.generate(prompts, 6, adapters=names) == wanted
    assert len(set(wanted)) > 3
    assert lm.generate(prompts[2], 6, adapters=["all"]) == wanted[2]
    sampling = nplora.generate.Sampling(max_new_tokens=6)
    assert "".join(nplora.generate.stream(lm, prompts[2], sampling, "all")) == wanted[2]
    with pytest.raises(ValueError, match="1 adapters for 2 prompts"):
        lm.generate(["1", "2"], 6, adapters=["all"])
    with pytest.raises(KeyError, match="generate: no adapter 'xyz'"):
        lm.generate(["1"], 6, adapters=["xyz"])
    with pytest.raises(TypeError, match=r"^generate: adapter is a int, expected a name or an Adapter"):
        lm.generate(["1"], 6, adapters=[3])  # type: ignore[list-item]


def test_an_adapter_can_be_rounded_to_bfloat16(model: Path, paths: dict[str, Path]) -> None:
    lm = load_model(model)
    lm.load_adapter(paths["all"], "exact")
    lm.load_adapter(paths["all"], "rounded", dtype="bfloat16")
    for name, delta in lm.adapters["exact"].items():
        rounded = lm.adapters["rounded"][name]
        for values, nearest in ((delta.A, rounded.A), (delta.B, rounded.B)):
            assert not (nearest.view(np.uint32) & 0xFFFF).any()
            np.testing.assert_allclose(nearest, values, rtol=2**-8)
    twin = lm.with_adapter(lm.adapters["rounded"])  # its arrays may change, so it has no copies of them
    np.testing.assert_array_equal(
        alone(lm, "rounded", IDS[0], (1, 1, 2))[-1], alone(twin, None, IDS[0], (1, 1, 2))[-1]
    )
    with pytest.raises(ValueError, match="dtype='int4'"):
        lm.load_adapter(paths["all"], "other", dtype="int4")


def test_sequences_with_the_same_adapter_are_computed_together(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = []

    def counted(models: list[Any], *rest: Any, few: Any = slot_models._decode_together) -> Any:
        together.append(len(set(map(id, models))))
        return few(models, *rest)

    monkeypatch.setattr(slot_models, "_decode_together", counted)
    names = ["all", "added", None] * 8
    wanted = {name: alone(lm, name, IDS[0], (4,))[0] for name in names}
    cache = lm.new_cache(len(names), 4)
    for slot, name in enumerate(names):
        cache.adapters[slot] = name
    slots = np.random.default_rng(0).permutation(len(names))
    together.clear()
    for token in range(4):
        logits = lm.decode(np.full(len(slots), IDS[0, token]), slots, cache)
    assert together == [1, 1, 1] * 4
    for slot, got in zip(slots, logits, strict=True):
        expected = wanted[names[slot]]
        np.testing.assert_array_equal(got[: len(expected)], alone_in_steps(lm, names[slot]))
        assert np.isneginf(got[len(expected) :]).all()


def alone_in_steps(lm: LanguageModel, name: str | None) -> Array:
    return alone(lm, name, IDS[0], (1, 1, 1, 1))[-1]


def adapter_with(model: Path, seed: int) -> Adapter:
    lm, rng = load_model(model), np.random.default_rng(seed)
    lm.add_lora(targets="q_proj,v_proj", rank=2)
    for parameter in lm.parameters():
        parameter.value[...] += rng.normal(0, 0.3, parameter.value.shape)
    return Adapter.from_model(lm)


def test_models_join_those_that_are_joined_and_take_the_place_of_one_that_rests(
    model: Path,
) -> None:
    """Building a new joint model for each arrival would take longer than decoding."""
    lm, names = load_model(model), [f"adapter {i}" for i in range(6)]
    for number, name in enumerate(names):
        lm.load_adapter(adapter_with(model, number), name)
    cache = lm.new_cache(2, 4)
    joints = set()
    for number, name in enumerate([*names, *reversed(names)]):
        cache.reset()
        cache.adapters[0], cache.adapters[1] = names[number // 4], name
        logits = lm.decode(IDS[:2], [0, 1], cache)
        for row, own in enumerate((names[number // 4], name)):
            np.testing.assert_array_equal(logits[row], alone(lm, own, IDS[row], (4,))[0])
        if cache.joint is not None:
            joints.add(id(cache.joint))
            assert len(cache.joint._models) <= 3  # type: ignore[attr-defined]
    assert len(joints) == 1
