"""Language models without torch: packing, decoding, cost and memory of training, and errors."""

import contextlib
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from nplora.lm import LanguageModel
from nplora.models.packing import IGNORED, pack
from nplora.nn.module import saved_nbytes

Array = np.ndarray[Any, Any]
VOCAB, LAYERS = small_models.VOCAB, small_models.LAYERS

# Sums in another order, of at most 64 products and three blocks: a few hundred eps of logits around 5.
CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture
def lm(tmp_path: Path) -> LanguageModel:
    return small_models.load(tmp_path)


def ids_of(*lengths: int) -> list[Array]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB, length) for length in lengths]


def with_factors(lm: LanguageModel, **options: Any) -> LanguageModel:
    """Adapters whose update is not zero."""
    lm.add_lora(**{"rank": 2, "alpha": 4, **options})
    rng = np.random.default_rng(5)
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.3 * rng.standard_normal(layer.A.shape)  # type: ignore[attr-defined]
    return lm


def gradients(lm: LanguageModel, sequences: list[Array]) -> tuple[float, dict[str, Array]]:
    lm.zero_grad()
    total = lm.forward_backward(pack((s, s) for s in sequences), 0.1)
    return total, {p.name: p.grad.copy() for p in lm.parameters()}


# ---- packed sequences ----


def test_packed_sequences_give_what_each_gives_alone(lm: LanguageModel) -> None:
    with_factors(lm)
    sequences = ids_of(9, 1, 0, 17, 33)
    total, together = gradients(lm, sequences)
    alone = [gradients(lm, [sequence]) for sequence in sequences]
    assert total == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    for name, gradient in together.items():
        wanted = np.sum([found[name] for _, found in alone], axis=0)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
    batch = pack((s, s) for s in sequences)
    assert lm.loss_packed(batch) == pytest.approx(total / batch.num_targets, rel=1e-6)


def test_the_loss_is_the_mean_over_labels_of_the_next_token(lm: LanguageModel) -> None:
    ids = np.stack(ids_of(12, 12))
    labels = ids.copy()
    labels[0, 3:7] = labels[1, -1] = IGNORED
    logits = lm.logits(ids).astype(np.float64)[:, :-1]
    wanted = labels[:, 1:]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(wanted, 0)[..., None], -1)[..., 0]
    assert lm.loss(ids, labels) == pytest.approx(-picked[wanted != IGNORED].mean(), abs=1e-5)
    assert lm.loss(ids, np.full_like(ids, IGNORED)) == 0


def test_gradients_add_up_and_scale_with_the_factor(lm: LanguageModel) -> None:
    with_factors(lm)
    batch = pack((s, s) for s in ids_of(20))
    lm.forward_backward(batch, 1.0)
    once = {p.name: p.grad.copy() for p in lm.parameters()}
    lm.forward_backward(batch, 0.5)
    for p in lm.parameters():
        np.testing.assert_allclose(p.grad, 1.5 * once[p.name], rtol=1e-4, atol=1e-6)


