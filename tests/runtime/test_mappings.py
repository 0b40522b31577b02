"""A model's file that changes while it is mapped: cut short, written to in place, or replaced."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
import systems
from nplora import _core
from nplora.adapters import Adapter
from nplora.formats import gguf, safetensors
from nplora.formats.errors import CorruptError
from nplora.lm import LanguageModel
from nplora.lora.delta import LoraDelta
from nplora.lora.merging import Merge
from nplora.platform import files
from nplora.trainer.run_directory import RunDirectory
from small_llama import save_small_llama

IDS = np.arange(40)
BUS_ERROR = 128 + 7  # SIGBUS of Linux


# ---- cut short: the process ends with a message ----


def ended(path: Path, code: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The outcome of a process that runs this code on a model, `lm`, whose file `cut()` truncates."""
    prelude = f"""
        {before}
        import os, sys
        import numpy as np
        import nplora
        ids = np.arange(40)
        lm = nplora.load_model({str(path)!r})
        def cut(path={str(path)!r}):
            os.truncate(path, 4096)
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def message(path: Path) -> str:
    reason = "the file was cut short while it was mapped, or its disk failed"
    return f"nplora: error: {path}: {reason}; load_model(..., mmap=False) copies the file\n"


CUT = {
    "generating": """
        cache = lm.new_cache(1, 60)
        lm.decode([[1, 2]], [0], cache)
        cut()
        lm.decode([3], [0], cache)
    """,
    "training": """
        lm.add_lora(rank=2)
        for step in range(3):
            lm.train_step(ids, ids, nplora.SGD(lr=0.1))
            cut()
    """,
    "in a thread, beside handlers of Python's signals": """
        import signal, threading
        signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
        os.kill(os.getpid(), signal.SIGTERM)
        cut()
        thread = threading.Thread(target=lm.logits, args=(ids,))
        thread.start()
        thread.join()
    """,
}


@pytest.mark.slow
@systems.needs_cut_files
@pytest.mark.parametrize("what", CUT)
def test_a_model_that_is_cut_short_ends_the_process_with_one_line(what: str, tmp_path: Path) -> None:
    path = small_models.write(tmp_path / "small.gguf")
    done = ended(path, textwrap.dedent(CUT[what]) + "\nprint('went on')")
    assert done.stderr == message(path)
    assert done.returncode == BUS_ERROR
    assert done.stdout == ("term\n" if "beside" in what else "")


@pytest.mark.slow
@systems.needs_fork
def test_a_forked_child_ends_alone(tmp_path: Path) -> None:
    path = small_models.write(tmp_path / "small.gguf")
    done = ended(
        path,
        """
        child = os.fork()
        if not child:
            cut()
            lm.logits(ids)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{BUS_ERROR}\n", message(path))


@systems.needs_cut_files
@pytest.mark.slow
def test_other_mappings_and_signals_go_to_the_handler_from_before(tmp_path: Path) -> None:
    path = small_models.write(tmp_path / "small.gguf")
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    foreign = f"""
        import mmap
        with open({str(tmp_path / "other")!r}, "rb") as file:
            other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cut({str(tmp_path / "other")!r})
        other[1 << 19]
    """
    sent = "import signal; os.kill(os.getpid(), signal.SIGBUS)"
    for code in (foreign, sent):
        done = ended(path, code)
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGBUS, "", "")


@pytest.mark.slow
@systems.needs_cut_files
@pytest.mark.parametrize("handler", ["faulthandler", "Python's"])
def test_a_handler_from_before_is_called_in_between(handler: str, tmp_path: Path) -> None:
    path = small_models.write(tmp_path / "small.gguf")
    if handler == "faulthandler":
        before = "import faulthandler; faulthandler.enable()"
    else:
        before = "import signal; signal.signal(signal.SIGBUS, lambda *_: print('called'))"
    done = ended(path, "cut(); lm.logits(ids)", before)
    assert done.stderr.startswith(message(path))
    assert ("Fatal Python error: Bus error" in done.stderr) == (handler == "faulthandler")
    assert done.returncode == BUS_ERROR


@systems.needs_cut_files
@pytest.mark.slow
def test_faulthandler_that_is_switched_off_takes_the_message_along_until_the_next_mapping(
    tmp_path: Path,
) -> None:
    """It puts back the handler from before its own."""
    path, other = (small_models.write(tmp_path / name) for name in ("small.gguf", "other.gguf"))
    code = (
        f"faulthandler.disable(); lm = nplora.load_model({str(other)!r}); cut({str(other)!r}); lm.logits(ids)"
    )
    done = ended(path, code, "import faulthandler; faulthandler.enable()")
    assert (done.returncode, done.stderr) == (BUS_ERROR, message(other))


def test_a_mapping_that_is_gone_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, forgotten = list[int](), list[int]()
    watch, unwatch = _core.watch_mapping, _core.unwatch_mapping

    def watching(mapping: Any, message: bytes) -> int:
        watched.append(watch(mapping, message))
        return watched[-1]

    def forgetting(number: int) -> None:
        forgotten.append(number)
        unwatch(number)

    monkeypatch.setattr(_core, "watch_mapping", watching)
    monkeypatch.setattr(_core, "unwatch_mapping", forgetting)
    safetensors.save(tmp_path / "a.safetensors", {"x": np.zeros(10_000, np.float32)})
    array = safetensors.open(tmp_path / "a.safetensors")["x"].array
    assert (len(watched), forgotten) == (1, [])
    del array
    assert forgotten == watched


