"""new_classifier makes a classifier with a new head; load_classifier reads the head from files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import Adapter
from nplora.formats.config_json import Fields, read_fields
from nplora.formats.errors import FormatError, LimitError, brief, counted
from nplora.formats.files import StrPath
from nplora.formats.label_record import LONGEST_LABEL, MAX_LABELS, TASKS, LabelRecord, is_name
from nplora.formats.model_directory import CONFIG
from nplora.lm import classifier_head
from nplora.lm.classifier import TextClassifier
from nplora.lm.classifier_head import ClassifierHead
from nplora.lm.encoder import Encoder, require_encoder
from nplora.lm.encoder_loading import load_encoder
from nplora.models import families
from nplora.models.config import ModelConfig
from nplora.models.families.head_spec import HeadSpec, language_model_head
from nplora.nn.module import layer_stream

Array = npt.NDArray[Any]

_SPREAD = 0.02  # the standard deviation of transformers' new layers
_SHORT = 8  # only a `max_length` below this is checked for room, because reading the tokenizer takes time
_PROBLEMS = {  # transformers' names of the tasks
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}


@_check.keywords
def new_classifier(
    encoder: Encoder,
    labels: Iterable[str] | Iterable[int] | Mapping[int, str],
    task: str = "single",
    tokens: bool = False,
    seed: int = 0,
) -> TextClassifier:
    """Put a new, untrained head on an encoder. The encoder is not copied.

    The dense layer of the head starts with the values in the model's files, if the files have this layer. The
    weights of all other linear layers are drawn from N(0, 0.02²), as in transformers.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> classifier = nplora.new_classifier(encoder, ["order", "refund"])
        >>> classifier.add_lora(rank=4)
        >>> classifier.labels
        ('order', 'refund')

    Args:
        labels: the names of the outputs. (In a regression, each output is a number.) Integers are converted
            to texts. `labels` may be a dictionary from numbers (0, 1, ...) to names, such as transformers'
            `id2label`.
        task: "single" (each text has one label), "multi" (each text has any number of labels) or
            "regression" (each output is a number).
        tokens: whether to classify each token of a text, instead of the whole text.
        seed: the seed of the new weights.
    Raises:
        ValueError: two labels have the same name, the number of labels does not fit the task, or the task is
            unknown.
        TypeError: the labels are not texts.
    """
    op = "new_classifier"
    require_encoder(op, encoder)
    record = _record(op, labels, task, tokens)
    spec = _spec(encoder, tokens)
    _check.integer(op, "seed", seed, least=0)
    arrays: dict[str, dict[str, Array]] = {}
    for layer, shapes in classifier_head.shapes(spec, encoder.config.hidden_size, len(record.labels)).items():
        stored = None if layer == spec.out else _stored(encoder, layer, shapes)
        arrays[layer] = _new(layer, shapes, seed, layer == spec.norm) if stored is None else stored
    return TextClassifier(encoder, ClassifierHead(spec, arrays, _eps(encoder)), record)


@_check.keywords
def load_classifier(
    model: StrPath | Encoder,
    adapter: StrPath | Adapter | None = None,
    compute: str | None = None,
    any_base: bool = False,
) -> TextClassifier:
    """Load a classifier from a model and a classifier's adapter, or from a model whose files contain a head.

    The adapter must have PEFT's task type SEQ_CLS or TOKEN_CLS. If nplora wrote the adapter, its files
    contain the names of the labels. If PEFT wrote the adapter, the names come from the model's config.json,
    provided that config.json has one name for each label. Otherwise the names are LABEL_0, LABEL_1 and so on.

        >>> import nplora
        >>> classifier = nplora.new_classifier(nplora.load_encoder("encoder-model"), ["order", "refund"])
        >>> classifier.add_lora(rank=2)
        >>> nplora.save_adapter(classifier, "mine")
        >>> nplora.load_classifier("encoder-model", "mine").labels
        ('order', 'refund')

    Args:
        model: a path, as for `load_encoder`, or a loaded encoder that has no adapter. `adapter` is added to
            this encoder.
        adapter: a PEFT directory, or an `Adapter`.
        compute: as for `load_encoder`; None: "float32". For a loaded encoder, `compute` must be None.
        any_base: accept an adapter that was trained on another model with the same shapes.
    Raises:
        FormatError: the adapter or the model has no head for a classifier, or the adapter does not fit the
            model.
        Other errors: see `load_encoder` and `Adapter.attach`.
    """
    encoder = opened_encoder("load_classifier", model, compute)
    if adapter is None:
        return _from_model(encoder)
    found = adapter if isinstance(adapter, Adapter) else Adapter.read(adapter, any_base=any_base)
    tokens = found.task_type == "TOKEN_CLS"
    spec = _spec(encoder, tokens)
    head = found.modules_to_save
    if "weight" not in head.get(spec.out, {}):
        raise FormatError(
            f"{found.source}: the adapter has no layer {spec.out!r}, expected an adapter of a classifier"
        )
    weight = head[spec.out]["weight"]
    outputs = weight.shape[0] if weight.ndim else 1  # a weight without axes is refused below
    _require_outputs(found.source, outputs)
    arrays = {}
    for layer, shapes in classifier_head.shapes(spec, encoder.config.hidden_size, outputs).items():
        arrays[layer] = _given(found.source, layer, shapes, head, encoder)
    if unknown := [name for name in head if name not in arrays]:
        raise FormatError(
            f"{found.source}: the adapter has the layer {brief(unknown[0])}, which the head of this "
            "model lacks"
        )
    record = found.labels or _guessed(encoder, outputs, tokens)
    if record.tokens != tokens:
        kinds = ("tokens", "whole texts") if record.tokens else ("whole texts", "tokens")
        raise FormatError(
            f"{found.source}: the labels are for {kinds[0]}, but task_type {found.task_type} is for "
            f"{kinds[1]}"
        )
    if len(record.labels) != outputs:
        raise FormatError(f"{found.source}: {len(record.labels)} labels, but the head has {outputs} outputs")
    # PEFT's target "all-linear" puts factors on the dense layer. Then only `out` is trained as a whole.
    frozen = [name for name in spec.layers if name not in head] if spec.dense in found else []
    made = TextClassifier(encoder, ClassifierHead(spec, arrays, _eps(encoder), frozen), record)
    factors = Adapter.of(dataclasses.replace(found, modules_to_save={}))
    if record.max_length is not None and record.max_length < _SHORT:
        require_room(found.source, made)  # before the encoder gets LoRA layers
    factors.attach(made, any_base)
    return made


def require_room(source: str, classifier: TextClassifier) -> None:
    """Raise FormatError if the special tokens around a text leave no room for a token within `max_length`.

    Args:
        source: the file or argument that set `max_length`, for the error message.
    """
    around = len(classifier.encoder.token_ids([""], classifier.encoder.config.max_position_embeddings)[0][0])
    if classifier.max_length <= around:
        raise FormatError(
            f"{source}: max_length is {classifier.max_length}, but the tokenizer puts "
            f"{counted(around, 'token')} around a text; expected at least {around + 1}"
        )


def opened_encoder(op: str, model: StrPath | Encoder, compute: str | None) -> Encoder:
    """The encoder, which is loaded if `model` is a path. The encoder's own pooling is not used.

    Raises:
        ValueError: `compute` is given for an encoder that is loaded already.
    """
    if not isinstance(model, Encoder):
        return load_encoder(model, compute or "float32", pooling="mean")
    if compute is not None:
        raise ValueError(f"{op}: compute={compute!r} is given, but the encoder is loaded already")
    return model


def _record(op: str, labels: Iterable[Any], task: str, tokens: bool) -> LabelRecord:
    if isinstance(labels, str) or not np.iterable(labels):
        raise TypeError(f"{op}: labels is {labels!r}, expected a list of texts")
    if isinstance(labels, Mapping):  # id2label of transformers
        if sorted(map(str, labels)) != sorted(map(str, range(len(labels)))):
            raise ValueError(
                f"{op}: labels has the keys {brief(list(labels))}, expected 0 to {len(labels) - 1}"
            )
        labels = [name for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    given = list(labels)
    if all(isinstance(name, int | np.integer) and not isinstance(name, bool) for name in given):
        given = list(map(str, given))
    names = _check.texts(op, "labels", given)
    if any(not is_name(name) for name in names):
        raise ValueError(f"{op}: a label is empty or has more than {LONGEST_LABEL:,} characters")
    _check.choice(op, "task", task, TASKS)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{op}: two labels are named {twice!r}")
    least = 2 if task == "single" else 1
    if not least <= len(names) <= MAX_LABELS:
        raise ValueError(
            f"{op}: {len(names)} labels, expected {least} to {MAX_LABELS:,} for the task {task!r}"
        )
    return LabelRecord(task, names, None, bool(tokens))


def _spec(encoder: Encoder, tokens: bool) -> HeadSpec:
    config = encoder.config
    if isinstance(config, ModelConfig):
        return language_model_head(tokens)
    family = families.encoder_of(config)
    return family.token_head(config) if tokens else family.head(config)


def _require_outputs(source: str, outputs: int) -> None:
    if not outputs:
        raise FormatError(f"{source}: the head has no outputs")
    if outputs > MAX_LABELS:
        raise LimitError(f"{source}: the head has {outputs:,} outputs, expected at most {MAX_LABELS:,}")


def has_output_bias(encoder: Encoder) -> bool:
    """Whether the last layer of a new head for texts has a bias. On a language model, it has no bias."""
    return _spec(encoder, tokens=False).out_bias


def _eps(encoder: Encoder) -> float:
    config = encoder.config
    return config.rms_norm_eps if isinstance(config, ModelConfig) else config.layer_norm_eps


def _new(layer: str, shapes: Mapping[str, tuple[int, ...]], seed: int, is_norm: bool) -> dict[str, Array]:
    rng = np.random.default_rng(layer_stream(seed, layer))
    made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    made["weight"][...] = 1 if is_norm else _SPREAD * rng.standard_normal(shapes["weight"], np.float32)
    return made


def _stored(encoder: Encoder, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array] | None:
    """The arrays of a layer in the model's files; None if an array is missing or has the wrong shape."""
    found = {name: encoder.head_tensor(f"{layer}.{name}") for name in shapes}
    fitting = {n: a for n, a in found.items() if a is not None and a.shape == shapes[n]}
    return fitting if len(fitting) == len(shapes) else None


