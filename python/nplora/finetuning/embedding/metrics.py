"""Metrics of embeddings: Spearman's rank correlation of scored pairs; recall, nDCG and MRR of a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.data.sources import Data, sources_of
from nplora.finetuning.embedding.examples import read_sources
from nplora.formats.errors import brief
from nplora.lm import Encoder
from nplora.lm.encoder import require_encoder
from nplora.weights import FrozenWeight

Array = npt.NDArray[Any]

_QUERIES = 256  # queries that are searched at once
_DOCUMENTS = 16384  # documents that are searched at once


def pearson(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Pearson's correlation of two arrays (n,). If all values of an array are equal, the result is NaN.

    >>> import nplora
    >>> nplora.embedding.pearson([1, 2, 3], [2, 4, 6])
    1.0
    """
    a, b = _two("pearson", x, y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float(np.clip((a * b).sum() / scale, -1, 1)) if scale > 0 else float("nan")


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two arrays (n,). Equal values all get the mean of their ranks.

    >>> import nplora
    >>> nplora.embedding.spearman([1, 2, 3], [10, 100, 1000])
    1.0
    """
    a, b = _two("spearman", x, y)
    return pearson(_ranks(a), _ranks(b))


def _two(op: str, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Array, Array]:
    a, b = _check.floats(op, "x", x, np.float64), _check.floats(op, "y", y, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"{op}: x has shape {a.shape}, y has {b.shape}, expected two arrays (n,), n >= 2")
    return a, b


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


@_check.keywords
def evaluate_similarity(
    encoder: Encoder,
    data: Data,
    columns: Mapping[str, str] | str | None = None,
    prompts: str | Mapping[str, str] | None = None,
    dim: int | None = None,
    max_length: int | None = None,
) -> dict[str, float]:
    """Measure how well the cosines of pairs of texts agree with the scores that people gave the pairs.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> rows = [
        ...     {"sentence1": "a cat", "sentence2": "the cat", "score": 1.0},
        ...     {"sentence1": "a cat", "sentence2": "my parcel", "score": 0.0},
        ... ]
        >>> sorted(nplora.embedding.evaluate_similarity(encoder, rows))
        ['pairs', 'pearson', 'spearman']

    Args:
        data, columns, prompts, max_length: as in `read_examples`; a row has "sentence1", "sentence2" and
            "score". If `data` is a directory, the validation data are read, or the training data if there are
            no validation data. If `data` is a dictionary of splits, the first of these splits that exists is
            read: validation, test, training.
        dim: use only the first `dim` values of an embedding (Matryoshka); None: all.
    Returns:
        a dict: "spearman" (the usual measure), "pearson", and "pairs", the number of pairs.
    Raises:
        DataError: a row is wrong; the message names the file and the line.
        ValueError: an argument is out of range, or there is only one pair.
    """
    op = "evaluate_similarity"
    require_encoder(op, encoder)
    _require_dim(op, encoder, dim)
    examples = read_sources(op, sources_of(op, data), encoder, "cosent", columns, prompts, max_length)
    if len(examples) < 2:
        raise ValueError(f"{op}: there is only one pair of texts, expected at least two")
    vectors = _units(op, encoder.embed_ids(examples.texts(), normalize=False), dim)
    assert examples.scores is not None
    cosines = (vectors[examples.first] * vectors[examples.second]).sum(axis=1, dtype=np.float64)
    return {
        "spearman": spearman(cosines, examples.scores),
        "pearson": pearson(cosines, examples.scores),
        "pairs": float(len(examples)),
    }


@dataclasses.dataclass(frozen=True)
class RetrievalScores:
    """The scores of a search. Each score is computed for every query, and averaged over the queries.

    Attributes:
        recall: for each k, the share of the relevant documents that are among the first k results.
        precision: for each k, the share of the first k results that are relevant documents.
        ndcg: for each k, the normalised discounted cumulative gain, with linear gains as in trec_eval.
        mrr: for each k, 1 / r, where the first relevant document is result number r (from 1); 0 if r > k.
        accuracy: for each k, the share of the queries that have a relevant document among the first k
            results.
        queries, documents: the numbers of queries and documents.

    >>> import nplora
    >>> encoder, texts = nplora.load_encoder("encoder-model"), {"a": "a cat", "b": "my parcel"}
    >>> print(nplora.embedding.evaluate_retrieval(encoder, texts, texts, {"a": ["a"], "b": ["b"]}, k=[1]))
    2 queries, 2 documents: recall@1 1.0000, precision@1 1.0000, ... accuracy@1 1.0000
    """

    recall: dict[int, float]
    precision: dict[int, float]
    ndcg: dict[int, float]
    mrr: dict[int, float]
    accuracy: dict[int, float]
    queries: int
    documents: int

    def as_dict(self) -> dict[str, float]:
        """A dict from names such as "recall@10" to the scores.

        >>> import nplora
        >>> half = {1: 0.5}
        >>> nplora.embedding.RetrievalScores(half, half, half, half, half, 2, 10).as_dict()["recall@1"]
        0.5
        """
        names = ("recall", "precision", "ndcg", "mrr", "accuracy")
        return {f"{name}@{k}": score for name in names for k, score in getattr(self, name).items()}

    def __str__(self) -> str:
        words = ", ".join(f"{name} {score:.4f}" for name, score in self.as_dict().items())
        return f"{self.queries:,} queries, {self.documents:,} documents: {words}"


Relevant = Mapping[Any, Mapping[Any, float] | Sequence[Any] | set[Any] | frozenset[Any]]


@_check.keywords
def evaluate_retrieval(
    encoder: Encoder,
    queries: Mapping[Any, str],
    corpus: Mapping[Any, str],
    relevant: Relevant,
    k: Sequence[int] = (1, 3, 5, 10),
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    dim: int | None = None,
    batch_size: int | None = None,
) -> RetrievalScores:
    """Measure how well a search by cosines finds the relevant documents.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> queries, corpus = {"q": "where is my parcel"}, {"a": "where is my parcel", "b": "the cat"}
        >>> nplora.embedding.evaluate_retrieval(encoder, queries, corpus, {"q": ["a"]}, k=[1]).recall
        {1: 1.0}

    Args:
        queries, corpus: dicts from names to texts.
        relevant: a dict from the name of each query to its relevant documents. These are a list of document
            names, or a dict from document names to grades above 0. Queries without a relevant document are
            left out.
        k: a list of numbers. For each number k, the scores count only the k best documents that a search
            finds.
        query_prompt, corpus_prompt: texts that precede each query and each document, as in `Encoder.embed`.
        dim: use only the first `dim` values of an embedding (Matryoshka); None: all.
        batch_size: as in `Encoder.embed`.
    Raises:
        ValueError: no query has a relevant document, the corpus is empty, or an argument is out of range.
        TypeError: `queries`, `corpus` or `relevant` is not a dict.
        KeyError: `relevant` has a name that is not in `queries` or `corpus`.
    """
    op = "evaluate_retrieval"
    require_encoder(op, encoder)
    if isinstance(k, str) or not np.iterable(k):
        raise TypeError(f"{op}: k is {brief(k)}, expected a list of numbers such as (1, 10)")
    for name, value in (("queries", queries), ("corpus", corpus), ("relevant", relevant)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{op}: {name} is {_check.kind(value)}, expected a dict whose keys are names")
    places = {name: i for i, name in enumerate(corpus)}
    grades = {name: _grades(op, name, queries, places, given) for name, given in relevant.items()}
    names = [name for name in queries if grades.get(name)]
    if not names:
        raise ValueError(f"{op}: no query has a relevant document in the corpus")
    steps = sorted({_check.integer(op, "k", each, least=1) for each in k})
    if not steps:
        raise ValueError(f"{op}: k is empty, expected at least one number")
    _require_dim(op, encoder, dim)
    asked = _units(op, encoder.embed([queries[name] for name in names], batch_size, False, query_prompt), dim)
    stored = _units(op, encoder.embed(list(corpus.values()), batch_size, False, corpus_prompt), dim)
    found = nearest(asked, stored, steps[-1])
    return _scores(found, [grades[name] for name in names], steps, len(corpus))


def _require_dim(op: str, encoder: Encoder, dim: int | None) -> None:
    if dim is not None:
        _check.integer(op, "dim", dim, 1, encoder.dim)


def _units(op: str, vectors: Array, dim: int | None) -> Array:
    """Cut each embedding to its first `dim` values, and scale the result to norm 1.

    Raises:
        ValueError: an embedding has NaN or infinity, so the metrics would mean nothing.
    """
    if not np.isfinite(vectors).all():
        raise ValueError(f"{op}: an embedding of the model has NaN or infinity, expected finite values")
    cut = vectors if dim is None else np.ascontiguousarray(vectors[:, :dim])
    return np.asarray(cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.float32(1e-12)))


def _grades(
    op: str, query: Any, queries: Mapping[Any, str], places: Mapping[Any, int], given: Any
) -> dict[int, float]:
    """The relevant documents of a query: a dict from a document's index in the corpus to its grade."""
    if query not in queries:
        raise KeyError(f"{op}: relevant has the query {brief(query)}, which is not in queries")
    if isinstance(given, str) or not np.iterable(given):
        raise TypeError(f"{op}: relevant[{brief(query)}] is {brief(given)}, expected names of documents")
    pairs = given.items() if isinstance(given, Mapping) else ((name, 1.0) for name in given)
    grades = {}
    for name, grade in pairs:
        if name not in places:
            raise KeyError(f"{op}: relevant[{brief(query)}] has {brief(name)}, which is not in the corpus")
        if _check.at_least(op, "a grade", grade, 0) > 0:
            grades[places[name]] = float(grade)
    return grades


def nearest(queries: Array, corpus: Array, k: int) -> Array:
    """For each row of `queries`, find the k rows of `corpus` with the largest dot products.

    Return the indices of these rows. Rows with equal dot products are in the order of the corpus.

        >>> import numpy as np
        >>> from nplora.finetuning.embedding.metrics import nearest
        >>> nearest(np.float32([[1, 0]]), np.float32([[0, 1], [2, 0], [1, 0]]), 2)
        array([[1, 2]])

    Returns:
        int64 (queries, min(k, documents)), the best first.
    """
    k = min(k, len(corpus))
    best = np.empty((len(queries), k), np.int64)
    for begin in range(0, len(queries), _QUERIES):
        rows = slice(begin, begin + _QUERIES)
        best[rows] = _nearest_of_few(queries[rows], corpus, k)
    return best


def _nearest_of_few(queries: Array, corpus: Array, k: int) -> Array:
    scores: Array = np.empty((len(queries), 0), np.float32)
    places: Array = np.empty((len(queries), 0), np.int64)
    for begin in range(0, len(corpus), _DOCUMENTS):
        part = corpus[begin : begin + _DOCUMENTS]
        scores = np.concatenate([scores, FrozenWeight(part).matmul(queries)], axis=1)
        own = np.broadcast_to(np.arange(begin, begin + len(part)), (len(queries), len(part)))
        places = np.concatenate([places, own], axis=1)
        order = _largest(scores, k)
        scores, places = (np.take_along_axis(each, order, axis=1) for each in (scores, places))
    return places


def _largest(scores: Array, k: int) -> Array:
    """The indices of the k largest values of each row, the largest first. Equal values keep their order.

    To save time, the function sorts only the k largest values, not the whole row.
    """
    n = scores.shape[1]
    if n <= k:
        return np.argsort(-scores, axis=1, kind="stable")
    least = np.partition(scores, n - k, axis=1)[:, n - k : n - k + 1]
    among = scores >= least
    for row in np.flatnonzero(among.sum(axis=1) > k):  # too many values equal the k-th largest
        equal = np.flatnonzero(scores[row] == least[row])
        among[row, equal[k - among[row].sum() :]] = False
    found = np.nonzero(among)[1].reshape(len(scores), k)
    order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def _scores(
    found: Array, grades: Sequence[Mapping[int, float]], steps: Sequence[int], documents: int
) -> RetrievalScores:
    """Score the search results `found`: a row for each query, with the indices of the best documents."""
    gains = np.array(
        [[grade.get(int(i), 0.0) for i in row] for row, grade in zip(found, grades, strict=True)]
    )
    gains = gains.reshape(len(grades), found.shape[1])
    right = gains > 0
    known = np.array([len(grade) for grade in grades])
    discounts = 1 / np.log2(np.arange(2, 2 + max(steps)))
    ideal = np.zeros((len(grades), max(steps)))
    for row, grade in zip(ideal, grades, strict=True):
        best = sorted(grade.values(), reverse=True)[: max(steps)]
        row[: len(best)] = best
    first = np.where(right.any(axis=1), right.argmax(axis=1), max(steps))
    scores = RetrievalScores({}, {}, {}, {}, {}, len(grades), documents)
    for k in steps:
        hits, width = right[:, :k].sum(axis=1), min(k, found.shape[1])
        scores.recall[k] = float((hits / known).mean())
        scores.precision[k] = float(hits.mean() / k)
        gained = (gains[:, :k] * discounts[:width]).sum(axis=1)
        scores.ndcg[k] = float((gained / (ideal[:, :k] * discounts[:k]).sum(axis=1)).mean())
        scores.mrr[k] = float(np.where(first < k, 1 / (first + 1), 0).mean())
        scores.accuracy[k] = float((hits > 0).mean())
    return scores
