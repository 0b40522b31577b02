"""Losses of embeddings, against torch in float64, and against sentence-transformers if it is installed."""

from typing import Any

import numpy as np
import pytest

from nplora.nn import embedding_losses
from nplora.nn.embedding_losses import CoSENTLoss, CosineLoss, MatryoshkaLoss, RankingLoss, TripletLoss

Array = np.ndarray[Any, Any]
N, DIM = 7, 6


def torch_ranking(scale: float = 20.0, symmetric: bool = False, left_out: Array | None = None) -> Any:
    import torch
    from torch.nn.functional import cross_entropy, normalize

    def loss(columns: list[Any], targets: Any) -> Any:
        a, c = normalize(columns[0], dim=1), normalize(torch.cat(columns[1:]), dim=1)
        scores, own = scale * a @ c.T, torch.arange(len(a))
        if left_out is not None:
            scores = scores.masked_fill(torch.from_numpy(left_out), -torch.inf)
        value = cross_entropy(scores, own)
        return (value + cross_entropy(scores[:, : len(a)].T, own)) / 2 if symmetric else value

    return loss


def torch_triplet(margin: float, distance: str) -> Any:
    from torch.nn import functional

    def between(x: Any, y: Any) -> Any:
        if distance == "cosine":
            return 1 - functional.cosine_similarity(x, y)
        return (x - y).norm(p=2 if distance == "euclidean" else 1, dim=1)

    def loss(columns: list[Any], targets: Any) -> Any:
        a, p, n = columns
        return functional.relu(between(a, p) - between(a, n) + margin).mean()

    return loss


def torch_cosine(columns: list[Any], targets: Any) -> Any:
    from torch.nn.functional import cosine_similarity

    return ((cosine_similarity(*columns) - targets) ** 2).mean()


def torch_cosent(columns: list[Any], targets: Any) -> Any:
    import torch

    cosines = 20 * torch.nn.functional.cosine_similarity(*columns)
    terms = [torch.zeros(1, dtype=torch.float64)]
    for i, j in np.ndindex(N, N):
        if targets[i] < targets[j]:
            terms.append((cosines[i] - cosines[j])[None])
    return torch.logsumexp(torch.cat(terms), 0)


def torch_matryoshka(inner: Any, weights: dict[int, float]) -> Any:
    from torch.nn.functional import normalize

    def loss(columns: list[Any], targets: Any) -> Any:
        return sum(
            weight * inner([normalize(x[:, :dim], dim=1) for x in columns], targets)
            for dim, weight in weights.items()
        )

    return loss


LEFT_OUT = np.random.default_rng(5).uniform(size=(N, N + 3)) < 0.3
LEFT_OUT[np.arange(N), np.arange(N)] = False

CASES: dict[str, tuple[Any, Any, list[int], Any]] = {
    "pairs": (RankingLoss(), torch_ranking, [N, N], None),
    "negatives": (RankingLoss(scale=7), lambda: torch_ranking(7), [N, N, 3], None),
    "symmetric": (RankingLoss(symmetric=True), lambda: torch_ranking(symmetric=True), [N, N, 3], None),
    "left out": (RankingLoss(), lambda: torch_ranking(left_out=LEFT_OUT), [N, N, 3], LEFT_OUT),
    "left out, symmetric": (
        RankingLoss(symmetric=True),
        lambda: torch_ranking(left_out=LEFT_OUT[:, :N], symmetric=True),
        [N, N],
        LEFT_OUT[:, :N],
    ),
    "euclidean": (TripletLoss(0.5), lambda: torch_triplet(0.5, "euclidean"), [N] * 3, None),
    "manhattan": (TripletLoss(0.5, "manhattan"), lambda: torch_triplet(0.5, "manhattan"), [N] * 3, None),
    "cosine triplet": (TripletLoss(0.5, "cosine"), lambda: torch_triplet(0.5, "cosine"), [N] * 3, None),
    "cosine": (CosineLoss(), lambda: torch_cosine, [N, N], "scores"),
    "cosent": (CoSENTLoss(), lambda: torch_cosent, [N, N], "scores"),
    "matryoshka ranking": (
        MatryoshkaLoss(RankingLoss(), (6, 3, 2), (1.0, 0.5, 0.25)),
        lambda: torch_matryoshka(torch_ranking(), {6: 1.0, 3: 0.5, 2: 0.25}),
        [N, N, 3],
        None,
    ),
    "matryoshka cosine": (
        MatryoshkaLoss(CosineLoss(), (4, 1)),
        lambda: torch_matryoshka(torch_cosine, {4: 1.0, 1: 1.0}),
        [N, N],
        "scores",
    ),
}


