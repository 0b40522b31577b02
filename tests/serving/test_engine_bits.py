"""The bits of an answer depend neither on other requests nor on the pieces in which its prompt is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_engines import prompt, small

import nplora
import small_models
from nplora.adapters import Adapter
from nplora.lm import LanguageModel
from nplora.lm.generation import PAGE, Sampling
from nplora.models.gguf_export import model_to_gguf
from nplora.serving import Engine
from nplora.serving.ticket import Ticket

pytest.importorskip("tokenizers")

CALL = (5, 9)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 8},
    "large": {"rank": 64},
    "activated": {"rank": 8, "invocation": CALL},
}
NO_END = {0: -np.inf}
SAMPLING = Sampling(max_new_tokens=4, logit_bias=NO_END)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model as wide as a real one, so that the core has several methods to choose from."""
    directory = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WIDTH": 576, "HIDDEN": 1536, "LAYERS": 2, "HEADS": 9, "KV_HEADS": 3}.items():
            patch.setattr(small_models, name, value)
        patch.setattr(small_models, "DIM", 64)
        small(directory, context=10 * PAGE)
    path = directory / "small.gguf"
    if request.param == "int8":  # the products in 8-bit integers are those of GGUF's blocks
        model_to_gguf(path, directory / "blocks.gguf", "q4_0")
        path = directory / "blocks.gguf"
    lm = nplora.load_model(path, compute=request.param)
    for name, settings in ADAPTERS.items():
        lm.load_adapter(adapter_of(directory, **settings), name)
    return lm


def adapter_of(directory: Path, **settings: Any) -> Adapter:
    lm, rng = nplora.load_model(directory / "small.gguf"), np.random.default_rng(0)
    lm.add_lora(targets="all-linear", **settings)
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.05 * rng.standard_normal(layer.A.shape)
    return Adapter.from_model(lm)


def answer(ticket: Ticket) -> list[tuple[int, float | None]]:
    return [(token.id, token.logprob) for chunk in ticket for token in chunk.tokens]


def in_company(lm: LanguageModel, ids: list[int], name: str | None) -> Ticket:
    engine = Engine(lm, max_requests=4)
    engine.submit([5, 6, 7], Sampling(max_new_tokens=60, logit_bias=NO_END))
    engine.step()  # now the prompt is read in shorter pieces
    return engine.submit(ids, SAMPLING, adapter=name, logprobs=0)


def after_its_beginning(pages: int) -> Callable[[LanguageModel, list[int], str | None], Ticket]:
    def submit(lm: LanguageModel, ids: list[int], name: str | None) -> Ticket:
        engine = Engine(lm, max_requests=4)
        engine.submit(ids[: pages * PAGE + 1], SAMPLING, adapter=name).text()
        return engine.submit(ids, SAMPLING, adapter=name, logprobs=0)

    return submit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call", "length"),
    [
        ("plain", None, 530), ("large", None, 530),
        ("activated", 30, 84), ("activated", 126, 300), ("activated", 190, 300),
    ],
)  # fmt: skip
def test_log_probabilities_do_not_depend_on_the_company_or_on_the_pages_that_are_there(
    lm: LanguageModel, name: str | None, call: int | None, length: int
) -> None:
    ids = [one if one not in CALL else 6 for one in prompt(np.random.default_rng(1), length)]
    if call is not None:
        ids[call : call + 2] = CALL
    wanted = answer(Engine(lm, max_requests=4).submit(ids, SAMPLING, adapter=name, logprobs=0))
    assert len(wanted) == SAMPLING.max_new_tokens
    assert answer(in_company(lm, ids, name)) == wanted
    for pages in {1, length // PAGE}:
        assert answer(after_its_beginning(pages)(lm, ids, name)) == wanted
