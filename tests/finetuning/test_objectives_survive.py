"""Every objective: a run that is stopped, diverges, or finds the disk full."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.finetuning import finetune, teach
from nplora.finetuning.objective_options import OBJECTIVES
from nplora.formats import files
from nplora.nn.losses import NonFiniteLossError
from nplora.trainer import Callback
from nplora.trainer.run_directory import RunDirectory
from small_llama import save_small_llama

pytest.importorskip("tokenizers")

PAIRS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no" * (1 + n % 3)} for n in range(12)]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the predictions of a teacher for ANSWERS."""
    directory = tmp_path_factory.mktemp("objectives")
    model = save_small_llama(directory / "model.gguf")
    teach(model, ANSWERS, directory / "taught", top_k=4)
    return directory


@pytest.fixture(scope="module", params=OBJECTIVES)
def options(request: pytest.FixtureRequest, place: Path) -> dict[str, Any]:
    rows = PAIRS if request.param in ("dpo", "orpo", "kto") else ANSWERS
    found = {
        "model": place / "model.gguf", "data": rows, "objective": request.param, "rank": 2, "lr": 1e-2,
        "batch_examples": 4, "dropout": 0.2, "epochs": 3, "save_every": 2, "schedule": "constant",
        "progress": False,
    }  # fmt: skip
    return found | ({"teacher": place / "taught"} if request.param == "distill" else {})


@pytest.fixture(scope="module")
def expected(options: dict[str, Any], place: Path) -> dict[str, bytes]:
    """The adapter of a run that nothing disturbed."""
    whole = place / f"whole-{options['objective']}"
    finetune(output=whole, **options)
    return adapter_of(whole)


def adapter_of(directory: Path) -> dict[str, bytes]:
    return {
        name: (directory / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
    }


class CtrlC(Callback):
    def on_step_end(self, run: Any, record: Any) -> None:
        if record.step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_ctrl_c_saves_a_run_that_resumes_to_the_bit(
    options: dict[str, Any], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped = finetune(output=out, callbacks=[CtrlC()], **options)
    assert (stopped.history.ended, len(stopped.history.steps)) == ("interrupted", 3)
    assert adapter_of(out) != expected
    assert finetune(output=out, resume=True, **options).history.ended == "complete"
    assert adapter_of(out) == expected


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_from_which_a_run_resumes_to_the_bit(
    options: dict[str, Any], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, steps, out = files.write, list[int](), tmp_path / "out"

    class Count(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            steps.append(record.step)

    def full(fd: int, chunk: files.Chunk, progress: files.Progress) -> None:
        if steps and steps[-1] >= 5 and progress.nbytes > 5000:  # checkpoints, but not the log
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, chunk, progress)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", full)
        with (
            pytest.warns(UserWarning, match="could not be written"),
            pytest.raises(OSError, match="No space"),
        ):
            finetune(output=out, callbacks=[Count()], **options)
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    assert not (out / "adapter_model.safetensors").exists()
    with RunDirectory(out) as directory:
        assert directory.newest is not None
        assert directory.newest.step == 4
    finetune(output=out, resume=True, **options)
    assert adapter_of(out) == expected


@pytest.mark.slow
def test_a_run_that_diverges_names_its_step_and_saves_no_bad_factors(
    options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(NonFiniteLossError, match=r"step \d \(epoch 1\)") as caught:
        finetune(output=out, **options | {"lr": 1e30})
    assert any("lower" in note for note in caught.value.__notes__)
    with RunDirectory(out) as directory:
        assert directory.newest is not None
        for array in directory.newest.parameters.values():
            assert np.isfinite(array).all()
    if (out / "adapter_model.safetensors").exists():
        for delta in nplora.read_adapter(out).values():
            assert np.isfinite(delta.A).all()
