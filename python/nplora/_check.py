"""Checks of the arguments that users pass to nplora.

Error messages name the operation, the expected value and the actual value.
"""

from __future__ import annotations  # annotations do not import np.random, which is slow

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
T = TypeVar("T")
P = ParamSpec("P")

_OVERLAP_WORK = 10_000  # the limit for np.shares_memory; if it needs more, the arrays count as overlapping
_INT64_MAX = 2**63 - 1
_LONGEST_NAME = 256  # characters of an unknown name that are compared with the known names

MAX_RANK = 1 << 16  # a larger rank of an adapter is surely a mistake, and might take all memory


def is_bfloat16(array: Array) -> bool:
    """Whether the array's dtype is ml_dtypes.bfloat16.

    The dtype's name is compared, so ml_dtypes need not be imported.
    """
    return array.dtype.name == "bfloat16"


# ---- kinds ----


def kind(value: object) -> str:
    """Describe any value briefly for a message.

    The name of a class from another package includes the module.
    """
    if isinstance(value, type):
        return f"the class {_title(value)}, not an instance of it"
    return f"{value[:40]!r}" if isinstance(value, str) else f"a {_title(type(value))}"


def _title(cls: type) -> str:
    package = cls.__module__.partition(".")[0]
    return cls.__name__ if package in ("builtins", "nplora") else f"{cls.__module__}.{cls.__qualname__}"


# ---- keywords ----

# nplora's keywords, each with the names that other libraries use for it.
_OTHER_NAMES = {
    "rank": "r lora_r lora_rank lora_dim",
    "alpha": "lora_alpha",
    "targets": "target_modules lora_target_modules lora_targets lora_target modules",
    "layers": "layers_to_transform num_layers lora_layers",
    "dropout": "lora_dropout",
    "init": "init_lora_weights",
    "trainable_tokens": "trainable_token_indices trainable_token_ids new_special_tokens",
    "modules_to_save": "train_modules additional_target lora_modules_to_save full_modules",
    "invocation": "alora_invocation_tokens alora_invocation_string invocation_string invocation_tokens",
    "lr": "learning_rate peak_lr",
    "lora_plus_ratio": "loraplus_lr_ratio loraplus_ratio lr_ratio lora_plus_lr_ratio",
    "lr_ratio": "loraplus_lr_ratio loraplus_ratio lora_plus_ratio",
    "rank_pattern": "ranks r_pattern",
    "schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
    "warmup": "warmup_ratio warmup_steps num_warmup_steps",
    "warmup_steps": "warmup_ratio warmup num_warmup_steps",
    "max_grad_norm": "clip_norm clip_grad_norm gradient_clipping gradient_clip_val",
    "clip_norm": "max_grad_norm clip_grad_norm gradient_clipping gradient_clip_val",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "steps": "max_steps iters num_iters iterations total_steps",
    "batch_size": "per_device_train_batch_size train_batch_size micro_batch_size batch_examples",
    "batch_examples": "per_device_train_batch_size train_batch_size micro_batch_size batch_size",
    "accumulate": "gradient_accumulation_steps accumulate_grad_batches grad_accumulation_steps grad_accum",
    "max_length": "max_seq_length max_seq_len model_max_length seq_length cutoff_len block_size",
    "learn": "train_on_inputs mask_prompt completion_only_loss assistant_only_loss",
    "compute": "dtype torch_dtype bf16 fp16 precision",
    "dtype": "load_in_4bit load_in_8bit quantization_config",
    "recompute": "gradient_checkpointing grad_checkpoint use_gradient_checkpointing",
    "seed": "random_state random_seed",
    "save_every": "save_steps steps_per_save checkpoint_every",
    "checkpoint_every": "save_steps steps_per_save save_every",
    "eval_every": "eval_steps steps_per_eval val_check_interval eval_interval eval_freq",
    "valid_split": "val_size test_size validation_split val_split eval_split",
    "patience": "early_stopping_patience early_stopping_rounds early_stopping",
    "keep": "load_best_model_at_end restore_best_weights restore_best save_best keep_best",
    "report_to": "log_with loggers tracker trackers",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir force",
    "output": "output_dir out out_dir save_path adapter_path",
    "checkpoint_dir": "output_dir output",
    "model": "model_name_or_path pretrained_model_name_or_path model_name model_path base_model",
    "adapter": "lora lora_path adapters adapter_path adapter_name_or_path",
    "data": "dataset dataset_path dataset_name train_file train_data train_dataset data_path",
    "valid": "validation validation_file valid_file eval_file eval_data eval_dataset",
    "validation": "valid validation_data eval_data eval_dataset",
    "max_new_tokens": "max_tokens max_completion_tokens n_predict num_predict max_length",
    "temperature": "temp do_sample",
    "repetition_penalty": "repeat_penalty",
    "stop": "stop_sequences stop_strings",
    "prompt": "text query question message input_text",
}
# Keywords of other libraries for settings that nplora does not have. Some of them look like our keywords.
_NOT_OURS = (
    *("logging_steps", "log_steps", "log_every"),
    *("steps_per_report", "save_strategy", "val_batches"),
)
_OTHER_MEANINGS = {
    "warmup_ratio": ", a number of steps",
    "max_length": ", which does not count the prompt",
    "do_sample": ", where 0 always takes the most likely token",
}
# Keywords for settings that nplora does not have, and what nplora does instead. `_INSTEAD` applies only to
# functions that generate text, and `_INSTEAD_ALWAYS` to all functions.
_INSTEAD = {
    **dict.fromkeys(
        ("batch_size", "eval_batch_size", "per_device_eval_batch_size"), "; nplora forms the batches itself"
    ),
    **dict.fromkeys(
        ("num_beams", "num_return_sequences"), "; nplora generates one text, without beam search"
    ),
}
_INSTEAD_ALWAYS = {
    **dict.fromkeys(
        _OTHER_NAMES["dtype"].split(),
        "; nplora keeps the weights in the dtype of the model's file; `nplora convert --dtype` changes it",
    ),
    **dict.fromkeys(
        ("device", "device_map", "gpu", "cuda", "n_gpu_layers"),
        "; nplora computes on the CPU and uses no GPU",
    ),
}


