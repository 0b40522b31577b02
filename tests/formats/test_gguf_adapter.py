"""llama.cpp's adapter files: reading them, and errors that are raised before any part is used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile import refused
from nplora.formats import gguf, gguf_adapter
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.formats.gguf import Tensor, Typed
from nplora.formats.gguf_adapter import GgufAdapter, Pair
from nplora.models import base_model

Q = "blk.0.attn_q.weight"
EMBEDDING = "token_embd.weight"


def adapter() -> GgufAdapter:
    rng = np.random.default_rng(0)
    shapes = {Q: ((2, 5), (6, 2)), EMBEDDING: ((3, 9), (5, 3))}
    pairs = {
        name: Pair(*(rng.standard_normal(shape, np.float32) for shape in both))
        for name, both in shapes.items()
    }
    return GgufAdapter("llama", 12.0, pairs)


def test_an_adapter_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = adapter()
    gguf_adapter.save(tmp_path / "a.gguf", written)
    read = gguf_adapter.load(tmp_path / "a.gguf")
    assert (read.architecture, read.alpha, list(read.pairs)) == ("llama", 12.0, [Q, EMBEDDING])
    for name, pair in written.pairs.items():
        np.testing.assert_array_equal(read.pairs[name].lora_a, pair.lora_a)
        np.testing.assert_array_equal(read.pairs[name].lora_b, pair.lora_b)
    assert gguf.open(tmp_path / "a.gguf")[f"{EMBEDDING}.lora_a"].shape == (9, 3)
    assert [read.pairs[name].rank for name in (Q, EMBEDDING)] == [2, 3]
    assert [read.scale(name) for name in (Q, EMBEDDING)] == [6.0, 4.0]


def test_an_alpha_of_0_is_a_scale_of_1() -> None:
    assert GgufAdapter("llama", 0.0, adapter().pairs).scale(Q) == 1.0


def edited(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    gguf_adapter.save(path, adapter())
    file = gguf.open(path)
    tensors, metadata = dict(file), dict(file.metadata.typed())
    edit(tensors, metadata)  # type: ignore[arg-type]
    gguf.save(path, tensors, metadata)
    return path


def test_norms_are_skipped_and_reported(tmp_path: Path) -> None:
    name = "blk.0.attn_norm.weight"
    path = edited(tmp_path / "a.gguf", lambda tensors, _: tensors.update({name: np.ones(5, np.float32)}))
    assert gguf_adapter.load(path).passed_over == (name,)


def test_a_general_type_that_is_not_text_is_refused_for_a_model(tmp_path: Path) -> None:
    for kind in (np.uint32([1, 2]), Typed(["adapter", "model"], "STRING")):
        path = tmp_path / "a.gguf"
        gguf.save(path, {Q: np.ones((2, 2), np.float32)}, {"general.type": kind})
        with refused(FormatError, "'general.type'", path):
            base_model.read(path)


A, B = Q + ".lora_a", Q + ".lora_b"
BLOCKS = Tensor(B, "Q8_0", (6, 32), np.zeros(6 * 34, np.uint8))
HOSTILE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], type[FormatError], str]] = {
    "a model": (
        lambda _, metadata: metadata.update({"general.type": "model"}),
        FormatError,
        "general.type is 'model', expected 'adapter'; this is a model file, not an adapter",
    ),
    "types in an array": (
        lambda _, metadata: metadata.update({"general.type": np.uint32([1, 2])}),
        FormatError,
        "expected a STRING",
    ),
    "no type": (
        lambda _, metadata: metadata.pop("general.type"),
        FormatError,
        "'general.type' is missing, expected a STRING",
    ),
    "no architecture": (
        lambda _, metadata: metadata.pop("general.architecture"),
        FormatError,
        "'general.architecture' is missing",
    ),
    "another kind of adapter": (
        lambda _, metadata: metadata.update({"adapter.type": "ia3"}),
        UnsupportedError,
        "adapter.type is 'ia3', expected 'lora'",
    ),
    "no invocation tokens of an activated LoRA (aLoRA)": (
        lambda _, metadata: metadata.update({"adapter.alora.invocation_tokens": np.empty(0, np.uint32)}),
        FormatError,
        "adapter.alora.invocation_tokens is empty, expected token ids",
    ),
    "a mark of the chat template that is text": (
        lambda _, metadata: metadata.update({"nplora.chat_template": "true"}),
        FormatError,
        "is the STRING 'true', expected a BOOL",
    ),
    "alpha NaN": (
        lambda _, metadata: metadata.update({"adapter.lora.alpha": np.float32(np.nan)}),
        FormatError,
        "adapter.lora.alpha is nan, expected a finite number",
    ),
    "alpha as text": (
        lambda _, metadata: metadata.update({"adapter.lora.alpha": "16"}),
        FormatError,
        "is the STRING '16', expected a number",
    ),
    "alpha as an array": (
        lambda _, metadata: metadata.update({"adapter.lora.alpha": Typed([1.0], "FLOAT32")}),
        FormatError,
        "is 1 value of type FLOAT32, expected a number",
    ),
    "lora_a without lora_b": (
        lambda tensors, _: tensors.pop(B),
        FormatError,
        f"tensor '{B}' is missing, but the layer's other factor is present",
    ),
    "lora_b without lora_a": (
        lambda tensors, _: tensors.pop(A),
        FormatError,
        f"tensor '{A}' is missing, but the layer's other factor is present",
    ),
    "a tensor that belongs to no pair": (
        lambda tensors, _: tensors.update({Q: np.ones((6, 5))}),
        FormatError,
        f"tensor '{Q}', expected a name that ends in .lora_a or .lora_b",
    ),
    "different ranks": (
        lambda tensors, _: tensors.update({B: np.ones((6, 3))}),
        FormatError,
        f"'{Q}': .lora_a has shape (2, 5), .lora_b (6, 3), expected equal ranks",
    ),
    "different ranks in an embedding": (
        lambda tensors, _: tensors.update({EMBEDDING + ".lora_a": np.ones((3, 9))}),
        FormatError,
        f"'{EMBEDDING}': .lora_a has shape (3, 9), .lora_b (5, 3), expected equal ranks",
    ),
    "rank 0": (
        lambda tensors, _: tensors.update({A: np.ones((0, 5)), B: np.ones((6, 0))}),
        FormatError,
        f"tensor '{A}' has shape (0, 5), expected two dimensions of at least 1",
    ),
    "no values, but a shape beyond float32": (
        lambda tensors, _: tensors.update({A: np.ones((1 << 61, 0), np.float16)}),
        FormatError,
        f"tensor '{A}' has shape (2305843009213693952, 0), expected two dimensions of at least 1",
    ),
    "one dimension": (
        lambda tensors, _: tensors.update({A: np.ones(5)}),
        FormatError,
        f"tensor '{A}' has shape (5,), expected two dimensions",
    ),
    "an infinity": (
        lambda tensors, _: tensors.update({A: np.full((2, 5), np.inf)}),
        FormatError,
        f"tensor '{A}' holds NaN or an infinity",
    ),
    "a float64 beyond float32": (
        lambda tensors, _: tensors.update({A: np.full((2, 5), 1e300)}),
        FormatError,
        "holds NaN or an infinity",
    ),
    "integers": (
        lambda tensors, _: tensors.update({A: np.ones((2, 5), np.int8)}),
        UnsupportedError,
        f"tensor '{A}' is I8, expected one of F32, F16, BF16, F64",
    ),
    "a digest that is not one": (
        lambda _, metadata: metadata.update({"nplora.base_norms.sha256": "\x1b[31m\nall is well"}),
        FormatError,
        "nplora.base_norms.sha256 is '\\x1b[31m\\nall is well', expected 64 hexadecimal digits",
    ),
    "a digest with another line": (
        lambda _, metadata: metadata.update({"nplora.base_norms.sha256": "a" * 64 + "\n"}),
        FormatError,
        "expected 64 hexadecimal digits",
    ),
    "a digest that is too long": (
        lambda _, metadata: metadata.update({"nplora.base_norms.sha256": "0" * 100_000}),
        FormatError,
        "0000…, expected 64 hexadecimal digits",
    ),
    "a digest in capitals": (
        lambda _, metadata: metadata.update({"nplora.base_norms.sha256": "A" * 64}),
        FormatError,
        "expected 64 hexadecimal digits",
    ),
    "quantised factors": (
        lambda tensors, _: tensors.update({B: BLOCKS}),
        UnsupportedError,
        f"tensor '{B}' is Q8_0, expected one of F32",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_adapter_that_is_wrong_gives_its_exact_error(name: str, tmp_path: Path) -> None:
    edit, error, words = HOSTILE[name]
    path = edited(tmp_path / "a.gguf", edit)
    with refused(error, words, path):
        gguf_adapter.load(path)
