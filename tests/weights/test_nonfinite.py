"""NaN and infinities in a model's file are reported before any computation, and never printed as JSON."""

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from nplora import _core, cli
from nplora.adapters import Adapter
from nplora.finetuning import execution
from nplora.formats import gguf, safetensors
from nplora.formats.errors import FormatError
from nplora.lora.delta import LoraDelta
from nplora.models import weights
from small_llama import save_small_llama

ml_dtypes = pytest.importorskip("ml_dtypes")

Array = np.ndarray[Any, Any]

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NAME, STORED = "model.layers.1.mlp.up_proj", "blk.1.ffn_up.weight"


def patterns(values: Array) -> Array:
    return values.view(np.uint16) if values.itemsize == 2 else values


@pytest.mark.parametrize("storage", DTYPES)
def test_the_first_value_that_is_not_finite_is_found(storage: str, rng: np.random.Generator) -> None:
    """It is placed among the largest and smallest finite values; 300,000 of them are several tasks."""
    limits, size = ml_dtypes.finfo(DTYPES[storage]), 300_000
    finite = np.array([limits.max, limits.min, limits.smallest_subnormal, 0, -0.0, 1], DTYPES[storage])
    values = finite[rng.integers(0, len(finite), size)]
    assert _core.first_nonfinite(patterns(values), storage) == -1
    assert _core.first_nonfinite(patterns(values[:0]), storage) == -1
    places = [size - 1, 262_144, 131_072, 131_071, 65_537, 33, 0]
    for bad, place in zip([np.nan, np.inf, -np.inf, np.nan, -np.nan, np.inf, np.nan], places, strict=True):
        values[place] = bad
        assert _core.first_nonfinite(patterns(values), storage) == place


@pytest.mark.usefixtures("thread_limit")
def test_the_first_one_is_the_same_with_any_number_of_threads() -> None:
    values = np.zeros(2_000_000, np.float32)
    values[[600_000, 1_999_999, 1_200_000]] = np.nan
    for threads in (1, 2, 3, 8):
        nplora.set_num_threads(threads)
        assert [_core.first_nonfinite(values, "float32") for _ in range(20)] == [600_000] * 20


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("storage", DTYPES)
def test_a_model_with_a_matrix_that_is_not_finite_is_refused(
    storage: str, value: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_models.config()))
    tensors: dict[str, Any] = {n: w.astype(DTYPES[storage]) for n, w in small_models.hf_tensors().items()}
    tensors[f"{NAME}.weight"][[5, 6], [31, 0]] = value
    safetensors.save(tmp_path / "model.safetensors", tensors)
    stored = dict(small_models.tensors())
    bad = tensors[f"{NAME}.weight"]
    kind = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}[storage]
    raw = np.ascontiguousarray(bad).view(np.uint8).reshape(-1)
    stored[STORED] = gguf.Tensor(STORED, kind, bad.shape, raw)
    model = small_models.write(tmp_path / "m.gguf", weights=stored)
    for path, file, name in (
        (tmp_path, tmp_path / "model.safetensors", f"{NAME}.weight"), (model, model, STORED),
    ):  # fmt: skip
        said = f"{file}: tensor '{name}': the value at [5, 31] is {value}, expected a finite number"
        expected = f"^{re.escape(said)}$"
        for mmap in (True, False):
            with pytest.raises(FormatError, match=expected):
                nplora.load_model(path, mmap=mmap)
    with pytest.raises(FormatError, match=r"the value at \[5, 31\] is"):
        nplora.model_to_gguf(tmp_path, tmp_path / "new.gguf", "q8_0")
    assert not (tmp_path / "new.gguf").exists()


def test_a_plan_does_not_read_the_matrices_and_a_run_checks_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    model = save_small_llama(tmp_path / "m.gguf")
    (tmp_path / "train.jsonl").write_text('{"text": "abc"}\n' * 4)
    checked: list[str] = []
    monkeypatch.setattr(weights, "require_finite", lambda source, tensor: checked.append(tensor.name))
    options: dict[str, Any] = {"steps": 1, "rank": 1, "memory": "4G"}  # this process may already use much
    nplora.plan(model, tmp_path / "train.jsonl", **options)
    nplora.load_model(model, check=False)
    assert not checked
    monkeypatch.setattr(execution, "fixed_compute", lambda *given: "bfloat16")  # so the model is loaded again
    nplora.finetune(model, tmp_path / "train.jsonl", tmp_path / "out", **options)
    assert len(checked) == len(set(checked)) > 0


