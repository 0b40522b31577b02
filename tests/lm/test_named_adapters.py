"""Several named adapters of one model: each context uses its own adapter, and a call keeps its adapter."""

import concurrent.futures
import contextvars
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.adapters import Adapter
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.lm import LanguageModel, load_model
from nplora.lm.generation import stream
from small_llama import save_small_llama

Array = np.ndarray[Any, Any]
IDS = [[1, 2, 3, 4]]
PROMPT = "1+1="
SETTINGS: dict[str, dict[str, Any]] = {
    "few": {"targets": "q_proj", "rank": 2, "layers": "last:1"},
    "all": {"targets": "all-linear", "rank": 3, "use_rslora": True},
    "ends": {"targets": "embed_tokens,lm_head,v_proj", "rank": 2},
    "dora": {"targets": "up_proj", "rank": 2, "use_dora": True},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf")


@pytest.fixture
def paths(model: Path, tmp_path: Path) -> dict[str, Path]:
    """Adapters of these settings with random factors."""
    rng = np.random.default_rng(0)
    for name, options in SETTINGS.items():
        lm = load_model(model)
        lm.add_lora(**options)
        for parameter in lm.parameters():
            parameter.value[...] += rng.normal(0, 0.3, parameter.value.shape)
        nplora.save_adapter(lm, tmp_path / name)
    return {name: tmp_path / name for name in SETTINGS}


def alone(model: Path, path: Path) -> LanguageModel:
    lm = load_model(model)
    Adapter.read(path).attach(lm)
    return lm


def named(model: Path, paths: dict[str, Path]) -> LanguageModel:
    lm = load_model(model)
    for name, path in paths.items():
        lm.load_adapter(path, name)
    return lm


def answers(lm: LanguageModel) -> tuple[Any, ...]:
    return lm.logits(IDS).tobytes(), lm.loss(IDS, IDS), lm.generate(PROMPT, 6)


def test_a_named_adapter_answers_as_it_does_alone(model: Path, paths: dict[str, Path]) -> None:
    plain, lm = answers(load_model(model)), named(model, paths)
    assert list(lm.adapters) == list(SETTINGS)
    assert lm.adapters["few"].source == str(paths["few"])
    assert answers(lm) == plain
    seen = {plain[0]}
    for name, path in paths.items():
        lm.set_adapter(name)
        wanted = answers(alone(model, path))
        assert answers(lm) == wanted, name
        seen.add(wanted[0])
    assert len(seen) == 1 + len(paths)
    lm.set_adapter(None)
    assert answers(lm) == plain
    assert not lm.adapter_layers()


def test_several_selected_adapters_add_up(model: Path, paths: dict[str, Path]) -> None:
    lm = named(model, paths)
    lm.set_adapter(["few", "all"])
    both = load_model(model)
    nplora.combine([(paths["few"], 1), (paths["all"], 1)]).attach(both)
    assert answers(lm) == answers(both)
    with pytest.raises(UnsupportedError, match="uses DoRA"):
        lm.set_adapter(["few", "dora"])
    assert answers(lm) == answers(both)


def test_deleting_one_of_several_selected_adapters_keeps_the_others(
    model: Path, paths: dict[str, Path]
) -> None:
    lm = named(model, paths)
    lm.set_adapter(["few", "all", "ends"])
    lm.delete_adapter("all")
    both = load_model(model)
    nplora.combine([(paths["few"], 1), (paths["ends"], 1)]).attach(both)
    assert answers(lm) == answers(both)
    lm.delete_adapter("dora")  # is not selected
    assert answers(lm) == answers(both)
    lm.delete_adapter("few")
    assert answers(lm) == answers(alone(model, paths["ends"]))
    lm.delete_adapter("ends")
    assert answers(lm) == answers(load_model(model))


def test_layers_of_the_model_s_own_stay_and_are_not_added(model: Path, paths: dict[str, Path]) -> None:
    """An adapter of all layers on a model that trains fewer of them."""
    lm = alone(model, paths["few"])
    own, parameters = answers(lm), [p.value.tobytes() for p in lm.parameters()]
    lm.load_adapter(paths["all"], "all")
    lm.set_adapter("all")
    assert answers(lm) == answers(alone(model, paths["all"]))
    with lm.disable_adapter():
        assert answers(lm) == answers(load_model(model))
    lm.set_adapter(None)
    assert answers(lm) == own
    assert [p.value.tobytes() for p in lm.parameters()] == parameters


def test_training_with_a_named_adapter_is_refused(model: Path, paths: dict[str, Path]) -> None:
    lm = alone(model, paths["few"])
    lm.load_adapter(paths["all"], "all")
    lm.set_adapter("all")
    for call in (lambda: lm.train_step(IDS, IDS, nplora.SGD(lr=1e-3)), lambda: lm.forward(IDS)):
        with pytest.raises(
            RuntimeError, match="the named adapter 'all' is selected, but named adapters are for"
        ):
            call()
    lm.set_adapter(None)
    lm.train_step(IDS, IDS, nplora.SGD(lr=1e-3))


def test_training_a_model_with_a_named_adapter_selected_writes_nothing(
    model: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    data, out = tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    lm = named(model, {"few": paths["few"]})
    lm.set_adapter("few")
    words = "the named adapter 'few' is selected, but named adapters are for inference only; call set_adapter"
    for call in (lambda: nplora.finetune(lm, data, out), lambda: nplora.plan(lm, data)):
        with pytest.raises(RuntimeError, match=f"^(finetune|plan): {words}"):
            call()
    assert not out.exists()
    lm.add_lora()
    trainer = nplora.Trainer(lm, nplora.finetuning.TokenLoss())
    with pytest.raises(RuntimeError, match=f"^fit: {words}"):
        trainer.fit([(np.zeros((1, 2)), None)], checkpoint_dir=out)
    assert not out.exists()


def test_a_name_unlike_all_others_is_a_key_error_with_all_names(model: Path, paths: dict[str, Path]) -> None:
    lm = load_model(model)
    with pytest.raises(
        KeyError, match="set_adapter: no adapter 'x'; no adapter is loaded; call load_adapter first"
    ):
        lm.set_adapter("x")
    for name in ("few", "all"):
        lm.load_adapter(paths[name], name)
    with pytest.raises(KeyError, match="set_adapter: no adapter 'xyz'; the loaded adapters are 'few', 'all'"):
        lm.set_adapter("xyz")
    for names in (3, [3], ["few", None]):
        with pytest.raises(TypeError, match=r"set_adapter: names is .*, expected a name, a list of names, "):
            lm.set_adapter(names)  # type: ignore[arg-type]


def test_what_is_no_adapter_is_a_type_error_that_says_what_is(model: Path, paths: dict[str, Path]) -> None:
    lm = load_model(model)
    for given in ((paths["few"], 0.5), 3, None, [paths["few"]]):
        with pytest.raises(
            TypeError, match=r"load_adapter: path is a .*, expected a path or an Adapter; nplo"
        ):
            lm.load_adapter(given, "few")  # type: ignore[arg-type]
    for given in (str(paths["few"]), paths["few"]):
        with pytest.raises(
            TypeError, match=r"with_adapter: adapter is .*, expected an Adapter; Adapter\.read"
        ):
            lm.with_adapter(given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"with_adapter: adapter is a tuple, expected an Adapter$"):
        lm.with_adapter((paths["few"], 0.5))  # type: ignore[arg-type]


def test_names_that_are_not_there_are_a_key_error_with_the_nearest(
    model: Path, paths: dict[str, Path]
) -> None:
    lm = named(model, paths)
    lm.set_adapter("few")
    before = answers(lm)
    for call in (lambda: lm.set_adapter("fewer"), lambda: lm.set_adapter(["all", "fewer"])):
        with pytest.raises(KeyError, match="set_adapter: no adapter 'fewer', the nearest names: 'few'"):
            call()
    with pytest.raises(KeyError, match="delete_adapter: no adapter 'fewer', the nearest names: 'few'"):
        lm.delete_adapter("fewer")
    assert answers(lm) == before


def test_an_adapter_that_cannot_be_named_or_does_not_fit_changes_nothing(
    model: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    lm = named(model, {"few": paths["few"]})
    with pytest.raises(ValueError, match="an adapter 'few' is loaded already; call delete_adapter"):
        lm.load_adapter(paths["all"], "few")
    for name in ("", 3):
        with pytest.raises(TypeError, match=r"name is .*, expected a non-empty text"):
            lm.load_adapter(paths["all"], name)  # type: ignore[arg-type]
    other = load_model(save_small_llama(tmp_path / "other.gguf", vocab=200))
    for given in (paths["ends"], Adapter.read(paths["ends"])):
        with pytest.raises(FormatError, match="does not fit the model"):
            other.load_adapter(given, "ends")
    assert list(lm.adapters) == ["few"]
    assert not other.adapters


@pytest.mark.slow
def test_threads_with_two_adapters_and_none_do_not_see_each_other(
    model: Path, paths: dict[str, Path]
) -> None:
    lm = named(model, paths)
    names = ["few", "all", None]
    wanted = {}
    for name in names:
        lm.set_adapter(name)
        wanted[name] = lm.generate(PROMPT, 6), lm.loss(IDS, IDS)
    assert len({loss for _, loss in wanted.values()}) == 3
    lm.set_adapter("ends")  # of this thread alone
    together = threading.Barrier(len(names))

    def run(name: str | None) -> list[bool]:
        if name is not None:
            lm.set_adapter(name)
        together.wait()
        return [(lm.generate(PROMPT, 6), lm.loss(IDS, IDS)) == wanted[name] for _ in range(200)]

    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(run, names))
    assert list(itertools.chain(*found)) == [True] * 600


def test_a_call_ends_with_the_adapter_that_it_began_with(model: Path, paths: dict[str, Path]) -> None:
    lm = named(model, paths)
    lm.set_adapter("all")
    wanted = lm.generate(PROMPT, 8)
    pieces = stream(lm, PROMPT, nplora.generate.Sampling(max_new_tokens=8))
    begun = [next(pieces)]
    cache = lm.new_cache(1, 8)
    first = lm.decode([1], [0], cache)
    context = contextvars.copy_context()
    lm.delete_adapter("all")
    assert lm.generate(PROMPT, 8) != wanted  # this context selects none now
    assert "".join([*begun, *pieces]) == wanted
    cache.reset()
    assert lm.decode([1], [0], cache).tobytes() == first.tobytes()
    for call in (lambda: lm.logits(IDS), lambda: lm.loss(IDS, IDS), lambda: lm.generate(PROMPT, 2)):
        with pytest.raises(KeyError, match="no adapter 'all'"):
            context.run(call)


def test_a_context_that_is_copied_keeps_its_adapter_and_other_models_theirs(
    model: Path, paths: dict[str, Path]
) -> None:
    lm = named(model, paths)
    plain = answers(lm)
    context = contextvars.copy_context()
    context.run(lm.set_adapter, "few")
    assert context.run(answers, lm) == answers(alone(model, paths["few"]))
    assert answers(lm) == plain
    lm.set_adapter("all")
    other = named(model, paths)
    assert answers(other) == plain  # what is selected is of one model


def test_weights_that_are_exchanged_are_those_of_named_adapters_too(
    model: Path, paths: dict[str, Path]
) -> None:
    lm, merged = alone(model, paths["few"]), alone(model, paths["few"]).merge_and_unload()
    lm.load_adapter(paths["all"], "all")
    lm.merge_and_unload()
    lm.set_adapter("all")
    assert isinstance(merged, LanguageModel)
    Adapter.read(paths["all"]).attach(merged)
    assert answers(lm) == answers(merged)


def test_weights_that_are_exchanged_while_an_adapter_is_named_are_not_the_old_ones(
    model: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, merged = alone(model, paths["few"]), alone(model, paths["few"]).merge_and_unload()
    merging = threading.Thread(target=lm.merge_and_unload)

    def merged_meanwhile(adapter: Adapter, any_base: bool = False) -> LanguageModel:
        made = type(lm).with_adapter(lm, adapter, any_base)
        merging.start()
        merging.join(0.5)  # it may wait until the adapter has its name
        return made

    with monkeypatch.context() as patch:
        patch.setattr(lm, "with_adapter", merged_meanwhile)
        lm.load_adapter(paths["all"], "all")
    merging.join()
    lm.set_adapter("all")
    assert isinstance(merged, LanguageModel)
    Adapter.read(paths["all"]).attach(merged)
    assert answers(lm) == answers(merged)


def test_a_named_adapter_is_what_a_model_s_was_when_it_got_the_name(
    model: Path, paths: dict[str, Path]
) -> None:
    lm = alone(model, paths["few"])
    lm.load_adapter(Adapter.from_model(lm), "before")
    lm.load_adapter(paths["ends"], "ends")
    for parameter in lm.parameters():
        parameter.value[...] += 1
    both = load_model(model)
    nplora.combine([(paths["few"], 1), (paths["ends"], 1)]).attach(both)
    lm.set_adapter(["before", "ends"])
    assert answers(lm) == answers(both)


def test_a_model_describes_its_weights_and_its_adapters(model: Path, paths: dict[str, Path]) -> None:
    lm = load_model(model)
    plain = [
        f"LanguageModel({str(model)!r}, llama: 2 blocks of width 32, vocabulary 266, context 64)",
        f"  weights: {lm.num_parameters:,} values in float32, compute 'float32'",
    ]
    assert repr(lm).splitlines() == plain
    lm.add_lora(rank=2, targets="q_proj")
    lm.add_lora(rank=4, targets="lm_head", use_dora=True)
    for name in ("few", "all"):
        lm.load_adapter(paths[name], name)
    lm.set_adapter("all")
    trained = 2 * 2 * (32 + 32) + 4 * (32 + 266) + 266
    assert repr(lm).splitlines() == [
        *plain,
        f"  adapter: rank 2 to 4, alpha 16, DoRA on 3 layers, {trained:,} trained values",
        "  named adapters: 'few', 'all' (selected)",
    ]


def test_merging_while_a_named_adapter_is_selected_is_refused(model: Path, paths: dict[str, Path]) -> None:
    """It would merge the layers of the model's own, and not the adapter that calls use."""
    lm = named(model, paths)
    lm.set_adapter("few")
    for merge in (lm.merge, lm.merge_and_unload):
        with pytest.raises(
            RuntimeError, match=r"the named adapter 'few' is selected, .*; call set_adapter\(None\) first"
        ):
            merge()
    lm.set_adapter(None)
    assert lm.merge() == []