_TRAINER = ("schedule", "warmup_steps", "accumulate", "clip_norm", "seed", "callbacks", "progress")
_FIT = ("epochs", "steps", "batch_size", "shuffle", "validation", "eval_every", "patience", "keep")
# Hints for a setting that was given to the wrong function: to Trainer instead of Trainer.fit, to Trainer.fit
# instead of Trainer, or to one of them instead of the optimiser. Each key is a keyword of only one function
# (clip_norm of Trainer, checkpoint_dir of Trainer.fit), so it shows which function was called.
_TAKEN_ELSEWHERE = {
    "clip_norm": {
        "lr": "; the optimiser takes it: Trainer(..., optimizer=AdamW(lr=...))",
        **{ours: f"; `fit` takes it: fit(..., {ours}=...)" for ours in _FIT},
    },
    "checkpoint_dir": {
        "lr": "; the Trainer's optimiser takes it: Trainer(..., optimizer=AdamW(lr=...))",
        **{ours: f"; Trainer takes it: Trainer(..., {ours}=...)" for ours in _TRAINER},
    },
}


def _taken_elsewhere(name: str, known: Iterable[str]) -> str:
    """Return a hint about the function that takes the setting `name`, or an empty text."""
    for marker in _TAKEN_ELSEWHERE.keys() & set(known):
        for ours, hint in _TAKEN_ELSEWHERE[marker].items():
            if name in (ours, *_OTHER_NAMES.get(ours, "").split()):
                return hint
    return ""


