"""Classifiers and embeddings that several ranks train have the bits of those of one process."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from distributed.launching import needs_mpi, run
from distributed.threads import ThreadRank, on_threads
from nplora import cli, embedding
from nplora.distributed import Alone, Communicator, opening
from nplora.finetuning import ClassifierRun, ClassifyOptions, agreement, train_classifier
from nplora.trainer import Callback, History, Run, StepRecord
from small_encoder import WORDS, save_small_encoder
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

PETS, OTHERS = ("cat", "dog"), WORDS[15:28]
ACCUMULATE = 4  # the last step of an epoch of 7 batches has 3 batches


def text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(OTHERS + PETS, rng.integers(2, 12)))


def labelled(count: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = [{"text": text(rng)} for _ in range(count)]
    pets = [[pet for pet in PETS if pet in row["text"]] for row in rows]
    return [
        {
            **row,
            "label": "pet" if own else "shop",
            "pets": own,
            "number": 3.0 + len(own),
            "tags": ["B-PET" if word in PETS else "O" for word in row["text"].split()],
        }
        for row, own in zip(rows, pets, strict=True)
    ]


def triplets(count: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{name: text(rng) for name in ("anchor", "positive", "negative")} for _ in range(count)]


def scored(count: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"sentence1": text(rng), "sentence2": text(rng), "score": float(rng.random())} for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The ranks are threads, so each of them computes with one."""
    before = nplora.get_num_threads()
    nplora.set_num_threads(1)
    yield
    nplora.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("model"))


def digest(model: nplora.Module) -> str:
    return hashlib.sha256(b"".join(p.value.tobytes() for p in model.parameters())).hexdigest()[:16]


def numbers(history: History) -> list[Any]:
    steps = [(s.loss, s.count, s.grad_norm) for s in history.steps]
    return [*steps, *((e.step, e.val_loss, e.val_accuracy) for e in history.evaluations)]


def adapter(directory: Path) -> str:
    return hashlib.sha256(Path(directory, "adapter_model.safetensors").read_bytes()).hexdigest()[:16]


def place(ranks: Communicator | None, directory: Path) -> Path:
    """The output directory. Only rank 0 can make it: /proc has no place for new directories."""
    return directory if ranks is None or ranks.rank == 0 else Path("/proc/no/such/directory")


# ---- classifiers ----

CLASSIFIERS: dict[str, dict[str, Any]] = {
    "single": {"dropout": 0.2, "class_weights": "balanced", "calibrate": True, "use_dora": True},
    "multi": {"task": "multi", "columns": "label=pets", "schedule": "linear", "eval_every": 1},
    "regression": {"task": "regression", "columns": "label=number", "dropout": 0.1},
    "int8": {"compute": "int8", "patience": 1},
    "words": {
        "columns": "tokens=text,tags=tags",
        "dropout": 0.2,
        "class_weights": "balanced",
        "calibrate": True,
    },
}


def classified(
    ranks: Communicator | None, model: Path, output: Path, **more: Any
) -> tuple[ClassifierRun, tuple[Any, ...]]:
    options: dict[str, Any] = {"rank": 2, "lr": 1e-2, "batch_examples": 3, "accumulate": ACCUMULATE} | more
    made = train_classifier(
        model,
        labelled(),
        place(ranks, output),
        valid=labelled(35, 1),
        epochs=2,
        communicator=ranks,
        **options,
    )
    report = None if made.valid is None else made.valid.as_json()
    return made, (digest(made.classifier), numbers(made.history), made.temperature, report)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_ranks_train_the_classifier_of_one_process(name: str, model: Path, tmp_path: Path) -> None:
    alone = classified(None, model, tmp_path / "alone", **CLASSIFIERS[name])[1]
    for size in (1, 2, 3):
        output = tmp_path / str(size)

        def work(ranks: ThreadRank, output: Path = output) -> tuple[Any, ...]:
            return classified(ranks, model, output, **CLASSIFIERS[name])[1]

        assert on_threads(size, work) == [alone] * size
        assert adapter(output) == adapter(tmp_path / "alone")


def test_a_classifier_of_ranks_reports_each_of_them(model: Path, tmp_path: Path) -> None:
    first, second = on_threads(2, lambda ranks: classified(ranks, model, tmp_path / "out")[0])
    assert (first.process, second.process) == (0, 1)
    assert [record.rank for record in first.ranks] == [0, 1]
    assert sum(record.items for record in first.ranks) == 2 * 20
    assert len(re.findall(r"rank [01] on .* texts/s, waited", str(first))) == 2