def _given(
    source: str,
    layer: str,
    shapes: Mapping[str, tuple[int, ...]],
    head: Mapping[str, Mapping[str, Array]],
    encoder: Encoder,
) -> dict[str, Array]:
    """Return a layer's arrays from the adapter, or from the model's files if the adapter lacks the layer."""
    if layer not in head:
        stored = _stored(encoder, layer, shapes)
        if stored is None:
            raise FormatError(
                f"{source}: neither the adapter nor the model has the layer {layer!r}, which the head needs"
            )
        return stored
    given = dict(head[layer])
    if given.keys() != shapes.keys():
        raise FormatError(
            f"{source}: {layer} has the arrays {', '.join(sorted(map(brief, given)))}, expected "
            f"{', '.join(sorted(shapes))}"
        )
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise FormatError(f"{source}: {layer}.{name} has shape {given[name].shape}, expected {shape}")
    return given


def _from_model(encoder: Encoder) -> TextClassifier:
    """Return the classifier of a model whose files contain a head."""
    width, tokens = encoder.config.hidden_size, _classifies_tokens(encoder)
    spec = _spec(encoder, tokens)
    weight = encoder.head_tensor(f"{spec.out}.weight")
    outputs = 0 if weight is None or weight.ndim != 2 else weight.shape[0]
    arrays = {
        layer: _stored(encoder, layer, shapes)
        for layer, shapes in classifier_head.shapes(spec, width, outputs).items()
    }
    if not outputs or (missing := [name for name, found in arrays.items() if found is None]):
        name = spec.out if not outputs else missing[0]
        raise FormatError(
            f"{encoder.source}: the model has no layer {name!r}, expected the files of a classifier, or an "
            "adapter of a classifier besides the model"
        )
    _require_outputs(str(encoder.source), outputs)
    head = ClassifierHead(spec, {name: found or {} for name, found in arrays.items()}, _eps(encoder))
    return TextClassifier(encoder, head, _guessed(encoder, outputs, tokens))


