"""The merge gate: a merged model appears only if its held-out loss hardly rises; a refusal leaves no file."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from gguf.quants import dequantize

import nplora
import small_models
from nplora import cli
from nplora.adapters import Adapter, HeldOutLoss
from nplora.finetuning import evaluate, finetune, held_out_loss
from nplora.finetuning.load import opened
from nplora.formats import files, gguf
from nplora.lora.delta import LoraDelta
from nplora.tokenizer import Tokenizer
from small_llama import save_small_llama

tokenizers = pytest.importorskip("tokenizers")

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Q4_1, held-out data, and an adapter that this type loses, though the loss falls by 1.2."""
    directory = tmp_path_factory.mktemp("merge")
    model = save_small_llama(directory / "model.gguf", storage="q4_1")
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24)]
    for name, part in (("train", rows), ("valid", rows[:8])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = directory / "train.jsonl"
    finetune(model, data, directory / "adapter", lr=2e-3, epochs=6, progress=False)
    return directory


def merge(place: Path, output: Path, *more: str) -> int:
    files = [str(place / name) for name in ("model.gguf", "adapter")]
    check = ["--check", str(place / "valid.jsonl")]
    return cli.main(["merge", *files, "--output", str(output), *check, *more])


def losses_of(place: Path) -> tuple[float, float]:
    """The loss of the model, and with the adapter on the fly."""
    model, valid = place / "model.gguf", place / "valid.jsonl"
    return evaluate(model, valid)["loss"], evaluate(model, valid, adapter=place / "adapter")["loss"]


def unquantised(path: Path, output: Path) -> Path:
    """The same model in float32, decoded by PyPI's gguf."""
    tensors = {
        t.name: np.asarray(dequantize(t.data, t.tensor_type), np.float32).reshape(t.shape[::-1].tolist())
        for t in oracle.GGUFReader(path).tensors
    }
    gguf.save(output, tensors, gguf.open(path).metadata.typed())
    return output


@pytest.mark.slow
def test_an_adapter_that_loses_its_training_is_refused_with_a_type_that_keeps_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, on_the_fly = losses_of(place)
    assert on_the_fly < before - 1
    assert merge(place, tmp_path / "out.gguf") == 2
    said = re.search(
        r"merge: rounding to q4_1 would keep ([\d.]+)% of the adapter's change \(ΔW\), "
        r"expected at least 90%, and the held-out loss would go from ([\d.]+) to ([\d.]+) in q4_1, "
        r"expected a rise of at most --tolerance 0\.02; "
        r"--dtype (\w+) keeps about (\d+)% of ΔW, and its loss is ([\d.]+) \(measured\); "
        r"--lossy without --check merges anyway\n",
        capsys.readouterr().err,
    )
    assert said is not None
    assert list(tmp_path.iterdir()) == []
    assert float(said[2]) == pytest.approx(on_the_fly, abs=1e-4)
    lossy, valid = tmp_path / "lossy.gguf", place / "valid.jsonl"
    nplora.merge_adapter(place / "model.gguf", place / "adapter", lossy, lossy=True)
    decoded = unquantised(lossy, tmp_path / "decoded.gguf")
    assert float(said[3]) == pytest.approx(evaluate(decoded, valid)["loss"], abs=2e-4)
    assert merge(place, tmp_path / "out.gguf", "--dtype", said[4]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("held-out loss ")
    assert first.endswith(f": {on_the_fly:.4f} -> {said[6]}")
    assert float(said[6]) < on_the_fly + 0.02
    decoded = unquantised(tmp_path / "out.gguf", tmp_path / "decoded.gguf")
    assert float(said[6]) == pytest.approx(evaluate(decoded, valid)["loss"], abs=2e-4)


def test_what_a_report_says_of_the_loss() -> None:
    cases = {
        (3.6618, 3.6638): "held-out loss unaffected: 3.6618 -> 3.6638",
        (3.6618, 3.7039): "held-out loss rises by 0.0421: 3.6618 -> 3.7039",
        (3.6618, 3.65): "held-out loss falls by 0.0118: 3.6618 -> 3.6500",
    }
    assert {pair: str(HeldOutLoss(*pair, tolerance=0.02)) for pair in cases} == cases
    kept = [HeldOutLoss(1.0, merged, tolerance=0.5).is_kept for merged in (0.5, 1.5, 1.51, np.nan, np.inf)]
    assert kept == [True, True, False, False, False]


def test_the_loss_decides_alone_if_lossy_is_set(place: Path, tmp_path: Path) -> None:
    sources = place / "model.gguf", place / "adapter"
    out, check = tmp_path / "out.gguf", held_out_loss(place / "valid.jsonl")
    with pytest.raises(ValueError, match=r"^merge: the held-out loss would go from .* in q4_1") as refused:
        nplora.merge_adapter(*sources, out, lossy=True, check=check)
    assert "rounding to" not in str(refused.value)
    done = nplora.merge_adapter(*sources, out, lossy=True, check=check, tolerance=2)
    assert done.loss is not None
    assert done.loss.merged > done.loss.on_the_fly + 0.02
    assert str(done).startswith("held-out loss rises by ")


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_before_the_merge_ends_it_at_once(
    place: Path, tmp_path: Path, loss: float
) -> None:
    asked = list[Any]()

    def check(model: Any, adapter: Any) -> float:
        asked.append(model)
        return loss if adapter is not None else 5.0

    out = tmp_path / "out.gguf"
    with pytest.raises(FloatingPointError, match=f"^merge: the held-out loss before the merge is {loss}"):
        nplora.merge_adapter(
            place / "model.gguf", place / "adapter", out, check=check, lossy=True, tolerance=np.float32(0.1)
        )
    assert (len(asked), out.exists()) == (1, False)


def test_one_function_merges_for_all_callers() -> None:
    assert nplora.merge_adapter is nplora.adapters.merge_adapter


def test_a_check_that_is_no_function_is_refused_with_the_function_to_use(place: Path, tmp_path: Path) -> None:
    valid = str(place / "valid.jsonl")
    with pytest.raises(
        TypeError, match=r"^merge: check is .*; nplora\.finetuning\.held_out_loss\(data\) mak"
    ):
        nplora.merge_adapter(place / "model.gguf", place / "adapter", tmp_path / "out.gguf", check=valid)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ({"max_length": 1}, "merge: max_length is 1"),
        ({"chatt": True}, "held_out_loss: unexpected keyword 'chatt'; did you mean chat?"),
        ({"metric": "f1"}, "held_out_loss: unexpected keyword 'metric'"),
    ],
)
def test_a_held_out_loss_refuses_wrong_options_at_once(reading: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as refused:
        held_out_loss("no file", **reading)
    assert words in str(refused.value)


def test_the_held_out_data_are_read_and_encoded_only_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though three models are measured: the base with the adapter, the merged one and the remedy's."""
    rows = [json.loads(line) for line in (place / "valid.jsonl").read_text().splitlines()]
    read, encoded, encode = list[int](), list[str](), Tokenizer.encode_prompt

    class Rows:
        def __iter__(self) -> Iterator[dict[str, str]]:
            read.append(len(rows))
            return iter(rows)

    def counted(self: Tokenizer, text: str, *most: Any) -> list[int]:
        encoded.append(text)
        return encode(self, text, *most)

    measured = list[float]()

    def noted(model: Any, adapter: Any) -> float:
        measured.append(check(model, adapter))
        return measured[-1]

    monkeypatch.setattr(Tokenizer, "encode_prompt", counted)
    check, out = held_out_loss(Rows()), tmp_path / "out.gguf"
    with pytest.raises(ValueError, match=r"the held-out loss would go from .* \(measured\)"):
        nplora.merge_adapter(place / "model.gguf", place / "adapter", out, check=noted)
    assert len(measured) == 3
    assert len(encoded) == len(set(encoded)) == 2 * len(rows)
    once = len(read)
    check(place / "model.gguf", None)
    assert len(read) == once  # a list that is given is read for its kind first


def test_held_out_data_are_encoded_anew_for_another_tokenizer(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    model = gguf.open(place / "model.gguf")
    typed = model.metadata.typed()
    tokens = list(typed["tokenizer.ggml.tokens"].value)
    swapped = tokens.index("1"), tokens.index("2")
    tokens[swapped[0]], tokens[swapped[1]] = "2", "1"
    typed["tokenizer.ggml.tokens"] = gguf.Typed(tokens, "STRING")
    gguf.save(other, dict(model), typed)
    check = held_out_loss(place / "valid.jsonl")
    for path in (place / "model.gguf", other, place / "model.gguf"):
        assert check(path, None) == evaluate(path, place / "valid.jsonl")["loss"]
    assert check(other, None) != check(place / "model.gguf", None)


def test_an_adapter_of_another_model_is_checked_as_its_caller_wants(place: Path, tmp_path: Path) -> None:
    foreign = Adapter.read(place / "adapter")
    foreign.base_digest = "0" * 64
    check, out = held_out_loss(place / "valid.jsonl"), tmp_path / "out.gguf"
    with pytest.raises(ValueError, match="another model"):
        nplora.merge_adapter(place / "model.gguf", foreign, out, "q8_0", check=check)
    done = nplora.merge_adapter(place / "model.gguf", foreign, out, "q8_0", any_base=True, check=check)
    assert done.loss is not None
    assert done.loss.on_the_fly == pytest.approx(losses_of(place)[1], abs=1e-6)


def test_a_loss_that_stays_does_not_hide_a_lost_update(tmp_path: Path) -> None:
    """An update of no consequence for these data: the share of ΔW still decides, unless --lossy is given."""
    model = save_small_llama(tmp_path / "model.gguf", storage="q4_1")
    update = LoraDelta(np.full((32, 1), 1e-5, "f4"), np.ones((1, 32), "f4"), 1.0)
    adapter = Adapter("small", {"model.layers.0.self_attn.q_proj": update})
    rows, out = iter([{"prompt": "1+1=", "completion": "2"}]), tmp_path / "out.gguf"
    check = held_out_loss(rows)
    with pytest.raises(ValueError, match=r"would keep .* stays within the tolerance .*; --dtype \w+ keeps"):
        nplora.merge_adapter(model, adapter, out, check=check)
    done = nplora.merge_adapter(model, adapter, out, check=check, lossy=True)
    assert done.loss is not None
    assert done.loss.is_kept


def test_a_refused_or_broken_merge_leaves_the_old_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out.gguf", files.write
    out.write_bytes(b"the old model")

    def run(**options: Any) -> None:
        check = held_out_loss(place / "valid.jsonl")
        nplora.merge_adapter(
            place / "model.gguf", place / "adapter", out, overwrite=True, check=check, **options
        )

    def full(fd: int, chunk: files.Chunk, progress: files.Progress) -> None:
        if progress.done > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, chunk, progress)

    def interrupted(op: str, model: Any, compute: None) -> Any:
        if "out.gguf" in str(model):
            assert Path(model).stat().st_size > 30_000
            raise KeyboardInterrupt
        return opened(op, model, compute)

    with pytest.raises(ValueError, match="the held-out loss would go"):
        run()
    with monkeypatch.context() as patched:
        patched.setattr("nplora.finetuning.held_out.opened", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(dtype="q8_0")
    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: [\d,]+ of [\d,]+ bytes were written"):
        run(dtype="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == b"the old model"


def test_a_disk_too_small_for_the_remedy_leaves_its_estimate(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write
    size = (place / "model.gguf").stat().st_size

    def full(fd: int, chunk: files.Chunk, progress: files.Progress) -> None:
        if progress.nbytes > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, chunk, progress)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(ValueError, match=r"--dtype \w+ keeps about \d+% of ΔW \(estimated\); --lossy"):
        nplora.merge_adapter(
            place / "model.gguf",
            place / "adapter",
            tmp_path / "out.gguf",
            check=held_out_loss(place / "valid.jsonl"),
        )
    assert list(tmp_path.iterdir()) == []


def test_wrong_data_and_options_are_refused_before_anything_is_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    for options, words in (
        (["--check", str(bad)], "bad.jsonl, line 1"),
        (["--check", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--tolerance", "-1"], "tolerance is -1.0, expected a number of at least 0"),
        (["--tolerance", "nan"], "tolerance is nan, expected a finite number"),
        (["--max-length", "1"], "--max-length is 1"),
    ):
        assert merge(place, tmp_path / "out.gguf", *options) == 2, options
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("option", ["--tolerance=0.02", "--max-length=20", "--chat"])
def test_options_of_the_check_are_refused_without_it(
    place: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", place / "model.gguf", place / "adapter", "--output", tmp_path / "out.gguf", option]
    assert cli.main(list(map(str, words))) == 2
    name = option.partition("=")[0]
    assert f"nplora: error: {name} needs held-out data: add --check FILE" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tolerance_without_a_check_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^merge: tolerance is given without check, which meas"):
        nplora.merge_adapter(place / "model.gguf", place / "adapter", tmp_path / "out.gguf", tolerance=0.1)
    assert list(tmp_path.iterdir()) == []


def hf_directory(directory: Path) -> Path:
    """A small model in Hugging Face's files, with a byte-level tokenizer."""
    directory.mkdir()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    characters = {character: i for i, character in enumerate("<0123456789+=")}
    content = json.loads(backend.to_str())
    content["model"] |= {"vocab": characters, "merges": []}
    content["added_tokens"] = [
        {"id": 0, "content": "<", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ]  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<"}')
    config = small_models.config(tie_word_embeddings=False)
    (directory / "config.json").write_text(json.dumps(config))
    small_models.write_tensors(directory / "model.safetensors", small_models.hf_tensors())
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "output"), [("", "out"), ("", "out.safetensors"), ("model.safetensors", "out.safetensors")]
)
def test_a_hugging_face_model_is_checked_too(base: str, output: str, tmp_path: Path) -> None:
    model = hf_directory(tmp_path / "model")
    rng = np.random.default_rng(0)
    shape = small_models.WIDTH, 2
    update = LoraDelta(rng.standard_normal(shape, np.float32), rng.standard_normal(shape[::-1], "f4"), 0.05)
    adapter = Adapter("random", {"model.layers.1.self_attn.q_proj": update})
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(5)]
    done = nplora.merge_adapter(model / base, adapter, tmp_path / output, check=held_out_loss(rows))
    assert done.loss is not None
    assert done.loss.on_the_fly == pytest.approx(evaluate(model, rows, adapter=adapter)["loss"], abs=1e-6)
    assert done.loss.merged == pytest.approx(done.loss.on_the_fly, abs=1e-4)
    with pytest.raises(ValueError, match=r"the held-out loss would go from 1\.0000 to 2\.0000 in float32"):
        nplora.adapters.merge_adapter(
            model / base,
            adapter,
            tmp_path / f"new-{output}",
            check=lambda model, adapter: 1 if adapter else 2,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", output]
