"""The digest that identifies models: equal for all storages of a model, checked when adapters are used."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
from hostile import refused
from nplora import cli
from nplora.adapters import Adapter, read_adapter
from nplora.finetuning import attach_adapter, load_with_adapter
from nplora.formats import gguf, safetensors
from nplora.formats.errors import FormatError, LimitError, TruncatedError, UnsafeError
from nplora.lm import LanguageModel
from nplora.weights import storages


def changed(arrays: dict[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """The tensors of a model with its matrices in this storage. Another seed changes its norms."""
    rng = np.random.default_rng(seed)
    made = dict(arrays)
    for name, array in arrays.items():
        if array.ndim == 1 and seed:
            made[name] = array + np.float32(0.1) * rng.standard_normal(len(array), np.float32)
        elif array.ndim == 2 and dtype != "float32":
            raw = storages.encode(array, dtype).reshape(-1)
            made[name] = gguf.Tensor(name, storages.GGML_NAMES[dtype], array.shape, raw)
    return made


def gguf_model(path: Path, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    weights = changed(small_models.tensors(), dtype, seed)
    return small_models.write(path, small_models.metadata(**changes), weights)


def hf_model(directory: Path, dtype: type = np.float32, weights: dict[str, Any] | None = None) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(small_models.config()))
    tensors = {name: array.astype(dtype) for name, array in (weights or small_models.hf_tensors()).items()}
    safetensors.save(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return gguf_model(tmp_path / "model.gguf")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return gguf_model(tmp_path / "other.gguf", seed=1)


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    return saved(nplora.load_model(model), tmp_path / "adapter", str(model))


def saved(lm: LanguageModel, directory: Path, name: str | None = None, **options: Any) -> Path:
    lm.add_lora(**{"rank": 2, "targets": "q_proj", "init": "gaussian", **options})
    nplora.save_adapter(lm, directory, name)
    return directory


def digest(path: Path) -> str:
    found = nplora.load_model(path).base_digest()
    assert found is not None
    assert len(found) == 64
    return found


def test_a_model_has_one_digest_in_every_file_and_storage(model: Path, other: Path, tmp_path: Path) -> None:
    for dtype in ("q8_0", "q4_0", "float16", "bfloat16"):
        assert digest(gguf_model(tmp_path / f"{dtype}.gguf", dtype)) == digest(model)
    assert digest(hf_model(tmp_path / "hf")) == digest(model)
    assert digest(other) != digest(model)


def test_norms_that_were_rounded_to_bfloat16_are_the_same(model: Path, tmp_path: Path) -> None:
    weights = small_models.tensors()
    for name, array in weights.items():
        if array.ndim == 1:
            bits = storages.encode(array[None], "bfloat16").view(np.uint16).astype(np.uint32) << 16
            weights[name] = bits.view(np.float32)[0]
            assert not np.array_equal(weights[name], array)
    assert digest(small_models.write(tmp_path / "rounded.gguf", weights=weights)) == digest(model)


def test_adapters_and_training_leave_the_digest(model: Path) -> None:
    lm = nplora.load_model(model)
    for options in ({"init": "pissa"}, {"targets": ["lm_head", "embed_tokens"], "init": "zero"}):
        lm.add_lora(rank=2, **options)  # type: ignore[arg-type]
        assert lm.base_digest() == digest(model)
    assert nplora.Sequential(nplora.Linear(np.zeros((2, 2)))).base_digest() is None


def uses(model: Path, adapter: Path, output: Path) -> list[Callable[..., Any]]:
    """All functions that put an adapter on a model."""

    def load(**options: Any) -> None:
        lm = nplora.load_model(model)
        lm.add_lora(rank=2, targets="q_proj")
        nplora.load_adapter(lm, adapter, **options)

    return [
        load,
        lambda **options: attach_adapter(nplora.load_model(model), adapter, **options),
        lambda **options: load_with_adapter(model, adapter, **options),
        lambda **options: nplora.merge_adapter(model, adapter, output, **options),
    ]


def test_an_adapter_of_another_model_is_refused_with_both_digests_and_accepted_on_request(
    model: Path, other: Path, adapter: Path, tmp_path: Path
) -> None:
    for use in uses(other, adapter, tmp_path / "out.gguf"):
        with pytest.raises(FormatError) as caught:
            use()
        text = str(caught.value)
        assert text.startswith(f"{adapter}: the adapter belongs to another model")
        assert f"sha256 {digest(model)[:12]}" in text
        assert f"{digest(other)[:12]}" in text
        assert repr(str(model)) in text
        assert not (tmp_path / "out.gguf").exists()
    for use in uses(other, adapter, tmp_path / "out.gguf"):
        use(any_base=True)


def test_an_adapter_fits_its_model_in_any_storage_and_kind_of_file(adapter: Path, tmp_path: Path) -> None:
    q8_0, hf = gguf_model(tmp_path / "q8_0.gguf", "q8_0"), hf_model(tmp_path / "hf")
    for use in [*uses(q8_0, adapter, tmp_path / "a.gguf"), *uses(hf, adapter, tmp_path / "b.safetensors")]:
        use()


def test_an_adapter_without_a_digest_is_accepted(other: Path, adapter: Path, tmp_path: Path) -> None:
    file = safetensors.open(adapter / "adapter_model.safetensors", mmap=False)
    safetensors.save(adapter / "adapter_model.safetensors", dict(file), {"format": "pt"})
    for use in uses(other, adapter, tmp_path / "out.gguf"):
        use()


def test_shapes_that_differ_are_reported_with_the_digests(adapter: Path, model: Path, tmp_path: Path) -> None:
    weights = changed(small_models.tensors(), seed=1)
    wide = {
        n: np.resize(a, [2 * s if s == small_models.WIDTH else s for s in a.shape])
        for n, a in weights.items()
    }
    path = small_models.write(
        tmp_path / "wide.gguf",
        small_models.metadata(llama__embedding_length=64, llama__attention__key_length=16),
        wide | {
            f"blk.{i}.attn_{part}.weight": np.zeros((rows, 64), np.float32)
            for i in range(small_models.LAYERS) for part, rows in (("k", 32), ("v", 32))
        },
    )  # fmt: skip
    for use in uses(path, adapter, tmp_path / "out.gguf")[1:]:
        with pytest.raises(FormatError) as caught:
            use()
        text = str(caught.value)
        assert "(32, 32)" in text
        assert "(64, 64)" in text
        assert f"sha256 {digest(model)[:12]}" in text
        assert digest(path)[:12] in text


def test_an_adapter_keeps_the_digest_of_its_model_in_a_gguf_file_and_in_a_combination(
    model: Path, other: Path, adapter: Path, tmp_path: Path
) -> None:
    file, back = tmp_path / "a.gguf", tmp_path / "back"
    nplora.adapter_to_gguf(adapter, file, model)
    nplora.adapter_from_gguf(file, back, model)
    nplora.combine([(file, 1), (Adapter("b", dict(read_adapter(adapter))), 1)], base=model).save(
        tmp_path / "sum"
    )
    for again in (file, back, tmp_path / "sum"):
        assert read_adapter(again, model).base_digest == digest(model)
        nplora.merge_adapter(model, again, tmp_path / "out.gguf", overwrite=True)
        with pytest.raises(FormatError, match="another model"):
            nplora.merge_adapter(other, again, tmp_path / "out.gguf", overwrite=True)


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_an_adapter_of_another_model_is_converted_only_on_request(
    kind: str, model: Path, other: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "hf":
        other = hf_model(tmp_path / "hf", weights=changed(small_models.hf_tensors(), seed=1))
    file, back = tmp_path / "a.gguf", tmp_path / "back"
    nplora.adapter_to_gguf(adapter, file, model)
    again = tmp_path / "again.gguf"
    for source, target in ((adapter, again), (file, back)):
        with pytest.raises(FormatError) as caught:
            nplora.adapters.convert_adapter(source, target, other)
        assert str(caught.value).startswith(f"{source}: the adapter belongs to another model (")
        assert (
            f"sha256 {digest(model)[:12]} of its norm weights; this model has sha256 {digest(other)[:12]})"
            in str(caught.value)
        )
        arguments = ["convert", str(source), str(target), "--base", str(other)]
        assert cli.main(arguments) == 2
        assert "use --any-base to accept it anyway" in capsys.readouterr().err
        assert not target.exists()
        assert cli.main([*arguments, "--any-base"]) == 0
        assert read_adapter(target, other).base_digest == digest(
            other
        )  # the heads of `other` determine the order of rows


def test_an_adapter_of_another_model_s_shapes_is_not_converted(
    adapter: Path, model: Path, tmp_path: Path
) -> None:
    file, wide = tmp_path / "a.gguf", changed(small_models.tensors(), seed=1)
    nplora.adapter_to_gguf(adapter, file, model)
    wide |= {f"blk.{i}.attn_q.weight": np.zeros((64, 32), np.float32) for i in range(small_models.LAYERS)}
    base = small_models.write(tmp_path / "wide.gguf", weights=wide)
    for source, target in ((adapter, tmp_path / "b.gguf"), (file, tmp_path / "back")):
        with pytest.raises(
            FormatError, match=r"the adapter belongs to another model \(.*\), and does not fit"
        ):
            nplora.adapters.convert_adapter(source, target, base, any_base=True)


def test_an_adapter_without_a_digest_gets_that_of_the_base_it_is_converted_with(
    model: Path, other: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = safetensors.open(adapter / "adapter_model.safetensors", mmap=False)
    safetensors.save(adapter / "adapter_model.safetensors", dict(tensors), {"format": "pt"})
    nplora.adapter_to_gguf(adapter, tmp_path / "a.gguf", model)
    assert read_adapter(tmp_path / "a.gguf", model).base_digest == digest(model)
    file = gguf.open(tmp_path / "a.gguf")
    metadata = {k: v for k, v in file.metadata.typed().items() if not k.startswith("nplora.")}
    gguf.save(tmp_path / "b.gguf", dict(file), metadata)
    nplora.adapter_from_gguf(tmp_path / "b.gguf", tmp_path / "back", model)
    assert read_adapter(tmp_path / "back").base_digest == digest(model)
    with pytest.raises(FormatError, match="another model"):
        attach_adapter(nplora.load_model(other), tmp_path / "back")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"


@pytest.mark.parametrize("weights", ["none", "pointer", "pickle", "shard missing", "link to nothing"])
def test_a_base_without_weights_counts_as_unknown(
    weights: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    base = hf_model(tmp_path / "hf")
    tensors = base / "model.safetensors"
    if weights == "pointer":
        tensors.write_bytes(LFS)
    else:
        tensors.unlink()
    if weights == "link to nothing":  # in a cache that is only half downloaded
        tensors.symlink_to("nowhere")
    if weights == "pickle":
        (base / "pytorch_model.bin").touch()
    if weights == "shard missing":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for any_base in (False, True):
        file = tmp_path / f"{any_base}.gguf"
        with warns_of_missing_weights(not any_base and weights in MISSING):
            nplora.adapter_to_gguf(adapter, file, base, any_base=any_base)
            nplora.combine([(adapter, 1), (adapter, 1)], base=base, any_base=any_base)
        with warns_of_missing_weights(weights in MISSING):
            assert read_adapter(file, base).base_digest == (None if any_base else digest(model))
            nplora.adapter_from_gguf(file, tmp_path / f"{any_base}", base, any_base=any_base)
            nplora.combine([(adapter, 1), (file, 1)], base=base)


MISSING = ("pointer", "shard missing", "link to nothing")


def warns_of_missing_weights(expected: bool = True) -> AbstractContextManager[Any]:
    words = "hf: weights are missing, so nplora cannot check that the adapter belongs to this model"
    return pytest.warns(UserWarning, match=words) if expected else nullcontext()


def sharded_model(directory: Path, weights: dict[str, Any], matrices: str = "matrices.safetensors") -> Path:
    """The norms are in their own shard."""
    hf_model(directory, weights=weights)
    (directory / "model.safetensors").unlink()
    norms = {name: array for name, array in weights.items() if array.ndim == 1}
    safetensors.save(directory / "norms.safetensors", norms)
    shards = {name: "norms.safetensors" if name in norms else matrices for name in weights}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return directory


def test_the_shards_with_the_norms_are_enough_to_detect_another_base(adapter: Path, tmp_path: Path) -> None:
    weights = small_models.hf_tensors()
    base = sharded_model(tmp_path / "hf", weights)
    other = sharded_model(tmp_path / "other", changed(weights, seed=1))
    nplora.combine([(adapter, 1)], base=base)
    nplora.adapter_to_gguf(adapter, tmp_path / "a.gguf", base)
    with pytest.raises(
        ValueError, match=r"[/\\]other', sha256 .*, but the adapters belong to another model \(.*; pass that"
    ):
        nplora.combine([(adapter, 1)], base=other)
    for named in (other, other / "config.json"):
        with pytest.raises(FormatError, match=r"the adapter belongs to another model"):
            nplora.adapter_to_gguf(adapter, tmp_path / "b.gguf", named)
    (base / "norms.safetensors").write_bytes(LFS)
    with warns_of_missing_weights():
        nplora.combine([(adapter, 1)], base=base)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named_whichever_file_it_replaces(name: str, tmp_path: Path) -> None:
    base = hf_model(tmp_path / "hf")
    (base / name).write_bytes(LFS)
    with pytest.raises(FormatError, match=rf"{name}: is a Git LFS pointer"):
        print(nplora.load_model(base / name if name.endswith("gguf") else base).tokenizer)


@pytest.mark.parametrize(
    ("put", "error", "words"),
    [
        (lambda path, data: path.write_bytes(data[:-1]), TruncatedError, "the tensors end at byte"),
        (lambda path, data: path.touch(), TruncatedError, "the file is empty"),
        (
            lambda path, data: path.write_bytes((1 << 40).to_bytes(8, "little") + data[8:]),
            LimitError,
            "a header of 1,099,511,627,776 bytes",
        ),
        (lambda path, data: path.mkdir(), FormatError, "a directory, expected a regular file"),
        (lambda path, data: os.mkfifo(path), FormatError, "a FIFO, expected a regular file"),
        (lambda path, data: path.symlink_to("/dev/null"), FormatError, "a character device, expected a"),
    ],
    ids=["cut", "empty", "header", "directory", "fifo", "device"],
)
def test_a_base_with_damaged_weights_is_refused(
    put: Callable[[Path, bytes], object], error: type[FormatError], words: str, adapter: Path, tmp_path: Path
) -> None:
    base = hf_model(tmp_path / "hf")
    weights = base / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    put(weights, data)
    assert_refused(base, adapter, tmp_path, error, words, weights)


def test_a_base_whose_index_leaves_its_directory_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = sharded_model(tmp_path / "hf", small_models.hf_tensors(), "../../etc/passwd")
    index = base / "model.safetensors.index.json"
    assert_refused(base, adapter, tmp_path, UnsafeError, "'../../etc/passwd', expected a name", index)


def assert_refused(
    base: Path, adapter: Path, tmp_path: Path, error: type[FormatError], words: str, source: Path
) -> None:
    for use in (
        lambda: nplora.combine([(adapter, 1)], base=base),
        lambda: nplora.combine([(adapter, 1)], base=base, any_base=True),
        lambda: nplora.adapter_to_gguf(adapter, tmp_path / "a.gguf", base),
    ):
        with refused(error, words, source):
            use()
    assert cli.main(["combine", str(adapter), "--output", str(tmp_path / "sum"), "--base", str(base)]) == 2
    assert not (tmp_path / "a.gguf").exists()
    assert not (tmp_path / "sum").exists()


def test_a_base_that_is_not_a_model_is_refused(
    adapter: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nplora.adapter_to_gguf(adapter, tmp_path / "a.gguf", model)
    gguf.save(tmp_path / "data.gguf", {"x": np.zeros(1, np.float32)})
    (tmp_path / "empty").mkdir()
    base = sharded_model(tmp_path / "hf", small_models.hf_tensors())
    for path, message in (
        (tmp_path / "nowhere" / "config.json", "no such file: {}"),
        (tmp_path / "nowhere.gguf", "no such file: {}"),
        (tmp_path / "empty", f"no such file: {{}}{os.sep}config.json"),
        (base / "model.safetensors.index.json", "{}: model_type is missing, expected text"),
        (tmp_path / "data.gguf", "{}: metadata 'general.architecture' is missing"),
        (tmp_path / "a.gguf", "{}: the file is an adapter, expected a model"),
    ):
        line = ["combine", str(adapter), "--output", str(tmp_path / "sum"), "--base", str(path)]
        for more in ([], ["--any-base"]):
            assert cli.main([*line, *more]) == 2
            assert message.format(path) in capsys.readouterr().err
    assert not (tmp_path / "sum").exists()


def test_adapters_of_an_unknown_family_can_be_combined(adapter: Path, tmp_path: Path) -> None:
    base = hf_model(tmp_path / "hf", weights=changed(small_models.hf_tensors(), seed=1))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(
        ValueError, match=r"but the adapters belong to another model"
    ):  # the names of norms alike
        nplora.combine([(adapter, 1)], base=base)
    unknown = Adapter("unknown", dict(read_adapter(adapter)))
    nplora.combine([(unknown, 1), (unknown, 1)], base=base)
    (base / "model.safetensors").write_bytes(LFS)
    with warns_of_missing_weights():
        nplora.combine([(adapter, 1), (unknown, 1)], base=base)


def test_adapters_are_not_combined_for_another_base(
    model: Path, other: Path, adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.gguf"
    nplora.adapter_to_gguf(adapter, file, model)
    for source in (file, adapter):
        with pytest.raises(ValueError, match=r"models? .*--any-base") as caught:
            nplora.combine([(source, 1)], base=other)
        assert digest(model)[:12] in str(caught.value)
        assert digest(other)[:12] in str(caught.value)
        nplora.combine([(source, 1)], base=model)
        nplora.combine([(source, 1)], base=other, any_base=True)


def test_a_combination_of_any_bases_has_their_common_digest(adapter: Path, model: Path) -> None:
    unknown = Adapter("unknown", dict(read_adapter(adapter)))
    assert nplora.combine([(adapter, 1), (unknown, 1)]).base_digest == digest(model)
    assert nplora.combine([(adapter, 1), (unknown, 1)], any_base=True).base_digest is None
    assert nplora.combine([(adapter, 1), (adapter, 1)], any_base=True).base_digest == digest(model)


def test_adapters_of_different_models_are_combined_only_on_request(
    model: Path, other: Path, adapter: Path, tmp_path: Path
) -> None:
    foreign = saved(nplora.load_model(other), tmp_path / "foreign", str(model))  # the same name
    with pytest.raises(ValueError, match=r"combine: the adapters belong to different models") as caught:
        nplora.combine([(adapter, 1), (foreign, 1)])
    for path, base in ((adapter, model), (foreign, other)):
        assert f"{path}: {str(model)!r}, sha256 {digest(base)[:12]}" in str(caught.value)
    both = nplora.combine([(adapter, 1), (foreign, 1)], any_base=True)
    assert (both.base_digest, both.base_model_name_or_path) == (None, str(model))
    renamed = saved(nplora.load_model(model), tmp_path / "renamed", "elsewhere/of-another-name")
    both = nplora.combine([(adapter, 1), (renamed, 1)])  # with one digest, the names do not matter
    assert (both.base_digest, both.base_model_name_or_path) == (digest(model), None)
    both.save(tmp_path / "both")
    attach_adapter(nplora.load_model(model), tmp_path / "both")
    with pytest.raises(FormatError, match="another model"):
        attach_adapter(nplora.load_model(other), tmp_path / "both")


@pytest.mark.parametrize(
    ("one", "two", "differ"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B", True),
        ("HuggingFaceTB/SmolLM2-135M", "/models/smollm2-135m/", False),
        ("m.gguf", "/there/m.gguf", False),
        ("m.gguf", "n.gguf", True),
        ("m.gguf", None, False),
        ("m.gguf", "", False),
        (None, None, False),
    ],
)
def test_without_digests_the_last_part_of_the_names_distinguishes_models(
    one: str | None, two: str | None, differ: bool
) -> None:
    update = nplora.lora.LoraDelta(np.ones((3, 1), np.float32), np.ones((1, 2), np.float32), 1.0)
    pair = [
        (nplora.adapters.Adapter(text, {"q": update}, base), 1.0) for text, base in (("a", one), ("b", two))
    ]
    if differ:
        with pytest.raises(ValueError, match=r"different models \(.*\):\n  a: .*\n  b: "):
            nplora.combine(pair)
        nplora.combine(pair, any_base=True)
    else:
        nplora.combine(pair)


def test_the_commands_refuse_and_accept_on_request(
    model: Path, other: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = saved(nplora.load_model(other), tmp_path / "foreign", str(other))
    out = str(tmp_path / "out")
    for line in (
        ["merge", str(other), str(adapter), "--output", f"{out}.gguf"],
        ["combine", str(adapter), str(foreign), "--output", out],
    ):
        assert cli.main(line) == 2
        assert "--any-base" in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))
        assert cli.main([*line, "--any-base"]) == 0
        for path in tmp_path.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        capsys.readouterr()