def suggestion(name: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    """Return the end of a message about an unknown name: for example, "; did you mean rank?".

    If another library uses the unknown name, the text suggests nplora's name for the same setting. For any
    other unknown name, the text suggests the known name with the most similar spelling. For some settings
    that another function takes, the text names this function. For some settings that nplora does not have,
    the text says what nplora does instead. If there is no suggestion, the text is empty.

    Args:
        show: a function that converts the suggested name to the form in the message, such as `--max-length`.
    """
    if name in _NOT_OURS:
        return ""
    known = list(known)
    generates = "max_new_tokens" in known
    same = [ours for ours in known if name in _OTHER_NAMES.get(ours, "").split()]
    if not generates and "prompt" in same:  # the prompt of an encoder is a prefix of its texts
        same.remove("prompt")
    if same:
        return f"; did you mean {show(same[0])}{_OTHER_MEANINGS.get(name, '')}?"
    if hint := _taken_elsewhere(name, known):
        return hint
    if name in _INSTEAD and generates:
        return _INSTEAD[name]
    if name in _INSTEAD_ALWAYS:
        return _INSTEAD_ALWAYS[name]
    near = difflib.get_close_matches(name[:_LONGEST_NAME], known, n=1)
    return f"; did you mean {show(near[0])}?" if near else ""


def parameters_hint(name: str, value: object) -> str:
    """Return the end of a message for a value of `lr` that is a collection, else an empty text.

    In torch's optimisers, the first argument is the parameters; here, it is `lr`. So a user who passes a
    collection probably means the parameters.
    """
    is_several = isinstance(value, Sized | Iterator) and not isinstance(value, str)
    return "; pass the parameters to `step` instead" if name == "lr" and is_several else ""


def keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that an unknown keyword raises a TypeError that suggests a known keyword."""
    known = inspect.signature(function).parameters
    op = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: P.args, **named: P.kwargs) -> T:
        for name in named:
            if name not in known:
                raise TypeError(f"{op}: unexpected keyword {name!r}{suggestion(name, known)}")
        for name, value in zip(known, args, strict=False):
            if name in named:
                raise TypeError(
                    f"{op}: {name} is given twice: by position ({kind(value)}) and by keyword"
                    f"{parameters_hint(name, value)}"
                )
        return function(*args, **named)

    return checked


# ---- numbers and words ----


def number(op: str, name: str, value: object) -> float:
    """Check that a value is a finite real number; return it as a float. A bool is refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number")
    try:
        checked = float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} is beyond the range of float64") from None
    if not math.isfinite(checked):
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")
    return checked


def scale(op: str, value: object, dtype: npt.DTypeLike) -> float:
    """Check that `scale` is finite in `dtype`, the dtype of the arrays that it multiplies."""
    checked = number(op, "scale", value)
    if abs(checked) > float(np.finfo(dtype).max):
        raise ValueError(f"{op}: scale is {value}, beyond the range of {np.dtype(dtype).name}")
    return checked


def at_least(op: str, name: str, value: object, least: float) -> float:
    """Check that a value is a finite real number of at least `least`."""
    checked = number(op, name, value)
    if checked < least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {least:g}")
    return checked


def integer(op: str, name: str, value: object, least: int, most: int | None = None) -> int:
    """Check that a value is an integer from `least` to `most`; return it as an int. A bool is refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} is {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {least}")
    if most is not None and int(value) > most:
        raise ValueError(f"{op}: {name} is {value}, expected at most {most}")
    return int(value)


def boolean(op: str, name: str, value: object) -> None:
    """Check that a value is True or False.

    Python would accept any other value too: for example, the text "no" would count as true.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name} is {value!r}, expected True or False")


def rank(op: str, value: object) -> int:
    """Check that the rank of an adapter is an integer from 1 to MAX_RANK."""
    return integer(op, "rank", value, least=1, most=MAX_RANK)


def probability(op: str, name: str, value: object) -> float:
    """Check that a value is a number of at least 0 and below 1."""
    checked = number(op, name, value)
    if not 0 <= checked < 1:
        raise ValueError(f"{op}: {name} is {value}, expected at least 0 and below 1")
    return checked


def texts(op: str, name: str, value: object) -> tuple[str, ...]:
    """Check that a value is a list or tuple of str; return it as a tuple."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{op}: {name} is {value!r}, expected a list of texts")
    return tuple(value)


def choice(op: str, name: str, value: object, allowed: Iterable[str]) -> str:
    """Check that a value is one of the allowed words."""
    words = list(allowed)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{op}: {name}={value!r} is not available; possible: {', '.join(map(repr, words))}")
    return value


def generator(op: str, rng: np.random.Generator | int | None) -> np.random.Generator:
    """Return `rng` if it is a generator, else a new generator with the seed `rng` (None: a random seed)."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        message = f"{op}: rng is {rng!r}, expected a numpy Generator, an integer of at least 0, or None"
        raise type(error)(message) from None


# ---- arrays that are read ----


