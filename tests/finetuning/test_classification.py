"""Classifiers of texts: training, resuming, labels, metrics and bad rows."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from failing_step import FailingStep
from kept_weights import KeptWeights
from nplora import _core
from nplora.finetuning import (
    ClassificationReport,
    ClassifyOptions,
    TextBatches,
    evaluate_classifier,
    predict_rows,
    train_classifier,
)
from nplora.finetuning.classification.calibration import temperature
from nplora.formats.errors import DataError, FormatError
from nplora.models.decoder import frozen_weights
from nplora.nn import losses
from small_encoder import WORDS, save_small_encoder
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

PETS, OTHERS = ("cat", "dog"), WORDS[15:28]
FAST: dict[str, Any] = {"rank": 2, "lr": 1e-2, "batch_examples": 8}


def some_rows(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of random words. Those with a pet have the label "pet"."""
    rng, rows = np.random.default_rng(seed), list[dict[str, Any]]()
    for _ in range(count):
        words = rng.choice(OTHERS, 5).tolist()
        pets = [pet for pet in PETS if rng.random() < 0.3]
        words += pets
        rng.shuffle(words)
        row = {"text": " ".join(words), "label": "pet" if pets else "shop", "pets": pets}
        rows.append({**row, "number": 10.0 + 5 * len(pets)})
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_a_classifier_learns_and_its_adapter_is_read_again(model: Path, tmp_path: Path) -> None:
    rows = some_rows()
    run = train_classifier(model, rows, tmp_path, valid=some_rows(40, 1), epochs=8, **FAST)
    assert run.classifier.labels == ("pet", "shop")
    assert run.valid is not None
    assert run.valid.values["accuracy"] >= 0.9
    again = nplora.load_classifier(model, tmp_path)
    assert again.max_length == 32
    texts = [row["text"] for row in rows]
    np.testing.assert_array_equal(again.logits(texts), run.classifier.logits(texts))
    assert evaluate_classifier(again, some_rows(40, 1)).as_json() == run.valid.as_json()
    predicted = list(predict_rows(again, iter(rows)))
    assert [row["prediction"] for row in predicted] == again.predict(texts)
    assert list(predicted[0]["probabilities"].values()) == again.predict_proba(texts)[0].tolist()


@pytest.mark.slow
def test_several_labels_for_a_text_are_learned(model: Path, tmp_path: Path) -> None:
    rows = some_rows()
    run = train_classifier(model, rows, tmp_path, task="multi", columns="label=pets", epochs=20, **FAST)
    report = evaluate_classifier(run.classifier, rows, columns={"label": "pets"})
    assert run.classifier.labels == PETS
    assert report.values["micro_f1"] >= 0.9
    separated = [{"text": row["text"], "label": "; ".join(row["pets"])} for row in rows]
    assert evaluate_classifier(run.classifier, separated, separator=";").as_json() == report.as_json()


@pytest.mark.slow
def test_a_regression_predicts_the_targets_as_they_are(model: Path, tmp_path: Path) -> None:
    rows = some_rows()
    run = train_classifier(
        model, rows, tmp_path, task="regression", columns="label=number", epochs=20, **FAST
    )
    found = nplora.load_classifier(model, tmp_path).predict([row["text"] for row in rows])
    wanted = [row["number"] for row in rows]
    assert np.corrcoef(found, wanted)[0, 1] > 0.9
    assert abs(np.mean(found) - np.mean(wanted)) < 1
    report = evaluate_classifier(run.classifier, rows, columns="label=number")
    assert math.isclose(report.values["loss"], np.mean(np.subtract(found, wanted) ** 2), rel_tol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["single", "regression"])
