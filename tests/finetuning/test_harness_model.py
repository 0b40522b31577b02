"""The model class for lm-evaluation-harness, without the harness: a stub takes the place of its package.

`test_harness.py` compares the class with the harness's own, where lm_eval is installed.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.lm import LanguageModel, load_model
from small_llama import CONTEXT, save_small_llama

pytest.importorskip("tokenizers")

STUB = {
    "__init__.py": "",
    "api/__init__.py": "",
    "api/model.py": "class LM:\n    pass\n",
    "api/registry.py": "def register_model(name):\n    return lambda made: made\n",
    "utils.py": "get_rolling_token_windows = make_disjoint_window = None\n",
}
MODULE = "nplora.finetuning.judging.harness"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def lm(path: Path) -> LanguageModel:
    return load_model(path)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported with the stub. Afterwards, neither is loaded."""
    for name, text in STUB.items():
        (tmp_path / "lm_eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lm_eval" / name).write_text(text)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        names = MODULE, "lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.utils"
        for name in names:
            patched.setitem(sys.modules, name, None)  # so that the name is removed at the end, if it is new
            patched.delitem(sys.modules, name)
        yield importlib.import_module(MODULE)


def made(harness: Any, *arguments: Any, **options: Any) -> Any:
    model = harness.NploraLM(*arguments, **options)
    model.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
    return model


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def expected(lm: LanguageModel, ids: list[int], count: int) -> tuple[float, bool]:
    """log p of the last `count` tokens, from the logits in float64, and whether each is the likeliest."""
    logits = lm.logits(ids[:-1]).astype(np.float64)[-count:]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    last = ids[-count:]
    return log_probs[np.arange(count), last].sum(), bool((log_probs.argmax(axis=1) == last).all())


def test_continuations_have_the_log_probabilities_of_the_logits(harness: Any, lm: LanguageModel) -> None:
    pairs = [("1+1=", " 2"), ("1+1= ", "2"), ("1+1=", " three"), ("x" * 70, "yz"), ("", "ab")]
    found = made(harness, lm).loglikelihood(requests(*pairs))
    encode = lm.tokenizer.encode
    texts = [(encode("1+1= 2"), 2), (encode("1+1= 2"), 2), (encode("1+1= three"), 6)]
    texts.append((encode("x" * 70 + "yz")[-CONTEXT - 1 :], 2))  # the beginning of a long text is cut off
    texts.append(([lm.tokenizer.eos_id, *encode("ab")], 2))  # no context: the model has no BOS
    for (score, is_top), (ids, count) in zip(found, texts, strict=True):
        assert (score, is_top) == pytest.approx(expected(lm, ids, count), abs=1e-4)


def test_greedy_texts_are_said_to_be_greedy(harness: Any, lm: LanguageModel) -> None:
    text = lm.generate("1+1=", max_new_tokens=3)
    ((_, is_top),) = made(harness, lm).loglikelihood(requests(("1+1=", text)))
    assert is_top


def test_texts_are_generated_with_the_options_of_the_task(harness: Any, lm: LanguageModel) -> None:
    whole = lm.generate("1+1=", max_new_tokens=12)
    options = {"until": [whole[4]], "max_gen_toks": 12, "do_sample": False}
    texts = made(harness, lm).generate_until(
        requests(("1+1=", options), ("1+1=", {"max_gen_toks": 5}), ("1+1=", options))
    )
    stopped = whole[: whole.index(whole[4])]
    assert texts == [stopped, lm.generate("1+1=", max_new_tokens=5), stopped]
    model = made(harness, lm, max_gen_toks=9)
    assert model._sampling({"until": "x"}) == nplora.generate.Sampling(max_new_tokens=9, stop=["x"])


def test_adapters_are_added_up(harness: Any, path: Path, lm: LanguageModel, tmp_path: Path) -> None:
    trained = load_model(path)
    trained.add_lora(rank=2, init="gaussian")
    names = [str(tmp_path / name) for name in ("one", "other")]
    for name in names:
        nplora.save_adapter(trained, name)
    ids, scores = lm.tokenizer.encode("1+1=2"), [expected(lm, lm.tokenizer.encode("1+1=2"), 1)[0]]
    for count in (1, 2):
        sum_of = nplora.combine([(names[0], float(count))])
        scores.append(expected(lm.with_adapter(sum_of), ids, 1)[0])
        model = made(harness, str(path), "+".join(names[:count]))
        ((score, _),) = model.loglikelihood(requests(("1+1=", "2")))
        assert score == pytest.approx(scores[-1], abs=1e-4)
    assert min(abs(np.diff(scores))) > 1e-2