def test_an_adapter_is_merged_only_into_a_finite_weight(tmp_path: Path) -> None:
    """Tensors that are not merged may hold anything: files of other models have masks of infinities."""
    bad = np.ones((4, 32), np.float32)
    bad[2, 7] = np.inf
    safetensors.save(tmp_path / "base.safetensors", {"bad.weight": bad, "good.weight": np.ones_like(bad)})
    update = LoraDelta(np.ones((4, 1), np.float32), np.ones((1, 32), np.float32), 1.0)
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(
        FormatError, match=r"base.safetensors: tensor 'bad.weight': the value at \[2, 7\] is inf"
    ):
        nplora.merge_adapter(base, Adapter("a", {"bad": update}), output)
    assert not output.exists()
    nplora.merge_adapter(base, Adapter("a", {"good": update}), output)
    np.testing.assert_array_equal(safetensors.open(output)["bad.weight"].array, bad)


def test_arrays_of_users_keep_nan_and_infinity() -> None:
    W = np.ones((3, 4), np.float32)
    W[0, 0], W[1, 0] = np.nan, np.inf
    y = nplora.FrozenWeight(W).matmul(np.ones(4, np.float32))
    np.testing.assert_array_equal(y, [np.nan, np.inf, 4])


@pytest.mark.parametrize("as_json", [True, False])
def test_eval_of_a_loss_that_is_not_finite_fails_and_prints_json_of_null(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights can overflow."""
    pytest.importorskip("tokenizers")
    small = gguf.open(save_small_llama(tmp_path / "small.gguf"))
    tensors: dict[str, Any] = dict(small)
    norm = small["output_norm.weight"].numpy()
    tensors["output_norm.weight"] = np.full_like(norm, 3e38)
    gguf.save(tmp_path / "large.gguf", tensors, small.metadata.typed())
    (tmp_path / "text.txt").write_text("abc\n")
    given = ["eval", str(tmp_path / "large.gguf"), "--data", str(tmp_path / "text.txt")]
    assert cli.main([*given, *(["--json"] if as_json else [])]) == 1
    out, err = capsys.readouterr()
    if as_json:
        result = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert result["loss"] is None
        assert result["tokens"] > 0
    else:
        assert out == ""
    assert err.splitlines()[-1].startswith("nplora: error: eval: the loss over ")
    assert err.endswith(", expected a finite number\n")


def test_settings_that_are_not_finite_are_logged_as_text(tmp_path: Path) -> None:
    class Capped(nplora.SGD):
        def __init__(self) -> None:
            super().__init__(lr=0.1)
            self.cap = math.inf

    model = nplora.Sequential(nplora.LoRALinear(np.eye(4, dtype=np.float32), rank=2))
    x = np.ones((8, 4), np.float32)
    for _ in range(2):  # the second run compares its settings with the checkpoint's
        trainer = nplora.Trainer(model, "mse", Capped())
        trainer.fit(x, x, epochs=1, checkpoint_dir=tmp_path, resume=True)
    start = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
    assert start["settings"]["free"]["cap"] == "Infinity"


# Calls that need no allow_nan=False: their output is read back at once, or is printed by a chat template.
NOT_WRITTEN = {
    "trainer/resuming.py",
    "formats/strict_json.py",
    "tokenizer/chat_template.py",
    "tokenizer/renderer.py",
}


@pytest.mark.slow
def test_written_json_never_holds_nan() -> None:
    package, found = Path(nplora.__file__).parent, 0
    for file in package.rglob("*.py"):
        if file.relative_to(package).as_posix() in NOT_WRITTEN:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                found += 1
                assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("allow_nan") == "False", file
    assert found > 4
