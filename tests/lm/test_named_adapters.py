"""Several named adapters of one model: each context uses its own adapter, and a call keeps its adapter."""

import asyncio
import concurrent.futures
import contextvars
import copy
import itertools
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import _check
from nplora.adapters import Adapter
from nplora.formats.errors import CorruptError, FormatError, UnsupportedError
from nplora.lm import LanguageModel, load_model, named_adapters
from nplora.lm.generation import generate_ids, prompt_ids, stream, stream_all
from nplora.models.packing import pack
from nplora.tokenizer import Tokenizer
from small_llama import save_small_llama

Array = np.ndarray[Any, Any]
IDS = [[1, 2, 3, 4]]
PROMPT = "1+1="
CALLS = 20  # of each thread that runs beside others
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


def elsewhere(call: Callable[[], Any]) -> None:
    """Call a function in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def before_first_call(of: Any, name: str, action: Callable[[], Any]) -> pytest.MonkeyPatch:
    """Run an action in another thread just before the next call of a function. Call `undo` at the end."""
    function, patch, todo = getattr(of, name), pytest.MonkeyPatch(), [action]

    def with_action(*args: Any, **named: Any) -> Any:
        if todo:
            elsewhere(todo.pop())
        return function(*args, **named)

    patch.setattr(of, name, with_action)
    return patch


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
    for nothing in (None, []):
        lm.set_adapter("all")
        lm.set_adapter(nothing)
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
        KeyError, match="no adapter 'x'; no named adapter is loaded; load one with load_adapter"
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


def test_swapped_arguments_are_noticed(
    model: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a name without a separator may be the name of any file."""
    lm, few = load_model(model), paths["few"]
    words = "load_adapter: path, the first argument, does not exist, but the second argument"
    for name, found in (
        (str(few), f"{str(few)!r} exists"), (few, f"{str(few)!r} exists"),
        (Adapter.read(few), "is an Adapter"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=f"{words} {re.escape(found)}: swap the two: 'nowhere'$"):
            lm.load_adapter("nowhere", name)  # type: ignore[arg-type]
    monkeypatch.chdir(few.parent)
    for path in ("nowhere", f"nowhere/{few.name}"):
        with pytest.raises(FileNotFoundError) as alone:
            Adapter.read(path)
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(alone.value))}$"):
            lm.load_adapter(path, few.name)


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
    with pytest.raises(
        ValueError, match="'few' is loaded already; pass replace=True, or call delete_adapter"
    ):
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


def test_calls_are_right_while_another_thread_replaces_and_deletes_adapters(
    model: Path, paths: dict[str, Path]
) -> None:
    """Each call has the old or the new adapter, and never fails. Some calls use a deleted adapter."""
    lm, other, prompt = named(model, paths), load_model(model), "1<step>=<step>"
    kept = lm.adapters["dora"]
    other.add_lora(rank=2, init="gaussian", targets="q_proj", add_tokens="<step>")
    ends = Adapter.read(paths["ends"])
    versions = {"x": [Adapter.from_model(other), ends], "y": [Adapter.read(paths["few"]), ends]}

    def outputs(names: Any) -> tuple[Any, ...]:
        lm.set_adapter(names)
        return lm.generate(prompt, 3), lm.loss(IDS, IDS)

    wanted: dict[Any, list[tuple[Any, ...]]] = {"x": [], ("y", "all"): []}
    for number in range(2):
        for name, both in versions.items():
            lm.load_adapter(both[number], name, replace=True)
        for names, found in wanted.items():
            found.append(outputs(names))
    deleted, plain = outputs("dora")[0], outputs(None)[0]
    running = threading.Event()
    running.set()

    def change() -> int:
        for number in itertools.count():
            if not running.is_set():
                return number
            for name, both in versions.items():
                lm.load_adapter(both[number % 2], name, replace=True)
            lm.delete_adapter("dora")
            lm.load_adapter(paths["dora"], "dora")
        raise AssertionError

    def selected(names: Any) -> list[bool]:
        texts, losses = (set(values) for values in zip(*wanted[names], strict=True))
        found = [outputs(names) for _ in range(CALLS)]
        return [text in texts and loss in losses for text, loss in found]

    def for_each_prompt() -> list[bool]:
        found = [lm.generate([prompt] * 3, 3, adapters=[kept, None, "x"]) for _ in range(CALLS)]
        texts = {text for text, _ in wanted["x"]}
        return [one == deleted and two == plain and x in texts for one, two, x in found]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            changes = pool.submit(change)
            runs = [pool.submit(selected, names) for names in wanted] + [pool.submit(for_each_prompt)]
            try:
                found = [run.result() for run in runs]
            finally:
                running.clear()
    finally:
        sys.setswitchinterval(interval)
    assert changes.result() > 2
    assert found == [[True] * CALLS] * 3


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