def has_head(encoder: Encoder) -> bool:
    """Whether the model's files have the last layer of a classifier. The shape of the layer is not checked.

    Raises:
        FormatError, UnsupportedError: as in `Encoder.head_tensor`.
    """
    spec = _spec(encoder, _classifies_tokens(encoder))
    return encoder.head_tensor(f"{spec.out}.weight") is not None


def _classifies_tokens(encoder: Encoder) -> bool:
    config = _config(encoder)
    return config is not None and "TokenClassification" in _architecture(config)


def _config(encoder: Encoder) -> Fields | None:
    path = encoder.source / CONFIG
    return read_fields(path) if path.is_file() else None


def _architecture(config: Fields) -> str:
    values = dict(config.items()).get("architectures")
    first = values[0] if isinstance(values, list) and values else ""
    return first if isinstance(first, str) else ""


def _guessed(encoder: Encoder, outputs: int, tokens: bool) -> LabelRecord:
    """The labels and the task that config.json names."""
    config = _config(encoder)
    values = {} if config is None else dict(config.items())
    named, problem = values.get("id2label"), values.get("problem_type")
    labels = tuple(f"LABEL_{i}" for i in range(outputs))
    if isinstance(named, dict) and len(named) == outputs:
        found = [named.get(str(i)) for i in range(outputs)]
        if all(isinstance(name, str) and is_name(name) for name in found) and len(set(found)) == outputs:
            labels = tuple(map(str, found))
    task = _PROBLEMS.get(problem, "") if isinstance(problem, str) else ""
    return LabelRecord(task or ("single" if outputs > 1 else "regression"), labels, None, tokens)
