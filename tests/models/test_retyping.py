"""GGUF models in other types, read back by PyPI's gguf."""

from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

import nplora
from nplora import cli
from nplora.formats import gguf
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.models import gguf_export
from nplora.weights import storages
from small_llama import save_small_llama
from taken import assert_nothing_is_lost

Array = np.ndarray[Any, Any]
Q8_0 = oracle.GGMLQuantizationType.Q8_0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf")


def read(path: Path) -> dict[str, tuple[str, Array]]:
    return {
        t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()))
        for t in oracle.GGUFReader(path).tensors
    }


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in oracle.GGUFReader(path).fields.items()}


def test_the_blocks_of_q8_0_are_those_of_gguf(model: Path, tmp_path: Path) -> None:
    report = nplora.model_to_gguf(model, tmp_path / "new.gguf", "q8_0")
    given = read(model)
    tensors = oracle.GGUFReader(tmp_path / "new.gguf").tensors
    assert [tensor.name for tensor in tensors] == list(given)
    for tensor in tensors:
        kind, values = given[tensor.name]
        if values.ndim == 1:
            assert (tensor.tensor_type.name, kind) == ("F32", "F32")
            np.testing.assert_array_equal(tensor.data, values)
        else:
            assert tensor.tensor_type == Q8_0
            np.testing.assert_array_equal(tensor.data, quantize(values, Q8_0))
    assert report.types == {"Q8_0": 16, "F32": 5}
    assert report.tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("before", ["float16", "bfloat16", "q8_0", "q4_1"])
@pytest.mark.parametrize("after", ["float32", "bfloat16", "q8_0", "q4_0"])
def test_each_type_becomes_each_other(before: str, after: str, tmp_path: Path) -> None:
    source = save_small_llama(tmp_path / "model.gguf", before)
    nplora.model_to_gguf(source, tmp_path / "new.gguf", after)
    given, found = read(source), read(tmp_path / "new.gguf")
    for name, (_, values) in given.items():
        kind, got = found[name]
        assert kind == ("F32" if values.ndim == 1 else storages.GGML_NAMES[after])
        oracles = oracle.GGMLQuantizationType[kind]
        rounded = dequantize(quantize(values, oracles), oracles).reshape(values.shape)
        if before == after:
            np.testing.assert_array_equal(got, values)
        assert np.square(got - values).sum() <= 1.0001 * np.square(rounded - values).sum(), name


def test_metadata_and_tokenizer_stay_and_the_file_type_changes(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    nplora.model_to_gguf(model, tmp_path / "new.gguf", "q8_0")
    before, after = fields(model), fields(tmp_path / "new.gguf")
    changed = {name for name in after if after[name] != before.get(name)}
    counts = {"GGUF.kv_count"} & changed
    assert changed - counts == {"general.file_type", "general.quantization_version"}
    assert oracle.LlamaFileType(after["general.file_type"]) == oracle.LlamaFileType.MOSTLY_Q8_0
    lm = nplora.load_model(tmp_path / "new.gguf")
    assert lm.generate("ab", max_new_tokens=4) == nplora.load_model(model).generate("ab", max_new_tokens=4)


def test_rows_that_are_no_whole_blocks_get_a_type_with_shorter_blocks(model: Path, tmp_path: Path) -> None:
    report = nplora.model_to_gguf(model, tmp_path / "new.gguf", "q4_k")  # blocks of 256, rows of 32 and 64
    assert "their rows cannot be divided into whole blocks of 256 values" in str(report)
    assert {kind for kind, values in read(tmp_path / "new.gguf").values() if values.ndim > 1} == {"Q5_0"}


def test_the_command_prints_the_types(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new.gguf"
    assert cli.main(["convert", str(model), str(target), "--dtype", "q8_0"]) == 0
    assert capsys.readouterr().out == f"{target}: llama, 21 tensors: 16 Q8_0, 5 F32\n"
    assert cli.main(["convert", str(model), str(target), "--dtype", "q8_0"]) == 2
    assert "the file already exists" in capsys.readouterr().err
    assert cli.main(["convert", str(model), str(tmp_path / "other.gguf")]) == 2
    assert "is a GGUF model already" in capsys.readouterr().err


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    target = tmp_path / "new.gguf"
    model = save_small_llama(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="model"):
        nplora.model_to_gguf(model, model, "q8_0", overwrite=True)
    split = {"split.count": gguf.Typed(3, "UINT16")}
    changes: list[tuple[dict[str, Any], type[Exception], str]] = [
        (split, UnsupportedError, "one of 3 files of a model"),
        ({"general.architecture": "mamba"}, UnsupportedError, "mamba"),
        ({"general.type": "adapter"}, FormatError, "an adapter, expected a model"),
    ]
    for change, error, words in changes:
        source = save_small_llama(tmp_path / "changed.gguf", changes=change)
        with pytest.raises(error, match=words):
            nplora.model_to_gguf(source, target, "q8_0")
    assert not target.exists()


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, model: Path) -> None:
    file = gguf.open(model)
    tensors: dict[str, Any] = dict(file)
    broken = tensors["blk.1.ffn_up.weight"].numpy().copy()
    broken[3, 4] = np.nan
    gguf.save(tmp_path / "nan.gguf", tensors | {"blk.1.ffn_up.weight": broken}, file.metadata.typed())
    with pytest.raises(FormatError, match=r"blk\.1\.ffn_up\.weight.*\[3, 4\] is nan"):
        nplora.model_to_gguf(tmp_path / "nan.gguf", tmp_path / "new.gguf", "q8_0")


def test_a_taken_name_is_kept(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.gguf"
    assert_nothing_is_lost(target, lambda overwrite: nplora.model_to_gguf(model, target, "q4_0", overwrite))


def test_a_gguf_model_is_a_model_and_an_adapter_is_not(model: Path, tmp_path: Path) -> None:
    assert gguf_export.is_model(model)
    adapter = save_small_llama(tmp_path / "a.gguf", changes={"general.type": "adapter"})
    assert not gguf_export.is_model(adapter)