@pytest.mark.slow
def test_ranks_train_a_classifier_on_a_language_model(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    save_small_llama(model)
    alone = classified(None, model, tmp_path / "alone", dropout=0.2)[1]
    work = functools.partial(classified, model=model, output=tmp_path / "out", dropout=0.2)
    assert on_threads(2, lambda ranks: work(ranks)[1]) == [alone] * 2


@pytest.mark.slow
def test_ranks_divide_the_batches_of_the_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nplora.lm.encoder.MOST_TOKENS", 40)
    monkeypatch.setattr("nplora.finetuning.classification.training.MOST_TOKENS", 40)
    alone = classified(None, model, tmp_path / "alone", calibrate=True)[1]
    logits_of_ids, counts = nplora.TextClassifier.logits_of_ids, list[int]()

    def counted(self: nplora.TextClassifier, ids: Any, batch_size: int | None = None) -> Any:
        counts.append(len(ids))
        return logits_of_ids(self, ids, batch_size)

    monkeypatch.setattr(nplora.TextClassifier, "__call__", logits_of_ids)  # of the evaluations
    monkeypatch.setattr(nplora.TextClassifier, "logits_of_ids", counted)
    found = on_threads(3, lambda ranks: classified(ranks, model, tmp_path / "out", calibrate=True)[1])
    assert found == [alone] * 3
    assert sum(counts) == 35
    assert len(counts) > 3


class _Fail(Callback):
    def on_step_end(self, run: Run, record: StepRecord) -> None:
        if record.step == 2:
            raise OSError("the power is gone")


@pytest.mark.slow
def test_a_run_of_two_ranks_is_resumed_by_three(model: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"dropout": 0.2, "save_every": 1}
    alone = classified(None, model, tmp_path / "alone", **more)[1]
    with pytest.raises(OSError, match="the power is gone"):
        on_threads(2, lambda ranks: classified(ranks, model, tmp_path / "out", callbacks=[_Fail()], **more))
    found = on_threads(3, lambda ranks: classified(ranks, model, tmp_path / "out", resume=True, **more)[1])
    assert found == [alone] * 3
    assert adapter(tmp_path / "out") == adapter(tmp_path / "alone")


def test_a_rank_with_other_rows_is_named_before_the_first_step(model: Path, tmp_path: Path) -> None:
    def work(ranks: ThreadRank) -> None:
        rows = labelled()[ranks.rank :]
        train_classifier(
            model, rows, place(ranks, tmp_path / "out"), accumulate=2, batch_examples=4, communicator=ranks
        )

    with pytest.raises(ValueError, match="train_classifier: the ranks do not agree: rank 1 differs in data"):
        on_threads(2, work)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("lr", 0.5), ("calibrate", True), ("max_length", 9)])
def test_a_rank_with_another_option_is_named(option: str, value: Any) -> None:
    def work(ranks: ThreadRank) -> None:
        more: dict[str, Any] = {option: value} if ranks.rank else {}
        agreement.require_same_options(ranks, ClassifyOptions(accumulate=2, **more), "train_classifier")

    with pytest.raises(ValueError, match=f"train_classifier: .* rank 1 differs in {option}: "):
        on_threads(2, work)


def test_a_classifier_with_more_ranks_than_batches_in_a_step_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_classifier: 3 ranks need at least 3 batches in a step"):
        on_threads(3, lambda ranks: classified(ranks, model, tmp_path, accumulate=2))


@pytest.mark.slow
def test_a_communicator_of_your_own_is_used(model: Path, tmp_path: Path) -> None:
    class Counted(Alone):
        joins = 0

        def join(self, part: Any, out: Any) -> None:
            self.joins += 1
            super().join(part, out)

    for train in (classified, embedded):
        ranks = Counted()
        train(ranks, model, tmp_path / train.__name__)
        assert ranks.joins == 4, train


