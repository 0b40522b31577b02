"""Training of embeddings: micro-batches, data, measures and saved adapters."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nplora
from failing_step import FailingStep
from kept_weights import KeptWeights
from nplora import _core
from nplora.distributed import Alone
from nplora.finetuning.embedding import (
    EmbeddingLoss,
    ExampleBatches,
    MatryoshkaLoss,
    RankingLoss,
    TextBatch,
    evaluate_retrieval,
    evaluate_similarity,
    label_pairs,
    read_examples,
    spearman,
    train,
)
from nplora.finetuning.embedding import metrics as measures
from nplora.finetuning.int8_check import Int8Check
from nplora.formats.errors import DataError
from nplora.models.decoder import frozen_weights
from nplora.nn.product_errors import int8_layers
from small_encoder import WORDS, save_small_encoder

pytest.importorskip("tokenizers")

Array = np.ndarray[Any, Any]
ROWS = [
    {"anchor": "where is my parcel", "positive": "delivery is late", "negative": "the cat sat"},
    {"anchor": "a cat and a dog", "positive": "the dog", "negative": "my refund"},
    {"anchor": "return an order", "positive": "refund my order .", "negative": "the mat"},
    {"anchor": "how do i query", "positive": "query : the order", "negative": "late cat"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("encoders") / "model")


def adapted(model: Path, dropout: float = 0.0) -> nplora.Encoder:
    encoder = nplora.load_encoder(model)
    encoder.add_lora(rank=2, init="gaussian", dropout=dropout)
    return encoder


def random_batch(rng: np.random.Generator, n: int = 8) -> TextBatch:
    """A batch of pairs with texts of 1 to 20 tokens."""
    return TextBatch([[rng.integers(5, len(WORDS), rng.integers(1, 20)) for _ in range(n)] for _ in range(2)])


def gradients(
    encoder: nplora.Encoder, loss: EmbeddingLoss, x: TextBatch, y: Any = None
) -> tuple[float, Array]:
    encoder.zero_grad()
    value = loss.forward_backward(encoder, x, y, 1 / len(x))
    return value / len(x), np.concatenate([p.grad.ravel() for p in encoder.parameters()])


# ---- micro-batches ----


@pytest.mark.slow
@pytest.mark.parametrize("dims", [None, (32, 8)])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    model: Path, dims: Any, rng: np.random.Generator
) -> None:
    """The sums over tokens are cut in other places. The loss multiplies their rounding by its scale, 20."""
    encoder, x = adapted(model), random_batch(rng)
    loss, whole = gradients(encoder, EmbeddingLoss(dims=dims), x)
    for micro_tokens in (1, 30, 70):
        value, parts = gradients(encoder, EmbeddingLoss(dims=dims, micro_tokens=micro_tokens), x)
        assert value == pytest.approx(loss, rel=1e-5)
        assert np.linalg.norm(parts - whole) <= 20 * 5e-6 * np.linalg.norm(whole)


def test_a_micro_batch_is_computed_again_with_the_same_dropout(
    model: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, x, forward = adapted(model, dropout=0.5), random_batch(rng), nplora.Encoder.embed_forward
    seen = dict[bytes, list[Array]]()

    def watched(self: nplora.Encoder, ids: Any, normalize: bool | None = None) -> Any:
        vectors, saved = forward(self, ids, normalize)
        seen.setdefault(np.concatenate(ids).tobytes(), []).append(vectors.copy())
        return vectors, saved

    monkeypatch.setattr(nplora.Encoder, "embed_forward", watched)
    before = encoder.random_state()
    gradients(encoder, EmbeddingLoss(micro_tokens=40), x)
    assert len(seen) > 2
    assert sorted(map(len, seen.values())) == [1, *[2] * (len(seen) - 1)]  # the last one is kept
    for found in seen.values():
        assert all(np.array_equal(found[0], other) for other in found)
    after = encoder.random_state()
    calls = {name: state[1] - before[name][1] for name, state in after.items()}
    assert set(calls.values()) == {len(seen)}  # the next batch gets other masks


def test_only_one_micro_batch_is_kept_at_a_time(
    model: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    encoder, forward = adapted(model), nplora.Encoder.embed_forward
    alive = list[weakref.ref[Any]]()
    most = 0

    def watched(self: nplora.Encoder, ids: Any, normalize: bool | None = None) -> Any:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        vectors, saved = forward(self, ids, normalize)
        alive.append(weakref.ref(saved.x.base if saved.x.base is not None else saved.x))
        return vectors, saved

    monkeypatch.setattr(nplora.Encoder, "embed_forward", watched)
    gradients(encoder, EmbeddingLoss(micro_tokens=20), random_batch(rng))
    assert len(alive) > 10
    assert most == 0


def test_known_positives_are_no_negatives() -> None:
    a, b, c, d = [5], [6, 7], [8], [9]
    batch = TextBatch([[a, b, a, c], [b, c, d, d], [a, d]])
    known = batch.known_positives()
    assert known is not None
    assert known.astype(int).tolist() == [
        [0, 0, 1, 0, 1, 0],  # its anchor is also that of d, and is a negative
        [1, 0, 0, 0, 0, 0],  # itself
        [1, 0, 0, 1, 1, 1],
        [0, 1, 1, 0, 0, 1],  # itself, and copies of its positive
    ]
    assert TextBatch([[a, b], [c, d]]).known_positives() is None


def test_a_loss_that_is_not_finite_names_the_block_and_changes_nothing(
    model: Path, rng: np.random.Generator
) -> None:
    encoder = adapted(model)
    encoder.adapter_layers()["encoder.layer.1.output.dense"].A[...] = np.inf  # type: ignore[attr-defined]
    x, loss = random_batch(rng), EmbeddingLoss(micro_tokens=30)
    before = [p.value.copy() for p in encoder.parameters()]
    with pytest.raises(
        nplora.NonFiniteLossError, match=r"block whose output is not finite is 'encoder.layer.1'"
    ):
        nplora.Trainer(encoder, loss, nplora.AdamW(lr=1e-2)).fit([(x, None)])
    for old, new in zip(before, encoder.parameters(), strict=True):
        np.testing.assert_array_equal(old, new.value)


def test_another_model_than_an_encoder_is_refused() -> None:
    trainer = nplora.Trainer(nplora.LoRALinear(np.eye(2), rank=1), EmbeddingLoss())
    with pytest.raises(TypeError, match="EmbeddingLoss: the model is a LoRALinear, expected an Encoder"):
        trainer.fit([(TextBatch([[[1]], [[2]]]), None)])


def test_known_positives_are_left_out_of_nested_matryoshka_losses(model: Path) -> None:
    """Both anchors are equal, so no text is a negative, and the loss is 0 at each width."""
    encoder = adapted(model)
    x = TextBatch([encoder.encode(["a cat", "a cat"]), encoder.encode(["the cat", "the dog"])])
    nested = EmbeddingLoss(MatryoshkaLoss(RankingLoss(), (16,)), dims=(16,))
    assert nested.evaluate(encoder, x, None) == 0


# ---- data ----


def directory_of(path: Path, **splits: list[dict[str, str]]) -> Path:
    path.mkdir()
    for name, rows in splits.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_files_become_examples_and_long_texts_are_cut_and_counted(
    model: Path, tmp_path: Path
) -> None:
    encoder = nplora.load_encoder(model)
    rows = [*ROWS, {"anchor": "a " * 100, "positive": "the dog"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(path, encoder)
    words = str(examples.report)
    assert words.endswith("pairs.jsonl: 5 examples, 13 different texts, 94 tokens; 1 text cut to 32 tokens")
    assert examples.report.tokens == sum(map(len, examples.texts()))
    batch, scores = examples.batch([4, 0])
    assert scores is None
    assert [len(column) for column in batch.columns] == [2, 2, 1]
    assert len(batch.columns[0][0]) == encoder.max_length  # type: ignore[arg-type]
    assert list(batch.columns[2][0]) == encoder.encode(["the cat sat"])[0]  # type: ignore[call-overload]
    table = tmp_path / "pairs.csv"
    table.write_text("question,answer\na cat,the cat\n")
    read = read_examples(table, encoder, columns={"anchor": "question", "positive": "answer"})
    assert [list(ids) for ids in read.texts()] == encoder.encode(["a cat", "the cat"])
    prompted = read_examples(ROWS[:1], encoder, prompts={"anchor": "query : "})
    wanted = encoder.encode(["query : where is my parcel", "delivery is late", "the cat sat"])
    assert [list(ids) for ids in prompted.texts()] == wanted


@pytest.mark.parametrize(
    ("loss", "row", "words"),
    [
        ("ranking", {"anchor": "a"}, "positive is missing; the row has"),
        ("ranking", {"anchor": " ", "positive": "a"}, "anchor is empty, expected a text"),
        ("ranking", {"anchor": 3, "positive": "a"}, "anchor is 3, expected a string"),
        ("ranking", {"anchor": "a", "positive": "b", "negatives": "c"}, "negatives is 'c', expected a list"),
        ("ranking", {"anchor": "a", "positive": "b", "negatives": ["c", ""]}, r"negatives\[1\] is ''"),
        ("triplet", {"anchor": "a", "positive": "b"}, "negative is missing"),
        ("cosine", {"sentence1": "a", "sentence2": "b"}, "score is missing"),
        ("cosine", {"sentence1": "a", "sentence2": "b", "score": "high"}, "score is 'high', expected"),
        ("cosine", {"sentence1": "a", "sentence2": "b", "score": True}, "score is True, expected a number"),
        ("cosent", {"sentence1": "a", "sentence2": "b", "score": "nan"}, "score is 'nan', expected a number"),
        ("cosent", {"sentence1": "a", "sentence2": "b", "score": 1e39}, r"score is 1e\+39, expected"),
        ("cosine", {"sentence1": "a", "sentence2": "b", "score": 5}, "score is 5, but a cosine is from"),
    ],
)  # fmt: skip
def test_a_bad_row_names_its_file_and_line(
    model: Path, tmp_path: Path, loss: str, row: dict[str, Any], words: str
) -> None:
    encoder = nplora.load_encoder(model)
    good = {**ROWS[0], "sentence1": "a", "sentence2": "b", "score": "0.5"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"pairs.jsonl, line 2: {words}"):
        read_examples(path, encoder, loss)
    examples = read_examples(path, encoder, loss, skip_bad=True)
    assert (len(examples), examples.report.skipped) == (1, 1)
    assert "line 2" in str(examples.report)


def test_wrong_arguments_of_the_reader_are_refused(model: Path, tmp_path: Path) -> None:
    encoder = nplora.load_encoder(model)
    with pytest.raises(ValueError, match="columns has 'question', expected one of anchor, positive"):
        read_examples(ROWS, encoder, columns={"question": "anchor"})
    with pytest.raises(ValueError, match="prompts has 'query', expected one of anchor, positive"):
        read_examples(ROWS, encoder, prompts={"query": "q: "})
    wrong: Any = 5
    with pytest.raises(TypeError, match="read_examples: prompts is a int, expected a dictionary"):
        read_examples(ROWS, encoder, prompts=wrong)
    with pytest.raises(TypeError, match=r"prompts\['anchor'\] is a int, expected a text"):
        read_examples(ROWS, encoder, prompts={"anchor": wrong})
    with pytest.raises(TypeError, match=r"columns\['anchor'\] is a int, expected a text"):
        read_examples(ROWS, encoder, columns={"anchor": wrong})
    with pytest.raises(TypeError, match="read_examples: columns is a int, expected a dictionary"):
        read_examples(ROWS, encoder, columns=wrong)
    with pytest.raises(TypeError, match="evaluate_retrieval: k is 5, expected a list of numbers"):
        evaluate_retrieval(encoder, {"q": "a"}, {"d": "a"}, {"q": ["d"]}, k=wrong)
    path = tmp_path / "text.txt"
    path.write_text("a cat\n")
    with pytest.raises(DataError, match=r"text.txt, line 1: a plain text has no pairs"):
        read_examples(path, encoder)
    with pytest.raises(DataError, match=r"data: no rows to train on; 1 bad row skipped \(data, row 1"):
        read_examples([{"anchor": ""}], encoder, skip_bad=True)


def test_columns_may_be_named_in_one_text(model: Path) -> None:
    rows = [{"q": "a cat", "positive": "the cat"}]
    assert len(read_examples(rows, nplora.load_encoder(model), columns="anchor=q")) == 1


def test_the_training_split_is_trained_on_and_the_validation_split_is_measured(
    model: Path, tmp_path: Path
) -> None:
    encoder = nplora.load_encoder(model)
    both = directory_of(tmp_path / "both", train=ROWS[:3], valid=ROWS[3:])
    splits = {"train": ROWS[:3], "validation": ROWS[3:]}
    for number, data in enumerate((both, splits)):
        assert len(read_examples(data, encoder)) == 3
        result = train(model, data, tmp_path / f"{number}", steps=1)
        assert result.valid is not None
        assert (result.train.examples, result.valid.examples) == (3, 1)
        assert result.history.best_loss is not None
    other = train(model, ROWS, tmp_path / "other", valid=both, steps=1)
    assert other.valid is not None
    assert (other.train.examples, other.valid.examples) == (4, 1)
    scored = [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(5)]
    found = evaluate_similarity(encoder, {"train": scored, "validation": scored[:2]})
    assert found["pairs"] == 2


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(model: Path) -> None:
    examples = read_examples(ROWS, nplora.load_encoder(model))
    batches = ExampleBatches(examples, batch_size=3, seed=1)
    assert batches.length == 2
    orders = []
    for epoch in range(4):
        found = [tuple(ids) for batch, _ in batches.epoch(epoch) for ids in batch.columns[0]]  # type: ignore[arg-type]
        assert len(set(found)) == 4
        orders.append(found)
    assert len({tuple(order) for order in orders}) > 1
    rest = [batch.columns for batch, _ in batches.epoch(2, skip=1)]
    assert len(rest) == 1
    assert batches.identity() != ExampleBatches(examples, batch_size=3, seed=2).identity()


# ---- measures ----


def test_spearman_has_the_mean_rank_for_equal_values(rng: np.random.Generator) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = rng.integers(0, 6, 40), rng.integers(0, 6, 40)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert spearman(x, 3 * x + 1) == pytest.approx(1)
    assert np.isnan(spearman(x, np.ones(40)))
    with pytest.raises(ValueError, match=r"expected two arrays \(n,\), n >= 2"):
        spearman([1, 2], [1, 2, 3])


def test_similarities_are_measured_with_cosines(model: Path) -> None:
    encoder = nplora.load_encoder(model)
    texts = [("a cat", "the cat"), ("my parcel", "the mat"), ("a dog", "return an order"), ("late", "late")]
    scores = [0.9, 0.1, 0.4, 0.9]
    rows = [{"sentence1": a, "sentence2": b, "score": s} for (a, b), s in zip(texts, scores, strict=True)]
    found = evaluate_similarity(encoder, rows, dim=12)
    first, second = (encoder.embed(list(side), normalize=False)[:, :12] for side in zip(*texts, strict=True))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    assert found["spearman"] == pytest.approx(spearman(cosines, scores))
    assert found["pearson"] == pytest.approx(np.corrcoef(cosines, scores)[0, 1], abs=1e-5)
    assert found["pairs"] == 4


def plain_scores(order: list[int], grades: dict[int, float], k: int) -> dict[str, float]:
    """The scores of one query, by their definitions."""
    gains = [grades.get(i, 0.0) for i in order[:k]]
    best = sorted(grades.values(), reverse=True)[:k]
    discounted = [sum(g / np.log2(i + 2) for i, g in enumerate(each)) for each in (gains, best)]
    ranks = [i for i, gain in enumerate(gains) if gain > 0]
    return {
        "recall": len(ranks) / len(grades),
        "precision": len(ranks) / k,
        "ndcg": discounted[0] / discounted[1],
        "mrr": 1 / (ranks[0] + 1) if ranks else 0,
        "accuracy": float(bool(ranks)),
    }


@pytest.mark.parametrize("k", [1, 3, 20])
def test_scores_of_a_search_are_those_of_their_definitions(
    model: Path, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_DOCUMENTS", 3)
    monkeypatch.setattr(measures, "_QUERIES", 2)
    encoder = nplora.load_encoder(model)
    corpus = {f"d{i}": f"{a} {b}" for i, (a, b) in enumerate(zip(WORDS[5:15], WORDS[20:30], strict=True))}
    queries = {"q1": "a cat", "q2": "where is my parcel", "none": "the mat", "q3": "delivery refund"}
    relevant: dict[str, Any] = {"q3": ["d9"], "q1": {"d0": 2, "d4": 1, "d7": 3, "d8": 0}, "q2": {"d2", "d5"}}
    found = evaluate_retrieval(encoder, queries, corpus, {**relevant, "none": []}, k=[k, 2])
    stored = encoder.embed(list(corpus.values()))
    wanted = []
    for name, given in relevant.items():
        cosines = stored @ encoder.embed(queries[name])
        order = np.argsort(-cosines, kind="stable").tolist()
        graded = given.items() if isinstance(given, dict) else [(each, 1.0) for each in given]
        grades = {int(each[1:]): grade for each, grade in graded if grade > 0}
        wanted.append(plain_scores(order, grades, k))
    for name in wanted[0]:
        mean = np.mean([each[name] for each in wanted])
        assert found.as_dict()[f"{name}@{k}"] == pytest.approx(mean), name
    assert (found.queries, found.documents) == (3, 10)


@pytest.mark.parametrize("k", [1, 3, 7, 40, 100])
def test_the_nearest_rows_are_those_of_a_stable_sort(
    k: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small whole numbers have exact products, many of which are equal."""
    monkeypatch.setattr(measures, "_DOCUMENTS", 17)
    queries, corpus = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (9, 60))
    wanted = np.argsort(-(queries @ corpus.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(measures.nearest(queries, corpus, k), wanted)


def test_embeddings_that_are_not_finite_are_not_measured(model: Path) -> None:
    encoder = adapted(model)
    encoder.adapter_layers()["encoder.layer.1.output.dense"].A[...] = np.nan  # type: ignore[attr-defined]
    rows = [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(2)]
    with pytest.raises(ValueError, match="evaluate_similarity: an embedding of the model has NaN"):
        evaluate_similarity(encoder, rows)
    with pytest.raises(ValueError, match="evaluate_retrieval: an embedding of the model has NaN"):
        evaluate_retrieval(encoder, {"q": "a"}, {"d": "a"}, {"q": ["d"]})


def test_a_path_is_refused_where_a_loaded_model_is_expected(model: Path) -> None:
    words = "encoder is .*, expected an encoder, as load_encoder returns it"
    with pytest.raises(TypeError, match=f"evaluate_retrieval: {words}"):
        evaluate_retrieval(str(model), {"q": "a"}, {"d": "a"}, {"q": ["d"]})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"evaluate_similarity: {words}"):
        evaluate_similarity(model, [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"new_classifier: {words}"):
        nplora.new_classifier(str(model), ["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"evaluate_classifier: classifier is .*, expected a classifier"):
        nplora.finetuning.evaluate_classifier(str(model), [])  # type: ignore[arg-type]


def test_one_pair_has_no_correlation(model: Path) -> None:
    rows = [{"sentence1": "a cat", "sentence2": "a dog", "score": 1.0}]
    with pytest.raises(ValueError, match="there is only one pair of texts, expected at least two"):
        evaluate_similarity(nplora.load_encoder(model), rows)


def test_unknown_names_of_a_search_are_refused(model: Path) -> None:
    encoder = nplora.load_encoder(model)
    queries, corpus = {"q": "a cat"}, {"d": "a dog"}
    with pytest.raises(KeyError, match="which is not in the corpus"):
        evaluate_retrieval(encoder, queries, corpus, {"q": ["e"]})
    with pytest.raises(KeyError, match="which is not in queries"):
        evaluate_retrieval(encoder, queries, corpus, {"p": ["d"]})
    with pytest.raises(ValueError, match="no query has a relevant document"):
        evaluate_retrieval(encoder, queries, corpus, {"q": []})
    with pytest.raises(TypeError, match="expected names of documents"):
        evaluate_retrieval(encoder, queries, corpus, {"q": "d"})
    lists: list[tuple[str, Any]] = [("queries", ["a cat"]), ("corpus", ["a dog"]), ("relevant", ["d"])]
    for name, value in lists:
        given: dict[str, Any] = {"queries": queries, "corpus": corpus, "relevant": {"q": ["d"]}, name: value}
        with pytest.raises(TypeError, match=f"{name} is .*, expected a dict whose keys are names"):
            evaluate_retrieval(encoder, **given)


# ---- runs ----


@pytest.mark.slow
def test_a_run_learns_the_pairs_and_its_adapter_gives_equal_embeddings(model: Path, tmp_path: Path) -> None:
    queries = {i: row["anchor"] for i, row in enumerate(ROWS)}
    corpus = {i: row["positive"] for i, row in enumerate(ROWS)}
    relevant = {i: [i] for i in queries}
    result = train(model, ROWS, tmp_path / "out", valid=ROWS, lr=1e-2, epochs=30, batch_size=2, dropout=0.1)
    assert len(result.history.steps) == 60
    assert evaluate_retrieval(result.encoder, queries, corpus, relevant, k=[1]).recall[1] == 1
    assert result.history.best_loss is not None
    assert result.history.best_loss < 0.1
    encoder = nplora.load_encoder(model)
    nplora.read_adapter(tmp_path / "out").attach(encoder)
    texts = [row["anchor"] for row in ROWS]
    np.testing.assert_array_equal(encoder.embed(texts), result.encoder.embed(texts))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_a_run_without_a_stop(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "batch_size": 3, "dropout": 0.2, "micro_tokens": 20}

    class Stop(nplora.trainer.Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            if record.step == 3:
                raise OSError("stop")

    whole = train(model, ROWS, tmp_path / "whole", epochs=4, **options)
    with pytest.raises(OSError, match="stop"):
        train(model, ROWS, tmp_path / "out", epochs=4, callbacks=[Stop()], **options)
    again = train(model, ROWS, tmp_path / "out", epochs=4, resume=True, **options)
    assert len(again.history.steps) == 8
    for one, other in zip(whole.encoder.parameters(), again.encoder.parameters(), strict=True):
        np.testing.assert_array_equal(one.value, other.value)


@pytest.mark.slow
def test_a_run_in_int8_learns_and_compares_its_gradients(model: Path, tmp_path: Path) -> None:
    train(model, ROWS, tmp_path / "out", lr=1e-2, epochs=30, batch_size=2, compute="int8")
    encoder = nplora.load_encoder(model)  # in float32
    nplora.read_adapter(tmp_path / "out").attach(encoder)
    columns = [encoder.embed([row[name] for row in ROWS], normalize=True) for name in ("anchor", "positive")]
    assert ((columns[0] @ columns[1].T).argmax(axis=1) == np.arange(len(ROWS))).all()
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    (row,) = (row for row in log if row["event"] == "int8")
    assert 0.95 < row["cosine"] < 1  # 1 would be a run in bfloat16


def test_a_run_that_keeps_weights_in_int8_trains_the_same_adapter(model: Path, tmp_path: Path) -> None:
    adapters = []
    for keeps in (False, True):
        options: dict[str, Any] = {"compute": "int8", "keep_int8": keeps, "steps": 3, "batch_size": 2}
        kept = KeptWeights()
        run = train(model, ROWS, tmp_path / str(keeps), callbacks=[kept], **options)
        blocks = [weight.int8_nbytes for weight in frozen_weights(run.encoder.model.layers)]
        assert kept.nbytes == 3 * [keeps * sum(blocks)]
        assert not any(weight.keeps_int8 for weight in frozen_weights([run.encoder]))  # after the run
        adapters.append(Path(run.output, "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_a_resumed_run_may_keep_weights_and_a_finished_one_converts_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"compute": "int8", "batch_size": 2}
    train(model, ROWS, tmp_path / "whole", steps=4, **options)
    with pytest.raises(OSError, match="the power is gone"):
        train(model, ROWS, tmp_path / "cut", steps=4, save_every=2, callbacks=[FailingStep(3)], **options)
    options |= {"compute": None, "keep_int8": True, "resume": True, "steps": 4}  # the run stays in int8
    train(model, ROWS, tmp_path / "cut", save_every=2, progress=True, **options)
    assert "cut: the run still uses --compute int8" in capsys.readouterr().err
    files = [Path(tmp_path, name, "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    monkeypatch.setattr(nplora.FrozenWeight, "keep_int8", None)  # a call would fail
    train(model, ROWS, tmp_path / "cut", save_every=2, **options)


@pytest.mark.parametrize("count", [1, 8, 501])
def test_pairs_of_labels_have_the_scores_of_their_labels(count: int) -> None:
    texts = [f"{label} {i}" for label, number in (("a", 5), ("b", 2), ("c", 1)) for i in range(number)]
    rows = label_pairs([*texts, "a 0"], [text[0] for text in texts] + ["a"], count, seed=1)
    assert len(rows) == count
    for row in rows:
        assert row["sentence1"] != row["sentence2"]
        assert row["score"] == (row["sentence1"][0] == row["sentence2"][0])
    assert [row["score"] for row in rows] == [1.0 - i % 2 for i in range(count)]
    if count > 100:
        assert {row[name] for row in rows for name in ("sentence1", "sentence2")} == set(texts)
        alike = [row["sentence1"][0] for row in rows[::2]]
        assert 0.35 < alike.count("b") / len(alike) < 0.65  # "c" has only one text
        assert {row["sentence1"][0] + row["sentence2"][0] for row in rows[1::2]} == {
            "ab", "ac", "ba", "bc", "ca", "cb"
        }  # fmt: skip
        assert rows != label_pairs(texts, [text[0] for text in texts], count, seed=2)
    assert rows == label_pairs(texts, [text[0] for text in texts], count, seed=1)


def test_a_text_with_two_labels_makes_no_pair_with_itself() -> None:
    rows = label_pairs(["a", "b", "a", "c"], [0, 0, 1, 1], 200)
    assert all(row["sentence1"] != row["sentence2"] for row in rows)
    assert {row["sentence1"] + row["sentence2"] for row in rows[1::2]} == {"ac", "ba", "bc", "ca", "ab", "cb"}


@pytest.mark.parametrize(
    ("texts", "labels", "error", "words"),
    [
        (["a", "b"], [1], ValueError, "there are 2 texts, but 1 label$"),
        (["a", "b"], [1, 1], ValueError, "there are fewer than two different labels"),
        (["a", "a", "b"], [1, 1, 2], ValueError, "no label has two different texts"),
        (["a", 2, "b"], [1, 1, 2], TypeError, r"texts\[1\] is .*, expected a text"),
        ("ab", [1, 2], TypeError, "texts is .*, expected a list of texts"),
        (None, [1, 2], TypeError, "texts is a NoneType, expected a list of texts"),
        (["a", "b"], "xy", TypeError, "labels is .*, expected a list of labels"),
        (["a", "b"], [np.ones(2), 2], TypeError, r"labels\[0\] is .*, expected a text or a number"),
        (["a", "b"], [[1], [2]], TypeError, r"labels\[0\] is .*, expected a text or a number"),
        (["a", " ", "b"], [1, 1, 2], ValueError, r"texts\[1\] is empty"),
        ([], [], ValueError, "there are fewer than two different labels"),
        (["a", "b", "c"], [1, None, 1], ValueError, r"labels\[1\] is missing: it is None"),
        (["a", "b", "c"], [1, 1, float("nan")], ValueError, r"labels\[2\] is missing: it is nan"),
    ],
)
def test_labels_that_give_no_pairs_are_refused(
    texts: Any, labels: list[int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"label_pairs: {words}"):
        label_pairs(texts, labels)


def test_weights_are_kept_only_with_int8(model: Path, tmp_path: Path) -> None:
    words = "train: keep_int8 needs compute='int8', but compute is 'bfloat16'"
    encoder = nplora.load_encoder(model, compute="bfloat16")
    for given in (encoder, model):
        with pytest.raises(ValueError, match=words):
            train(given, ROWS, tmp_path, compute=None if given is encoder else "bfloat16", keep_int8=True)
    with pytest.raises(TypeError, match="train: keep_int8 is 'no', expected True or False"):
        train(model, ROWS, tmp_path, compute="int8", keep_int8="no")  # type: ignore[arg-type]


def test_a_run_continues_in_another_arithmetic_if_this_is_asked_for(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "steps": 2, "lr": 1e-3}
    train(model, ROWS, tmp_path / "out", **options)
    options |= {"compute": "bfloat16", "resume": True, "steps": 3}
    with pytest.raises(ValueError, match=r"compute was float32, is bfloat16 .*; --change-compute"):
        train(model, ROWS, tmp_path / "out", **options)
    with (
        pytest.warns(UserWarning, match="total_steps was 2, is 3"),
        pytest.warns(UserWarning, match="another arithmetic: compute was float32, is bfloat16"),
    ):
        train(model, ROWS, tmp_path / "out", change_compute=True, **options)


@pytest.mark.parametrize(("words", "expected"), [(3, 16), (25, 9), (62, 5)])
def test_the_gradients_of_about_512_tokens_are_compared(
    words: int, expected: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pairs have nine texts or more, so that no product has so few rows that it is always in int8."""
    encoder = adapted(model)
    rows = [{"anchor": "cat " * words, "positive": f"{WORDS[15 + i % 9]} " * words} for i in range(20)]
    examples, loss, used = read_examples(rows, encoder, max_length=64), EmbeddingLoss(), list[int]()
    monkeypatch.setattr(loss, "forward_backward", lambda _, x, *__: used.append(len(x)) or 0.0)
    loss.sample_gradient(encoder, examples)()
    assert used == [expected]


def test_a_sample_whose_loss_is_not_finite_is_not_compared(model: Path) -> None:
    encoder = nplora.load_encoder(model, compute="int8")
    encoder.add_lora(rank=2, init="gaussian")
    encoder.adapter_layers()["encoder.layer.1.output.dense"].A[...] = np.inf  # type: ignore[attr-defined]
    loss, said, log = EmbeddingLoss(), list[str](), list[Any]()
    check = Int8Check(encoder, loss.sample_gradient(encoder, read_examples(ROWS, encoder)), said.append)
    run: Any = SimpleNamespace(step=1, ranks=Alone(), log=lambda *row: log.append(row))
    with np.errstate(all="ignore"):
        check.on_step_end(run, None)  # type: ignore[arg-type]
    assert said == ["step 1: the sample's gradients in int8 and bfloat16 are not compared: the loss is nan"]
    assert not log
    assert all(layer.int8 for _, layer in int8_layers(encoder))


def test_int8_without_vector_instructions_is_warned_of(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**_core.config(), "isa": "generic"}
    monkeypatch.setattr(_core, "config", lambda: here)
    with pytest.warns(UserWarning, match="train: compute='int8' is about 8 times slower than 'float32' here"):
        train(model, ROWS, tmp_path / "out", steps=1, batch_size=2, compute="int8")


@pytest.mark.slow
def test_every_loss_trains_on_its_rows(model: Path, tmp_path: Path) -> None:
    scored = [{"sentence1": "a cat", "sentence2": "the cat", "score": 1.0},
              {"sentence1": "a cat", "sentence2": "my parcel", "score": 0.0}]  # fmt: skip
    ranking = RankingLoss(scale=50, symmetric=True)
    for loss, rows in [("triplet", ROWS), ("cosine", scored), ("cosent", scored), (ranking, ROWS)]:
        options: dict[str, Any] = {
            "loss": loss,
            "lr": 1e-2,
            "epochs": 20,
            "dims": (32, 16),
            "overwrite": True,
        }
        losses = train(model, rows, tmp_path / "out", **options).history.loss
        assert losses[-1] < 0.7 * losses[0], loss


def test_a_directory_that_is_in_use_is_refused_before_the_run(model: Path, tmp_path: Path) -> None:
    def files(directory: Path) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    encoder = nplora.load_encoder(model)
    before = files(model)
    with pytest.raises(FileExistsError, match="the directory holds a model"):
        train(encoder, ROWS, model, steps=1)
    assert files(model) == before
    assert not encoder.adapter_layers()
    out = tmp_path / "out"
    nplora.save_adapter(adapted(model), out)
    before = files(out)
    with pytest.raises(FileExistsError, match="the directory holds an adapter but no run"):
        train(model, ROWS, out, steps=1)
    assert files(out) == before
    assert train(model, ROWS, out, steps=1, overwrite=True).output == out
    with pytest.raises(FileExistsError, match="the directory holds a run"):
        train(model, ROWS, out, steps=1)
    data = tmp_path / "data"
    data.mkdir()
    (data / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ValueError, match=r"train: .*log.jsonl is the data itself"):
        train(model, data / "log.jsonl", data, steps=1, overwrite=True)
    assert len((data / "log.jsonl").read_text().splitlines()) == len(ROWS)


def test_an_encoder_with_an_adapter_is_trained_further_and_refuses_another_adapter(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = adapted(model)
    with pytest.raises(ValueError, match="train: rank, layers can be given only for a new adapter, but the"):
        train(encoder, ROWS, tmp_path / "out", rank=4, layers="last:1", steps=1)
    result = train(encoder, ROWS, tmp_path / "out", steps=1, progress=True)
    assert result.encoder is encoder
    assert "the encoder has an adapter on 12 layers, which is trained further" in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    with pytest.raises(ValueError, match="train: compute='bfloat16' is given, but the encoder is loaded"):
        train(encoder, ROWS, tmp_path / "other", compute="bfloat16", steps=1)


def test_options_of_the_adapter_and_of_the_checkpoints_have_their_effect(model: Path, tmp_path: Path) -> None:
    steps = list[int]()

    class Watch(nplora.trainer.Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            steps.append(record.step)

    result = train(
        model, ROWS, tmp_path / "out", layers="last:1", use_dora=True, use_rslora=True, init="gaussian",
        compute="bfloat16", save_every=1, keep="last", valid=ROWS, steps=2, callbacks=[Watch()],
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (True, True)
    names = list(result.encoder.adapter_layers())
    assert len(names) == 6
    assert all(name.startswith("encoder.layer.1.") for name in names)
    assert all(layer.A.any() for layer in result.encoder.adapter_layers().values())  # type: ignore[attr-defined]
    layer = dict(result.encoder.named_modules())[names[0]]
    assert layer.weight.compute == "bfloat16"  # type: ignore[attr-defined]
    assert steps == [1, 2]