def as_array(op: str, name: str, value: npt.ArrayLike) -> Array:
    """Convert a value to a NumPy array."""
    try:
        return np.asarray(value)
    except ValueError as error:
        if "inhomogeneous" not in str(error):
            raise ValueError(f"{op}: {name} is not an array: {error}") from error
        raise ValueError(f"{op}: {name} is inhomogeneous: it contains lists of different lengths") from None


def matrix(op: str, name: str, array: Array) -> Array:
    """Check that an array has the two axes of a weight (d_out, d_in)."""
    if array.ndim != 2:
        if array.ndim == 0 and array.dtype.kind not in "fiub" and not is_bfloat16(array):
            raise TypeError(
                f"{op}: {name} is a {type(array.item()).__name__}, expected an array (d_out, d_in)"
            )
        raise ValueError(f"{op}: {name} has {_axes(array)}, expected 2 axes (d_out, d_in)")
    return array


def _axes(array: Array) -> str:
    return "1 axis" if array.ndim == 1 else f"{array.ndim} axes"


def floats(op: str, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """Return an array of real numbers as a C-contiguous, aligned array of `dtype`; copy it only if needed."""
    if value is None:
        raise TypeError(f"{op}: {name} is None, expected an array")
    array = as_array(op, name, value)
    if array.dtype.kind not in "fiub" and not is_bfloat16(array):
        raise TypeError(f"{op}: {name} has dtype {array.dtype}, expected real numbers")
    return np.require(array, dtype, ("C", "A"))


def shaped(op: str, name: str, value: npt.ArrayLike, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Convert an array of real numbers to `dtype`, and check that it has exactly the shape `shape`."""
    array = floats(op, name, value, dtype)
    if array.shape != shape:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {shape}")
    return array


def saved(op: str, value: object, kind: type) -> None:
    """Check that `value` is an object of the class `kind`.

    A forward pass returns its output and an object of this class. The backward pass needs this object.

    Raises:
        TypeError: `value` is of another class.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{op}: saved is of type {type(value).__name__}, "
            f"expected {kind.__name__}, which the forward pass returns beside its output"
        )


def kept(op: str, name: str, array: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Check the shape and dtype of an array that a forward pass saved for the backward pass of a layer.

    Raises:
        ValueError: the shape or dtype differs, so the array comes from another layer's forward pass.
    """
    if array is not None and (array.shape != shape or array.dtype != dtype):
        raise ValueError(
            f"{op}: saved is from another layer: its {name} is {array.dtype} of shape {array.shape}, "
            f"expected {dtype} of shape {shape}"
        )


def own(op: str, saved: Any, layer: object) -> None:
    """Refuse `saved` if it comes from another layer's forward pass, even if all shapes fit.

    Call this check after all other checks of `saved`.

    Raises:
        ValueError: `saved` comes from another layer's forward pass.
    """
    if saved.layer is not None and saved.layer is not layer:
        kind = type(saved.layer).__name__
        raise ValueError(f"{op}: `saved` comes from a forward pass of another {kind}")


def rows(
    op: str, name: str, value: npt.ArrayLike, width: int, width_name: str, dtype: npt.DTypeLike
) -> tuple[Array, tuple[int, ...]]:
    """Reshape an array (..., width) to (n, width).

    Returns:
        the new array, and a tuple with the lengths of all axes before the last one.
    """
    array = floats(op, name, value, dtype)
    if array.ndim == 0:
        raise ValueError(f"{op}: {name} is a single number, expected an array (..., {width_name}={width})")
    if array.shape[-1] != width:
        raise ValueError(f"{op}: {name} has last axis {array.shape[-1]}, expected {width_name}={width}")
    lead = array.shape[:-1]
    return array.reshape(math.prod(lead), width), lead


def vector(op: str, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """Check that an array has one axis; return a copy with the dtype `dtype`."""
    array = floats(op, name, value, dtype)
    if array.ndim != 1:
        raise ValueError(f"{op}: {name} has {_axes(array)}, expected 1")
    return array.copy()


def factors(
    op: str, A: npt.ArrayLike, B: npt.ArrayLike, d_out: int, d_in: int, dtype: npt.DTypeLike
) -> tuple[Array, Array]:
    """Check that the factors A (d_out, r) and B (r, d_in) fit the weight. The rank r must be at least 1."""
    a, b = floats(op, "A", A, dtype), floats(op, "B", B, dtype)
    if a.ndim != 2 or a.shape[0] != d_out or a.shape[1] == 0:
        raise ValueError(f"{op}: A has shape {a.shape}, expected (d_out={d_out}, r) with r at least 1")
    if b.shape != (a.shape[1], d_in):
        raise ValueError(f"{op}: B has shape {b.shape}, expected (r={a.shape[1]}, d_in={d_in})")
    return a, b


def integers(op: str, name: str, value: npt.ArrayLike) -> Array:
    """Convert an array of integers, of any shape, to int64. An empty list counts as an array of integers."""
    array = as_array(op, name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{op}: {name} has dtype {array.dtype}, expected integers")
    if array.dtype.kind == "u" and array.size and array.max() > _INT64_MAX:
        raise ValueError(f"{op}: {name} holds {array.max()}, expected at most 2**63 - 1")
    return np.require(array, np.int64, ("C", "A"))


def in_range(op: str, name: str, ids: Array, size: int) -> Array:
    """Check that all ids are at least 0 and below `size`; return the ids."""
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{op}: {name} holds {worst}, expected integers from 0 to {size - 1}")
    return ids


# ---- arrays that are written ----


def writable(op: str, name: str, array: object, *readers: tuple[str, Array]) -> Array:
    """Check that an array can be written in place, and shares no memory with the inputs in `readers`.

    Args:
        readers: the inputs of the operation, as pairs (name, array).
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{op}: {name} is a {type(array).__name__}, expected a NumPy array to write into")
    if not array.flags.writeable:
        raise ValueError(f"{op}: {name} is read-only")
    if not array.dtype.isnative:
        raise TypeError(f"{op}: {name} is byte-swapped ({array.dtype.str}), expected native byte order")
    if not array.flags.aligned:
        raise ValueError(f"{op}: {name} is not aligned to the size of its elements")
    for reader, other in readers:
        if overlap(array, other):
            raise ValueError(f"{op}: {name} overlaps {reader} in memory")
    return array


def overlap(a: Array, b: Array) -> bool:
    """Return True if two arrays share memory, or if it would take too long to find out."""
    try:
        return bool(np.shares_memory(a, b, max_work=_OVERLAP_WORK))  # type: ignore[arg-type, unused-ignore]
    except np.exceptions.TooHardError:
        return True


def merge_target(op: str, W: object, dtype: str | None, *readers: tuple[str, Array]) -> tuple[Array, str]:
    """Check the weight W that `merge_lora` changes in place.

    Returns:
        a tuple: W in the form that the C++ core expects, and the name of W's dtype. If W is float32 or
        float64, the first element is W itself. If W is float16 or bfloat16, the first element is a uint16
        view of the bit patterns of W.
    """
    array = writable(op, "W", W, *readers)
    storage = _storage_in_place(op, array, dtype)
    matrix(op, "W", array)
    if array.size:
        _require_rows(op, array)
    return (array.view(np.uint16) if array.itemsize == 2 else array), storage


def _require_rows(op: str, W: Array) -> None:
    """Check that each row of W is contiguous in memory, and that the rows are in order without overlap."""
    row, inner = W.strides
    if W.shape[1] > 1 and inner != W.itemsize:
        raise ValueError(
            f"{op}: the rows of W are not contiguous ({inner} bytes from one element to the next, "
            f"expected {W.itemsize}): is W transposed?"
        )
    if W.shape[0] > 1 and row < W.shape[1] * W.itemsize:
        raise ValueError(
            f"{op}: the rows of W run backwards or overlap ({row} bytes from one row to the next)"
        )


def _storage_in_place(op: str, array: Array, dtype: str | None) -> str:
    if array.dtype == np.uint16 and dtype == "bfloat16":
        return "bfloat16"
    name: str = array.dtype.name
    if name not in ("float32", "float64", "float16", "bfloat16"):
        hint = '; if W holds bit patterns of bfloat16, pass dtype="bfloat16"' if name == "uint16" else ""
        raise TypeError(f"{op}: W has dtype {name}, expected float32, float64, float16 or bfloat16{hint}")
    if dtype not in (None, name):
        raise ValueError(f"{op}: dtype={dtype!r}, but W has dtype {name}")
    return name
