"""embed_file: texts in files, and their embeddings in other files."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.finetuning.embedding import embed_file
from nplora.formats.errors import DataError
from small_encoder import save_small_encoder

pytest.importorskip("tokenizers")

TEXTS = ["a cat", 'the "dog", and a cat', "where is my parcel", "a " * 60]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_encoder(tmp_path_factory.mktemp("encoders") / "model")


@pytest.fixture(scope="module")
def wanted(model: Path) -> np.ndarray:  # type: ignore[type-arg]
    with pytest.warns(UserWarning, match="1 of 4 texts"):
        return nplora.load_encoder(model).embed([f"query : {text}" for text in TEXTS], normalize=False)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
@pytest.mark.parametrize("output", ["npy", "csv", "jsonl"])
def test_embeddings_of_a_file_are_those_of_its_texts(
    model: Path,
    tmp_path: Path,
    kind: str,
    output: str,
    wanted: np.ndarray,  # type: ignore[type-arg]
) -> None:
    source, target = tmp_path / f"texts.{kind}", tmp_path / f"vectors.{output}"
    with source.open("w", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([["id", "body"], *enumerate(TEXTS)])
        elif kind == "jsonl":
            file.writelines(json.dumps({"body": text}) + "\n" for text in TEXTS)
        else:
            file.writelines(f"{text}\n" for text in TEXTS)
    made = embed_file(
        model, source, target, column="body", normalize=False, prompt="query : ", batch_size=3, progress=False
    )
    assert (made.texts, made.dim, made.cut, made.max_length) == (4, 32, 1, 32)
    assert "1 text cut to 32 tokens" in str(made)
    if output == "npy":
        found = np.load(target)
        assert found.dtype == np.float32
    elif output == "csv":
        rows = list(csv.reader(target.read_text().splitlines()))
        assert [row[0] for row in rows[1:]] == TEXTS
        found = np.array([row[1:] for row in rows[1:]], np.float32)
    else:
        objects = [json.loads(line) for line in target.read_text().splitlines()]
        assert [each["text"] for each in objects] == TEXTS
        found = np.array([each["embedding"] for each in objects], np.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_written_digits_give_the_same_bits(model: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS[:3]]
    for name in ("v.npy", "v.jsonl"):
        embed_file(model, rows, tmp_path / name)
    lines = (tmp_path / "v.jsonl").read_text().splitlines()
    read = np.array([json.loads(line)["embedding"] for line in lines], np.float32)
    np.testing.assert_array_equal(read, np.load(tmp_path / "v.npy"))


def test_bad_texts_and_outputs_are_refused_and_an_old_file_stays(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "texts.txt", tmp_path / "v.npy"
    source.write_text("a cat\n\na dog\n")
    with pytest.raises(DataError, match=r"texts.txt, line 2: the line is empty"):
        embed_file(model, source, target)
    with pytest.raises(DataError, match="data, row 2: text is empty, expected a text"):
        embed_file(model, [{"text": "a"}, {"text": ""}], target)
    with pytest.raises(
        DataError, match=r"data, row 1: text is missing; the row has \['body'\]; set --column"
    ):
        embed_file(model, [{"body": "a"}], target)
    with pytest.raises(ValueError, match=r"output is v.bin, expected a file that ends in .npy, .csv, .jsonl"):
        embed_file(model, [{"text": "a"}], "v.bin")
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite"):
        embed_file(model, [{"text": "a"}], target)
    assert target.read_bytes() == b"old"


def test_a_file_that_is_read_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "a cat"}\n')
    with pytest.raises(ValueError, match=r"embed_file: .*texts.jsonl is the data itself"):
        embed_file(model, data, data, overwrite=True)
    assert data.read_text() == '{"text": "a cat"}\n'
    link = tmp_path / "link.csv"
    link.symlink_to(data)
    with pytest.raises(ValueError, match=r"embed_file: .*link.csv is the data itself"):
        embed_file(nplora.load_encoder(model), data, link, overwrite=True)


@pytest.mark.parametrize("output", ["npy", "csv", "jsonl"])
def test_embeddings_with_nan_or_infinity_are_refused(model: Path, tmp_path: Path, output: str) -> None:
    """JSON has no NaN, and a search with such a vector finds nothing."""
    encoder = nplora.load_encoder(model)
    encoder.add_lora(rank=2, init="gaussian")
    encoder.adapter_layers()["encoder.layer.1.output.dense"].A[...] = 3e38  # type: ignore[attr-defined]
    target = tmp_path / f"v.{output}"
    with pytest.raises(ValueError, match="embed_file: 2 of 2 embeddings have NaN or infinity, the first"):
        embed_file(encoder, [{"text": "a cat"}, {"text": "a dog"}], target)
    assert not target.exists()


def test_a_wrong_batch_size_is_named(model: Path, tmp_path: Path) -> None:
    wrong: Any = 2.5
    for size, error in ((wrong, TypeError), (0, ValueError)):
        with pytest.raises(error, match="embed_file: batch_size is"):
            embed_file(model, [{"text": "a cat"}], tmp_path / "v.npy", batch_size=size)