def test_a_resumed_run_has_the_bits_of_a_run_without_a_stop(task: str, model: Path, tmp_path: Path) -> None:
    column = "label=number" if task == "regression" else "label=label"
    options = {**FAST, "task": task, "columns": column, "epochs": 2, "dropout": 0.1, "save_every": 3}
    options |= {"valid_split": 0.2, "calibrate": task == "single", "accumulate": 2}
    whole = train_classifier(model, some_rows(), tmp_path / "whole", **options)
    for step in (1, 3, 4):
        with pytest.raises(OSError, match="the power is gone"):
            train_classifier(
                model, some_rows(), tmp_path / "cut", callbacks=[FailingStep(step)], resume=True, **options
            )
    again = train_classifier(model, some_rows(), tmp_path / "cut", resume=True, **options)
    finished = train_classifier(model, some_rows(), tmp_path / "cut", resume=True, **options)
    files = [Path(tmp_path, name, "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert whole.temperature == again.temperature == finished.temperature
    words = "the run was already finished: nothing was trained"
    assert [words in str(run) for run in (whole, again, finished)] == [False, False, True]
    assert ["peak memory" in str(run) for run in (whole, again, finished)] == [True, True, False]
    with pytest.raises(FileExistsError, match="holds a run"):
        train_classifier(model, some_rows(), tmp_path / "cut", **options)
    options |= {"lr": 1.0, "eval_every": 1, "patience": 1}
    early, again = (
        train_classifier(model, some_rows(), tmp_path / "early", resume=True, **options) for _ in range(2)
    )
    assert early.history.ended == again.history.ended == "patience"
    assert [run.was_finished for run in (early, again)] == [False, True]
    options = {name: value for name, value in options.items() if name not in ("eval_every", "patience")}
    other = [*some_rows()[:-1], {"text": "a cat", "label": "shop", "number": 3}]
    with pytest.raises(ValueError, match=r"\b[xy]\b"):
        train_classifier(model, other, tmp_path / "cut", resume=True, **options)


@pytest.mark.slow
def test_a_run_in_int8_learns_compares_its_gradients_and_resumes_to_the_bit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {**FAST, "epochs": 8, "compute": "int8", "save_every": 3}
    train_classifier(model, some_rows(), tmp_path / "whole", **options)
    with pytest.raises(OSError, match="the power is gone"):
        train_classifier(model, some_rows(), tmp_path / "cut", callbacks=[FailingStep(4)], **options)
    options |= {"compute": None, "resume": True}  # the run stays in int8
    train_classifier(model, some_rows(), tmp_path / "cut", progress=True, **options)
    assert "cut: the run still uses --compute int8" in capsys.readouterr().err
    files = [Path(tmp_path, name, "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    exact = nplora.load_classifier(model, tmp_path / "whole")  # in float32
    assert evaluate_classifier(exact, some_rows(40, 1)).values["accuracy"] >= 0.9
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    (row,) = (row for row in log if row["event"] == "int8")
    assert row["step"] == 1
    assert 0.95 < row["cosine"] < 1  # 1 would be a run in bfloat16


def test_a_run_that_keeps_weights_in_int8_trains_the_same_adapter(model: Path, tmp_path: Path) -> None:
    adapters = []
    for keeps in (False, True):
        encoder = nplora.load_encoder(model, compute="int8")
        options: dict[str, Any] = {**FAST, "steps": 2, "layers": "last:1", "keep_int8": keeps}
        kept = KeptWeights()
        run = train_classifier(encoder, some_rows(), tmp_path / str(keeps), callbacks=[kept], **options)
        blocks = [weight.int8_nbytes for weight in frozen_weights(encoder.model.layers[-1:])]
        assert kept.nbytes == 2 * [keeps * sum(blocks)]
        assert not any(weight.keeps_int8 for weight in frozen_weights([encoder]))  # after the run
        adapters.append(Path(run.output, "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_a_finished_run_converts_no_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**FAST, "steps": 1, "compute": "int8", "keep_int8": True}
    train_classifier(model, some_rows(), tmp_path / "out", **options)
    monkeypatch.setattr(nplora.FrozenWeight, "keep_int8", None)  # a call would fail
    assert train_classifier(model, some_rows(), tmp_path / "out", resume=True, **options).was_finished


@pytest.mark.parametrize("compute", ["bfloat16", None])
def test_weights_are_kept_only_with_int8(model: Path, tmp_path: Path, compute: str | None) -> None:
    words = f"train_classifier: keep_int8 needs compute='int8', but compute is '{compute or 'float32'}'"
    with pytest.raises(ValueError, match=words):
        train_classifier(model, some_rows(), tmp_path / "out", compute=compute, keep_int8=True)
    assert not (tmp_path / "out").exists()


def test_a_run_continues_in_another_arithmetic_if_this_is_asked_for(model: Path, tmp_path: Path) -> None:
    rows, options = some_rows(), {**FAST, "epochs": None, "steps": 2}
    train_classifier(model, rows, tmp_path / "out", **options)
    options |= {"compute": "bfloat16", "resume": True, "steps": 3}
    with pytest.raises(ValueError, match=r"compute was float32, is bfloat16 .*; --change-compute"):
        train_classifier(model, rows, tmp_path / "out", **options)
    with (
        pytest.warns(UserWarning, match="total_steps was 2, is 3"),
        pytest.warns(UserWarning, match="another arithmetic: compute was float32, is bfloat16"),
    ):
        train_classifier(model, rows, tmp_path / "out", change_compute=True, **options)
    with pytest.raises(ValueError, match="train_classifier: change_compute=True needs resume=True"):
        train_classifier(model, rows, tmp_path / "new", change_compute=True)


def test_int8_without_vector_instructions_is_warned_of(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**_core.config(), "isa": "generic"}
    monkeypatch.setattr(_core, "config", lambda: here)
    with pytest.warns(UserWarning, match="train_classifier: compute='int8' is about 8 times slower"):
        train_classifier(model, some_rows(), tmp_path / "out", compute="int8", steps=1)


def test_balanced_weights_give_all_labels_the_same_weight(model: Path, tmp_path: Path) -> None:
    """The first loss, whose logits are nearly 0 for all labels, is the mean of weight · log 2."""
    rows = [{"text": "a cat", "label": 1}] * 2 + [{"text": "the mat", "label": 0}] * 6
    run = train_classifier(model, rows, tmp_path, class_weights="balanced", steps=1, lr=1e-12)
    logits = run.classifier.logits([row["text"] for row in rows]).astype(np.float64)
    labels, weights = np.array([1, 1, 0, 0, 0, 0, 0, 0]), np.array([8 / 12, 8 / 4])
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(8), labels]
    assert math.isclose(run.history.loss[0], (weights[labels] * losses).mean(), rel_tol=1e-6)
    assert run.classifier.labels == ("0", "1")


def test_labels_are_sorted_by_their_value(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "a cat", "label": label} for label in ("10", "9", "-1", "b", "a")]
    run = train_classifier(model, rows, tmp_path, steps=1)
    assert run.classifier.labels == ("-1", "9", "10", "a", "b")


def test_long_texts_are_cut_and_counted(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "a cat " * 40, "label": "pet"}, {"text": "the mat", "label": "shop"}]
    run = train_classifier(model, rows, tmp_path, steps=1, max_length=10)
    assert run.cut == 1
    assert "cut to 10 tokens: 1 text" in str(run)
    again = nplora.load_classifier(model, tmp_path)
    assert again.max_length == 10
    with pytest.warns(UserWarning, match="cut to 10 tokens: 1 text"):
        evaluate_classifier(again, rows)


ROW = {"text": "a cat", "label": "pet"}
SHOP = {"text": "the mat", "label": "shop"}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([ROW, ROW], {}, "all rows have the label 'pet', expected at least 2 labels"),
        ([ROW, {"text": "", "label": "shop"}], {}, "data, row 2: the text is empty"),
        ([ROW, {"text": " \n", "label": "shop"}], {}, "data, row 2: the text is empty"),
        ([ROW, {"text": None, "label": "shop"}], {}, "row 2: 'text' is None, expected a text"),
        ([ROW, {"label": "shop"}], {}, r"row 2: no field 'text', only \['label'\]"),
        ([ROW, {"text": "a"}], {}, "row 2: no field 'label'.*--columns label=NAME"),
        ([ROW, {"text": "a", "label": 3}], {}, "row 2: the label 3 is a number, but the label 'pet'"),
        ([ROW, {"text": "a", "label": 0.5}], {}, "row 2: the label is 0.5, expected .* an integer; --task"),
        ([ROW, {"text": "a", "label": float("nan")}], {}, "row 2: the label is nan, expected"),
        ([ROW, {"text": "a", "label": None}], {}, "row 2: the label is None, expected"),
        ([ROW, {"text": "a", "label": " "}], {}, "row 2: the label is empty"),
        ([ROW, {"text": "a", "label": ["pet", 1]}], {"task": "multi"}, "row 2: the label 1 is a number"),
        ([{"text": "a", "label": []}], {"task": "multi"}, "no row has a label"),
        ([{"text": "a", "label": float("nan")}], {"task": "regression"}, "the target is nan, expected"),
        ([{"text": "a", "label": "1e999"}], {"task": "regression"}, "row 1: the target is '1e999'"),
        ([{"text": "a", "label": 1e39}], {"task": "regression"}, "row 1: the target is 1e"),
        ([{"text": "a", "label": True}], {"task": "regression"}, "row 1: the target is True"),
        ([{"text": "a", "label": "many"}], {"task": "regression"}, "row 1: the target is 'many'"),
        ([ROW, SHOP], {"valid": [{"text": "a", "label": "zoo"}]}, "the label 'zoo' is unknown"),
        ([ROW, SHOP], {"valid_split": 1e-9}, "valid_split=1e-09 holds out 0 of 2 rows"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused_with_their_place(
    rows: list[dict[str, Any]], options: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        train_classifier(model, rows, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_skipped_and_counted_on_request(model: Path, tmp_path: Path) -> None:
    bad = {"text": "", "label": "shop"}
    run = train_classifier(model, [ROW, bad, SHOP, bad], tmp_path, steps=1, skip_bad=True)
    assert run.examples == 2
    assert "2 bad rows skipped (data, row 2: the text is empty" in str(run)
    with pytest.warns(UserWarning, match="1 bad row skipped .*the label 'zoo' is unknown"):
        report = evaluate_classifier(run.classifier, [ROW, {"text": "a", "label": "zoo"}], skip_bad=True)
    assert report.examples == 1
    with pytest.raises(DataError, match="the label 'zoo' is unknown, expected one of 'pet', 'shop'"):
        evaluate_classifier(run.classifier, [ROW, {"text": "a", "label": "zoo"}])
    with pytest.warns(UserWarning, match="1 empty text; the prediction for an empty text means little"):
        assert len(list(predict_rows(run.classifier, [{"text": ""}]))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "several"}, "task='several' is not available"),
        (
            {"task": "multi", "class_weights": "balanced"},
            "is for the tasks 'single' and 'tokens', not 'multi'",
        ),
        ({"task": "regression", "calibrate": True}, "calibrate is for labels"),
        ({"epochs": 1, "steps": 1}, "epochs and steps are both given"),
        ({"separator": ""}, "separator is '', expected a text"),
        ({"valid_split": 1.0}, "valid_split is 1.0, expected between 0 and 1"),
        ({"rank": 0}, "rank is 0"),
        ({"lr": 0}, "lr is 0, expected above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifyOptions(**options)


def test_the_tokenizer_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = save_small_encoder(tmp_path / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["elephant"] = len(WORDS)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [ROW, {"text": "an elephant", "label": "zoo"}]
    with pytest.raises(FormatError, match="the tokenizer has a token with id 31, but the model's vocabulary"):
        train_classifier(path, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    classifier = nplora.new_classifier(nplora.load_encoder(path), ["pet", "zoo"])
    for use in (classifier.predict, classifier.encoder.embed):
        with pytest.raises(FormatError, match="expected the tokenizer of this model"):
            use(["an elephant"])


def test_calibration_needs_validation_data(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibrate=True needs validation data"):
        train_classifier(model, [ROW, SHOP], tmp_path / "out", calibrate=True)


def test_unknown_columns_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns has the key 'prompt', expected text or label"):
        train_classifier(model, [ROW, SHOP], tmp_path / "out", columns="prompt=x")


# ---- metrics, against scikit-learn ----


def test_the_metrics_of_single_labels_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(200, 4)), rng.integers(0, 3, 200)  # the last label never occurs
    report = ClassificationReport.of("single", list("abcd"), logits, truth)
    predicted = logits.argmax(axis=1)
    assert report.confusion is not None
    every = list(range(4))
    np.testing.assert_array_equal(report.confusion, metrics.confusion_matrix(truth, predicted, labels=every))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert math.isclose(report.values["loss"], metrics.log_loss(truth, chances, labels=every))
    found = np.array([[s.precision, s.recall, s.f1, s.support] for s in report.scores.values()]).T
    wanted = metrics.precision_recall_fscore_support(truth, predicted, labels=every, zero_division=0)
    np.testing.assert_allclose(found, wanted)
    assert math.isclose(report.values["accuracy"], metrics.accuracy_score(truth, predicted))
    assert math.isclose(report.values["macro_f1"], wanted[2].mean())


def test_the_metrics_of_several_labels_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(150, 3)), rng.integers(0, 2, (150, 3))
    report = ClassificationReport.of("multi", list("abc"), logits, truth)
    predicted = (logits >= 0).astype(int)
    for name, average in (("micro_f1", "micro"), ("macro_f1", "macro")):
        assert math.isclose(report.values[name], metrics.f1_score(truth, predicted, average=average))
    assert math.isclose(report.values["subset_accuracy"], metrics.accuracy_score(truth, predicted))
    losses = [metrics.log_loss(truth[:, i], 1 / (1 + np.exp(-logits[:, i]))) for i in range(3)]
    assert math.isclose(report.values["loss"], np.mean(losses))


def test_the_metrics_of_numbers_are_those_of_scipy_and_scikit_learn() -> None:
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 60).astype(float)  # with ties
    found = truth + rng.normal(size=60)
    values = ClassificationReport.of("regression", ["score"], found[:, None], truth[:, None]).values
    assert math.isclose(values["mae"], metrics.mean_absolute_error(truth, found))
    assert math.isclose(values["r2"], metrics.r2_score(truth, found))
    assert math.isclose(values["pearson"], stats.pearsonr(truth, found).statistic)
    assert math.isclose(values["spearman"], stats.spearmanr(truth, found).statistic)
    constant = ClassificationReport.of("regression", ["score"], found[:, None], np.ones((60, 1)))
    assert json.loads(json.dumps(constant.as_json(), allow_nan=False))["r2"] is None


@pytest.mark.parametrize("task", ["single", "multi"])
def test_the_temperature_has_the_lowest_loss(task: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(400, 3))
    noisy = logits / 2.5 + rng.gumbel(size=logits.shape)
    truth = noisy.argmax(axis=1) if task == "single" else (noisy > 0.5).astype(np.float32)

    def loss(t: float) -> float:
        return ClassificationReport.of(task, list("abc"), logits / t, truth).values["loss"]

    wanted = optimize.minimize_scalar(loss, bounds=(0.1, 50), method="bounded", options={"xatol": 1e-8}).x
    assert math.isclose(temperature(task, logits, truth), wanted, rel_tol=1e-5)


# ---- inputs that went wrong once ----

PETS_AND_SHOPS = [ROW, SHOP]


def untrained(model: Path, labels: Any = ("pet", "shop"), **options: Any) -> nplora.TextClassifier:
    return nplora.new_classifier(nplora.load_encoder(model), labels, **options)


def damaged(model: Path) -> nplora.TextClassifier:
    """A classifier whose logits overflow."""
    classifier = untrained(model)
    classifier.add_lora(rank=2, init="gaussian")
    for parameter in classifier.parameters():
        if parameter.name.endswith((".A", ".B")):
            parameter.value[...] = 3e38
    return classifier


@pytest.mark.parametrize("form", ["directory", "mapping"])
def test_validation_data_are_the_validation_rows_of_a_directory(
    form: str, model: Path, tmp_path: Path
) -> None:
    held = some_rows(2, 1)
    for name, rows in (("train", some_rows(6)), ("valid", held)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    valid: Any = tmp_path if form == "directory" else {"train": some_rows(6), "validation": held}
    run = train_classifier(model, some_rows(6), tmp_path / "out", valid=valid, steps=1)
    assert run.valid is not None
    assert run.valid.examples == 2


def test_one_text_is_not_a_list_of_texts(model: Path) -> None:
    classifier = untrained(model)
    for use in (classifier.predict, classifier.predict_proba, classifier.logits, classifier.encoder.encode):
        with pytest.raises(TypeError, match="texts is 'a cat', expected a list of texts"):
            use("a cat")


def test_logits_that_are_not_finite_are_an_error_that_names_the_row(model: Path) -> None:
    classifier = damaged(model)
    with np.errstate(all="ignore"):
        for use in (classifier.predict, classifier.predict_proba):
            with pytest.raises(ValueError, match=r"the logits of texts\[0\] are NaN or infinite"):
                use(["a cat"])
        with pytest.raises(ValueError, match="evaluate_classifier: the logits of data, row 1 are NaN"):
            evaluate_classifier(classifier, PETS_AND_SHOPS)
        with pytest.raises(ValueError, match="predict_rows: the logits of data, row 1 are NaN"):
            list(predict_rows(classifier, PETS_AND_SHOPS))
    for task, targets in (("single", np.array([0])), ("regression", np.ones((1, 2)))):
        with pytest.raises(ValueError, match="ClassificationReport: the logits of"):
            ClassificationReport.of(task, ["a", "b"], np.array([[0.0, np.nan]]), targets)


def test_a_loaded_encoder_is_left_as_it_was(model: Path, tmp_path: Path) -> None:
    encoder = nplora.load_encoder(model)
    with pytest.raises(OSError, match="the power is gone"):
        train_classifier(
            encoder, some_rows(), tmp_path / "a", max_length=5, callbacks=[FailingStep(1)], **FAST
        )
    assert encoder.max_length == 32
    run = train_classifier(encoder, some_rows(8), tmp_path / "b", max_length=5, steps=1, **FAST)
    assert (encoder.max_length, run.classifier.max_length) == (32, 5)
    other = nplora.load_encoder(model)
    assert nplora.load_classifier(other, tmp_path / "b").max_length == 5
    assert other.max_length == 32


def test_an_encoder_has_no_adapter_after_saving_has_failed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = nplora.load_encoder(model)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("nplora.finetuning.classification.training.save_adapter", full)
        with pytest.raises(OSError, match="no space left"):
            train_classifier(encoder, PETS_AND_SHOPS, tmp_path, steps=1)
    assert not encoder.adapter_layers()
    run = train_classifier(encoder, PETS_AND_SHOPS, tmp_path, steps=1, resume=True)
    assert run.classifier.adapter_layers()


def test_compute_is_refused_for_a_loaded_encoder(model: Path, tmp_path: Path) -> None:
    encoder = nplora.load_encoder(model)
    with pytest.raises(ValueError, match="compute='bfloat16' is given, but the encoder is loaded already"):
        train_classifier(encoder, PETS_AND_SHOPS, tmp_path / "out", compute="bfloat16")
    with pytest.raises(ValueError, match="compute='int4' is not available"):
        train_classifier(model, PETS_AND_SHOPS, tmp_path / "out", compute="int4")
    with pytest.raises(ValueError, match="load_classifier: compute='float32' is given"):
        nplora.load_classifier(encoder, compute="float32")


def test_a_text_without_tokens_is_a_bad_row(tmp_path: Path) -> None:
    """The tokenizer of a language model may add no token to an empty text."""
    path = save_small_llama(tmp_path / "model.gguf", changes={"tokenizer.ggml.add_bos_token": False})
    classifier = nplora.new_classifier(nplora.load_encoder(path, pooling="last"), ["pet", "shop"])
    rows = [{"text": "a cat"}, {"text": ""}, {"text": "a dog"}]
    with pytest.raises(DataError, match="data, row 2: the text has no tokens"):
        list(predict_rows(classifier, rows))
    with pytest.warns(UserWarning, match="row 2: the text has no tokens"):
        found = list(predict_rows(classifier, rows, skip_bad=True))
    assert [row["text"] for row in found] == ["a cat", "a dog"]


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_without_room_for_words_is_refused(length: int, model: Path, tmp_path: Path) -> None:
    message = f"max_length is {length}, but the tokenizer puts 2 tokens around a text; expected at least 3"
    with pytest.raises(FormatError, match=f"train_classifier: {message}"):
        train_classifier(model, PETS_AND_SHOPS, tmp_path / "out", max_length=length)
    classifier = untrained(model)
    classifier.add_lora(rank=2)
    classifier.max_length = length
    nplora.save_adapter(classifier, tmp_path / "saved")
    encoder = nplora.load_encoder(model)
    with pytest.raises(FormatError, match=f"saved.*: {message}"):
        nplora.load_classifier(encoder, tmp_path / "saved")
    assert not encoder.adapter_layers()


def test_fields_that_a_prediction_would_replace_are_refused(model: Path) -> None:
    row = {"text": "a cat", "probability": 3}
    with pytest.raises(DataError, match="row 1: the row already has a field 'probability'"):
        list(predict_rows(untrained(model), [row]))
    number = untrained(model, ["score"], task="regression")
    assert next(predict_rows(number, [row]))["probability"] == 3


def test_labels_are_found_with_spaces_and_by_number(model: Path) -> None:
    rows = [{"text": "a cat", "label": " a"}, {"text": "a dog", "label": "b"}]
    assert evaluate_classifier(untrained(model, [" a", "b"]), rows).examples == 2
    numbered = [{"text": "a cat", "label": 0}, {"text": "a dog", "label": 1.0}]
    for labels in (["LABEL_0", "LABEL_1"], [0, 1], {0: "x", 1: "y"}, {"1": "y", "0": "x"}):
        report = evaluate_classifier(untrained(model, labels), numbered)
        assert report.scores[report.labels[0]].support == 1
        assert report.labels[0] in ("LABEL_0", "0", "x")
    with pytest.raises(DataError, match="data, row 1: the label '0' is unknown, expected one of '1', '3'"):
        evaluate_classifier(untrained(model, [1, 3]), numbered)
    both = [{"text": "a cat", "label": 1}, {"text": "a dog", "label": True}]
    words = r"the label True is a boolean, but the label 1 \(data, row 1\) is a number"
    with pytest.raises(DataError, match=words):
        evaluate_classifier(untrained(model, ["1", "True"]), both)
    with pytest.raises(DataError, match="the label '2' is unknown"):
        evaluate_classifier(untrained(model), [{"text": "a", "label": 2}])
    with pytest.raises(ValueError, match=r"labels has the keys \[0, 2\], expected 0 to 1"):
        untrained(model, {0: "x", 2: "y"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"separator": ""}, ValueError, "evaluate_classifier: separator is '', expected a text"),
        ({"separator": 5}, TypeError, "evaluate_classifier: separator is 5, expected a text"),
        ({"columns": {"text": 5}}, TypeError, r"evaluate_classifier: columns\['text'\] is 5, expected"),
        ({"columns": 5}, TypeError, "columns is"),
    ],
)
def test_wrong_arguments_of_an_evaluation_are_named(
    options: dict[str, Any], error: type[Exception], message: str, model: Path
) -> None:
    with pytest.raises(error, match=message):
        evaluate_classifier(untrained(model), PETS_AND_SHOPS, **options)


def test_a_classifier_of_two_numbers_has_no_rows_to_compare(model: Path) -> None:
    both = untrained(model, ["x", "y"], task="regression")
    with pytest.raises(ValueError, match="the classifier predicts 2 numbers, but each row has only one"):
        evaluate_classifier(both, [{"text": "a", "label": 1}])


def test_the_rate_counts_the_texts_of_the_steps(model: Path, tmp_path: Path) -> None:
    for task, column in (("single", "label"), ("multi", "pets")):
        options = {**FAST, "batch_examples": 2, "task": task, "columns": f"label={column}"}
        run = train_classifier(model, some_rows(), tmp_path / task, steps=3, **options)
        assert f" s, {6 / run.history.seconds:.1f} texts/s," in str(run)


def test_many_labels_need_no_matrix() -> None:
    """The confusion matrix of 60,000 labels would take 29 GB."""
    labels, truth = [str(i) for i in range(60_000)], np.array([0, 59_999, 7])
    logits = np.zeros((3, 60_000))
    logits[[0, 1, 2], [0, 59_999, 8]] = [9, 1, 1]
    report = ClassificationReport.of("single", labels, logits, truth)
    assert report.confusion is None
    assert "confusion" not in report.as_json()
    assert report.values["accuracy"] == 2 / 3
    found = [report.scores[name] for name in ("0", "7", "8", "59999")]
    assert [(score.f1, score.support) for score in found] == [(1, 1), (0, 1), (0, 0), (1, 1)]
    assert 0.01 <= temperature("single", logits, truth) <= 100


def test_reports_show_labels_without_control_characters(model: Path, tmp_path: Path) -> None:
    names = ["\x1b[31mred", "a\nb", "x" * 900]
    report = ClassificationReport.of("single", names, np.eye(3), np.arange(3))
    assert "\x1b" not in str(report)
    assert str(report).count("\n") == 9
    assert max(map(len, str(report).split("\n"))) < 200
    rows = [{"text": "a cat", "label": name} for name in names]
    text = str(train_classifier(model, rows, tmp_path / "out", steps=1, valid=rows))
    assert "\\x1b[31mred, a\\nb, xxx" in text
    assert "\x1b" not in text + repr(nplora.load_classifier(model, tmp_path / "out"))
    with pytest.raises(DataError, match="row 1: the label has 2,000 characters, expected at most 1,000"):
        train_classifier(model, [{"text": "a", "label": "x" * 2000}], tmp_path / "long", steps=1)


def test_infinite_metrics_are_null_in_json() -> None:
    targets = np.array([[1.0], [1.0 + 1e-160]])
    report = ClassificationReport("regression", ("score",), 2, {"r2": -math.inf, "loss": 1.0})
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["r2"] is None
    tiny = ClassificationReport.of("regression", ["score"], np.array([[1e20], [3.0]]), targets * 1e-160)
    json.dumps(tiny.as_json(), allow_nan=False)


@pytest.mark.parametrize(("texts", "length", "expected"), [(20, 200, 9), (5, 200, 5), (40, 20, 25)])
def test_int8_is_compared_with_more_texts_than_a_small_batch_has(
    texts: int, length: int, expected: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to eight rows are multiplied with low-bit weights in int8 in both gradients."""
    classifier, used = untrained(model), list[int]()
    forward = classifier.forward

    def cut(ids: Any) -> Any:  # the model takes 32 tokens
        used.append(len(ids))
        return forward([text[:9] for text in ids])

    monkeypatch.setattr(classifier, "forward", cut)
    batches = TextBatches([[5] * length] * texts, np.zeros(texts, np.int64), batch_size=4)
    batches.sample_gradient(classifier, losses.cross_entropy)()
    assert used == [expected]