def test_a_communicator_and_distributed_exclude_each_other(model: Path, tmp_path: Path) -> None:
    for train, op in ((classified, "train_classifier"), (embedded, "train")):
        with pytest.raises(ValueError, match=f"{op}: communicator and distributed are both given"):
            train(Alone(), model, tmp_path, distributed="mpi")
        with pytest.raises(
            ValueError, match=f"{op}: distributed='MPI' is not available; possible: 'mpi', 'off'"
        ):
            train(None, model, tmp_path, distributed="MPI")
    no_communicator: Any = "mpi"
    message = "communicator is 'mpi', expected a Communicator, which has the attribute rank"
    with pytest.raises(TypeError, match=f"train: {message}"):
        embedding.train(model, triplets(), tmp_path, communicator=no_communicator)
    with pytest.raises(TypeError, match=f"train_classifier: {message}"):
        train_classifier(model, labelled(), tmp_path, communicator=no_communicator)
    assert not list(tmp_path.iterdir())


def test_a_process_that_no_launcher_started_says_that_it_is_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "MPICommunicator", Alone)  # MPI without a launcher has one rank too
    notice = "--distributed mpi: this process trains alone; start it with `mpiexec -n N` to use N processes\n"
    for train in (classified, embedded):
        for distributed in ("mpi", "off"):
            train(
                None, model, tmp_path / distributed / train.__name__, progress=None, distributed=distributed
            )
            assert capsys.readouterr().err.count(notice) == (distributed == "mpi"), train


@pytest.mark.slow
def test_ranks_train_the_labels_of_tokens(model: Path) -> None:
    def trained(ranks: Communicator | None) -> tuple[Any, ...]:
        encoder = nplora.load_encoder(model)
        tagger = nplora.new_classifier(encoder, ["O", "PET"], tokens=True, seed=0)
        tagger.add_lora(rank=2, dropout=0.2, seed=0)
        ids = tagger.encoder.encode([row["text"] for row in labelled()])
        pets = [tagger.encoder.encode([pet])[0][1] for pet in PETS]
        groups = [ids[begin : begin + 3] for begin in range(0, len(ids), 3)]
        batches = [(group, np.isin(np.concatenate(group), pets).astype(np.int64)) for group in groups]
        trainer = nplora.Trainer(
            tagger, "cross_entropy", nplora.AdamW(1e-2), accumulate=ACCUMULATE, progress=False,
            communicator=ranks,
        )  # fmt: skip
        return numbers(trainer.fit(batches, epochs=2, validation=batches[:5])), digest(tagger)

    alone = trained(None)
    for size in (2, 3):
        assert on_threads(size, trained) == [alone] * size


# ---- embeddings ----

EMBEDDINGS: dict[str, dict[str, Any]] = {
    "ranking": {"dropout": 0.2},
    "micro_batches": {"dropout": 0.2, "micro_tokens": 24},
    "widths": {"dims": (32, 8), "micro_tokens": 24},
    "triplet": {"loss": "triplet", "micro_tokens": 40},
    "cosine": {"loss": "cosine", "data": scored(), "valid": scored(9, 1), "micro_tokens": 24},
    "int8": {"compute": "int8"},
    "cosent": {"loss": "cosent", "data": scored(), "valid": scored(9, 1), "use_dora": True},
}


def embedded(ranks: Communicator | None, model: Path, output: Path, **more: Any) -> tuple[Any, ...]:
    options: dict[str, Any] = {"data": triplets(), "valid": triplets(9, 1), "progress": False} | more
    made = embedding.train(
        model, output=place(ranks, output), rank=2, lr=1e-2, batch_size=3, accumulate=ACCUMULATE, epochs=2,
        communicator=ranks, **options,
    )  # fmt: skip
    return digest(made.encoder), numbers(made.history)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_ranks_train_the_embeddings_of_one_process(name: str, model: Path, tmp_path: Path) -> None:
    """With `micro_tokens`, most batches have several micro-batches, whose number differs."""
    alone = embedded(None, model, tmp_path / "alone", **EMBEDDINGS[name])
    for size in (1, 2, 3):
        output = tmp_path / str(size)

        def work(ranks: ThreadRank, output: Path = output) -> tuple[Any, ...]:
            return embedded(ranks, model, output, **EMBEDDINGS[name])

        assert on_threads(size, work) == [alone] * size
        assert adapter(output) == adapter(tmp_path / "alone")


def test_embeddings_are_accumulated_over_batches(model: Path, tmp_path: Path) -> None:
    """Only the examples of one batch are negatives of each other. A larger batch has more negatives."""
    made = embedding.train(model, triplets(8), tmp_path, batch_size=4, accumulate=2, progress=False)
    assert [step.count for step in made.history.steps] == [8]
    whole = embedding.train(model, triplets(8), tmp_path, batch_size=8, overwrite=True, progress=False)
    assert made.history.steps[0].loss < whole.history.steps[0].loss