def test_the_head_reads_only_tokens_with_a_target_a_chunk_at_a_time(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nplora.models import head

    with_factors(lm, targets=["q_proj", "lm_head"])
    sequences = ids_of(40)
    labels = np.where(np.arange(40) % 3 == 0, sequences[0], IGNORED)
    batch = pack([(sequences[0], labels)])
    expected = lm.forward_backward(batch, 0.1)
    found = {p.name: p.grad.copy() for p in lm.parameters()}
    monkeypatch.setattr(head, "_LEAST_ROWS", 4)
    monkeypatch.setattr(head, "_MOST_ROWS", 4)
    rows: list[int] = []
    cross_entropy = nplora._core.cross_entropy
    monkeypatch.setattr(
        nplora._core,
        "cross_entropy",
        lambda logits, *rest: (rows.append(len(logits)), cross_entropy(logits, *rest)),
    )
    lm.zero_grad()
    assert lm.forward_backward(batch, 0.1) == pytest.approx(expected, rel=1e-6)
    assert rows == [4, 3, 3, 3]
    for p in lm.parameters():
        np.testing.assert_allclose(
            p.grad, found[p.name], rtol=0, atol=1e-5 * np.abs(p.grad).max(), err_msg=p.name
        )


@pytest.mark.parametrize("training", [False, True])
def test_the_logits_of_a_chunk_are_gone_before_the_next_ones(
    lm: LanguageModel, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nplora.models import head
    from nplora.models.decoder import Decoder

    with_factors(lm)
    monkeypatch.setattr(head, "_LEAST_ROWS", 4)
    monkeypatch.setattr(head, "_MOST_ROWS", 4)
    seen: list[weakref.ref[Any]] = []
    cross_entropy, read_out = nplora._core.cross_entropy, Decoder.read_out

    def remember(logits: Any, *rest: Any) -> None:
        seen.append(weakref.ref(logits))
        cross_entropy(logits, *rest)

    def begin_chunk(*arguments: Any) -> Any:
        assert not any(reference() is not None for reference in seen)
        return read_out(*arguments)

    monkeypatch.setattr(nplora._core, "cross_entropy", remember)
    monkeypatch.setattr(Decoder, "read_out", begin_chunk)
    batch = pack([(ids_of(20)[0],) * 2])
    if training:
        lm.forward_backward(batch, 0.1)
    else:
        lm.loss_packed(batch)
    assert len(seen) == 5


@pytest.mark.parametrize("vocab", [32, 49152, 151936])
def test_the_chunks_of_the_head_are_even_and_no_larger_than_planned(vocab: int) -> None:
    from nplora.models import head

    for n in range(0, 1100, 13):
        pieces = head.chunks(np.arange(n), vocab)
        assert [int(i) for piece in pieces for i in piece] == list(range(n))
        sizes = [len(piece) for piece in pieces]
        assert max(sizes, default=0) <= head.most_rows(n, vocab)
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        assert len(sizes) == -(-n // head.most_rows(n, vocab))


@pytest.mark.parametrize(
    ("rows", "vocab", "most"),
    [(680, 49152, 170), (681, 49152, 255), (9999, 32, 256), (256, 151936, 64), (257, 151936, 96)],
)
def test_many_rows_go_through_the_head_more_at_a_time(rows: int, vocab: int, most: int) -> None:
    from nplora.models import head

    assert head.most_rows(rows, vocab) == most


def test_the_factors_of_a_model_lie_side_by_side(lm: LanguageModel) -> None:
    lm.add_lora(rank=3, targets=["all-linear", "embed_tokens", "lm_head"])
    layers = lm.adapter_layers().values()
    assert len({id(array.base) for layer in layers for array in (layer.A, layer.B)}) == 1
    assert len({id(array.base) for layer in layers for array in (layer.dA, layer.dB)}) == 1


def test_a_loss_of_your_own_goes_through_forward_and_backward(lm: LanguageModel) -> None:
    with_factors(lm)
    ids = np.stack(ids_of(15, 15))
    batch = pack(zip(ids, ids, strict=True))
    total = lm.forward_backward(batch, 1 / batch.num_targets)
    wanted = {p.name: p.grad.copy() for p in lm.parameters()}
    lm.zero_grad()
    logits, saved = lm.forward(ids)
    labels = np.concatenate([ids[:, 1:], np.full((2, 1), IGNORED)], axis=1)
    loss, dlogits = nplora.losses.cross_entropy(logits, labels)
    assert loss == pytest.approx(total / batch.num_targets, rel=1e-5)
    assert saved is not None
    lm.backward(dlogits, saved)
    for p in lm.parameters():
        np.testing.assert_allclose(
            p.grad, wanted[p.name], rtol=0, atol=1e-4 * np.abs(p.grad).max(), err_msg=p.name
        )


@pytest.mark.parametrize("targets", ["all-linear", "lm_head"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_a_pass_kept_serves_one_backward_of_its_own_model(
    lm: LanguageModel, targets: str, checkpointed: bool, tmp_path: Path
) -> None:
    twin = small_models.load(tmp_path)
    for model in (lm, twin):
        with_factors(model, targets=targets)
        model.model.checkpoint_blocks = checkpointed
    logits, saved = lm.forward(np.stack(ids_of(7, 7)))
    dy = np.ones_like(logits)
    with pytest.raises(ValueError, match=r"^LanguageModel\.backward: dy has shape \(2, 6, 60\), expected"):
        lm.backward(dy[:, 1:], saved)
    with pytest.raises(ValueError, match="`saved` comes from a forward pass of another"):
        twin.backward(dy, saved)
    assert not any(p.grad.any() for model in (lm, twin) for p in model.parameters())
    lm.backward(dy, saved)
    once = [p.grad.copy() for p in lm.parameters()]
    assert all(grad.any() for grad in once)
    with pytest.raises(RuntimeError, match="an earlier backward pass used and freed the saved values"):
        lm.backward(dy, saved)
    for parameter, grad in zip(lm.parameters(), once, strict=True):
        np.testing.assert_array_equal(parameter.grad, grad, parameter.name)


def test_a_merged_model_refuses_backward_before_it_adds_anything(lm: LanguageModel) -> None:
    with_factors(lm)
    logits, saved = lm.forward(ids_of(7)[0])
    lowest = next(iter(lm.adapter_layers().values()))  # backward comes there last
    lowest.merge()
    with pytest.raises(RuntimeError, match="the layer is merged"):
        lm.backward(logits, saved)
    assert not any(p.grad.any() for p in lm.parameters())
    lowest.unmerge()
    lm.backward(logits, saved)


def test_training_without_an_enabled_adapter_is_refused(lm: LanguageModel) -> None:
    (ids,) = ids_of(7)
    with pytest.raises(ValueError, match="forward_backward: the model has no adapter"):
        lm.train_step(ids, ids, nplora.SGD(lr=0.1))
    with_factors(lm)
    with (
        lm.disable_adapter(),
        pytest.raises(RuntimeError, match=r"forward_backward: nothing is trained, because all adapters are"),
    ):
        lm.train_step(ids, ids, nplora.SGD(lr=0.1))
    with lm.model.layers[0].disable_adapter():
        lm.train_step(ids, ids, nplora.SGD(lr=0.1))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_frozen_model_may_be_a_part_of_a_model_that_is_trained(
    lm: LanguageModel, rng: np.random.Generator, adapted: bool
) -> None:
    """`backward` cannot know whether other layers are trained, so it adds nothing and raises no error."""
    (ids,), head = ids_of(7), rng.standard_normal((3, lm.vocab_size), np.float32)
    net = nplora.Sequential(lm, nplora.Linear(head, trainable=True))
    if adapted:
        with_factors(lm)
    with lm.disable_adapter() if adapted else contextlib.nullcontext():
        y, saved = net.forward(ids)
        logits = lm.logits(ids)
    dy = rng.standard_normal(y.shape, np.float32)
    assert net.backward(dy, saved, need_dx=False) is None
    *frozen, trained = net.parameters()
    np.testing.assert_allclose(trained.grad, dy.T @ logits, rtol=1e-4, atol=1e-4)
    assert not any(parameter.grad.any() for parameter in frozen)


# ---- decoding with a cache ----


def test_cached_decoding_is_the_full_forward_pass(lm: LanguageModel) -> None:
    with_factors(lm)
    a, b = ids_of(30, 22)
    cache = lm.new_cache(slots=3, capacity=32)
    full_a, full_b = lm.logits(a), lm.logits(b)
    np.testing.assert_allclose(lm.decode(a[None, :10], [2], cache)[0], full_a[9], **CLOSE)
    np.testing.assert_allclose(lm.decode(b[None, :2], [0], cache)[0], full_b[1], **CLOSE)
    for t in range(20):  # in pieces, each slot at a place of its own, the order of slots exchanged
        logits = lm.decode(np.stack([b[2 + t : 3 + t], a[10 + t : 11 + t]]), [0, 2], cache)
        np.testing.assert_allclose(logits, [full_b[2 + t], full_a[10 + t]], **CLOSE)
    assert cache.lengths.tolist() == [22, 0, 30]
    cache.lengths[2] = 10  # forget, and go on differently
    np.testing.assert_allclose(lm.decode(a[None, 10:17], [2], cache)[0], full_a[16], **CLOSE)
    cache.reset()
    np.testing.assert_allclose(lm.decode(b[:1], [1], cache)[0], full_b[0], **CLOSE)


def test_a_cache_that_does_not_fit_refuses_and_stays_as_it_was(lm: LanguageModel) -> None:
    cache = lm.new_cache(2, 8)
    lm.decode([[1, 2, 3]], [1], cache)
    for ids, slots, message in (
        ([[1] * 6], [1], "a slot would hold 9 tokens, but has room for 8"),
        ([1, 2], [1, 1], "expected no slot twice"),
        ([1], [2], "slots holds 2"),
        ([1, 2], [1], r"slots have shape \(1,\), expected one slot for each of 2"),
        ([VOCAB], [0], f"token_ids holds {VOCAB}"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.decode(ids, slots, cache)
    assert cache.lengths.tolist() == [0, 3]


# ---- adapters ----


def test_targets_and_layers_choose_what_is_adapted(tmp_path: Path) -> None:
    def names(**options: Any) -> list[str]:
        lm = small_models.load(tmp_path)
        lm.add_lora(rank=2, **options)
        return [name.removeprefix("model.") for name in lm.adapter_layers()]

    assert len(names()) == 7 * LAYERS
    assert names(targets="q_proj", layers="last:1") == ["layers.2.self_attn.q_proj"]
    assert names(targets=["up_proj", "lm_head"], layers=range(1)) == ["layers.0.mlp.up_proj", "lm_head"]
    assert names(targets="model.layers.1.mlp.down_proj") == ["layers.1.mlp.down_proj"]
    assert names(targets=["embed_tokens", "v_proj"], layers="first:1") == [
        "embed_tokens",
        "layers.0.self_attn.v_proj",
    ]
    assert names(targets="up_proj, lm_head", layers=range(1)) == ["layers.0.mlp.up_proj", "lm_head"]
    for options, message in (
        ({"targets": "q_prj"}, "no layer 'q_prj'.*q_proj"),
        ({"layers": "last"}, "layers='last', expected 'last:N'"),
        ({"layers": "last:4"}, "layers='last:4', but the model has 3 blocks"),
        ({"layers": [3]}, "layers holds 3"),
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"seed": -1}, "seed is -1"),
    ):
        lm = small_models.load(tmp_path)
        with pytest.raises(ValueError, match=message):
            lm.add_lora(**options)
        assert not lm.adapter_layers()


@pytest.mark.parametrize(
    "options",
    [{"layers": "first:0"}, {"layers": "last:0"}, {"layers": []}, {"layers": range(0)}, {"targets": []}],
)
def test_an_adapter_on_no_layer_is_refused(lm: LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"add_lora: .*layers="):
        lm.add_lora(**options)
    assert not lm.adapter_layers()


@pytest.mark.parametrize("targets", [5, None, [1], b"q_proj", ["q_proj", None]])
def test_targets_that_are_no_texts_are_refused(lm: LanguageModel, targets: Any) -> None:
    with pytest.raises(TypeError, match=r"targets is .*, expected the name of a layer, or a list of names"):
        lm.add_lora(targets=targets)


def test_an_adapter_changes_nothing_until_it_is_trained(lm: LanguageModel) -> None:
    (ids,) = ids_of(20)
    before = lm.logits(ids)
    lm.add_lora(rank=2)
    np.testing.assert_allclose(lm.logits(ids), before, **CLOSE)
    with pytest.raises(ValueError, match="all layers with the name 'all-linear' have an adapter already"):
        lm.add_lora(rank=2)
    losses = [lm.train_step(ids, ids, nplora.SGD(lr=0.1)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    with lm.disable_adapter():
        np.testing.assert_allclose(lm.logits(ids), before, **CLOSE)
    trained = lm.logits(ids)
    lm.merge()
    np.testing.assert_allclose(lm.logits(ids), trained, **CLOSE)
    with pytest.raises(RuntimeError, match="merged"):
        lm.train_step(ids, ids, nplora.SGD(lr=0.1))
    lm.unmerge()
    np.testing.assert_array_equal(lm.logits(ids), trained)
    lm.merge_and_unload()
    assert not lm.adapter_layers()
    np.testing.assert_allclose(lm.logits(ids), trained, **CLOSE)


def test_adapters_that_are_there_stay_when_others_are_added(lm: LanguageModel, tmp_path: Path) -> None:
    with_factors(lm, targets="q_proj", dropout=0.5, seed=1)
    lm.forward(ids_of(5)[0])
    before = {p.name: p.value.copy() for p in lm.parameters()}, lm.random_state()
    lm.add_lora(rank=2, targets="v_proj", seed=2)
    for p in lm.parameters():
        if p.name in before[0]:
            np.testing.assert_array_equal(p.value, before[0][p.name])
    assert lm.random_state().items() >= before[1].items()
    alone = small_models.load(tmp_path)
    alone.add_lora(rank=2, targets="v_proj", seed=2)
    found = {p.name: p.value for p in lm.parameters()}
    for p in alone.parameters():
        np.testing.assert_array_equal(found[p.name], p.value)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_outside_the_blocks_alone_gets_its_gradient(lm: LanguageModel, target: str) -> None:
    """Central differences along the gradient: loss(p + h g) - loss(p - h g) = 2 h |g|²."""
    with_factors(lm, targets=target)
    batch = pack((s, s) for s in ids_of(12, 30))
    lm.forward_backward(batch, 1 / batch.num_targets)
    for p in lm.parameters():
        squared, start = float(np.sum(p.grad.astype(np.float64) ** 2)), p.value.copy()
        losses = []
        for h in (0.002, -0.002):
            p.value[...] = start + h / np.sqrt(squared) * p.grad
            losses.append(lm.loss_packed(batch))
        p.value[...] = start
        assert (losses[0] - losses[1]) / 0.004 == pytest.approx(np.sqrt(squared), rel=1e-2)


@pytest.mark.parametrize("target", ["down_proj", "up_proj", "o_proj", "k_proj"])
def test_blocks_below_the_lowest_adapted_one_keep_nothing(lm: LanguageModel, target: str) -> None:
    """The gradients are those that a model with adapters everywhere gives the same factors."""
    everywhere = small_models.load(Path(lm.config.source).parent)
    with_factors(lm, targets=target, layers=[1, 2])
    everywhere.add_lora(rank=2, alpha=4)
    for name, layer in lm.adapter_layers().items():
        twin = everywhere.adapter_layers()[name]
        twin.A[...], twin.B[...] = layer.A, layer.B  # type: ignore[attr-defined]
    sequences = ids_of(25)
    (total, found), (_, wanted) = gradients(lm, sequences), gradients(everywhere, sequences)
    assert total == pytest.approx(gradients(everywhere, sequences)[0], rel=1e-6)
    for name, gradient in found.items():
        np.testing.assert_allclose(
            gradient, wanted[name], rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )
    kept = lm.forward(sequences[0])[1]
    whole = everywhere.forward(sequences[0])[1]
    assert kept is not None
    assert whole is not None
    assert len(kept.decoder.blocks) == 2
    assert saved_nbytes(kept.decoder.blocks) < 0.7 * saved_nbytes(whole.decoder.blocks)


def test_checkpointed_blocks_give_the_same_bits_with_dropout_and_keep_less(lm: LanguageModel) -> None:
    with_factors(lm, dropout=0.3)
    state, sequences = lm.random_state(), ids_of(40)
    total, plain = gradients(lm, sequences)
    after = lm.random_state()
    lm.set_random_state(state)
    lm.model.checkpoint_blocks = True
    again, found = gradients(lm, sequences)
    assert again == total
    assert lm.random_state() == after != state
    for name, gradient in plain.items():
        np.testing.assert_array_equal(found[name], gradient, err_msg=name)
    logits, small = lm.forward(sequences[0])
    lm.forward(sequences[0])  # masks go on from here, whatever is computed again in between
    state = lm.random_state()
    assert small is not None
    kept = saved_nbytes(small.decoder.blocks)
    lm.backward(logits, small)
    assert lm.random_state() == state
    lm.model.checkpoint_blocks = False
    large = lm.forward(sequences[0])[1]
    assert large is not None
    assert 0 < kept < 0.15 * saved_nbytes(large.decoder.blocks)


@pytest.mark.parametrize("disabled_again", [False, True])
def test_checkpointed_blocks_are_computed_again_with_the_adapters_of_their_forward_pass(
    lm: LanguageModel, disabled_again: bool
) -> None:
    with_factors(lm)
    ids, found = ids_of(12)[0], []
    for again in (False, True):
        lm.model.checkpoint_blocks = again
        lm.zero_grad()
        with lm.disable_adapter() if not disabled_again else contextlib.nullcontext():
            logits, saved = lm.forward(ids)
        with lm.disable_adapter() if disabled_again else contextlib.nullcontext():
            lm.backward(logits, saved)
        found.append([p.grad.copy() for p in lm.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        np.testing.assert_array_equal(recomputed, plain)
    assert any(gradient.any() for gradient in found[1]) == disabled_again


def test_results_do_not_depend_on_the_number_of_threads(lm: LanguageModel, thread_limit: None) -> None:
    with_factors(lm)
    sequences = ids_of(70, 50)
    nplora.set_num_threads(1)
    total, one = gradients(lm, sequences)
    nplora.set_num_threads(2)
    again, two = gradients(lm, sequences)
    assert again == total
    for name, gradient in one.items():
        np.testing.assert_array_equal(two[name], gradient, err_msg=name)


def test_an_adapter_of_a_permuted_file_is_saved_in_the_order_of_hugging_face(tmp_path: Path) -> None:
    """Row i of a head of q goes to 2 i, row half + i to 2 i + 1."""
    lm = with_factors(small_models.load(tmp_path), targets=["q_proj", "v_proj"])
    nplora.save_adapter(lm, tmp_path / "adapter")
    saved = nplora.formats.safetensors.open(tmp_path / "adapter" / "adapter_model.safetensors")
    layers: Any = lm.adapter_layers()
    half = small_models.DIM // 2
    for kind, heads in (("q_proj", small_models.HEADS), ("v_proj", None)):
        layer = layers[f"model.layers.1.self_attn.{kind}"]
        theirs = saved[f"base_model.model.model.layers.1.self_attn.{kind}.lora_B.weight"].numpy()
        if heads is None:
            np.testing.assert_array_equal(theirs, layer.A)
            continue
        for head in range(heads):
            begin = head * small_models.DIM
            for i in range(half):
                np.testing.assert_array_equal(theirs[begin + i], layer.A[begin + 2 * i])
                np.testing.assert_array_equal(theirs[begin + half + i], layer.A[begin + 2 * i + 1])
    before = {p.name: p.value.copy() for p in lm.parameters()}
    for p in lm.parameters():
        p.value.fill(0)
    nplora.load_adapter(lm, tmp_path / "adapter")
    for p in lm.parameters():
        np.testing.assert_array_equal(p.value, before[p.name])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


# ---- a batch that has nothing to learn ----


@pytest.mark.parametrize("make", [nplora.AdamW, lambda: nplora.SGD(lr=0.1, momentum=0.9, weight_decay=0.1)])
def test_a_step_without_a_label_changes_nothing(lm: LanguageModel, make: Any) -> None:
    with_factors(lm, dropout=0.5)
    optimizer, ids = make(), ids_of(6)[0]
    for labels in (np.full(6, IGNORED), ids):  # before the first step, and after it
        state, streams = optimizer.state_dict(), lm.random_state()
        before = [p.value.copy() for p in lm.parameters()]
        assert lm.train_step(ids, np.full(6, IGNORED), optimizer) == lm.loss(ids, np.full(6, IGNORED)) == 0
        assert lm.train_step(ids[:1], ids[:1], optimizer) == 0  # one token predicts no label
        assert lm.random_state() == streams
        assert optimizer.steps == state["steps"]
        assert optimizer.state_dict().keys() == state.keys()
        for name, array in optimizer.state_dict().items():
            np.testing.assert_array_equal(array, state[name], name)
        for parameter, value in zip(lm.parameters(), before, strict=True):
            np.testing.assert_array_equal(parameter.value, value, parameter.name)
            assert not parameter.grad.any()
        lm.train_step(ids, labels, optimizer)
    assert optimizer.steps == 1


def test_micro_batches_without_a_label_add_nothing_to_a_step(lm: LanguageModel) -> None:
    with_factors(lm, dropout=0.5)
    ids, streams = ids_of(6)[0], lm.random_state()
    assert lm.forward_backward(pack([(ids, np.full(6, IGNORED))]), 1.0) == 0
    assert lm.random_state() == streams
    assert not any(p.grad.any() for p in lm.parameters())


# ---- an adapter switched off in one thread ----


def test_generation_in_one_thread_does_not_hear_of_another_that_disables_the_adapter(
    lm: LanguageModel,
) -> None:
    with_factors(lm)
    ids = np.stack(ids_of(5, 5))

    def scores() -> Array:
        cache = lm.new_cache(2, 8)
        return np.stack([lm.decode(ids, [0, 1], cache), lm.decode(ids[:, :1], [0, 1], cache)])

    def disabled() -> Array:
        with lm.disable_adapter():
            return scores()

    alone = {scores: scores(), disabled: disabled()}
    assert not np.array_equal(alone[scores], alone[disabled])
    with ThreadPoolExecutor(2) as pool:
        runs = [(call, pool.submit(call)) for _ in range(30) for call in alone]
    for call, run in runs:
        np.testing.assert_array_equal(run.result(), alone[call])


# ---- what users pass in ----


def test_ids_labels_and_states_that_make_no_sense_are_refused(lm: LanguageModel) -> None:
    ids = ids_of(6)[0]
    for labels in (ids, np.full(6, IGNORED)):
        with pytest.raises(ValueError, match="the model has no adapter"):
            lm.train_step(ids, labels, nplora.SGD(lr=0.1))
    with pytest.raises(TypeError, match="train_step: optimizer is the class SGD, not an instance of it"):
        lm.train_step(ids, ids, nplora.SGD)  # type: ignore[arg-type]
    for rank in (10**9, 2**63):
        with pytest.raises(ValueError, match=f"^add_lora: rank is {rank}, expected at most 65536$"):
            lm.add_lora(rank=rank)
    with pytest.raises(ValueError, match=r"token_ids have shape \(6,\), but labels have shape \(5,\)"):
        lm.loss(ids, ids[:5])
    with pytest.raises(ValueError, match=f"token_ids holds {VOCAB}, expected integers from 0 to {VOCAB - 1}"):
        lm.logits([VOCAB])
    with pytest.raises(ValueError, match="targets holds -3"):
        lm.loss(ids, np.where(np.arange(6) == 2, -3, ids))
    with pytest.raises(TypeError, match="token_ids has dtype float64"):
        lm.logits([0.5])
    with pytest.raises(ValueError, match=r"token_ids have shape \(1, 1, 6\)"):
        lm.logits(ids[None, None])
    assert lm.logits(np.empty((2, 0), np.int64)).shape == (2, 0, VOCAB)
    with pytest.warns(
        UserWarning, match="a sequence has 200 tokens, but the model was trained for at most 128"
    ):
        lm.loss(np.zeros(200, np.int64), np.zeros(200, np.int64))


def test_a_loss_that_is_not_finite_stops_before_the_update(lm: LanguageModel) -> None:
    with_factors(lm)
    layer: Any = next(iter(lm.adapter_layers().values()))
    layer.B[0, 0] = np.nan
    before = {p.name: p.value.copy() for p in lm.parameters()}
    optimizer, ids = nplora.AdamW(), ids_of(6)[0]
    with pytest.raises(nplora.NonFiniteLossError, match="the loss is nan at step 1"):
        lm.train_step(ids, ids, optimizer)
    assert optimizer.steps == 0
    for p in lm.parameters():
        np.testing.assert_array_equal(p.value, before[p.name])
