"""Distillation: teachers that run beside the student, stored teachers, and errors."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora import cli
from nplora.adapters import merge_adapter, save_adapter
from nplora.finetuning import FinetuneOptions, execution, finetune, plan, teach
from nplora.finetuning.data import TokenBatches, read_dataset
from nplora.finetuning.load import read_inputs
from nplora.finetuning.objectives.distill import DistillLoss
from nplora.finetuning.planning import ExecutionPlan
from nplora.finetuning.teachers import ModelTeacher, StoredTeacher, model_digest
from nplora.formats import gguf, safetensors
from nplora.formats.errors import CorruptError, FormatError
from nplora.lm import LanguageModel, load_model
from nplora.models.divergence import Distillation
from nplora.models.packing import IGNORED, PackedBatch, pack
from nplora.nn.losses import NonFiniteLossError
from nplora.trainer import Callback
from nplora.weights import FrozenWeight
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

Array = np.ndarray[Any, Any]
QUICK: dict[str, Any] = {"rank": 2, "lr": 1e-2, "batch_examples": 4, "progress": False}
DISTILL: dict[str, Any] = {"objective": "distill", **QUICK}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def teacher(model: Path) -> Path:
    """The same model with other weights."""
    lm, path = load_model(model), model.parent / "teacher.gguf"
    lm.add_lora(rank=8, init="gaussian")
    for layer in lm.adapter_layers().values():
        layer.A[...] *= 20  # type: ignore[attr-defined]
    save_adapter(lm, model.parent / "adapter")
    merge_adapter(model, model.parent / "adapter", path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def taught(model: Path, teacher: Path, data: Path) -> Path:
    path = model.parent / "taught.safetensors"
    teach(teacher, data, path, top_k=8)
    return path


def other_tokens(path: Path, id_: int = 40, token: str = "other", **options: Any) -> Path:
    """A model whose token `id_` is another one."""
    save_small_llama(path, **options)
    tokens = list(gguf.open(path).metadata.strings("tokenizer.ggml.tokens"))
    tokens[id_] = token
    return save_small_llama(path, changes={"tokenizer.ggml.tokens": tokens}, **options)


def adapter_of(output: Path) -> dict[str, Array]:
    file = safetensors.open(output / "adapter_model.safetensors")
    return {name: file[name].numpy().copy() for name in file}


# ---- training ----


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("stored", [False, True])
def test_the_divergence_falls(
    model: Path, teacher: Path, taught: Path, data: Path, tmp_path: Path, kl: str, stored: bool
) -> None:
    given = taught if stored else teacher
    report = finetune(
        model, data, tmp_path / "out", valid=data, teacher=given, kl=kl, kd_ratio=1.0, epochs=6, **DISTILL
    )
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after < 0.7 * report.loss_before
    assert report.metrics_before["kl"] == pytest.approx(report.loss_before)
    assert report.metrics_after["kl"] == pytest.approx(report.loss_after)
    assert "KL" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize(("kl", "temperature"), [("forward", 1.0), ("reverse", 2.0)])
def test_all_tokens_stored_teach_as_the_model_itself(
    model: Path, teacher: Path, data: Path, tmp_path: Path, kl: str, temperature: float
) -> None:
    path = tmp_path / "all.safetensors"
    vocab = load_model(model).config.vocab_size
    teach(teacher, data, path, top_k=vocab, temperature=temperature, dtype="float32")
    losses = []
    for name, given in (("stored", path), ("model", teacher)):
        report = finetune(
            model, data, tmp_path / name, teacher=given, kl=kl, temperature=temperature, epochs=2, **DISTILL
        )
        losses.append(report.history.loss)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


class Stop(Callback):
    """Presses Ctrl-C in a hook, when the run has made `step` updates."""

    def __init__(self, hook: str, step: int) -> None:
        self._step = step
        setattr(self, hook, self._stop)

    def _stop(self, run: Any, _: Any) -> None:
        if run.step == self._step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_a_run_resumes_to_the_bit(
    model: Path, teacher: Path, taught: Path, data: Path, tmp_path: Path, stored: bool
) -> None:
    options = DISTILL | {
        "teacher": taught if stored else teacher, "accumulate": 2, "dropout": 0.1, "recompute": True,
        "layers": "last:1", "keep_prefix": "disk", "batch_tokens": 40, "batch_examples": None,
        "save_every": 2, "steps": 5,
    }  # fmt: skip
    whole = finetune(model, data, tmp_path / "whole", **options)
    # The second one is between the batches of a step and its update.
    for hook, step in (("on_step_end", 1), ("on_before_optimizer_step", 2), ("on_step_end", 3)):
        output = tmp_path / f"{hook}-{step}"
        stopped = finetune(model, data, output, **options, callbacks=[Stop(hook, step)])
        assert (stopped.history.interrupted, len(stopped.history.steps)) == (True, step)
        resumed = finetune(model, data, output, resume=True, **options)
        assert resumed.history.loss == whole.history.loss
        assert [r.metrics for r in resumed.history.steps] == [r.metrics for r in whole.history.steps]
        parts = adapter_of(output)
        for name, array in adapter_of(tmp_path / "whole").items():
            np.testing.assert_array_equal(parts[name], array)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "words"),
    [({"kl": "reverse"}, "kl was forward, is reverse"), ({"kd_ratio": 0.9}, "kd_ratio was 0.5, is 0.9")],
)
def test_a_run_does_not_resume_with_another_divergence(
    model: Path, taught: Path, data: Path, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    finetune(model, data, tmp_path / "out", teacher=taught, steps=1, **DISTILL)
    with pytest.raises(ValueError, match=words):
        finetune(model, data, tmp_path / "out", teacher=taught, steps=2, resume=True, **DISTILL | changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stored", "model", "in memory"])
def test_a_run_does_not_resume_with_another_teacher(
    model: Path, teacher: Path, taught: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    """Both teachers are of one kind, and their vocabularies, sizes and data are the same."""
    first, other = taught, tmp_path / "other"
    if kind == "stored":
        teach(adapted(model), data, other, top_k=8)
    elif kind == "model":
        first, other = teacher, model
    else:
        first, other = adapted(model), adapted(model, alpha=16.0)  # type: ignore[assignment]
    finetune(model, data, tmp_path / "out", teacher=first, steps=1, **DISTILL)
    with pytest.raises(ValueError, match="teacher was"):
        finetune(model, data, tmp_path / "out", teacher=other, steps=2, resume=True, **DISTILL)


def adapted(model: Path, selected: str | list[str] | None = None, **changes: Any) -> LanguageModel:
    """A teacher with a random adapter of its own, and with named adapters."""
    lm = load_model(model)
    for name in ("a", "b"):
        lm.load_adapter(model.parent / "adapter", name)
    lm.set_adapter(selected)
    lm.add_lora(**{"rank": 4, "alpha": 8.0, "init": "gaussian", "seed": 0, "targets": ["q_proj"]} | changes)
    return lm


@pytest.mark.slow
def test_a_teacher_is_identified_by_all_that_decides_its_predictions(model: Path, teacher: Path) -> None:
    different: list[dict[str, Any]] = [
        {},
        {"alpha": 16.0},
        {"use_rslora": True},
        {"targets": ["k_proj"]},
        {"seed": 1},
        {"trainable_tokens": [3]},
        {"trainable_tokens": [4]},
        {"invocation": (3, 4)},
        {"invocation": (5,)},
        {"selected": "a"},
        {"selected": ["a", "b"]},
    ]
    digests = [model_digest(adapted(model, **changes)) for changes in different]
    assert len(set(digests)) == len(digests)
    assert digests == [model_digest(adapted(model, **changes)) for changes in different]
    assert model_digest(adapted(model, dropout=0.5)) == digests[0], "a teacher drops nothing"
    with adapted(model).disable_adapter() as off:
        assert model_digest(off) not in digests


def test_a_teacher_keeps_the_named_adapters_that_it_began_with(
    model: Path, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = adapted(model, "a")
    batch = pack(read_dataset(data, lm.tokenizer))
    rows = np.flatnonzero(batch.targets != IGNORED)[:3]
    of_model = ModelTeacher(lm)
    wanted = np.array(of_model.prepare_batch(batch)(rows))
    teach(lm, data, tmp_path / "wanted.safetensors", top_k=4)
    computed = LanguageModel.residual_stream

    def deleted_meanwhile(self: LanguageModel, batch: PackedBatch) -> Array:
        if "a" in lm.adapters:
            thread = threading.Thread(target=lm.delete_adapter, args=("a",))
            thread.start()
            thread.join()
        return computed(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "residual_stream", deleted_meanwhile)
        np.testing.assert_array_equal(of_model.prepare_batch(batch)(rows), wanted)
        lm.load_adapter(model.parent / "adapter", "a")
        teach(lm, data, tmp_path / "taught.safetensors", top_k=4)
    assert not {"a"} & lm.adapters.keys()
    assert (tmp_path / "taught.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()


def test_micro_batches_and_plans_within_a_budget_train_alike(
    model: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    lm = load_model(model)
    lm.add_lora(rank=2)
    batch = pack(read_dataset(data, lm.tokenizer))
    of_model = ModelTeacher(load_model(teacher))
    losses = [DistillLoss(Distillation(ratio=0.5), of_model, cut) for cut in (None, 20)]
    found = []
    for loss in losses:
        lm.zero_grad()
        found.append((loss.forward_backward(lm, batch, None, 0.1), [p.grad.copy() for p in lm.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for whole, cut in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5 * abs(whole).max())


def test_a_plan_counts_the_teacher(model: Path, teacher: Path, taught: Path, data: Path) -> None:
    """To the byte: what the head takes is written down here again, as it is the most in this small model."""
    lm = load_model(model)
    d, vocab = lm.config.hidden_size, lm.config.vocab_size
    dataset = read_dataset(data, lm.tokenizer)
    members = list(TokenBatches(dataset, batch_examples=8).members(0))
    tokens = max(int(dataset.lengths[batch].sum()) for batch in members)
    targets = max(int(dataset.targets[batch].sum()) for batch in members)
    head = 4 * targets * (vocab + 4 * d) + 2 * 4 * d * tokens
    block = 2**21  # an array of the divergence
    logits, hidden = 4 * targets * (vocab + 2 * d), 4 * d * tokens  # of the teacher
    stored = targets * (8 * 4 + 9 * (2 + 8))  # 8 ids, and 9 log-probabilities in float16 and float64
    rows = 4 * 8 * targets * 8  # the student's log-probabilities of the 8 tokens, and three more such arrays
    alone = plan(model, data).memory
    for given, more in ((teacher, 3 * block + logits + hidden), (taught, 2 * block + stored + rows)):
        found = plan(model, data, objective="distill", teacher=given).memory
        assert found.work == head + more
        assert (found.kept, found.factors) == (alone.kept, alone.factors)


def test_the_prediction_for_a_given_plan_counts_the_teachers_weights(
    model: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resident(lm: LanguageModel, of_teacher: LanguageModel | None = None) -> tuple[int, int]:
        return 0, 100 if of_teacher is None else 300

    monkeypatch.setattr(execution, "resident_memory", resident)
    options = FinetuneOptions(objective="distill", teacher=teacher, memory="1M")  # too little for any plan
    inputs = read_inputs("tune", model, data, None, options, check=False)
    adapters = execution.adapters_of("tune", inputs, options)
    found = execution.predicted("tune", inputs, adapters, options, ExecutionPlan("float32", False, None))
    assert found.memory.weights == 300


def test_a_teacher_may_be_a_model_in_memory_with_an_adapter(
    model: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    lm = nplora.finetuning.load_with_adapter(model, model.parent / "adapter")
    loaded = finetune(model, data, tmp_path / "loaded", teacher=lm, steps=2, **DISTILL)
    merged = finetune(model, data, tmp_path / "merged", teacher=teacher, steps=2, **DISTILL)
    np.testing.assert_allclose(loaded.history.loss, merged.history.loss, rtol=1e-4)
    assert lm.adapter_layers()


def test_stored_examples_may_be_divided_and_weighted_otherwise(
    model: Path, taught: Path, data: Path, tmp_path: Path
) -> None:
    report = finetune(
        model, [(data, 2.0)], tmp_path / "out", teacher=taught, valid_split=0.3, steps=2, **DISTILL
    )
    assert report.valid is not None


# ---- what teach stores ----


def test_the_file_holds_the_most_likely_tokens(model: Path, teacher: Path, data: Path, taught: Path) -> None:
    lm, k = load_model(teacher), 8
    dataset = read_dataset(data, lm.tokenizer)
    file = safetensors.open(taught)
    ids, stored, starts = (file[name].numpy() for name in ("ids", "log_probs", "starts"))
    assert (ids.dtype, stored.dtype) == (np.int32, np.float16)
    assert stored.shape == (dataset.report.learned, k + 1)
    for (tokens, labels), begin, end in zip(dataset, starts[:-1], starts[1:], strict=True):
        scores = lm.logits(tokens)[:-1][labels[1:] != IGNORED].astype(np.float64)
        log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        order = np.argsort(-log_probs, axis=1)[:, :k]
        np.testing.assert_array_equal(ids[begin:end], order)
        top = np.take_along_axis(log_probs, order, 1)
        np.testing.assert_allclose(stored[begin:end, :k], top, rtol=1e-3)
        np.testing.assert_allclose(
            stored[begin:end, k], np.log(1 - np.exp(top).sum(axis=1)), rtol=1e-3, atol=1e-4
        )


def test_probabilities_that_were_rounded_sum_to_1_again(model: Path, taught: Path, data: Path) -> None:
    batch = pack(read_dataset(data, load_model(model).tokenizer))
    top: Any = StoredTeacher(taught).prepare_batch(batch)(np.flatnonzero(batch.targets != IGNORED))
    np.testing.assert_allclose(np.exp(top.log_probs).sum(axis=1), 1, rtol=1e-12)


def test_equal_examples_are_stored_once_and_validation_data_too(
    teacher: Path, data: Path, tmp_path: Path
) -> None:
    valid = tmp_path / "valid.jsonl"
    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
    valid.write_text("".join([rows[0], '{"prompt": "new", "completion": "row"}\n', rows[0]]))
    found = teach(teacher, [(data, 3.0)], tmp_path / "t", valid=valid, top_k=2)
    assert found.examples == 25
    assert found.nbytes == (tmp_path / "t").stat().st_size


def test_a_file_is_not_replaced_unless_asked(teacher: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        teach(teacher, data, path, top_k=2)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="is the data itself, which is never overwritten"):
        teach(teacher, data, data, top_k=2, overwrite=True)
    teach(teacher, data, path, top_k=2, overwrite=True)
    assert StoredTeacher(path).top_k == 2


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_the_adapter_of_the_teacher_is_not_replaced(
    model: Path, teacher: Path, data: Path, tmp_path: Path, name: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(model.parent / "adapter", adapter)
    before = (adapter / name).read_bytes()
    for given in (adapter, (adapter, 0.5), [model.parent / "adapter", (adapter, 2.0)]):
        with pytest.raises(ValueError, match=f"teach: .*{name} is the adapter itself, which is never overw"):
            teach(model, data, adapter / name, adapter=given, top_k=2, overwrite=True)
    assert (adapter / name).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.01, 100.0])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_file_of_an_extreme_temperature_teaches(
    model: Path, teacher: Path, data: Path, tmp_path: Path, temperature: float, dtype: str
) -> None:
    teach(teacher, data, tmp_path / "t", top_k=8, temperature=temperature, dtype=dtype)
    report = finetune(model, data, tmp_path / "out", teacher=tmp_path / "t", kd_ratio=1.0, steps=2, **DISTILL)
    assert all(record.metrics["kl"] > 0 for record in report.history.steps)


def test_log_probabilities_that_do_not_fit_are_refused_before_the_file_exists(
    teacher: Path, data: Path, tmp_path: Path
) -> None:
    """Logits of a thousand, divided by 0.01, leave the range of float16."""
    lm = load_model(teacher)
    lm.model.norm.weight[...] *= 500
    with pytest.raises(
        ValueError, match=r"teach: a log-probability of .* does not fit into float16: a higher"
    ):
        teach(lm, data, tmp_path / "t", top_k=8, temperature=0.01)
    assert not (tmp_path / "t").exists()
    teach(lm, data, tmp_path / "t", top_k=8, temperature=0.01, dtype="float32")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing_behind(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    calls = []

    def fail(lm: LanguageModel, hidden: Array) -> Array:
        calls.append(len(hidden))
        raise error

    monkeypatch.setattr(LanguageModel, "logits_of", fail)
    with pytest.raises(error):
        teach(teacher, data, tmp_path / "t", top_k=2)
    assert calls
    assert not list(tmp_path.iterdir())


def test_a_teacher_whose_outputs_are_not_finite_is_an_error(
    teacher: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    lm = load_model(teacher)
    lm.model.norm.weight[...] = np.inf
    with pytest.raises(NonFiniteLossError, match=r"teach: the outputs of the teacher .* are not finite"):
        teach(lm, data, tmp_path / "t", top_k=2)
    assert not list(tmp_path.iterdir())


# ---- numbers that are not finite ----


@pytest.mark.parametrize("layer", ["model.layers.1", "model.norm"])
def test_a_teacher_that_diverges_is_blamed(
    model: Path, teacher: Path, data: Path, tmp_path: Path, layer: str
) -> None:
    lm = load_model(teacher)
    norm: Any = lm.model.norm if layer == "model.norm" else lm.model.layers[1].input_layernorm  # type: ignore[attr-defined]
    norm.weight[...] = np.nan
    words = rf"in the teacher .*, the first layer whose output is not finite is '{re.escape(layer)}'"
    with pytest.raises(NonFiniteLossError, match=words):
        finetune(model, data, tmp_path / "out", teacher=lm, steps=2, **DISTILL)


@pytest.mark.parametrize("layer", ["model.layers.1", "model.norm", "lm_head"])
def test_a_student_whose_outputs_are_not_finite_is_blamed(
    model: Path, taught: Path, data: Path, layer: str
) -> None:
    lm: Any = load_model(model)
    batch = pack(read_dataset(data, lm.tokenizer))
    loss = DistillLoss(Distillation(), StoredTeacher(taught))
    assert loss.blame(lm, batch) == "the output of every layer is finite, but the loss is not"
    if layer == "lm_head":  # finite weights, whose products are too large for float32
        lm.model.norm.weight[...] = 1e38
        lm.lm_head.weight = FrozenWeight(np.full((lm.config.vocab_size, 32), 1e5, np.float32))
    else:
        norm = lm.model.norm if layer == "model.norm" else lm.model.layers[1].input_layernorm
        norm.weight[0] = np.nan
    assert loss.blame(lm, batch) == f"the first layer whose output is not finite is {layer!r}"


def test_a_student_that_diverges_is_blamed(model: Path, taught: Path, data: Path, tmp_path: Path) -> None:
    words = r"^step 2 \(epoch 1\): the loss of batch 2 is nan: the first layer whose output is not finite is "
    with pytest.raises(NonFiniteLossError, match=words + r"'model\.layers\.0'; a lower lr may help"):
        finetune(model, data, tmp_path / "out", teacher=taught, steps=9, **DISTILL | {"lr": 1e30})


# ---- what is refused ----


def test_a_teacher_of_another_vocabulary_is_refused(
    model: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    other, stored = other_tokens(tmp_path / "other.gguf"), tmp_path / "t"
    teach(other, data, stored, top_k=2)
    for given in (other, stored):
        with pytest.raises(FormatError) as caught:
            finetune(model, data, tmp_path / "out", teacher=given, **DISTILL)
        words = (
            "differs from the vocabulary of .*: token 40 is 'other', expected '.*' .1 of .* tokens differ."
        )
        assert caught.match(f"^finetune: the vocabulary of the teacher .* {words}$")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_teacher(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "adapter", steps=1, rank=1)
    with pytest.raises(
        ValueError, match=r"the teacher .*adapter is an adapter, .*`nplora teach MODEL --adapter`"
    ):
        finetune(model, data, tmp_path / "out", teacher=tmp_path / "adapter", **DISTILL)


@pytest.mark.slow
@pytest.mark.parametrize("padded", ["model", "teacher"])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_a_vocabulary_may_be_padded(
    model: Path, teacher: Path, data: Path, tmp_path: Path, padded: str, kl: str
) -> None:
    more = load_model(model).config.vocab_size + 7
    longer, stored = save_small_llama(tmp_path / "longer.gguf", vocab=more), tmp_path / "t"
    student, teaching = (longer, teacher) if padded == "model" else (model, longer)
    teach(teaching, data, stored, top_k=more - 7)  # as many tokens as the tokenizer has
    for name, given in (("stored", stored), ("model", teaching)):
        report = finetune(student, data, tmp_path / name, teacher=given, kl=kl, steps=2, **DISTILL)
        assert np.isfinite(report.history.loss).all()


@pytest.fixture(scope="module")
def talkative(model: Path) -> Path:
    """A teacher with seven tokens that the student lacks. It finds them likely."""
    path = model.parent / "talkative.gguf"
    tokens = list(gguf.open(model).metadata.strings("tokenizer.ggml.tokens"))
    kinds = gguf.open(model).metadata["tokenizer.ggml.token_type"]
    changes = {
        "tokenizer.ggml.tokens": [*tokens, *(f"<|more{n}|>" for n in range(7))],
        "tokenizer.ggml.token_type": np.append(kinds, np.full(7, 3)).astype(np.int32),
    }
    return save_small_llama(path, changes=changes, vocab=len(tokens) + 7)


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_a_stored_teacher_may_know_tokens_that_the_student_lacks(
    model: Path, talkative: Path, data: Path, tmp_path: Path, kl: str
) -> None:
    lm = load_model(talkative)
    batch = pack(read_dataset(data, lm.tokenizer))
    ids = np.argsort(-lm.logits_of(lm.residual_stream(batch)), axis=1)
    assert (ids[:, :4] >= lm.config.vocab_size - 7).any(), "some of the likely tokens are new"
    losses = {}
    for k in (4, lm.config.vocab_size):
        teach(talkative, data, tmp_path / "t", top_k=k, dtype="float32", overwrite=True)
        report = finetune(
            model, data, tmp_path / f"{k}", teacher=tmp_path / "t", kl=kl, kd_ratio=1.0, steps=3, **DISTILL
        )
        losses[k] = report.history.loss
    report = finetune(model, data, tmp_path / "m", teacher=talkative, kl=kl, kd_ratio=1.0, steps=3, **DISTILL)
    np.testing.assert_allclose(losses[lm.config.vocab_size], report.history.loss, rtol=1e-5)
    assert 0 < losses[4][0] <= report.history.loss[0], "the divergence of fewer classes is a lower bound"


def test_log_probabilities_of_other_data_are_refused(
    model: Path, taught: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text(encoding="utf-8") + '{"prompt": "a", "completion": "b"}\n')
    for options, words in (
        ({"data": other}, "of 1 of 25 examples"),
        ({"data": data, "valid": other}, "other.jsonl: the teacher .* of 1 of 25 examples"),
        ({"data": data, "learn": "all"}, r"of 24 of 24 examples: .* .max_length 64, learn completion"),
        ({"data": data, "max_length": 6}, "has no log-probabilities of 5 of 11 examples"),
    ):
        with pytest.raises(FormatError, match=words):
            finetune(model, output=tmp_path / "out", teacher=taught, **options, **DISTILL)
    assert not (tmp_path / "out").exists()


def test_examples_that_are_longer_than_the_teachers_context_are_refused(model: Path, tmp_path: Path) -> None:
    """The message names the teacher, and a maximum length with which the run begins."""
    short = save_small_llama(
        tmp_path / "short.gguf", changes={"llama.context_length": gguf.Typed(16, "UINT32")}
    )
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "x" * 10, "completion": "y" * 20}] * 4
    teach(short, rows, tmp_path / "t", top_k=4)
    for teacher, words in (
        (
            short,
            "31 tokens, but the context of the teacher .*short.gguf is 16: expected max_length=16 or less",
        ),
        (
            tmp_path / "t",
            "of 4 of 8 examples: .* from which the teacher file was made: .* .max_length 16, learn",
        ),
    ):
        with pytest.raises(FormatError, match=words):
            finetune(model, rows, tmp_path / "out", teacher=teacher, steps=1, **DISTILL)
        finetune(
            model, rows, tmp_path / "o", teacher=teacher, steps=1, max_length=16, overwrite=True, **DISTILL
        )


@pytest.mark.filterwarnings("ignore:.*without any field that --columns .* renames")
def test_validation_data_may_have_nplora_s_names_beside_columns(model: Path, tmp_path: Path) -> None:
    """As in `finetune`, which trains on the same data."""
    rows, valid = [{"q": "1+1=", "a": "2"}] * 4, [{"prompt": "2+2=", "completion": "4"}] * 2
    columns = {"prompt": "q", "completion": "a"}
    teach(model, rows, tmp_path / "t", valid=valid, columns=columns, top_k=4)
    given = {"valid": valid, "columns": columns, "teacher": tmp_path / "t", "steps": 1}
    finetune(model, rows, tmp_path / "out", **given, **DISTILL)


def test_another_temperature_than_the_stored_one_is_refused(
    model: Path, taught: Path, data: Path, tmp_path: Path
) -> None:
    words = r"temperature is 2, but .* computed at temperature 1: run nplora teach again with --temperature 2"
    with pytest.raises(ValueError, match=words):
        finetune(model, data, tmp_path / "out", teacher=taught, temperature=2.0, **DISTILL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "distill"}, "objective 'distill' needs a teacher"),
        ({"teacher": "t"}, "teacher is for objective 'distill', but the objective is 'sft'"),
        ({"kl": "reverse"}, "kl is for objective 'distill'"),
        (
            {"objective": "distill", "teacher": "t", "kl": "both"},
            "kl='both' is not available; possible: 'forward'",
        ),
        ({"objective": "distill", "teacher": "t", "kd_ratio": 0}, "kd_ratio is 0, expected above 0"),
        ({"objective": "distill", "teacher": "t", "kd_ratio": 1.5}, "kd_ratio is 1.5"),
        ({"objective": "distill", "teacher": "t", "temperature": -1}, "temperature is -1"),
        ({"objective": "distill", "teacher": ""}, "teacher is an empty path"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    model: Path, data: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    for call in (lambda: plan(model, data, **options), lambda: finetune(model, data, tmp_path, **options)):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_model_does_not_teach_itself(model: Path, data: Path, tmp_path: Path) -> None:
    lm = load_model(model)
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        finetune(lm, data, tmp_path / "out", teacher=lm, **DISTILL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "teach: top_k is 0"), ({"top_k": 10**6}, "teach: top_k is 1000000, but the vocab"),
        ({"temperature": 0}, "teach: temperature is 0"),
        ({"temperature": 0.009}, "teach: temperature is 0.009, expected 0.01 to 100"),
        ({"temperature": 101}, "teach: temperature is 101, expected 0.01 to 100"),
        ({"dtype": "int8"}, "teach: dtype='int8' is not"),
        ({"compute": "int8"}, "teach: compute='int8' is not"),
    ],
)  # fmt: skip
def test_teach_refuses_wrong_options(
    teacher: Path, data: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        teach(teacher, data, tmp_path / "t", **options)


def changed(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        if name in metadata:
            metadata[name] = value
        elif callable(value):
            tensors[name] = value(tensors[name].copy())
        else:
            del tensors[name]

    return change


def put(place: Any, value: Any) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array[place] = value
        return array

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("nplora teacher", "9"), "is of version '9', expected 1"),
        (changed("ids", None), "ids is missing"),
        (changed("ids", lambda a: a.astype(np.int64)), r"ids is I64 .*, expected I32 with 2 axes"),
        (changed("log_probs", lambda a: a[:, 1:]), r"expected \(rows, k\), \(rows, k \+ 1\)"),
        (changed("starts", put(1, 10**9)), "starts do not ascend"),
        (changed("starts", put(-1, 7)), "starts do not ascend"),
        (changed("token_ends", put(3, 2**40)), "token_ends do not ascend"),
        (changed("temperature", "warm"), "temperature is 'warm', expected a number"),
        (changed("temperature", "-1"), "temperature is '-1', expected a number"),
        (changed("temperature", "1e9"), "temperature is '1e9', expected a number from 0.01 to 100"),
        (changed("ids", put(slice(None), 9999)), "ids holds 9999 to 9999, expected tokens from 0"),
        (changed("ids", put(slice(None), -1)), "ids holds -1 to -1"),
        (changed("ids", np.zeros_like), "a token twice"),
        (changed("log_probs", put(slice(None), np.nan)), "expected logarithms of probabilities"),
        (changed("log_probs", put(slice(None), 3)), "expected logarithms of probabilities"),
    ],
)
def test_a_damaged_file_is_refused(
    model: Path,
    taught: Path,
    data: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, str]], None],
    words: str,
) -> None:
    file = safetensors.open(taught)
    tensors, metadata = {name: file[name].numpy() for name in file}, dict(file.metadata)
    change(tensors, metadata)
    safetensors.save(tmp_path / "t", tensors, metadata)
    with pytest.raises(FormatError, match=words):
        finetune(model, data, tmp_path / "out", teacher=tmp_path / "t", steps=1, **DISTILL)


def test_a_file_of_another_kind_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    safetensors.save(tmp_path / "t", {"w": np.eye(2, dtype=np.float32)})
    with pytest.raises(FormatError, match="expected a teacher: a model, or a file that nplora teach made"):
        finetune(model, data, tmp_path / "out", teacher=tmp_path / "t", **DISTILL)


def test_a_file_that_changes_during_a_run_is_an_error(
    model: Path, taught: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t"
    shutil.copy(taught, path)
    stored, lm = StoredTeacher(path), load_model(model)
    batch = pack(read_dataset(data, lm.tokenizer))
    stored.prepare_batch(batch)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptError, match="changed while it was in use"):
        stored.prepare_batch(batch)


# ---- the command line ----


def test_the_command_line_teaches_and_distils(
    model: Path, teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(tmp_path / "t"), str(tmp_path / "out")
    words = [
        "teach",
        str(teacher),
        "--data",
        str(data),
        "--output",
        path,
        "--top-k",
        "4",
        "--temperature",
        "2",
    ]
    assert cli.main(words) == 0
    assert "24 examples, 66 tokens, the 4 most likely predictions for each" in capsys.readouterr().out
    options = ["--objective", "distill", "--teacher", path, "--kd-ratio", "1", "--steps", "2"]
    assert cli.main(["finetune", str(model), "--data", str(data), "--output", out, *options]) == 0
    assert "KL" in capsys.readouterr().out