def test_a_rank_with_other_pairs_is_named_before_the_first_step(model: Path, tmp_path: Path) -> None:
    def work(ranks: ThreadRank) -> None:
        embedded(ranks, model, tmp_path / "out", data=triplets(20, ranks.rank))

    with pytest.raises(ValueError, match="train: the ranks do not agree: rank 1 differs in data"):
        on_threads(2, work)
    assert not (tmp_path / "out").exists()


def test_the_result_of_ranks_reports_each_of_them(model: Path, tmp_path: Path) -> None:
    def work(ranks: ThreadRank) -> embedding.EmbeddingTraining:
        output = place(ranks, tmp_path)
        return embedding.train(model, triplets(), output, batch_size=4, accumulate=2, communicator=ranks)

    for made in on_threads(2, work):
        assert sum(record.items for record in made.ranks) == 20
        assert len(re.findall(r"\nrank [01] on .* examples/s, waited", str(made))) == 2


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [("micro_tokens", 24, "micro_tokens"), ("batch_size", 2, "batch_size"), ("dims", (32, 8), "loss")],
)
def test_a_rank_with_another_setting_of_the_loss_is_named(
    option: str, value: Any, name: str, model: Path, tmp_path: Path
) -> None:
    def work(ranks: ThreadRank) -> None:
        more: dict[str, Any] = {option: value} if ranks.rank else {}
        output = place(ranks, tmp_path / "out")
        embedding.train(model, triplets(), output, accumulate=2, rank=2, communicator=ranks, **more)

    with pytest.raises(ValueError, match=f"the ranks do not agree: rank 1 differs in .*{name}"):
        on_threads(2, work)


def test_embeddings_with_more_ranks_than_batches_in_a_step_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 ranks need at least 3 batches in a step, but there are 1"):
        on_threads(
            3, lambda ranks: embedding.train(model, triplets(), place(ranks, tmp_path), communicator=ranks)
        )


# ---- the command ----


@pytest.fixture(scope="module")
def inputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    for name, rows in (("train", labelled()), ("other", labelled(16)), ("valid", labelled(35, 1))):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def words(model: Path, inputs: Path, output: Path, *more: Any, data: str = "train.jsonl") -> list[Any]:
    files = [model, "--data", inputs / data, "--valid", inputs / "valid.jsonl", "--output", output]
    options = ["--rank", 2, "--batch-examples", 3, "--accumulate", 4, "--epochs", 2, "--dropout", 0.2]
    return ["classify", "train", *files, *options, *more]


@needs_mpi
@pytest.mark.slow
def test_ranks_of_mpi_train_the_classifier_of_one_process(model: Path, inputs: Path, tmp_path: Path) -> None:
    assert cli.main([*map(str, words(model, inputs, tmp_path / "alone"))]) == 0
    distributed = words(model, inputs, tmp_path / "out", "--distributed", "mpi")
    status, out, errors = run((2, ["-m", "nplora", *distributed]))
    assert status == 0, errors
    assert out.count("holds the adapter") == 1
    assert [f"rank {rank} on " in out for rank in range(3)] == [True, True, False]
    assert errors.count("20 texts to train on") == 1
    assert adapter(tmp_path / "out") == adapter(tmp_path / "alone")


@needs_mpi
@pytest.mark.slow
def test_a_rank_of_mpi_with_other_rows_is_one_error(model: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    programs = [
        (1, ["-m", "nplora", *words(model, inputs, output, "--distributed", "mpi", data=data)])
        for data in ("train.jsonl", "other.jsonl")
    ]
    status, _, errors = run(*programs)
    assert status != 0
    assert errors.count("error: ") == 1, errors
    assert "the ranks do not agree: rank 1 differs in data" in errors
    assert not output.exists()


def test_the_command_without_the_option_is_refused_under_a_launcher(
    model: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    assert cli.main([*map(str, words(model, inputs, tmp_path / "out"))]) == 2
    assert "--distributed mpi makes them train together; --distributed off" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*map(str, words(model, inputs, tmp_path / "out", "--distributed", "off"))]) == 0


def test_only_training_takes_the_option(
    model: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["classify", "eval", model, "--data", inputs / "train.jsonl", "--distributed", "mpi"]
    assert cli.main([*map(str, arguments)]) == 2
    assert "--distributed is an option of classify train" in capsys.readouterr().err
