"""Classifiers against transformers and PEFT: logits, gradients of factors and heads, adapters both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from figures import Figure

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
import torch_encoders  # noqa: E402
import torch_models  # noqa: E402
from small_encoder import save_small_encoder  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*name no pooling:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:.*copies of the base model's weights:UserWarning"),
]

Array = np.ndarray[Any, Any]

LABELS = ["bad", "so-so", "good"]
UPDATE = 0.02  # the scale of A. From 0.1 on, attention is so sharp that float32 in torch errs by 2e-4
TOLERANCE = 1e-5  # logits are of the order of 1, as hidden states are
GRADIENT_TOLERANCE = 1e-4  # relative to the largest element of an array's gradient
SEQUENCES = ["bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert", "modernbert with biases"]
HEADS = {"modernbert with biases": {"classifier_pooling": "mean", "classifier_bias": True}}
TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


def base_of(kind: str, directory: Path) -> None:
    """Write the model without a head."""
    torch_encoders.save(torch_encoders.make(kind, **HEADS.get(kind, {})), directory)


def classified_by_peft(kind: str, task: str, directory: Path) -> Any:
    """transformers' model with a random head, with PEFT's adapter of random factors. All is saved."""
    theirs = torch_encoders.make(kind, TASKS[task], num_labels=3, **HEADS.get(kind, {}))
    theirs.base_model.save_pretrained(directory / "base")
    targets = [
        name
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer" in name
    ]
    head = ["pooler"] if kind == "bert" and task == "SEQ_CLS" else ["head"] if "modern" in kind else None
    config = peft.LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules=targets, modules_to_save=head)
    theirs.name_or_path = str(directory / "base")
    model = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / "theirs")
    return model.double()


def assert_gradients_agree(ours: nplora.TextClassifier, model: Any) -> float:
    """Returns the largest error of a gradient, relative to the largest element of its array."""
    found = {p.name: p.grad for p in ours.parameters()}
    errors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            key = key.replace(".lora_A.default.weight", ".B").replace(".lora_B.default.weight", ".A")
            wanted = parameter.grad.numpy()
            errors[key] = np.abs(found[key] - wanted).max() / np.abs(wanted).max()
    assert errors.keys() == found.keys()
    assert all(error <= GRADIENT_TOLERANCE for error in errors.values()), errors
    return float(max(errors.values()))


def logits_of(model: Any, texts: list[list[int]]) -> Array:
    """The logits of each text alone, or of its tokens."""
    with torch.no_grad():
        parts = [model(input_ids=torch.tensor([ids])).logits.reshape(-1, 3).numpy() for ids in texts]
    return np.concatenate(parts)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_logits_and_gradients_of_an_adapter_of_peft(
    kind: str, task: str, tmp_path: Path, figure: Figure
) -> None:
    model = classified_by_peft(kind, task, tmp_path)
    ours = nplora.load_classifier(tmp_path / "base", tmp_path / "theirs")
    assert ours.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert ours.task_type == task
    texts = torch_encoders.some_texts()
    logits, saved = ours.forward(texts)
    wanted = torch.cat([model(input_ids=torch.tensor([ids])).logits.reshape(-1, 3) for ids in texts])
    worst = float(np.abs(logits - wanted.detach().numpy()).max())
    assert worst <= TOLERANCE
    np.testing.assert_array_equal(ours(texts), ours.logits_of_ids(texts, batch_size=50))
    np.testing.assert_allclose(ours.logits_of_ids(texts, batch_size=2), logits, rtol=0, atol=TOLERANCE)
    labels = np.random.default_rng(0).integers(0, 3, len(logits))
    torch.nn.functional.cross_entropy(wanted, torch.from_numpy(labels)).backward()
    ours.backward(nplora.losses.cross_entropy(logits, labels)[1], saved)
    figure("error of a logit of a classifier", worst)
    figure("error of a gradient of a classifier, relative", assert_gradients_agree(ours, model))


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_adapter_of_all_linear_layers_has_factors_in_the_head(kind: str, tmp_path: Path) -> None:
    """PEFT puts factors on the dense layer of the head, because only the last layer is in modules_to_save."""
    theirs = torch_encoders.make(kind, TASKS["SEQ_CLS"], num_labels=3)
    theirs.save_pretrained(tmp_path / "base")
    theirs.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules="all-linear")
    model = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    ours = nplora.load_classifier(tmp_path / "base", tmp_path / "theirs")
    dense = {"bert": "bert.pooler.dense", "modernbert": "head.dense"}[kind]
    assert dense in ours.adapter_layers()
    texts = torch_encoders.some_texts()
    logits, saved = ours.forward(texts)
    wanted = torch.cat([model.double()(input_ids=torch.tensor([ids])).logits for ids in texts])
    np.testing.assert_allclose(logits, wanted.detach().numpy(), rtol=0, atol=TOLERANCE)
    labels = np.random.default_rng(0).integers(0, 3, len(logits))
    torch.nn.functional.cross_entropy(wanted, torch.from_numpy(labels)).backward()
    ours.backward(nplora.losses.cross_entropy(logits, labels)[1], saved)
    assert_gradients_agree(ours, model)
    nplora.save_adapter(ours, tmp_path / "ours", str(tmp_path / "base"))
    plain = transformers.AutoModelForSequenceClassification
    base = plain.from_pretrained(tmp_path / "base", num_labels=3)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").double().eval()
    np.testing.assert_allclose(logits_of(again, texts), logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(
        nplora.load_classifier(tmp_path / "base", tmp_path / "ours")(texts), ours(texts)
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(kind: str, task: str, tmp_path: Path) -> None:
    base_of(kind, tmp_path / "base")
    ours = nplora.new_classifier(
        nplora.load_encoder(tmp_path / "base"), LABELS, tokens=task == "TOKEN_CLS", seed=3
    )
    ours.add_lora(rank=3, init="gaussian", layers="last:2")
    rng = np.random.default_rng(0)
    for parameter in ours.parameters():
        if parameter.name.endswith(".A"):
            parameter.value[...] *= np.float32(UPDATE)
        elif not parameter.name.endswith(".B"):
            parameter.value[...] += 0.2 * rng.standard_normal(parameter.value.shape, np.float32)
    base = str(tmp_path / "base")
    nplora.save_adapter(ours, tmp_path / "ours", base)
    loaded = getattr(
        peft, f"AutoPeftModelFor{'Token' if task == 'TOKEN_CLS' else 'Sequence'}Classification"
    ).from_pretrained(tmp_path / "ours", num_labels=3)
    texts = torch_encoders.some_texts()
    wanted = logits_of(loaded.double().eval(), texts)
    np.testing.assert_allclose(ours(texts), wanted, rtol=0, atol=TOLERANCE)
    again = nplora.load_classifier(tmp_path / "base", tmp_path / "ours")
    assert (again.labels, again.task) == (tuple(LABELS), "single")
    np.testing.assert_array_equal(again(texts), ours(texts))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_the_head_in_the_files_of_a_model_is_read(kind: str, tmp_path: Path) -> None:
    names = {"id2label": dict(enumerate(LABELS))}
    theirs = torch_encoders.make(kind, TASKS["SEQ_CLS"], **names)
    ours = nplora.load_classifier(torch_encoders.save(theirs, tmp_path))
    assert ours.labels == tuple(LABELS)
    texts = torch_encoders.some_texts()
    np.testing.assert_allclose(ours(texts), logits_of(theirs.double(), texts), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("task", TASKS)
def test_a_language_model_classifies(task: str, tmp_path: Path) -> None:
    base = torch_models.make("qwen3")
    base.save_pretrained(tmp_path / "base")
    texts = torch_encoders.some_texts(longest=60)
    ours = nplora.new_classifier(nplora.load_encoder(tmp_path / "base"), LABELS, tokens=task == "TOKEN_CLS")
    ours.add_lora(rank=2, init="gaussian", layers="last:1", targets="q_proj,down_proj")
    for parameter in ours.parameters():
        if parameter.name.endswith(".A"):
            parameter.value[...] *= np.float32(0.1)
    nplora.save_adapter(ours, tmp_path / "ours", str(tmp_path / "base"))
    head = (
        transformers.AutoModelForTokenClassification
        if task == "TOKEN_CLS"
        else (transformers.AutoModelForSequenceClassification)
    )
    model = head.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "ours").double().eval()
    np.testing.assert_allclose(ours(texts), logits_of(loaded, texts), rtol=0, atol=1e-4)


def test_a_trained_classifier_of_words_gives_the_same_labels_in_transformers(tmp_path: Path) -> None:
    """As in transformers' run_ner, the label of a word is that of its first token."""
    base_of("bert", tmp_path / "base")
    save_small_encoder(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").rename(tmp_path / "base" / "tokenizer.json")
    rows = [
        {"tokens": ["the", "cat", "sats", "."], "tags": ["O", "B-PET", "O", "O"]},
        {"tokens": ["A", "dogs", "unknown"], "tags": ["O", "B-PET", "I-PET"]},
    ] * 8
    options = {"rank": 2, "lr": 1e-2, "epochs": 20, "batch_examples": 8}
    run = nplora.finetuning.train_classifier(tmp_path / "base", rows, tmp_path / "ours", **options)
    loaded = peft.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "ours", num_labels=3)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "base" / "tokenizer.json"))
    for row, found in zip(rows, nplora.finetuning.predict_rows(run.classifier, rows), strict=True):
        encoding = tokenizer(row["tokens"], is_split_into_words=True, padding=False, truncation=False)
        wanted = logits_of(loaded.double().eval(), [encoding["input_ids"]])
        first = [encoding.word_ids().index(i) for i in range(len(row["tokens"]))]
        ours = run.classifier.word_logits(run.classifier.encoder.word_ids([row["tokens"]], 64))
        np.testing.assert_allclose(ours, wanted[first], rtol=0, atol=TOLERANCE)
        assert [run.classifier.labels[i] for i in wanted[first].argmax(axis=1)] == found["prediction"]
        assert found["prediction"] == row["tags"]