CHANGES: dict[str, Callable[[LanguageModel, Path], None]] = {
    "delete": lambda lm, other: lm.delete_adapter("x"),
    "replace": lambda lm, other: lm.load_adapter(other, "x", replace=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_keeps_its_adapter_when_another_thread_removes_it_meanwhile(
    model: Path, paths: dict[str, Path], change: str
) -> None:
    lm, batch = load_model(model), pack([(IDS[0], IDS[0])])
    ids = lm.tokenizer.encode_prompt(PROMPT)
    sampling = nplora.generate.Sampling(max_new_tokens=8)
    calls: dict[str, tuple[Any, str, Callable[[], Any]]] = {
        "generate": (Tokenizer, "encode_prompt", lambda: lm.generate(PROMPT, 8)),
        "adapters": (Tokenizer, "encode_prompt", lambda: lm.generate([PROMPT], 8, adapters=["x"])),
        "several": (Tokenizer, "encode_prompt", lambda: lm.generate([PROMPT] * 2, 8, adapters=["x", "x"])),
        "stream": (Tokenizer, "encode_prompt", lambda: "".join(stream(lm, PROMPT, sampling))),
        "generate_ids": (LanguageModel, "decode", lambda: generate_ids(lm, [ids], sampling)),
        "logits": (_check, "in_range", lambda: lm.logits(IDS).tobytes()),
        "loss": (_check, "in_range", lambda: lm.loss(IDS, IDS)),
        "loss_packed": (_check, "in_range", lambda: lm.loss_packed(batch)),
        "log_probs": (_check, "in_range", lambda: lm.log_probs(batch).tobytes()),
        "hidden_states": (_check, "in_range", lambda: lm.hidden_states(IDS).tobytes()),
        "residual_stream": (_check, "in_range", lambda: lm.residual_stream(batch).tobytes()),
        "loss_with": (
            _check, "in_range", lambda: lm.loss_with(batch, lambda logits, *_: logits.sum(axis=1))
        ),
        "token_scores": (_check, "in_range", lambda: lm.token_scores(batch).log_probs.tobytes()),
        "continuation_scores": (
            _check, "in_range",
            lambda: lm.continuation_scores([[1, 2]], [[[3], [4]]])[0][1].log_probs.tobytes(),
        ),
        "decode": (_check, "in_range", lambda: lm.decode([3], [0], lm.new_cache(1, 4)).tobytes()),
    }  # fmt: skip
    for name, (of, function, call) in calls.items():
        lm.load_adapter(paths["few"], "x", replace=True)
        lm.set_adapter("x")
        after = call()
        lm.load_adapter(paths["all"], "x", replace=True)
        wanted = call()
        assert wanted != after, name
        patch = before_first_call(of, function, lambda: CHANGES[change](lm, paths["few"]))
        try:
            assert call() == wanted, name
        finally:
            patch.undo()
        assert (lm.adapters["x"].source if "x" in lm.adapters else "") != str(paths["all"]), name


def test_a_prompt_is_encoded_with_one_adapter(model: Path) -> None:
    lm, other = load_model(model), load_model(model)
    other.add_lora(rank=2, targets="q_proj", add_tokens="<step>")
    lm.load_adapter(Adapter.from_model(other), "steps")
    lm.set_adapter("steps")
    wanted = prompt_ids("test", lm, "1<step>")
    assert max(wanted) == lm.config.vocab_size
    patch = before_first_call(Tokenizer, "encode_prompt", lambda: lm.delete_adapter("steps"))
    try:
        assert prompt_ids("test", lm, "1<step>") == wanted
    finally:
        patch.undo()
    assert not lm.adapters


def test_a_stream_keeps_the_adapter_of_its_call(model: Path, paths: dict[str, Path]) -> None:
    sampling = nplora.generate.Sampling(max_new_tokens=8)
    lm = alone(model, paths["few"])
    own = lm.generate(PROMPT, 8)
    lm.load_adapter(paths["all"], "all")
    lm.set_adapter("all")
    wanted = lm.generate(PROMPT, 8)
    with lm.disable_adapter():
        plain = lm.generate(PROMPT, 8)
        begun = stream(lm, PROMPT, sampling)
    assert len({own, wanted, plain}) == 3
    assert "".join(begun) == plain
    begun = stream(lm, PROMPT, sampling)
    lm.set_adapter(None)
    assert "".join(begun) == wanted
    lm.set_adapter("all")
    begun, named_once = stream(lm, PROMPT, sampling), stream_all(lm, [PROMPT], sampling, ["all"])
    lm.delete_adapter("all")
    assert "".join(begun) == "".join(piece for _, piece in named_once) == wanted
    begun = stream(lm, PROMPT, sampling)
    with lm.disable_adapter():
        assert "".join(begun) == own


def test_an_error_of_a_stream_is_raised_by_its_call(
    model: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = named(model, paths)

    def changed() -> None:
        raise CorruptError("the file was changed")

    with pytest.raises(KeyError, match="no adapter 'fewer'"):
        stream(lm, PROMPT, adapter="fewer")
    monkeypatch.setattr(lm, "require_unchanged", changed)
    with pytest.raises(CorruptError, match="the file was changed"):
        stream(lm, PROMPT)


def test_an_adapter_object_of_several_prompts_is_built_once(
    model: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, made = load_model(model), list[Adapter]()
    one, other = Adapter.read(paths["few"]), Adapter.read(paths["all"])
    with_adapter = LanguageModel.with_adapter

    def counted(self: LanguageModel, adapter: Adapter, any_base: bool = False) -> LanguageModel:
        made.append(adapter)
        return with_adapter(self, adapter, any_base)

    monkeypatch.setattr(LanguageModel, "with_adapter", counted)
    texts = lm.generate([PROMPT] * 5, 6, adapters=[one, other, one, other, one])
    assert len(made) == 2
    assert texts == [alone(model, paths[name]).generate(PROMPT, 6) for name in ["few", "all"] * 2 + ["few"]]


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


def test_names_may_come_from_any_iterable(model: Path, paths: dict[str, Path]) -> None:
    lm = named(model, {name: paths[name] for name in ("few", "all")})
    lm.set_adapter(["few", "all"])
    both = answers(lm)
    lm.set_adapter(None)
    lm.set_adapter(iter(["few", "all"]))
    assert answers(lm) == both
    with pytest.raises(TypeError, match="expected a name, a list of names, or None"):
        lm.set_adapter(name for name in ["few", 3])  # type: ignore[misc]
    assert answers(lm) == both


def test_a_name_that_is_given_twice_is_refused(model: Path, paths: dict[str, Path]) -> None:
    lm = named(model, {name: paths[name] for name in ("few", "all")})
    lm.set_adapter("few")
    before = answers(lm)
    with pytest.raises(
        ValueError, match=r"set_adapter: 'all' is given twice, expected each name once; to give an adapter"
    ):
        lm.set_adapter(["few", "all", "all"])
    assert answers(lm) == before


def test_an_adapter_may_be_deleted_while_adapters_are_disabled(model: Path, paths: dict[str, Path]) -> None:
    plain, lm = answers(load_model(model)), named(model, paths)
    lm.set_adapter("all")
    with lm.disable_adapter():
        lm.delete_adapter("all")
    assert answers(lm) == plain
    lm.set_adapter(["few", "ends"])
    with lm.disable_adapter(), lm.disable_adapter():
        lm.delete_adapter("ends")
        assert answers(lm) == plain
    assert answers(lm) == answers(alone(model, paths["few"]))
    with lm.disable_adapter():
        elsewhere(lambda: lm.delete_adapter("few"))
        assert answers(lm) == plain
    with pytest.raises(KeyError, match="no adapter 'few'"):  # as without the block
        lm.logits(IDS)


def test_an_adapter_cannot_be_selected_while_adapters_are_disabled(
    model: Path, paths: dict[str, Path]
) -> None:
    plain, lm = answers(load_model(model)), named(model, paths)
    other = named(model, {"few": paths["few"]})
    lm.set_adapter("all")
    wanted = answers(lm)
    for names in ("few", None):
        with (
            pytest.raises(RuntimeError, match=r"set_adapter: this code is inside `with lm\.disable_adapter"),
            lm.disable_adapter(),
        ):
            lm.set_adapter(names)
        assert answers(lm) == wanted
    with lm.disable_adapter():
        other.set_adapter("few")  # another model
        assert answers(other) == answers(alone(model, paths["few"]))
        assert answers(lm) == plain


def test_adapters_that_a_call_or_a_cache_names_are_used_while_adapters_are_disabled(
    model: Path, paths: dict[str, Path]
) -> None:
    lm = named(model, paths)
    lm.set_adapter("all")
    cache = lm.new_cache(1, 4)
    wanted, text = lm.decode([3], [0], cache), lm.generate(PROMPT, 6)
    cache.reset()
    with lm.disable_adapter():
        assert lm.generate([PROMPT], 6, adapters=["all"]) == [text]
        assert lm.decode([3], [0], cache).tobytes() == wanted.tobytes()
        assert lm.decode([3], [0], lm.new_cache(1, 4)).tobytes() != wanted.tobytes()


def test_a_sum_does_not_depend_on_the_order_of_its_names(model: Path, paths: dict[str, Path]) -> None:
    lm = named(model, {name: paths[name] for name in ("few", "all", "ends")})
    first, *others = itertools.permutations(["few", "all", "ends"])
    lm.set_adapter(first)
    wanted, copies = answers(lm), len(lm._named.models)
    for names in others:
        lm.set_adapter(names)
        assert answers(lm) == wanted
    assert len(lm._named.models) == copies
    factors = [parameter.value.tobytes() for parameter in lm.selected_model("test").parameters()]
    for names in others:
        fresh = named(model, paths)
        fresh.set_adapter(names)
        assert [
            parameter.value.tobytes() for parameter in fresh.selected_model("test").parameters()
        ] == factors


def test_only_the_last_sums_are_kept(model: Path, paths: dict[str, Path]) -> None:
    lm, most = load_model(model), named_adapters.MOST_SUMS
    names = [f"n{number}" for number in range(6)]
    for name in names:
        lm.load_adapter(paths["few"], name)
    single = {name: lm.named_model(name) for name in names}
    pairs = list(itertools.combinations(names, 2))
    assert len(pairs) > most
    lm.set_adapter(pairs[0])
    first = lm.selected_model("test")
    for pair in pairs:
        lm.set_adapter(pair)
        lm.set_adapter(pairs[0])  # is used again and again
    assert lm.selected_model("test") is first
    assert len(lm._named.models) == len(names) + most
    assert {name: lm.named_model(name) for name in names} == single
    lm.set_adapter(pairs[1])  # was dropped
    both = load_model(model)
    nplora.combine([(paths["few"], 1), (paths["few"], 1)]).attach(both)
    assert answers(lm) == answers(both)
    lm.delete_adapter("n0")
    assert first not in lm._named.models


@pytest.mark.parametrize("copied", [lambda lm: lm, copy.deepcopy])
def test_the_arrays_of_named_adapters_are_read_only(
    model: Path, tmp_path: Path, copied: Callable[[LanguageModel], LanguageModel]
) -> None:
    lm = load_model(model)
    settings: dict[str, dict[str, Any]] = {
        "dora": {"targets": "q_proj", "use_dora": True},
        "rows": {"targets": "q_proj", "trainable_tokens": [5, 7]},
        "whole": {"targets": "q_proj", "modules_to_save": "embed_tokens"},
    }
    for name, options in settings.items():
        other = load_model(model)
        other.add_lora(rank=2, init="gaussian", **options)
        nplora.save_adapter(other, tmp_path / name)
        adapter = Adapter.read(tmp_path / name)
        lm.load_adapter(adapter, name)
        assert adapter["model.layers.0.self_attn.q_proj"].A.flags.writeable  # the caller's own arrays
    arrays = list[Array]()
    for adapter in copied(lm).adapters.values():
        deltas = list(adapter.values())
        arrays += [array for d in deltas for array in (d.A, d.B, d.m) if array is not None]
        arrays += [array for rows in adapter.token_rows.values() for array in (rows.ids, rows.values)]
        arrays += [array for module in adapter.modules_to_save.values() for array in module.values()]
    assert len(arrays) >= 3 * 2 * 2 + 2 + 2 + 1
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_a_named_adapter_can_be_attached_and_trained(model: Path, paths: dict[str, Path]) -> None:
    lm = named(model, paths)
    other = load_model(model)
    lm.adapters["all"].attach(other)
    before = other.loss(IDS, IDS)
    for _ in range(3):
        other.train_step(IDS, IDS, nplora.AdamW(lr=0.01))
    assert other.loss(IDS, IDS) < before
    lm.set_adapter("all")
    assert answers(lm) == answers(alone(model, paths["all"]))


def test_a_task_inherits_the_selection_and_a_new_thread_does_not(model: Path, paths: dict[str, Path]) -> None:
    lm = named(model, paths)
    few, plain = answers(alone(model, paths["few"])), answers(load_model(model))
    found = list[tuple[Any, ...]]()

    async def task() -> None:
        found.append(answers(lm))
        lm.set_adapter("all")

    async def main() -> None:
        lm.set_adapter("few")
        await asyncio.create_task(task())
        await asyncio.to_thread(lambda: found.append(answers(lm)))
        found.append(answers(lm))  # the task's own selection does not matter here

    asyncio.run(main())
    assert found == [few] * 3
    lm.set_adapter("few")
    elsewhere(lambda: found.append(answers(lm)))
    assert found[3] == plain
