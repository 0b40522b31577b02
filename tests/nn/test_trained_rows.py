"""TrainedEmbedding and TrainedHead against plain NumPy in float64, before and after merging."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import nplora
import reference
from nplora import FrozenWeight
from nplora.formats.tokenizer_json import AddedToken
from nplora.nn import TrainedEmbedding, TrainedHead, TrainedRows

VOCAB, DIM = 11, 6
IDS = np.array([[3, 0, 3], [10, 7, 3]])
TOKENS = [7, 3]  # not in the order of the rows


def some_weight(rng: np.random.Generator, dtype: str = "float64") -> FrozenWeight:
    return FrozenWeight(rng.standard_normal((VOCAB, DIM)), dtype)


def table_of(weight: FrozenWeight, rows: TrainedRows) -> np.ndarray[Any, Any]:
    table = weight.to_numpy()
    table[slice(None) if rows.ids is None else rows.ids] = rows.value
    return table


@pytest.mark.parametrize("tokens", [TOKENS, None])
def test_an_embedding_and_a_head_compute_with_the_trained_rows(tokens: Any, rng: np.random.Generator) -> None:
    weight, bias = some_weight(rng), rng.standard_normal(VOCAB)
    rows = TrainedRows(weight, tokens)
    embedding, head = TrainedEmbedding(weight, rows), TrainedHead(weight, rows, is_tied=True, bias=bias)
    x = rng.standard_normal((2, 5, DIM))
    np.testing.assert_array_equal(embedding(IDS), weight.to_numpy()[IDS])
    rows.value += rng.standard_normal(rows.value.shape)
    table = table_of(weight, rows)
    np.testing.assert_array_equal(embedding(IDS), table[IDS])
    np.testing.assert_allclose(head(x), x @ table.T + bias, rtol=1e-12, atol=1e-12)
    with embedding.disable_adapter(), head.disable_adapter():
        np.testing.assert_array_equal(embedding(IDS), weight.to_numpy()[IDS])
        np.testing.assert_allclose(head(x), x @ weight.to_numpy().T + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [TOKENS, None])
def test_gradients_match_central_differences(tokens: Any, rng: np.random.Generator) -> None:
    weight = some_weight(rng)
    rows = TrainedRows(weight, tokens)
    embedding, head = TrainedEmbedding(weight, rows), TrainedHead(weight, rows, is_tied=True)
    c = rng.standard_normal((2, 3, VOCAB))
    x, saved = embedding.forward(IDS)
    saved_head = head.forward(x)[1]
    kept = c.copy()
    embedding.backward(head.backward(kept, saved_head), saved)
    np.testing.assert_array_equal(kept, c)  # the caller's array is not changed
    pairs = [(rows.value, rows.grad)]
    assert reference.gradient_error(lambda: float((c * head(embedding(IDS))).sum()), pairs, rng) <= 1e-6


def test_the_gradient_of_the_input_does_not_use_the_frozen_copies(rng: np.random.Generator) -> None:
    """Also if such a row is much larger than the others, as the row of an untrained token may be."""
    W = rng.standard_normal((VOCAB, DIM))
    W[3] = 1e7
    weight = FrozenWeight(W)
    rows = TrainedRows(weight, [3])
    rows.value[...] = 1
    dy = rng.standard_normal((4, VOCAB))
    head = TrainedHead(weight, rows)
    dx = head.backward(dy, head.forward(rng.standard_normal((4, DIM)))[1])
    np.testing.assert_allclose(dx, dy @ table_of(weight, rows), rtol=1e-5, atol=1e-5)


def test_the_int8_arithmetic_of_a_head_can_be_switched_off(rng: np.random.Generator) -> None:
    W, x = rng.standard_normal((VOCAB, 64)), rng.standard_normal((12, 64))
    heads = {}
    for compute in ("int8", "bfloat16"):
        weight = FrozenWeight(W, compute=compute)
        heads[compute] = TrainedHead(weight, TrainedRows(weight, [3]))
    exact = heads["bfloat16"].forward(x)[0]
    assert not np.array_equal(heads["int8"].forward(x)[0], exact)
    heads["int8"].int8 = False
    assert np.array_equal(heads["int8"].forward(x)[0], exact)


def test_a_tied_layer_has_no_parameters_of_its_own(rng: np.random.Generator) -> None:
    weight = some_weight(rng, "float32")
    rows = TrainedRows(weight, TOKENS)
    net = nplora.Sequential(TrainedEmbedding(weight, rows), TrainedHead(weight, rows, is_tied=True))
    assert [(p.name, p.value.shape) for p in net.parameters()] == [("0.rows", (2, DIM))]
    assert (net.num_trainable, net.num_parameters) == (2 * DIM, (VOCAB + 2) * DIM)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].rows is twin[1].rows
        twin[0].rows.value[...] = 9
        assert not (rows.value == 9).any()


def test_a_disabled_layer_gets_no_gradient(rng: np.random.Generator) -> None:
    weight = some_weight(rng)
    rows = TrainedRows(weight, TOKENS)
    head = TrainedHead(weight, rows)
    rows.value[...] = 5
    with head.disable_adapter():
        y, saved = head.forward(rng.standard_normal((4, DIM)))
        dx = head.backward(np.ones_like(y), saved)
    np.testing.assert_allclose(dx, np.ones((4, VOCAB)) @ weight.to_numpy())
    assert not rows.grad.any()


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "q8_0", "q4_k"])
@pytest.mark.parametrize("dtype", [None, "same", "bfloat16"])
@pytest.mark.parametrize("tokens", [TOKENS, None])
def test_merged_rows_are_rounded_to_the_storage(
    storage: str, dtype: str | None, tokens: Any, rng: np.random.Generator
) -> None:
    weight = FrozenWeight(rng.standard_normal((VOCAB, 256)), storage)
    rows = TrainedRows(weight, tokens)
    net = nplora.Sequential(TrainedEmbedding(weight, rows), TrainedHead(weight, rows, is_tied=True))
    rows.value += rng.standard_normal(rows.value.shape).astype("f4")
    exact, before = table_of(weight, rows), net(IDS)
    reports = net.merge(dtype)
    stored = storage if dtype == "same" else dtype
    numbers = np.arange(VOCAB) if tokens is None else np.array(tokens)
    rounded = exact.copy()
    if stored is not None:
        rounded[numbers] = FrozenWeight(exact[numbers], stored).to_numpy()
    np.testing.assert_array_equal(net[0](np.arange(VOCAB)), rounded)
    assert [report.storage for report in reports] == ([] if stored is None else [stored])
    with pytest.raises(ValueError, match="read-only"):
        rows.value[0] = 1
    merged = net(IDS)
    net.unmerge()
    np.testing.assert_array_equal(net(IDS), before)
    net.merge(dtype)
    net.merge_and_unload()
    assert net[0].weight is net[1].weight
    assert net.adapter_layers() == {}
    whole = stored or ("float32" if storage in ("q8_0", "q4_k") else storage)
    assert net[0].weight.dtype == whole
    expected = FrozenWeight(exact, whole).to_numpy()
    if dtype == "same" and tokens is not None:
        expected = rounded  # the other rows keep their bytes
    np.testing.assert_array_equal(net[0](np.arange(VOCAB)), expected)
    np.testing.assert_allclose(net(IDS), merged, rtol=0, atol=0.1 * np.abs(merged).max())


def test_bad_ids_are_refused(rng: np.random.Generator) -> None:
    weight = some_weight(rng)
    for ids, words in (
        ([], "ids is empty, expected at least one row"),
        ([3, 1, 3], "row 3 occurs twice in ids"),
        ([VOCAB], f"{VOCAB}"),
        ([-1], "-1"),
    ):
        with pytest.raises(ValueError, match=f"TrainedRows: .*{words}"):
            TrainedRows(weight, ids)
    with pytest.raises(TypeError, match="TrainedRows: ids has dtype float64, expected integers"):
        TrainedRows(weight, [1.5])


def test_a_pass_that_kept_nothing_has_no_gradient(rng: np.random.Generator) -> None:
    weight = some_weight(rng)
    layer = TrainedEmbedding(weight, TrainedRows(weight, TOKENS))
    other = TrainedEmbedding(weight, layer.rows)
    y, saved = layer.forward(IDS)
    with pytest.raises(ValueError, match="another TrainedEmbedding"):
        other.backward(y, saved)
    layer.merge()
    y, saved = layer.forward(IDS)
    with pytest.raises(RuntimeError, match="the layer is merged"):
        layer.backward(y, saved)
    layer.unmerge()
    with pytest.raises(RuntimeError, match="merged when this forward pass ran"):
        layer.backward(y, saved)
    with nplora.nn.module.inference():
        y, saved = layer.forward(IDS)
    with pytest.raises(RuntimeError, match="inference mode"):
        layer.backward(y, saved)


def test_unloading_after_a_failure_writes_the_present_rows(rng: np.random.Generator) -> None:
    weight = some_weight(rng, "float32")
    rows = TrainedRows(weight, TOKENS)
    lora = nplora.LoRALinear(np.eye(DIM), rank=1, rng=0)
    net = nplora.Sequential(TrainedEmbedding(weight, rows), lora, TrainedHead(weight, rows, is_tied=True))
    lora.A[...] = lora.B[...] = 3e38
    with pytest.raises(ValueError, match="finite values become infinite"):
        net.merge_and_unload()
    lora.A[...] = lora.B[...] = 0
    rows.value[...] = 7
    net.merge_and_unload()
    table = np.array(weight.to_numpy())
    table[TOKENS] = 7
    np.testing.assert_array_equal(net[0].weight.to_numpy(), table)
    assert net[0].weight is net[2].weight  # a tied pair still shares one weight


# ---- rows beyond the end of the weight ----

MORE = 3  # rows beyond the end


def longer_table(weight: FrozenWeight, rows: TrainedRows) -> np.ndarray[Any, Any]:
    """The whole table in float64, with the rows beyond the end as they start, or as they are trained."""
    table = weight.to_numpy()
    table = np.concatenate([table, np.tile(table.mean(axis=0), (MORE, 1))])
    table[slice(None) if rows.ids is None else rows.ids] = rows.value
    return table


@pytest.mark.parametrize("tokens", [[12, 3, 11, 13], None])
def test_rows_beyond_the_end_start_with_the_mean_and_are_computed(
    tokens: Any, rng: np.random.Generator
) -> None:
    weight = some_weight(rng)
    rows = TrainedRows(weight, tokens, VOCAB + MORE)
    start = longer_table(weight, rows)
    np.testing.assert_allclose(start[VOCAB:], np.tile(weight.to_numpy().mean(axis=0), (MORE, 1)), rtol=1e-14)
    np.testing.assert_array_equal(start[:VOCAB], weight.to_numpy())
    embedding, head = TrainedEmbedding(weight, rows), TrainedHead(weight, rows, is_tied=True)
    ids, x = np.array([13, 0, 11, 3, 12, 10]), rng.standard_normal((2, 5, DIM))
    c = rng.standard_normal((2, 5, VOCAB + MORE))
    for shift in (0.0, 1.0):  # first as they start, then changed
        rows.value += shift * rng.standard_normal(rows.value.shape)
        table = longer_table(weight, rows)
        np.testing.assert_array_equal(embedding(ids), table[ids])
        np.testing.assert_allclose(head(x), x @ table.T, rtol=1e-12, atol=1e-12)
        dx = head.backward(c, head.forward(x)[1])
        np.testing.assert_allclose(dx, c @ table, rtol=1e-12, atol=1e-12)
    with embedding.disable_adapter(), head.disable_adapter():
        np.testing.assert_allclose(embedding(ids), start[ids], rtol=1e-14)
        y, saved = head.forward(x)
        np.testing.assert_allclose(y, x @ start.T, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(head.backward(c, saved), c @ start, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"TrainedEmbedding\.forward: ids"):
        embedding([VOCAB + MORE])


@pytest.mark.parametrize("tokens", [[12, 3, 11, 13], None])
def test_gradients_of_rows_beyond_the_end_match_central_differences(
    tokens: Any, rng: np.random.Generator
) -> None:
    weight = some_weight(rng)
    rows = TrainedRows(weight, tokens, VOCAB + MORE)
    embedding, head = TrainedEmbedding(weight, rows), TrainedHead(weight, rows, is_tied=True)
    ids, c = np.array([[13, 0, 11], [3, 12, 13]]), rng.standard_normal((2, 3, VOCAB + MORE))
    x, saved = embedding.forward(ids)
    embedding.backward(head.backward(c, head.forward(x)[1]), saved)
    pairs = [(rows.value, rows.grad)]
    assert reference.gradient_error(lambda: float((c * head(embedding(ids))).sum()), pairs, rng) <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
@pytest.mark.parametrize("tokens", [[12, 3, 11, 13], None])
def test_rows_beyond_the_end_are_merged_and_unloaded(
    tokens: Any, dtype: str, rng: np.random.Generator
) -> None:
    weight = FrozenWeight(rng.standard_normal((VOCAB, 32)), dtype)
    rows = TrainedRows(weight, tokens, VOCAB + MORE)
    head = TrainedHead(weight, rows)
    rows.value += 0.5 * rng.standard_normal(rows.value.shape).astype(np.float32)
    x = rng.standard_normal((4, 32)).astype(np.float32)
    before = head(x)
    head.merge()
    np.testing.assert_allclose(head(x), before, rtol=1e-5, atol=1e-5)
    head.unmerge()
    np.testing.assert_array_equal(head(x), before)
    [report] = head.merge("same")
    assert report.storage == dtype
    rounded = head(x)
    assert np.abs(rounded - before).max() < (1e-5 if dtype == "float32" else 0.2)
    copied = pickle.loads(pickle.dumps(head))
    np.testing.assert_array_equal(copied(x), rounded)
    np.testing.assert_allclose(head.unloaded({})(x), rounded, rtol=1e-5, atol=1e-4)
    assert head.unloaded({}).weight.shape == (VOCAB + MORE, 32)


def test_rows_of_new_tokens_within_the_weight_start_with_the_mean(rng: np.random.Generator) -> None:
    weight = some_weight(rng)
    rows = TrainedRows(weight, [3, 10], tokens=[AddedToken(10, "<tool>")])
    np.testing.assert_array_equal(rows.value[0], weight.to_numpy()[3])
    np.testing.assert_allclose(rows.value[1], weight.to_numpy().mean(axis=0), rtol=1e-14)
    embedding = TrainedEmbedding(weight, rows)
    rows.value += 1
    embedding.reset(np.random.SeedSequence(0))
    np.testing.assert_allclose(rows.value[1], weight.to_numpy().mean(axis=0), rtol=1e-14)
    assert embedding.settings()["added_tokens"] == {"<tool>": 10}
    with embedding.disable_adapter():
        np.testing.assert_array_equal(embedding([10]), weight.to_numpy()[[10]])


def test_rows_beyond_the_end_must_all_be_trained_and_have_no_bias(rng: np.random.Generator) -> None:
    weight = some_weight(rng)
    with pytest.raises(ValueError, match="row 12 is beyond the weight's end, so ids must contain it"):
        TrainedRows(weight, [11, 13], VOCAB + MORE)
    with pytest.raises(ValueError, match="ids"):
        TrainedRows(weight, [VOCAB], VOCAB)
    rows = TrainedRows(weight, [11], VOCAB + 1)
    with pytest.raises(ValueError, match="rows beyond the weight's end have no bias"):
        TrainedHead(weight, rows, bias=np.zeros(VOCAB))
    assert "1 rows trained (1 added)" in repr(TrainedEmbedding(weight, rows))
