"""Divergences between a teacher and a student, beside torch in float64 and beside TRL."""

from typing import Any

import numpy as np
import pytest

from nplora.models.divergence import DIVERGENCES, Distillation, TopK, most_likely

torch = pytest.importorskip("torch")

Array = np.ndarray[Any, Any]
ROWS, VOCAB = 7, 301
BETA = {"forward": 0.0, "reverse": 1.0}  # TRL's names for the two


def logits(seed: int, scale: float = 3.0, vocab: int = VOCAB) -> Array:
    return np.random.default_rng(seed).normal(0, scale, (ROWS, vocab)).astype(np.float32)


def best(teacher: Array, k: int, temperature: float) -> TopK:
    """The k most likely tokens, computed in float64."""
    log_probs = torch.log_softmax(torch.tensor(teacher, dtype=torch.float64) / temperature, -1)
    top = log_probs.topk(k)
    rest = log_probs.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    return TopK(top.indices.numpy(), torch.cat([top.values, rest], 1).numpy())


def expected(
    student: Array, teacher: Array, labels: Array, loss: Distillation, k: int | None
) -> tuple[Array, Array]:
    """The losses and gradients of torch.nn.functional.kl_div in float64."""
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    common = min(student.shape[1], teacher.shape[1])
    log_q = torch.log_softmax(z[:, :common] / loss.temperature, -1)
    t = torch.tensor(teacher, dtype=torch.float64)[:, :common] / loss.temperature
    log_p = torch.log_softmax(t, -1)
    if k is not None:
        ids = log_p.topk(k).indices
        log_p, log_q = (
            torch.cat([x.gather(1, ids), x.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)], 1)
            for x in (log_p, log_q)
        )
    pair = (log_q, log_p) if loss.kl == "forward" else (log_p, log_q)
    kl = torch.nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    hard = torch.nn.functional.cross_entropy(z, torch.tensor(labels), reduction="none")
    total = loss.ratio * loss.temperature**2 * kl + (1 - loss.ratio) * hard
    total.sum().backward()
    return total.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize("kl", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("k", [None, 1, 20])
def test_losses_and_gradients_are_those_of_torch_in_float64(
    kl: str, temperature: float, ratio: float, k: int | None
) -> None:
    student, teacher, labels = logits(0), logits(1), np.arange(ROWS)
    loss, factor = Distillation(kl, temperature, ratio), 0.25
    given = teacher.copy() if k is None else best(teacher, k, temperature)
    found = student.copy()
    losses, kls, hard = loss(found, labels, given, factor, True)
    wanted, slopes = expected(student, teacher, labels, loss, k)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    # Logits of up to 12, divided by T, are rounded by 12 eps / T, and so is log(p / q), at most 12 here too.
    tolerance = 12 * 2**-23 * (1 if kl == "forward" else 12) * factor * max(1, temperature)
    np.testing.assert_allclose(found, factor * slopes, rtol=1e-5, atol=tolerance / 10)
    assert (hard is None) == (ratio == 1)
    given = teacher.copy() if k is None else best(teacher, k, temperature)
    evaluated, kls_again, hard = loss(student.copy(), labels, given, 1.0, False)
    np.testing.assert_allclose(evaluated, wanted, rtol=1e-5)
    np.testing.assert_allclose(kls_again, kls, rtol=1e-6)
    assert hard is not None


@pytest.mark.parametrize("kl", DIVERGENCES)
def test_full_logits_give_the_loss_of_trl(kl: str) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = logits(2), logits(3)
    z = torch.tensor(student[None], dtype=torch.float64, requires_grad=True)
    t = torch.tensor(teacher[None], dtype=torch.float64)
    labels = torch.zeros(1, ROWS, dtype=torch.long)
    wanted = gkd.GKDTrainer.generalized_jsd_loss(z, t, labels, beta=BETA[kl], reduction="batchmean")
    wanted.backward()
    found = student.copy()
    losses, _, _ = Distillation(kl)(found, np.zeros(ROWS, int), teacher.copy(), 1 / ROWS, True)
    assert losses.mean() == pytest.approx(wanted.item(), rel=1e-6)
    slopes = z.grad[0].numpy()
    np.testing.assert_allclose(found, slopes, rtol=0, atol=1e-6 * abs(slopes).max())


@pytest.mark.parametrize("kl", DIVERGENCES)
def test_the_rest_is_one_class_as_in_trl(kl: str) -> None:
    """TRL takes the student's k most likely tokens; here the teacher gives the same ones."""
    utils = pytest.importorskip("trl.experimental.sdft.loss_utils")
    student, teacher, k = logits(4), logits(5), 9
    z, t = (torch.tensor(x, dtype=torch.float64) for x in (student, teacher))
    wanted = utils.compute_topk_self_distillation_loss(
        z, t, distillation_topk=k, distillation_alpha=BETA[kl], distillation_add_tail=True
    )
    ids = z.topk(k).indices
    log_p = torch.log_softmax(t, -1)
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    top = TopK(ids.numpy(), torch.cat([log_p.gather(1, ids), rest], 1).numpy())
    losses, _, _ = Distillation(kl)(student.copy(), np.zeros(ROWS, int), top, 1.0, True)
    np.testing.assert_allclose(losses, wanted.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kl", DIVERGENCES)
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_tokens_that_only_pad_one_vocabulary_do_not_count(kl: str, longer: str) -> None:
    student, teacher = (logits(6 + i, vocab=VOCAB + 5 * (longer == name)) for i, name in enumerate(
        ("student", "teacher")
    ))  # fmt: skip
    labels, loss = np.arange(ROWS), Distillation(kl, 2.0, 0.5)
    found = student.copy()
    losses, _, _ = loss(found, labels, teacher.copy(), 1.0, True)
    wanted, slopes = expected(student, teacher, labels, loss, None)
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)
    np.testing.assert_allclose(found, slopes, atol=1e-6 * abs(slopes).max())


@pytest.mark.parametrize("kl", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.01, 100.0])
@pytest.mark.parametrize("k", [None, 20])
@pytest.mark.parametrize("vocab", [VOCAB, 8000])
def test_extreme_temperatures_are_exact_too(kl: str, temperature: float, k: int | None, vocab: int) -> None:
    """At 100, the divergence is 1e-3 to 1e-6, of terms near 1, whose errors of 1e-7 must not add up."""
    student, teacher, labels = logits(0, vocab=vocab), logits(1, vocab=vocab), np.arange(ROWS)
    loss = Distillation(kl, temperature, 1.0)
    want, gradient = expected(student, teacher, labels, loss, k)
    given = teacher.copy() if k is None else best(teacher, k, temperature)
    found, _, _ = loss(student, labels, given, 1.0, True)
    np.testing.assert_allclose(found, want, rtol=2e-4 if k is None else 1e-5)
    # At 0.01, log-ratios of a thousand are rounded, and cancel in the gradient of the reverse divergence.
    atol = 1e-4 * abs(gradient).max() + 1e-6 * want.max() / temperature
    np.testing.assert_allclose(student, gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("kl", DIVERGENCES)
def test_likely_tokens_that_the_student_lacks_are_left_out(kl: str) -> None:
    """Their probability is shared out among all other tokens, and "the rest" is one class as before."""
    student, teacher, k = logits(0), logits(1, vocab=VOCAB + 40), 12
    teacher[0, VOCAB:] += 20  # no token of this row is known
    teacher[1, VOCAB] = 40
    top = best(teacher, k, 1.0)
    lacking = top.ids >= VOCAB
    assert lacking[0].all()
    assert 0 < lacking[2:].sum() < lacking[2:].size
    log_probs = top.log_probs.copy()
    log_probs[:, :-1][lacking] = -np.inf
    log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    losses = []
    for row, log_q in enumerate(torch.log_softmax(z, -1)):
        ids = torch.tensor(top.ids[row][~lacking[row]])
        rest = log_q.scatter(0, ids, -torch.inf).logsumexp(0, keepdim=True)
        q, p = torch.cat([log_q[ids], rest]), torch.tensor(log_probs[row][np.append(~lacking[row], True)])
        pair = (q, p) if kl == "forward" else (p, q)
        losses.append(torch.nn.functional.kl_div(*pair, reduction="sum", log_target=True))
    torch.stack(losses).sum().backward()
    given = TopK(np.where(lacking, -1, top.ids), log_probs)
    found, _, _ = Distillation(kl)(student, np.zeros(ROWS, np.int64), given, 1.0, True)
    np.testing.assert_allclose(found, [loss.item() for loss in losses], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(student, z.grad.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", DIVERGENCES)
def test_k_of_the_whole_vocabulary_is_the_full_divergence(kl: str) -> None:
    student, teacher, labels = logits(8), logits(9), np.zeros(ROWS, int)
    found, top = student.copy(), student.copy()
    full = Distillation(kl)(found, labels, teacher.copy(), 1.0, True)[0]
    stored = Distillation(kl)(top, labels, best(teacher, VOCAB, 1.0), 1.0, True)[0]
    np.testing.assert_allclose(stored, full, rtol=2e-6)
    np.testing.assert_allclose(top, found, atol=1e-6 * abs(found).max())


@pytest.mark.parametrize("kl", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 3])
def test_very_sure_models_give_finite_losses_and_gradients(kl: str, k: int | None) -> None:
    student, teacher = logits(10, 0.1), logits(11, 0.1)
    student[:, 0] = 300  # in float32, all other probabilities are 0
    teacher[:, 1] = 40
    given = teacher.copy() if k is None else best(teacher, k, 1.0)
    losses, _, _ = Distillation(kl)(student, np.zeros(ROWS, int), given, 1.0, True)
    assert np.isfinite(losses).all()
    assert np.isfinite(student).all()
    assert (losses > 10).all()


@pytest.mark.parametrize("k", [1, 7, 32, 200, 2000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_most_likely_tokens_are_those_of_torch(k: int, temperature: float) -> None:
    teacher = logits(12, vocab=2000)
    found, wanted = most_likely(teacher.copy(), k, temperature), best(teacher, k, temperature)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=3e-6)


@pytest.mark.parametrize("k", [3, 40])
def test_of_equally_likely_tokens_the_first_ones_are_taken(k: int) -> None:
    tied = np.zeros((2, 3000), np.float32)
    tied[1, 1000:1002] = 1
    found = most_likely(tied, k).ids.tolist()
    assert found == [list(range(k)), [1000, 1001, *range(k - 2)]]


def test_the_rest_of_a_very_sure_teacher_keeps_its_probability() -> None:
    """1 - Σ p of the k tokens would be 0 in float32, and mostly rounding in float64."""
    sure = np.zeros((1, 5000), np.float32)
    sure[0, 17] = 60
    wanted = np.log(4998) - 60
    assert most_likely(sure, 2).log_probs[0, -1] == pytest.approx(wanted, abs=1e-5)
