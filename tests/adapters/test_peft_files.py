"""Adapter directories: writing, reading back, and that a failure changes nothing."""

import concurrent.futures
import contextlib
import errno
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nplora
import systems
from hostile import refused
from nplora.adapters import load_adapter, save_adapter
from nplora.formats import peft_adapter, safetensors
from nplora.formats.errors import (
    CorruptError,
    FormatError,
    LimitError,
    TruncatedError,
    UnsafeError,
    UnsupportedError,
)
from nplora.formats.peft_config import Patterns
from small_net import Net, edit, perturbed, rewrite, state

Array = np.ndarray[Any, Any]
PREFIX = peft_adapter.PREFIX


def test_the_file_has_peft_s_names_with_the_letters_exchanged(tmp_path: Path) -> None:
    model = Net(embedding=False, use_dora=True)
    save_adapter(model, tmp_path)
    tensors = safetensors.open(tmp_path / "adapter_model.safetensors")
    config = (tmp_path / "adapter_config.json").read_bytes()
    assert tensors.metadata == {
        "format": "pt",
        "adapter_config.json": config.decode(),
        "adapter_config.sha256": hashlib.sha256(config).hexdigest(),
    }
    assert set(tensors) == {
        f"{PREFIX}blocks.{i}.{name}"
        for i in (0, 1)
        for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    layer = model.blocks[0]
    np.testing.assert_array_equal(tensors[f"{PREFIX}blocks.0.lora_B.weight"].numpy(), layer.A)
    np.testing.assert_array_equal(tensors[f"{PREFIX}blocks.0.lora_A.weight"].numpy(), layer.B)
    np.testing.assert_array_equal(tensors[f"{PREFIX}blocks.0.lora_magnitude_vector"].numpy(), layer.m)
    assert tensors[f"{PREFIX}blocks.0.lora_A.weight"].shape == (3, 6)


def test_the_factors_of_an_embedding_are_transposed_in_the_file(tmp_path: Path) -> None:
    model = Net()
    save_adapter(model, tmp_path)
    tensors = safetensors.open(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors[f"{PREFIX}emb.lora_embedding_A"].numpy(), model.emb.A.T)
    np.testing.assert_array_equal(tensors[f"{PREFIX}emb.lora_embedding_B"].numpy(), model.emb.B.T)


def test_the_configuration_names_the_layers_in_full(tmp_path: Path) -> None:
    save_adapter(Net(rank=2, alpha=5, use_rslora=True), tmp_path, base_model_name_or_path="digits")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["emb", "blocks.0", "blocks.1"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (
        2,
        5,
        True,
        False,
    )
    assert (config["rank_pattern"], config["alpha_pattern"], config["task_type"]) == ({}, {}, None)
    assert config["base_model_name_or_path"] == "digits"


def test_layers_that_differ_are_written_as_patterns(tmp_path: Path) -> None:
    def model() -> nplora.Module:
        shapes = [(8, 8)] * 4
        ranks, alphas = [2, 2, 3, 2], [4.0, 4.5, 4.0, 4.0]
        rng = np.random.default_rng(0)
        return nplora.Sequential(
            *(
                nplora.LoRALinear(rng.normal(size=s), r, a, init="gaussian", rng=i)
                for i, (s, r, a) in enumerate(zip(shapes, ranks, alphas, strict=True))
            )
        )

    saved = perturbed(model(), 1)
    save_adapter(saved, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {"^2": 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {"^1": 4.5})
    loaded = model()
    load_adapter(loaded, tmp_path)
    assert state(loaded) == state(saved)
    save_adapter(nplora.Sequential(*(nplora.LoRALinear(np.ones((8, 8)), 2, 4) for _ in range(4))), tmp_path)
    assert load_adapter(loaded, tmp_path).changes == ("1: alpha 4.5 -> 4", "2: rank 3 -> 2")


def test_a_directory_that_is_not_there_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_adapter(Net(), tmp_path / "nope")
    assert str(caught.value.filename) == str(tmp_path / "nope")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotADirectoryError, match=r"is a file, expected a directory.*'.*a\.gguf'"):
        load_adapter(Net(), tmp_path / "a.gguf")


def test_layers_trained_whole_are_modules_to_save(tmp_path: Path) -> None:
    def model() -> nplora.Module:
        rng = np.random.default_rng(0)
        return nplora.Sequential(
            nplora.LoRALinear(rng.normal(size=(6, 5)), rank=2, init="gaussian", rng=1),
            nplora.LayerNorm(np.ones(6), np.zeros(6), trainable=True),
            nplora.Linear(rng.normal(size=(3, 6)), np.zeros(3), trainable=True),
        )

    saved, loaded = perturbed(model(), 1), model()
    save_adapter(saved, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["1", "2"]
    tensors = safetensors.open(tmp_path / "adapter_model.safetensors")
    assert {f"{PREFIX}{i}.{name}" for i in (1, 2) for name in ("weight", "bias")} < set(tensors)
    report = load_adapter(loaded, tmp_path)
    assert state(loaded) == state(saved)
    assert report.layers == ("0", "1", "2")


def test_a_name_that_peft_would_confuse_with_a_trained_layer_is_refused(tmp_path: Path) -> None:
    class Confusing(nplora.Module):
        def __init__(self) -> None:
            self.head = nplora.Linear(np.zeros((2, 2)), trainable=True)
            self.overhead = nplora.LoRALinear(np.zeros((2, 2)), rank=1)

    with pytest.raises(ValueError, match="the trained layer 'head' would also match 'overhead'"):
        save_adapter(Confusing(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_targets_become_an_expression_where_a_list_would_hit_others(tmp_path: Path) -> None:
    def model() -> nplora.Module:
        lora = nplora.LoRALinear(np.ones((4, 4)), rank=1, init="gaussian", rng=0)
        return nplora.Sequential(lora, nplora.Sequential(nplora.ReLU()))

    save_adapter(model(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "0"
    load_adapter(model(), tmp_path)


@pytest.mark.parametrize("setting", ["use_rslora", "use_dora"])
def test_what_peft_has_once_for_all_layers_must_not_differ(setting: str, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{setting: True}, {setting: False}]
    model = nplora.Sequential(*(nplora.LoRALinear(np.ones((4, 4)), rank=1, **kw) for kw in options))
    message = f"one {setting} for all .*, layer '0' has {setting}=True, and layer '1' has {setting}=False"
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_factors_of_another_float_type_are_converted(dtype: Any, tmp_path: Path) -> None:
    model, other = Net(), Net(rank=1)
    save_adapter(model, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    load_adapter(other, tmp_path)
    assert other.blocks[0].A.dtype == np.float32
    np.testing.assert_array_equal(other.blocks[0].A, model.blocks[0].A.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(other.emb.B, model.emb.B.astype(dtype).astype(np.float32))


def test_a_float64_value_beyond_float32_is_an_infinity(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    name = f"{PREFIX}blocks.0.lora_B.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: np.full((7, 3), 1e300)}))
    with pytest.raises(FormatError, match=r"blocks\.0\.lora_B\.weight' holds NaN or an infinity"):
        load_adapter(Net(), tmp_path)


HOSTILE: list[tuple[dict[str, Any], type[FormatError], str]] = [
    ({"rank_pattern": {"(a+)+$": 4}}, UnsafeError, "rank_pattern"),
    ({"r": 0}, FormatError, "r is 0"),
    ({"r": 10**9}, LimitError, "r is 1,000,000,000"),
    ({"r": True}, FormatError, "r is True"),
    ({"r": "8"}, FormatError, "r is '8'"),
    ({"r": 8}, FormatError, "'blocks.0': lora_A has shape (3, 6), lora_B (7, 3), expected rank 8"),
    ({"lora_alpha": float("nan")}, FormatError, "NaN"),
    ({"auto_mapping": {"base_model_class": "x", "parent_library": "os"}}, UnsafeError, "auto_mapping"),
    ({"trust_remote_code": True}, UnsafeError, "trust_remote_code"),
    ({"peft_type": "IA3"}, UnsupportedError, "peft_type is 'IA3'"),
]


@pytest.mark.parametrize(("fields", "error", "words"), HOSTILE)
def test_a_hostile_configuration_gives_its_error_and_changes_nothing(
    fields: dict[str, Any], error: type[FormatError], words: str, tmp_path: Path
) -> None:
    save_adapter(Net(), tmp_path)
    edit(tmp_path, **fields)
    model = Net(rank=2)
    before = state(model)
    with refused(error, words, tmp_path):
        load_adapter(model, tmp_path)
    assert state(model) == before


@pytest.mark.parametrize("text", ["", "\x1b[31m\nall is well", "a" * 63, "a" * 64 + "\n", "A" * 64, "g" * 64])
def test_a_digest_of_the_base_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    file = safetensors.open(path, mmap=False)
    safetensors.save(path, dict(file), file.metadata | {"base_norms.sha256": text})
    words = f"base_norms.sha256 is {text!r}, expected 64 hexadecimal digits"
    for read in (lambda: load_adapter(Net(), tmp_path), lambda: nplora.read_adapter(tmp_path)):
        with refused(FormatError, words, path):
            read()


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with refused(UnsafeError, "adapter_model.bin: a pickle can run any code", tmp_path):
        load_adapter(Net(), tmp_path)


def test_the_dropout_that_most_layers_have_is_written(tmp_path: Path) -> None:
    save_adapter(Net(dropout=0.25), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.25


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let the process grow by no more than `more` bytes of addresses."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (None, r"the first 8 bytes \(b'zz nonse'\) announce a header of 7,310,308,045,020,494,458 bytes"),
        (
            [f"{PREFIX}blocks.0.lora_A.weight", f"{PREFIX}blocks.0.lora_B.weight"],
            r"lora_A has shape \(4294967296,\), lora_B \(0,\), expected rank 3",
        ),
        (["stray"], "tensor 'stray' is not a LoRA factor of a layer"),
    ],
)
def test_no_memory_is_given_to_what_does_not_fit(names: list[str] | None, words: str, tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    path, size = tmp_path / "adapter_model.safetensors", 1 << 34
    header = b""
    if names is not None:
        entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [size, size]}
        header = json.dumps(dict.fromkeys(names, empty) | {names[0]: entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header if header else b"zz nonsense")
    try:
        os.truncate(path, 8 + len(header) + size)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    with memory_limit(1 << 30), pytest.raises(FormatError, match=words):
        load_adapter(Net(), tmp_path)


def test_a_configuration_full_of_patterns_is_read_or_refused_in_seconds(tmp_path: Path) -> None:
    model = nplora.Sequential(
        *(nplora.LoRALinear(np.ones((4, 4)), rank=1, init="gaussian", rng=i) for i in range(20))
    )
    save_adapter(model, tmp_path)
    for count, too_many in ((32, False), (512, True)):
        patterns = {f"{i:03}" + ".*" * 250: 1 for i in range(count)}
        edit(tmp_path, rank_pattern=patterns, alpha_pattern=patterns)
        begin = time.perf_counter()
        with pytest.raises(LimitError, match="patterns") if too_many else contextlib.nullcontext():
            load_adapter(model, tmp_path, edited_config=True)
        assert time.perf_counter() - begin < 5


def test_rank_and_alpha_are_looked_up_once_for_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(Net(), tmp_path)
    asked: list[str] = []
    real = Patterns.value

    def value(self: Patterns, name: str, default: float) -> float:
        asked.append(name)
        return real(self, name, default)

    monkeypatch.setattr(Patterns, "value", value)
    load_adapter(Net(), tmp_path)
    assert sorted(asked) == sorted(["emb", "blocks.0", "blocks.1"] * 2)


def test_an_edited_configuration_is_refused_until_it_is_said_to_be_edited(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    edit(tmp_path, lora_alpha=60)
    model = Net()
    before = state(model)
    with pytest.raises(CorruptError, match=r"config\.json: is not the file .*pass edited_config=True"):
        load_adapter(model, tmp_path)
    assert state(model) == before
    load_adapter(model, tmp_path, edited_config=True)
    assert model.blocks[0].alpha == 60


def test_tensors_without_the_digest_of_a_configuration_take_any(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    rewrite(tmp_path, lambda tensors: None)
    edit(tmp_path, lora_alpha=60)
    model = Net()
    load_adapter(model, tmp_path)
    assert model.blocks[0].alpha == 60


def test_a_truncated_file_is_a_truncated_error(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedError, match=re.escape(str(path))):
        load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_an_os_error(name: str, tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(Net(), tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*unknown keys are ignored")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files_give_format_errors_and_change_nothing(name: str, tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    rng = random.Random(0)
    model = Net()
    before = state(model)
    refused = 0
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(min(len(damaged), 1200))
            if rng.random() < 0.8:
                damaged[place] = rng.choice([damaged[place] ^ 1 << rng.randrange(8), *b'0123456789{}[]",-.e'])
            else:
                del damaged[place : place + rng.choice([1, 4, len(damaged)])]
            if not damaged:
                break
        path.write_bytes(damaged)
        try:
            load_adapter(model, tmp_path)
        except FormatError:
            refused += 1
            assert state(model) == before
        else:
            model = Net()
    assert refused > 100


def failing_after(good_calls: int, real: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    calls = iter(range(good_calls))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return real(*args, **kwargs)

    return call


def test_a_disk_that_fills_up_leaves_the_old_adapter(tmp_path: Path) -> None:
    import resource

    model = Net()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(OSError, match=r"adapter_model\.safetensors") as caught:
            save_adapter(perturbed(model, 1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"700 of [\d,]+ bytes were written", str(caught.value))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("call", "count"), [("open", 2), ("write", 8), ("fsync", 2)])
def test_an_error_at_any_call_leaves_the_old_adapter(
    call: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows' files are opened by _winapi.CreateFile."""
    opens = call == "open" and systems.IS_WINDOWS
    module, name = (importlib.import_module("_winapi"), "CreateFile") if opens else (os, call)
    model = Net()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    perturbed(model, 1)
    for good_calls in range(count):
        failing = failing_after(good_calls, getattr(module, name), OSError(errno.ENOSPC, "No space left"))
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(OSError, match="No space left"):
                save_adapter(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_configuration_is_renamed_last_and_the_directory_is_flushed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_replace, real_fsync = os.replace, os.fsync

    def replace(source: str, target: str, **directories: int) -> None:
        calls.append(os.path.basename(target))
        real_replace(source, target, **directories)

    def fsync(fd: int) -> None:
        place = Path(systems.path_of(fd))
        calls.append("flush " + (place.name.split(".")[1] if place.is_file() else str(place)))
        real_fsync(fd)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    save_adapter(Net(), tmp_path)
    flush = [] if systems.IS_WINDOWS else [f"flush {tmp_path}"]  # there, directories need none
    flushes = ["flush adapter_model", "flush adapter_config"]
    assert calls == [*flushes, "adapter_model.safetensors", *flush, "adapter_config.json", *flush]


def cut_short(directory: Path, model: nplora.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save an adapter, and stop between the two renames."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing_after(1, os.replace, OSError(errno.EIO, "the power fails")))
        with pytest.raises(OSError, match="the power fails"):
            save_adapter(model, directory)


def test_a_save_that_was_cut_short_between_its_renames_is_the_new_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(Net(alpha=6), tmp_path)
    old = (tmp_path / peft_adapter.CONFIG).read_bytes()
    cut_short(tmp_path, Net(alpha=60), monkeypatch)
    assert (tmp_path / peft_adapter.CONFIG).read_bytes() == old
    model = Net()
    load_adapter(model, tmp_path)
    assert model.blocks[0].alpha == 60
    assert nplora.read_adapter(tmp_path)["blocks.0"].scale == 60 / model.blocks[0].rank
    cut_short(tmp_path, Net(alpha=600), monkeypatch)  # once more, beside the same old configuration
    load_adapter(model, tmp_path)
    assert model.blocks[0].alpha == 600
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / peft_adapter.CONFIG).read_text())["lora_alpha"] == 600
    load_adapter(model, tmp_path)


def test_new_tensors_beside_a_configuration_that_they_do_not_replace_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(Net(alpha=6), tmp_path)
    cut_short(tmp_path, Net(alpha=60), monkeypatch)
    edit(tmp_path, lora_alpha=61)
    model = Net()
    before = state(model)
    with pytest.raises(CorruptError, match=r"not the file that was saved with adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    assert state(model) == before
    load_adapter(model, tmp_path, edited_config=True)
    assert model.blocks[0].alpha == 61


def killed_at(number: int, body: Callable[[], None]) -> bool:
    """Run a function in a child that ends, as by SIGKILL, before its n-th call to the system that matters."""
    child = os.fork()
    if not child:
        status = 1
        try:
            for name in ("open", "write", "fchmod", "fsync", "replace", "unlink"):
                setattr(os, name, ending_after(number, getattr(os, name)))
            body()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


KILLED = 9


calls: list[None] = []


def ending_after(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > number:
            os._exit(KILLED)
        return real(*args, **kwargs)

    return call


@pytest.mark.slow
def test_a_save_killed_before_any_call_leaves_the_old_adapter_or_the_new(tmp_path: Path) -> None:
    old, new = perturbed(Net(rank=5, alpha=8), 1), perturbed(Net(rank=3, alpha=12), 2)
    found = []
    for number in itertools.count():
        directory = tmp_path / str(number)
        save_adapter(old, directory)
        if not killed_at(number, lambda directory=directory: save_adapter(new, directory)):  # type: ignore[misc]
            break
        loaded = Net(rank=2)
        load_adapter(loaded, directory)
        found.append(state(loaded))
        save_adapter(new, directory)
        assert sorted(os.listdir(directory)) == [peft_adapter.CONFIG, peft_adapter.TENSORS]
        load_adapter(loaded, directory)
        assert state(loaded) == state(new)
    switch = found.index(state(new))
    assert found == [state(old)] * switch + [state(new)] * (len(found) - switch)
    assert switch > 8
    assert len(found) - switch >= 3  # the flush, the second rename, and its flush


@pytest.mark.slow
def test_a_reader_sees_the_old_adapter_or_the_new_while_one_replaces_the_other(tmp_path: Path) -> None:
    both = [perturbed(Net(rank=5, alpha=8), 1), perturbed(Net(rank=3, alpha=12), 2)]
    wanted, ended, seen = [state(model) for model in both], threading.Event(), set[int]()
    save_adapter(both[0], tmp_path)

    def read() -> None:
        while not ended.is_set():
            model = Net(rank=2)
            load_adapter(model, tmp_path)
            seen.add(wanted.index(state(model)))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        try:
            for number in itertools.count(1):
                save_adapter(both[number % 2], tmp_path)
                if reading.done() or (number >= 100 and seen == {0, 1}):
                    break
        finally:
            ended.set()
        reading.result()


@pytest.mark.skipif(systems.IS_WINDOWS, reason="this system's files have no permissions")
def test_permissions_of_the_files_that_a_save_replaces_are_kept(tmp_path: Path) -> None:
    save_adapter(Net(), tmp_path)
    modes = {peft_adapter.CONFIG: 0o600, peft_adapter.TENSORS: 0o666}
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    before = os.umask(0o027)
    try:
        save_adapter(Net(), tmp_path)
    finally:
        os.umask(before)
    assert {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in modes} == modes


@pytest.mark.skipif(systems.IS_WINDOWS, reason="this system cannot lock directories")
def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in peft_adapter.CONFIG, peft_adapter.TENSORS:
        (tmp_path / f".{name}.0123456789ab.tmp").write_bytes(b"half")
    others = [
        ".other.json.0123456789ab.tmp",
        f".{peft_adapter.CONFIG}.tmp",
        f".{peft_adapter.CONFIG}.mine.tmp",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"a user's")
    save_adapter(Net(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, peft_adapter.CONFIG, peft_adapter.TENSORS])


def test_a_directory_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        save_adapter(Net(), tmp_path / "file")
    (tmp_path / "taken" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises(OSError, match="is a directory"):
        save_adapter(Net(), tmp_path / "taken")
    assert os.listdir(tmp_path / "taken") == ["adapter_config.json"]


def test_nan_and_infinity_are_not_saved(tmp_path: Path) -> None:
    model = Net()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.blocks[1].A[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"save_adapter: blocks\.1\.A holds NaN"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_three_ignored_copies_of_frozen_weights_are_named(tmp_path: Path) -> None:
    model = nplora.Sequential(*(nplora.LoRALinear(np.eye(2, dtype=np.float32), rank=1) for _ in range(5)))
    save_adapter(model, tmp_path)
    copies = {f"{PREFIX}{n}.base_layer.weight": np.eye(2, dtype=np.float32) for n in range(5)}
    rewrite(tmp_path, lambda tensors: tensors.update(copies))
    with pytest.warns(UserWarning, match=r"for 5 layers \('0', '1', '2', …\); they are ignored"):
        nplora.read_adapter(tmp_path, edited_config=True)


def test_peft_s_copy_of_a_frozen_weight_is_ignored_if_it_fits_the_factors(tmp_path: Path) -> None:
    """PEFT writes such copies for an adapted head ((d_out, d_in)) or embedding ((vocab, dim))."""
    model = perturbed(Net(), 1)
    save_adapter(model, tmp_path)
    wide, table = model.blocks[0].weight.shape, model.emb.weight.shape
    copies = {
        f"{PREFIX}blocks.0.base_layer.weight": np.zeros(wide, np.float32),
        f"{PREFIX}emb.base_layer.weight": np.zeros(table, np.float32),
    }
    rewrite(tmp_path, lambda tensors: tensors.update(copies))
    loaded = Net()
    with pytest.warns(UserWarning, match="copies") as caught:
        load_adapter(loaded, tmp_path, edited_config=True)
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path}: the adapter has copies of the base model's weights for 2 layers ('blocks.0', 'emb'); "
        "they are ignored, because nplora uses the base model's own weights"
    ]
    assert caught[0].filename == __file__
    assert state(loaded) == state(model)
    for name, copy in copies.items():
        rewrite(tmp_path, lambda tensors, name=name, copy=copy: tensors.update({name: copy[1:]}))
        with pytest.raises(FormatError, match=f"tensor '{name}' is not a LoRA factor of a layer"):
            load_adapter(Net(), tmp_path, edited_config=True)
        rewrite(tmp_path, lambda tensors, name=name: tensors.pop(name))