# ---- written to in place: noticed after each call ----


def load_gguf(directory: Path) -> tuple[LanguageModel, Path]:
    path = small_models.write(directory / "small.gguf")
    return nplora.load_model(path), path


def load_directory(directory: Path) -> tuple[LanguageModel, Path]:
    (directory / "config.json").write_text(json.dumps(small_models.config()))
    safetensors.save(directory / "model.safetensors", small_models.hf_tensors())
    return nplora.load_model(directory), directory / "model.safetensors"


def overwrite(path: Path) -> None:
    """Other bytes of the same number, in the same file."""
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def train(lm: LanguageModel) -> None:
    if not lm.adapter_layers():
        lm.add_lora(rank=2)
    lm.train_step(IDS, IDS, nplora.SGD(lr=0.1))


CALLS: dict[str, Callable[[LanguageModel], object]] = {
    "loss": lambda lm: lm.loss(IDS, IDS),
    "logits": lambda lm: lm.logits(IDS),
    "train_step": train,
    "new_cache": lambda lm: lm.new_cache(1, 8),
}


@pytest.mark.parametrize("load", [load_gguf, load_directory])
def test_other_bytes_in_place_are_noticed_after_each_call(
    load: Callable[[Path], tuple[LanguageModel, Path]], tmp_path: Path
) -> None:
    lm, path = load(tmp_path)
    cache = lm.new_cache(1, 8)
    for call in CALLS.values():
        call(lm)
    factors = [p.value.copy() for p in lm.parameters()]
    overwrite(path)
    for call in (*CALLS.values(), lambda lm: lm.decode([1], [0], cache)):
        with pytest.raises(
            CorruptError,
            match=rf"^{re.escape(str(path))}: the file changed while it was in use \(written to\)",
        ):
            call(lm)
    for p, before in zip(lm.parameters(), factors, strict=True):
        np.testing.assert_array_equal(p.value, before)


def test_a_file_that_grows_is_noticed_with_both_sizes(tmp_path: Path) -> None:
    lm, path = load_gguf(tmp_path)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptError, match=rf"in use \({size:,} bytes, now {size + 4:,}\): put the original"):
        lm.loss(IDS, IDS)


@pytest.mark.parametrize("load", [load_gguf, load_directory])
def test_a_file_that_is_replaced_or_removed_does_no_harm(
    load: Callable[[Path], tuple[LanguageModel, Path]], tmp_path: Path
) -> None:
    lm, path = load(tmp_path)
    before = lm.logits(IDS)
    (tmp_path / "new").write_bytes(bytes(100))
    directory = files.open_directory(str(tmp_path))
    try:
        files.replace_in(directory, "new", path.name)  # Windows' own rename refuses a file that is mapped
    finally:
        os.close(directory)
    np.testing.assert_array_equal(lm.logits(IDS), before)
    path.unlink()
    np.testing.assert_array_equal(lm.logits(IDS), before)


def test_a_copy_in_memory_does_not_care(tmp_path: Path) -> None:
    path = small_models.write(tmp_path / "small.gguf")
    lm = nplora.load_model(path, mmap=False)
    before = lm.logits(IDS)
    os.truncate(path, 100)
    np.testing.assert_array_equal(lm.logits(IDS), before)
    assert gguf.open(small_models.write(tmp_path / "b.gguf"), mmap=False).mapped == ()


def test_a_merge_of_a_base_that_changes_meanwhile_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_models.write(tmp_path / "base.gguf")
    update = LoraDelta(np.ones((32, 1), np.float32), np.ones((1, 32), np.float32), 1.0)
    rows = Merge.rows

    def changing(merge: Merge) -> Any:
        yield from rows(merge)
        overwrite(path)

    monkeypatch.setattr(Merge, "rows", changing)
    adapter = Adapter("a", {"model.layers.0.self_attn.o_proj": update})
    with pytest.raises(CorruptError, match="the file changed while it was in use"):
        nplora.merge_adapter(path, adapter, tmp_path / "out.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["base.gguf"]


def test_a_run_stops_at_the_change_and_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    model = save_small_llama(tmp_path / "model.gguf")
    (tmp_path / "train.jsonl").write_text(8 * '{"text": "abcabcabc"}\n')
    forward_backward, calls = LanguageModel.forward_backward, [0]

    def changing(lm: LanguageModel, batch: object, factor: float) -> float:
        calls[0] += 1
        if calls[0] == 4:
            overwrite(model)
        return forward_backward(lm, batch, factor)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "forward_backward", changing)
    output = tmp_path / "out"
    with pytest.raises(CorruptError, match="the file changed while it was in use"):
        nplora.finetune(
            model, tmp_path / "train.jsonl", output, batch_examples=1, save_every=2, progress=False
        )
    assert not (output / "adapter_model.safetensors").exists()
    with RunDirectory(output) as directory:
        checkpoint = directory.latest()
        assert checkpoint is not None
        assert checkpoint.step == 3  # the last step before the change
