"""The reference pass on several ranks: they exchange often, and keep what they have computed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from distributed.cases import PAIRS
from distributed.threads import ThreadRank, on_threads
from nplora.distributed import Alone
from nplora.finetuning import FinetuneOptions
from nplora.finetuning.data.batches import TokenBatches
from nplora.finetuning.data.sources import sources_of
from nplora.finetuning.objectives import objective_of, reference
from nplora.finetuning.preparation import Preparation
from nplora.formats import files, safetensors
from nplora.formats.run_files import REFERENCE
from nplora.lm import LanguageModel, load_model
from small_llama import save_small_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


class Failing(ThreadRank):
    """Fails at one of its exchanges, as if the connection to another rank was lost."""

    def __init__(self, ranks: ThreadRank, exchanges: int) -> None:
        super().__init__(ranks.table, ranks.rank)
        self.left = exchanges

    def gather(self, value: Any, place: str = "") -> Any:
        self.left -= 1
        if not self.left:
            raise ConnectionError("lost")
        return super().gather(value, place)


def computed(model: Path, ranks: Any, directory: Path, calls: list[int] | None = None) -> Any:
    """Compute the reference of some pairs; return it."""
    lm, options = load_model(model), FinetuneOptions(objective="dpo")
    objective = objective_of(options)
    dataset = objective.read("finetune", sources_of("finetune", PAIRS), lm.tokenizer, options.reading(64))
    batches = TokenBatches(dataset, batch_examples=4, shuffle=False)
    if calls is not None:
        vars(lm)["log_probs"] = lambda batch: calls.append(1) or LanguageModel.log_probs(lm, batch)
    if getattr(ranks, "rank", 0):
        objective.prepare(lm, [batches], None, str, True, ranks)
    else:
        directory.mkdir(exist_ok=True)
        with files.Directory(directory) as held:
            objective.prepare(lm, [batches], held, str, True, ranks)
    return objective._reference._found()


def test_ranks_share_the_parts_and_know_all_results(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "EVALUATION_TOKENS", 64)
    calls: list[list[int]] = [[], [], [], []]
    alone = computed(model, None, tmp_path / "alone", calls[3])
    found = on_threads(3, lambda ranks: computed(model, ranks, tmp_path / "shared", calls[ranks.rank]))
    assert found == [alone] * 3
    assert (tmp_path / "shared" / REFERENCE).read_bytes() == (tmp_path / "alone" / REFERENCE).read_bytes()
    assert len(calls[3]) > 6  # so that the ranks exchange in several rounds
    assert max(map(len, calls[:3])) == -(-len(calls[3]) // 3)


def test_what_is_computed_before_a_failure_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "EVALUATION_TOKENS", 64)
    whole, calls = computed(model, None, tmp_path / "whole"), []

    def work(ranks: ThreadRank) -> None:
        computed(model, ranks if ranks.rank else Failing(ranks, 5), tmp_path / "cut")  # after two rounds

    with pytest.raises(ConnectionError, match="lost"):
        on_threads(2, work)
    kept = len(safetensors.open(tmp_path / "cut" / REFERENCE)["keys"].numpy())
    assert 0 < kept < len(whole)
    assert computed(model, None, tmp_path / "cut", calls) == whole
    parts = len(computed_parts(model, tmp_path / "again"))
    assert len(calls) == parts - 4
    assert (tmp_path / "cut" / REFERENCE).read_bytes() == (tmp_path / "whole" / REFERENCE).read_bytes()


def computed_parts(model: Path, directory: Path) -> list[int]:
    calls: list[int] = []
    computed(model, None, directory, calls)
    return calls


def test_another_model_on_a_rank_is_named_before_anything_is_computed(model: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    other = save_small_llama(tmp_path / "other.gguf", storage="bfloat16")

    def work(ranks: ThreadRank) -> None:
        computed(other if ranks.rank else model, ranks, tmp_path / "run", calls)

    with pytest.raises(ValueError, match="the ranks do not agree: rank 1 differs in base model"):
        on_threads(2, work)
    assert not calls


def test_a_resumed_run_uses_the_ranks_of_the_run_whose_exchanges_notice_signals(model: Path) -> None:
    class Signalled(Alone):
        def gather(self, value: Any, place: str = "") -> Any:
            raise KeyboardInterrupt

    lm, options = load_model(model), FinetuneOptions(objective="dpo")
    objective = objective_of(options)
    dataset = objective.read("finetune", sources_of("finetune", PAIRS), lm.tokenizer, options.reading(64))
    prepared = Preparation(objective, lm, [TokenBatches(dataset, batch_examples=4)], None, str, Alone())
    run: Any = SimpleNamespace(ranks=Signalled())
    with pytest.raises(KeyboardInterrupt):
        prepared.on_fit_start(run)


def test_the_file_is_written_during_the_pass(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "EVALUATION_TOKENS", 64)
    monkeypatch.setattr(reference, "_WRITE_SECONDS", 0.0)
    sizes: list[int] = []
    write = reference._write
    monkeypatch.setattr(reference, "_write", lambda *given: (sizes.append(len(given[2])), write(*given)))
    whole = computed(model, None, tmp_path / "run")
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3
    assert sizes[-1] == len(whole)
    assert np.all(np.isfinite(list(whole.values())))