def test_cosent_of_a_large_batch_needs_no_array_of_all_pairs(rng: np.random.Generator) -> None:
    import tracemalloc

    n = 2000
    columns, scores = [rng.standard_normal((n, 2), np.float32) for _ in range(2)], rng.uniform(size=n)
    tracemalloc.start()
    CoSENTLoss()(columns, scores)
    assert tracemalloc.get_traced_memory()[1] < n * n
    tracemalloc.stop()


@pytest.mark.parametrize("scale", [1.0, 5000.0])
def test_cosent_is_finite_for_any_scale_and_keeps_nan(scale: float) -> None:
    """The loss is log(1 + exp(2 * scale)). It overflows unless it is summed as a logarithm."""
    columns = [np.float64([[1, 0], [1, 0]]), np.float64([[-1, 0], [1, 0]])]
    loss, gradients = CoSENTLoss(scale)(columns, np.float64([1, 0]))
    assert loss == pytest.approx(np.logaddexp(0, 2 * scale))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.isnan(CoSENTLoss(scale)(columns, np.float64([1, np.nan]))[0])
    assert np.isnan(CoSENTLoss(scale)([columns[0], columns[1] * np.nan], np.float64([1, 1]))[0])


def problem(sizes: list[int], targets: Any, rng: np.random.Generator) -> tuple[list[Array], Any]:
    columns = [rng.standard_normal((size, DIM)) for size in sizes]
    return columns, np.round(8 * rng.uniform(size=N)) / 8 if isinstance(targets, str) else targets


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_torch(name: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    loss, make, sizes, targets = CASES[name]
    columns, targets = problem(sizes, targets, rng)
    inputs = [torch.tensor(x, requires_grad=True) for x in columns]
    wanted = make()(inputs, torch.tensor(targets) if isinstance(targets, np.ndarray) else None)
    wanted.backward()
    value, gradients = loss(columns, targets)
    assert value == pytest.approx(float(wanted.detach()), rel=1e-9)
    single, rounded = loss([x.astype(np.float32) for x in columns], targets)
    assert single == pytest.approx(float(wanted.detach()), rel=1e-5)
    for gradient, small, x in zip(gradients, rounded, inputs, strict=True):
        assert (gradient.dtype, small.dtype) == (np.float64, np.float32)
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(small, x.grad.numpy(), rtol=0, atol=1e-5)


def test_many_rows_are_computed_in_blocks_with_the_same_result(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = [rng.standard_normal((40, DIM)), rng.standard_normal((40, DIM)), rng.standard_normal((3, DIM))]
    left_out = rng.uniform(size=(40, 43)) < 0.2
    whole = RankingLoss(symmetric=True)(columns, left_out)
    monkeypatch.setattr(embedding_losses, "_ROWS", 16)
    blocks = RankingLoss(symmetric=True)(columns, left_out)
    assert blocks[0] == pytest.approx(whole[0], rel=1e-13)
    for one, other in zip(blocks[1], whole[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-13)


def test_an_own_positive_is_never_left_out(rng: np.random.Generator) -> None:
    columns = [rng.standard_normal((N, DIM)) for _ in range(2)]
    loss, gradients = RankingLoss()(columns, np.ones((N, N), np.bool_))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_nan_makes_the_loss_nan(name: str, rng: np.random.Generator) -> None:
    loss, _, sizes, targets = CASES[name]
    columns, targets = problem(sizes, targets, rng)
    columns[1][2, 0] = np.nan
    assert np.isnan(loss(columns, targets)[0])


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, DIM))
    for call, words in [
        (lambda: RankingLoss(scale=0), "scale is 0, expected above 0"),
        (lambda: TripletLoss(distance="far"), "distance='far' is not available"),
        (lambda: RankingLoss()([x]), "1 columns of embeddings, expected 2 to 3"),
        (lambda: RankingLoss()([x, x[:2]]), r"columns have shapes \(3, 6\), \(2, 6\)"),
        (lambda: RankingLoss()([x, x], np.ones((3, 3))), "expected bool"),
        (lambda: TripletLoss()([x, x, x[:2]]), "columns have shapes"),
        (lambda: CosineLoss()([x, x]), "targets is None, expected a score for each pair"),
        (lambda: CosineLoss()([x, x], np.ones(2)), r"targets has shape \(2,\), expected \(3,\)"),
        (lambda: MatryoshkaLoss(CosineLoss(), ()), "expected at least one width, and no width twice"),
        (lambda: MatryoshkaLoss(CosineLoss(), (2, 2)), "expected at least one width, and no width twice"),
        (lambda: MatryoshkaLoss(CosineLoss(), (2,), (1.0, 2.0)), "2 weights for 1 dims"),
        (
            lambda: MatryoshkaLoss(CosineLoss(), (7,))([x, x], np.ones(3)),
            "dims contains 7, but the embeddings have 6",
        ),
        (lambda: embedding_losses.get("op", "rank"), "op: loss='rank' is not available"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="expected a name or a loss such as RankingLoss"):
        embedding_losses.get("op", RankingLoss)  # type: ignore[arg-type]


# ---- sentence-transformers ----


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("pairs", [N, N]), ("symmetric", [N, N]), ("negatives", [N] * 4), ("euclidean", [N] * 3),
     ("cosine", [N, N]), ("cosent", [N, N]), ("matryoshka ranking", [N] * 3)],
)  # fmt: skip
def test_values_and_gradients_are_those_of_sentence_transformers(
    name: str, sizes: list[int], rng: np.random.Generator
) -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = torch.nn.Identity()
    ranking = theirs.MultipleNegativesRankingLoss(model)
    made = {
        "pairs": lambda: ranking,
        "symmetric": lambda: theirs.MultipleNegativesRankingLoss(
            model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        ),
        "negatives": lambda: theirs.MultipleNegativesRankingLoss(model, scale=7),
        "euclidean": lambda: theirs.TripletLoss(model, triplet_margin=0.5),
        "cosine": lambda: theirs.CosineSimilarityLoss(model),
        "cosent": lambda: theirs.CoSENTLoss(model),
        "matryoshka ranking": lambda: ranking,
    }[name]()
    loss, _, _, targets = CASES[name]
    columns, targets = problem(sizes, targets, rng)
    inputs = [torch.tensor(x, requires_grad=True) for x in columns]
    if name == "matryoshka ranking":
        wanted = torch_matryoshka(
            lambda x, _: ranking.compute_loss_from_embeddings(x, None), {6: 1.0, 3: 0.5, 2: 0.25}
        )(inputs, None)
    else:
        labels = None if targets is None else torch.tensor(targets)
        wanted = made.compute_loss_from_embeddings(inputs, labels)
    wanted.backward()
    own = columns if name != "negatives" else [*columns[:2], np.concatenate(columns[2:])]
    if name == "matryoshka ranking":
        own = columns
    value, gradients = loss(own, targets)
    assert value == pytest.approx(float(wanted.detach()), rel=1e-9)
    found = np.concatenate(gradients)
    np.testing.assert_allclose(found, np.concatenate([x.grad.numpy() for x in inputs]), rtol=0, atol=1e-9)
