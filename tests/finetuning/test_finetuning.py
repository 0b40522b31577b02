"""Fine-tuning from files to an adapter: options, runs that resume to the bit, evaluation."""

import dataclasses
import errno
import fractions
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
import small_models
import systems
from commands import command
from dead_streams import DEAD
from hostile import refused
from nplora import cli
from nplora.adapters import save_adapter
from nplora.finetuning import (
    FinetuneOptions,
    FinetuneReport,
    TokenLoss,
    TokenProgress,
    attach_adapter,
    baseline,
    evaluate,
    execution,
    finetune,
    load_with_adapter,
    plan,
    run,
)
from nplora.finetuning.data import TokenBatches, read_dataset
from nplora.finetuning.planning import choice
from nplora.formats import gguf, safetensors
from nplora.formats.errors import CorruptError, DataError, FormatError, UnsafeError
from nplora.formats.gguf import Typed
from nplora.lm import load_model
from nplora.models import prefix_cache
from nplora.models.packing import IGNORED
from nplora.nn.losses import NonFiniteLossError
from nplora.nn.optim import global_norm
from nplora.trainer import Callback, Run, StepRecord
from nplora.trainer.run_directory import RunDirectory
from small_llama import save_small_llama

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with train.jsonl and valid.jsonl."""
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(24)]
    directory = tmp_path / "data"
    directory.mkdir()
    for name, part in (("train", rows[4:]), ("valid", rows[:4])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory


QUICK = {"rank": 2, "lr": 1e-2, "batch_examples": 4, "epochs": 4, "save_every": 3}
CONTINUE = {name: value for name, value in QUICK.items() if name != "rank"}  # the adapter decides the rank


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        name: (directory / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
    }


# ---- a run ----


@pytest.mark.slow
def test_a_run_learns_and_leaves_an_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    report = finetune(model, data, tmp_path / "out", sample=("1+1=", "x"), **QUICK)
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.loss_after < report.loss_before - 0.5
    assert len(report.history.steps) == 20
    assert report.tokens == 4 * report.train.learned
    lm = load_with_adapter(model, tmp_path / "out")
    assert (report.trained, report.parameters) == (lm.num_trainable, lm.num_parameters)
    assert [sample.prompt for sample in report.samples] == ["1+1=", "x"]
    assert report.samples[0].before != report.samples[0].after
    assert f"validation loss {report.loss_before:.4f} -> {report.loss_after:.4f}" in str(report)
    base, adapted = evaluate(model, data), evaluate(model, data, adapter=tmp_path / "out")
    assert report.valid is not None
    expected = {
        "tokens": report.valid.learned, "source": str(data / "valid.jsonl"),
        "examples": 4, "truncated": 0, "emptied": 0, "skipped": 0,
    }  # fmt: skip
    assert base.items() >= (expected | {"loss": report.loss_before}).items()
    assert adapted.items() >= (expected | {"loss": report.loss_after}).items()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.slow
def test_steps_are_those_of_the_batches_mean_loss(model: Path, data: Path, tmp_path: Path) -> None:
    """One step over accumulated batches equals the step over all of their tokens at once."""
    runs = []
    for size, accumulate in ((20, 1), (5, 4)):
        output = tmp_path / f"out{size}"
        report = finetune(
            model, data, output, rank=2, lr=1e-2, batch_examples=size, accumulate=accumulate, steps=3,
            max_grad_norm=1e9,
        )  # fmt: skip
        runs.append((load_with_adapter(model, output), report.history))
    for one, other in zip(runs[0][1].steps, runs[1][1].steps, strict=True):
        assert (one.count, one.lr) == (other.count, other.lr)
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
        np.testing.assert_allclose(one.grad_norm, other.grad_norm, rtol=1e-4)
    dataset = read_dataset(data / "train.jsonl", runs[0][0].tokenizer)
    [(batch, _)] = TokenBatches(dataset, batch_examples=20)
    assert runs[0][1].steps[0].loss == pytest.approx(load_model(model).loss_packed(batch), rel=1e-6)
    lm = load_model(model)
    lm.add_lora(rank=2)
    lm.forward_backward(batch, 1 / batch.num_targets)
    assert runs[0][1].steps[0].grad_norm == pytest.approx(global_norm(lm.parameters()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    [{"batch_tokens": 40, "batch_examples": None}, {"accumulate": 2, "dropout": 0.2}],
    ids=["tokens", "accumulated"],
)
def test_a_run_that_was_stopped_resumes_to_the_bit(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: dict[str, Any]
) -> None:
    options = {**QUICK, **size, "save_every": 2, "sample": ("1+1=",)}
    whole = finetune(model, data, tmp_path / "whole", **options)
    count = len(whole.history.steps)
    for stop in (1, count // 2, count - 1):
        output = tmp_path / f"stopped{stop}"

        class StopAt(Callback):
            at = stop

            def on_step_end(self, run: Any, record: Any) -> None:
                if record.step == self.at:
                    raise KeyboardInterrupt

        monkeypatch.setattr(run, "speaks", lambda progress: True)
        monkeypatch.setattr(run, "TokenProgress", lambda loss, stops=StopAt: stops())
        stopped = finetune(model, data, output, **options)
        monkeypatch.undo()
        assert stopped.history.interrupted
        assert stopped.loss_after is None
        assert "interrupted: --resume continues" in str(stopped)
        assert len(stopped.history.steps) == stop
        assert files_of(output) != files_of(tmp_path / "whole")
        resumed = finetune(model, data, output, **options, resume=True)
        assert files_of(output) == files_of(tmp_path / "whole")
        assert resumed.history.loss == whole.history.loss
        assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
        assert resumed.samples == whole.samples


def test_one_seed_decides_the_start_of_the_factors(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "out", rank=2, seed=3, lr=1e-30, steps=1)
    lm = load_model(model)
    lm.add_lora(rank=2, seed=3)
    for name, layer in load_with_adapter(model, tmp_path / "out").adapter_layers().items():
        np.testing.assert_array_equal(layer.B, lm.adapter_layers()[name].B)


def test_every_option_reaches_trainer_optimiser_and_layers(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line of the log has the settings of trainer, optimiser and layers."""
    saved: list[int] = []
    save = RunDirectory.save
    monkeypatch.setattr(RunDirectory, "save", lambda d, point: (saved.append(point.step), save(d, point))[1])
    layer = {"rank": 3, "alpha": 5.0, "dropout": 0.25, "use_rslora": True, "use_dora": True, "freeze_B": True}
    finetune(
        model, data, tmp_path / "out", **layer, lr=3e-3, schedule="linear", warmup=2, weight_decay=0.2,
        max_grad_norm=0.7, steps=7, accumulate=2, batch_tokens=50, seed=9, save_every=3, compute="bfloat16",
        targets=("v_proj",), layers="first:1",
    )  # fmt: skip
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    header, settings = json.loads(log[0]), json.loads(log[1])["settings"]
    dataset = read_dataset(data / "train.jsonl", load_model(model).tokenizer)
    assert header["data"] == {
        "source": str(data / "train.jsonl"), "format": "completion", "examples": len(dataset),
        "tokens": sum(len(ids) for ids, _ in dataset),
        "trained_tokens": sum(int((labels[1:] != IGNORED).sum()) for _, labels in dataset),
        "batch_tokens": 50, "batches": len(TokenBatches(dataset, batch_tokens=50)),
    }  # fmt: skip
    valid = {"source": str(data / "valid.jsonl"), "examples": 4, "batches": 1}
    assert header["valid"].items() >= valid.items()
    wanted = {"lr": 3e-3, "weight_decay": 0.2, "schedule": "linear", "warmup_steps": 2, "clip_norm": 0.7}
    assert settings["free"].items() >= {**wanted, "total_steps": 7}.items()
    assert settings["fixed"].items() >= {"accumulate": 2, "batch_tokens": 50, "seed": 9}.items()
    [(name, found)] = settings["fixed"]["layers"].items()
    assert name == "model.layers.0.self_attn.v_proj"
    assert found.items() >= {**layer, "compute": "bfloat16"}.items()
    assert saved == [0, 1, 3, 6, 7]


def test_every_option_of_the_data_reaches_the_reader(model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1234", "completion": "5"},
        {"prompt": "1", "completion": "x" * 40},
        {"nothing": ""},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = finetune(
        model, tmp_path, tmp_path / "out", steps=1, learn="all", skip_bad=True, max_length=20
    ).train
    assert (report.skipped, report.truncated, report.longest) == (1, 1, 20)
    assert report.learned == report.tokens - 2  # all but the first token of each


@pytest.mark.slow
def test_the_model_learns_to_end_its_answers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "say:", "completion": "abc"}\n' * 8)
    targets = ("all-linear", "lm_head")
    report = finetune(
        model, tmp_path, tmp_path / "out", rank=8, lr=2e-2, steps=60, sample=("say:",), targets=targets
    )
    assert report.samples[0].after == "abc"
    assert report.loss_before is report.loss_after is None


@pytest.mark.slow
def test_recomputed_activations_give_the_same_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    for recompute in (False, True):
        finetune(model, data, tmp_path / str(recompute), recompute=recompute, **QUICK)
    assert files_of(tmp_path / "True") == files_of(tmp_path / "False")


def test_the_old_name_of_recompute_still_works(model: Path, data: Path) -> None:
    for options in (FinetuneOptions(checkpoint_blocks=True), FinetuneOptions(recompute=True)):
        assert options.recompute
        assert dataclasses.replace(options, lr=1e-3).recompute
    assert not FinetuneOptions().recompute
    assert not FinetuneOptions(checkpoint_blocks=False).recompute
    assert plan(model, data, checkpoint_blocks=True).chosen.recompute


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_kept_outputs_of_frozen_blocks_give_the_same_adapter(
    model: Path, data: Path, tmp_path: Path, where: str
) -> None:
    options: dict[str, Any] = {**QUICK, "layers": "last:1", "dropout": 0.1}
    plain = finetune(load_model(model), data, tmp_path / "plain", **options)
    lm = load_model(model)
    kept = finetune(lm, data, tmp_path / "kept", **options, keep_prefix=where)
    assert lm.model.prefix is None
    assert files_of(tmp_path / "kept") == files_of(tmp_path / "plain")
    assert (kept.history.loss, kept.loss_after) == (plain.history.loss, plain.loss_after)
    names = [{file.name for file in (tmp_path / name).iterdir()} for name in ("plain", "kept")]
    assert names[0] == names[1]


def test_a_disk_that_is_too_full_for_the_kept_outputs_is_an_error_before_the_run(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, os.strerror(28))

    has_call = hasattr(os, "posix_fallocate")
    monkeypatch.setattr(*((os, "posix_fallocate") if has_call else (prefix_cache, "reserve")), full)
    lm = load_model(model)
    with pytest.raises(OSError, match=r"No space left on device: the frozen blocks' outputs take"):
        finetune(lm, data, tmp_path / "out", **QUICK, layers="last:1", keep_prefix="disk")
    assert lm.model.prefix is None
    assert not lm.adapter_layers()
    assert not (tmp_path / "out" / "checkpoint-0.safetensors").exists()


@pytest.mark.slow
def test_a_run_with_a_frozen_b_trains_a_alone_and_continues_to_the_bit(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """With dropout and DoRA; resumed, and continued from the saved adapter."""
    options: dict[str, Any] = {"batch_examples": 4, "lr": 1e-2, "schedule": "constant", "freeze_B": True}
    new = {"rank": 2, "seed": 3, "dropout": 0.2, "use_dora": True}
    finetune(model, data, tmp_path / "whole", steps=6, **options, **new)
    finetune(model, data, tmp_path / "parts", steps=2, **options, **new)
    with pytest.warns(UserWarning, match="total_steps was 2, is 6"):
        finetune(model, data, tmp_path / "parts", steps=6, resume=True, **options, **new)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")

    report = finetune(model, data, tmp_path / "more", steps=2, adapter=tmp_path / "whole", **options)
    start = load_model(model)
    start.add_lora(rank=2, seed=3)
    whole, more = (load_with_adapter(model, tmp_path / name).adapter_layers() for name in ("whole", "more"))
    for name, layer in start.adapter_layers().items():
        np.testing.assert_array_equal(whole[name].B, layer.B)
        np.testing.assert_array_equal(more[name].B, layer.B)
        assert whole[name].A.any()
        assert (more[name].A != whole[name].A).any()
    assert report.trained == sum(layer.A.size + len(layer.m) for layer in whole.values())


@pytest.mark.slow
@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
def test_other_initial_factors_train_resume_to_the_bit_and_are_saved_for_the_unchanged_model(
    model: Path, data: Path, tmp_path: Path, init: str
) -> None:
    options = {**QUICK, "init": init}
    report = finetune(model, data, tmp_path / "out", **options)
    assert report.loss_before is not None
    assert report.loss_after is not None
    base, adapted = evaluate(model, data)["loss"], evaluate(model, data, adapter=tmp_path / "out")["loss"]
    assert report.loss_after < report.loss_before - 0.5
    assert adapted == pytest.approx(report.loss_after, abs=1e-4)
    if init == "gaussian":
        assert report.loss_before != base
    else:
        assert report.loss_before == pytest.approx(base, abs=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == (2 if init == "gaussian" else 4)
    finetune(
        model, data, tmp_path / "cut", **{**options, "epochs": None, "steps": 20, "schedule": "constant"}
    )
    finetune(
        model, data, tmp_path / "half", **{**options, "epochs": None, "steps": 7, "schedule": "constant"}
    )
    with pytest.warns(UserWarning, match="total_steps was 7, is 20"):
        finetune(
            model, data, tmp_path / "half",
            **{**options, "epochs": None, "steps": 20, "schedule": "constant"}, resume=True,
        )  # fmt: skip
    assert files_of(tmp_path / "half") == files_of(tmp_path / "cut")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initial_factors_that_quantised_weights_cannot_give_are_refused(
    tmp_path: Path, data: Path, init: str
) -> None:
    low = save_small_llama(tmp_path / "low.gguf", "q8_0")
    lm = load_model(low)
    with pytest.raises(
        ValueError,
        match=rf"init='{init}' needs unquantised weights, but model\.layers\.0\..* is stored in q8_0",
    ):
        lm.add_lora(init=init)
    assert not lm.adapter_layers()
    with pytest.raises(ValueError, match=r"stored in q8_0; use init='zero', or load the unquantised model"):
        finetune(low, data, tmp_path / "out", init=init)
    assert not (tmp_path / "out").exists()


# ---- what is refused, and what is left ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "steps": 1}, "epochs and steps are both given"),
        ({"batch_tokens": 1, "batch_examples": 1}, "both given"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are both given, expected only one"),
        ({"rank": 0}, "rank is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"schedule": "sine"}, "schedule='sine' is not available"),
        ({"compute": "int4"}, "compute='int4'"),
        ({"max_length": 1}, "max_length is 1"),
        ({"targets": ("q_prj",)}, "q_proj"),
        ({"layers": "middle"}, "layers='middle'"),
        ({"init": "ones"}, "init='ones'"),
        ({"keep_prefix": "tape"}, "keep_prefix='tape'"),
        (
            {"keep_prefix": "memory"},
            "keep_prefix='memory', but there is no frozen block below the adapters; ",
        ),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"sample": ("1+1=", "")}, "^finetune: sample '': the prompt is empty$"),
        (
            {"sample": ["x" * 64]},
            "^finetune: sample 'x*': the prompt has 64 tokens, expected fewer than 64 .the model's context.$",
        ),
        ({"sample": "1+1="}, "finetune: sample is '1\\+1=', expected a list of texts"),
        ({"sample": None}, "finetune: sample is None, expected a list of texts"),
        ({"sample": {"1+1="}}, "finetune: sample is {'1\\+1='}, expected a list of texts"),
        ({"sample": (text for text in "1")}, "finetune: sample is <generator .*, expected a list of texts"),
        ({"sample": [1]}, r"finetune: sample is \[1\], expected a list of texts"),
    ],
)
def test_nothing_is_written_for_options_that_do_not_fit(
    model: Path, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        finetune(model, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:generate. the text ends")  # the context is full
def test_a_sample_is_a_chat_if_the_training_data_are(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = save_small_llama(tmp_path / "model.gguf", changes={"tokenizer.chat_template": template})
    chats = [[("user", f"{n}+{n}="), ("assistant", str(2 * n))] for n in range(8)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    options: dict[str, Any] = {"sample": ("1+1=",), "steps": 2, "rank": 2, "progress": False}
    report = finetune(model, rows, tmp_path / "out", **options)
    chat, sampling = [{"role": "user", "content": "1+1="}], {"max_new_tokens": 48, "repetition_penalty": 1.1}
    lm = load_with_adapter(model, tmp_path / "out")
    assert report.samples[0].prompt == "1+1="
    assert report.samples[0].before == nplora.load_model(model).generate(chat, **sampling)
    assert report.samples[0].after == lm.generate(chat, **sampling)
    assert finetune(model, rows, tmp_path / "out", **options, resume=True).samples == report.samples


def test_a_sample_may_be_empty_if_the_model_has_a_bos_token(data: Path, tmp_path: Path) -> None:
    begins = {"tokenizer.ggml.bos_token_id": Typed(1, "UINT32"), "tokenizer.ggml.add_bos_token": True}
    model = save_small_llama(tmp_path / "bos.gguf", changes=begins)
    report = finetune(model, data, tmp_path / "out", **{**QUICK, "epochs": 1}, sample=[""])
    assert FinetuneOptions(sample=[""]).sample == ("",)  # type: ignore[arg-type]
    assert [sample.prompt for sample in report.samples] == [""]


def test_an_unknown_option_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^finetune: unexpected keyword 'rnk'; did you mean rank\?$"):
        finetune("m", "d", tmp_path, rnk=3)
    with pytest.raises(TypeError, match=r"^plan: unexpected keyword 'zzzzzz'$"):
        plan("m", "d", zzzzzz=3)


def test_nothing_is_written_for_bad_data(model: Path, data: Path, tmp_path: Path) -> None:
    (data / "valid.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match=r"valid\.jsonl, line 1: completion is empty"):
        finetune(model, data, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        finetune(model, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        finetune(tmp_path / "nothing.gguf", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_in_the_directory_is_kept(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "out", **QUICK)
    was = files_of(tmp_path / "out")
    with pytest.raises(
        FileExistsError,
        match=r"holds a run: --resume \(resume=True\) continues it, --overwrite \(.*\) deletes it",
    ):
        finetune(model, data, tmp_path / "out", **QUICK)
    assert files_of(tmp_path / "out") == was
    finetune(model, data, tmp_path / "out", **QUICK, seed=1, overwrite=True)
    assert files_of(tmp_path / "out") != was


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_in_the_directory_is_kept(file: str, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_bytes(b"of another run")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"an adapter but no run: --overwrite \(overwrite=True\)"):
            finetune(model, data, out, **QUICK, resume=resume)
    assert [path.name for path in out.iterdir()] == [file]
    assert (out / file).read_bytes() == b"of another run"
    finetune(model, data, out, **QUICK, overwrite=True)
    for checkpoint in out.glob("checkpoint-*"):
        checkpoint.unlink()
    was = files_of(out)
    with pytest.raises(FileExistsError, match="an adapter but no run"):
        finetune(model, data, out, **QUICK, resume=True)
    assert files_of(out) == was


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (os.rename, "log.jsonl"),
        (os.link, "log.jsonl"),
        (os.symlink, "lock"),
        (os.link, "adapter_config.json"),
        (os.symlink, "checkpoint-1.safetensors"),
    ],
)
def test_no_file_that_a_run_reads_is_replaced(
    make: Callable[[Path, Path], None], name: str, model: Path, data: Path, tmp_path: Path
) -> None:
    out, train = tmp_path / "out", tmp_path / "train.jsonl"
    out.mkdir()
    (data / "train.jsonl").rename(train)
    rows = train.read_bytes()
    make(train, out / name)
    source = train if train.exists() else out / name
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises((ValueError, FileExistsError), match=name) as raised:
            finetune(model, source, out, valid=data / "valid.jsonl", **QUICK, **more)
        if "resume" not in more:  # then the first error is that the file is not one of a run
            assert f"{name} is the training data itself, which is never overwritten" in str(raised.value)
    assert source.read_bytes() == rows
    assert os.listdir(out) == [name]


@pytest.mark.slow
def test_the_files_of_an_interrupted_run_are_ours_or_stay(model: Path, data: Path, tmp_path: Path) -> None:
    out, users = tmp_path / "out", tmp_path / "users"
    finetune(model, data, out, **QUICK)
    users.write_bytes(b"{}")
    for name in files_of(out):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(b"{}")
        with pytest.raises(FileExistsError, match=rf"the file does not belong to a LoRA adapter.*{name}"):
            finetune(model, data, out, **QUICK, resume=True)
        assert (out / name).read_bytes() == b"{}"
        (out / name).unlink()
        (out / name).symlink_to(users)
        for more in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UnsafeError, match=rf"{name}: a symbolic link, expected a regular file"):
                finetune(model, data, out, **QUICK, **more)
        (out / name).unlink()
        (out / name).write_bytes(kept)
    assert users.read_bytes() == b"{}"
    finetune(model, data, out, **QUICK, resume=True)


@pytest.mark.slow
@systems.needs_new_paths
def test_an_adapter_is_saved_in_the_directory_of_the_run_even_if_it_moves(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moving(baseline.Baseline):
        def on_fit_start(self, run: Run) -> None:
            super().on_fit_start(run)
            os.chdir("/")
            (tmp_path / "out").rename(tmp_path / "moved")

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(run, "Baseline", Moving)
        report = finetune(model, data, "out", **QUICK)
    assert report.output == tmp_path / "moved"
    assert f"{tmp_path / 'moved'}/ holds the adapter" in str(report)
    assert not (tmp_path / "out").exists()
    finetune(model, data, tmp_path / "whole", **QUICK)
    assert files_of(tmp_path / "moved") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_the_adapter_of_an_overwritten_run_is_not_used_for_the_new_run(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failing(baseline.Baseline):
        def on_step_end(self, run: Run, record: StepRecord) -> None:
            raise ArithmeticError("the machine is gone")

    out = tmp_path / "out"
    finetune(model, data, out, **QUICK)
    was = files_of(out)
    with monkeypatch.context() as patched:
        patched.setattr(run, "Baseline", Failing)
        with pytest.raises(ArithmeticError):
            finetune(model, data, out, **QUICK, seed=5, overwrite=True)
    for line in (
        ["eval", str(model), "--data", str(data), "--adapter", str(out)],
        ["info", str(out)],
        ["generate", str(model), "1+1=", "--adapter", str(out)],
        ["merge", str(model), str(out), "--output", str(tmp_path / "merged.gguf")],
        ["convert", str(out), str(tmp_path / "a.gguf"), "--base", str(model)],
        ["combine", str(out), "--output", str(tmp_path / "sum")],
    ):
        assert cli.main(line) == 2
        message = (
            "the directory holds a run that has no adapter yet: continue it with --resume (resume=True); if "
            "Trainer.fit made the run, save the adapter with nplora.save_adapter"
        )
        assert capsys.readouterr().err == f"nplora: error: {out}: {message}\n"
    finetune(model, data, out, **QUICK, seed=5, resume=True)
    assert evaluate(model, data, adapter=out)["loss"] > 0
    assert files_of(out) != was


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_directory_with_a_model_gets_no_adapter(
    file: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(model, data, tmp_path / "adapter", **QUICK)
    nplora.adapter_to_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", model)
    out = tmp_path / "out"
    out.mkdir()
    (out / file).touch()
    for line in (
        ["finetune", str(model), "--data", str(data), "--output", str(out), "--overwrite"],
        ["combine", str(tmp_path / "adapter"), "--output", str(out)],
        ["convert", str(tmp_path / "adapter.gguf"), str(out), "--base", str(model)],
    ):
        assert cli.main(line) == 2
        words = f"{out}: the directory holds a model ({file}): name another directory"
        assert words in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="holds a model"):
        nplora.read_adapter(tmp_path / "adapter").save(out)
    assert [path.name for path in out.iterdir()] == [file]


@pytest.mark.slow
def test_a_run_does_not_resume_with_other_data(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "out", **QUICK)
    with (data / "train.jsonl").open("a") as file:
        file.write('{"prompt": "more", "completion": "more"}\n')
    with pytest.raises(CorruptError, match="the data file or the way it is read has changed"):
        finetune(model, data, tmp_path / "out", **QUICK, resume=True)


@pytest.mark.slow
def test_a_run_that_cannot_resume_is_one_error_with_a_way_out(
    model: Path, data: Path, tmp_path: Path
) -> None:
    finetune(model, data, tmp_path / "out", **QUICK, targets="q_proj,v_proj")
    way_out = r"; --overwrite \(overwrite=True\) starts a new run$"
    for changes, message in (
        ({"rank": 3}, r"settings: rank was 2, is 3 in \d layers"),
        (
            {"targets": "q_proj"},
            r"settings: \d layers had adapters, now \d have them \(removed: .*v_proj; new: none\)",
        ),
        ({"epochs": 1}, r"ends at step 5; give a larger --epochs or --steps \(epochs, steps\)"),
    ):
        with pytest.raises(ValueError, match=message + way_out):
            finetune(
                model, data, tmp_path / "out", **{**QUICK, "targets": "q_proj,v_proj", **changes}, resume=True
            )


@pytest.mark.slow
def test_a_run_that_needs_more_memory_than_there_is_warns_of_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (choice, execution):
        monkeypatch.setattr(module, "available_memory", lambda: 5_000_000)
    words = r"the run needs \d+ MB of memory, and 5 MB are available: --memory 5M looks for a plan that fits"
    with pytest.warns(UserWarning, match=words):
        finetune(model, data, tmp_path / "out", **{**QUICK, "epochs": 1})
    small = plan(model, data, **QUICK)
    monkeypatch.setattr(choice, "available_memory", lambda: None)
    assert "available" not in str(plan(model, data, **QUICK))
    assert re.search(words, str(small))  # it keeps what was available
    finetune(model, data, tmp_path / "out", **{**QUICK, "epochs": 1}, resume=True)  # nothing is left to do
    with pytest.warns(UserWarning, match="total_steps"), pytest.warns(UserWarning, match=words):
        finetune(model, data, tmp_path / "out", **{**QUICK, "epochs": 2}, resume=True)


def test_the_memory_of_a_long_run_is_predicted_from_one_epoch(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, members = list[int](), TokenBatches.members

    def counted(self: TokenBatches, epoch: int, skip: int = 0) -> Any:
        epochs.append(epoch)
        return members(self, epoch, skip)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenBatches, "members", counted)
    monkeypatch.setattr(run, "training_batches", stop)
    (data / "valid.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, tmp_path / "out", steps=1000)
    assert epochs == [0]


def test_targets_may_be_one_text_as_on_the_command_line() -> None:
    for given in ("q_proj,v_proj", ("q_proj, v_proj",), ["q_proj", " v_proj"]):
        assert FinetuneOptions(targets=given).targets == ("q_proj", "v_proj")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_trains_nothing_and_says_so(
    model: Path, data: Path, tmp_path: Path
) -> None:
    words = "the run was already finished: nothing was trained"
    first = finetune(model, data, tmp_path / "out", **QUICK)
    resumed = finetune(model, data, tmp_path / "out", **QUICK, resume=True)
    assert words not in str(first)
    assert str(resumed).splitlines()[0] == words
    assert ("peak memory" in str(first), "peak memory" in str(resumed)) == (True, False)
    assert resumed.loss_after == first.loss_after


@pytest.mark.slow
def test_a_resumed_run_does_not_measure_the_baseline_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        **QUICK,
        "epochs": None,
        "schedule": "constant",
        "sample": ("1+1=",),
        "output": tmp_path / "out",
    }
    first = finetune(model, data, **options, steps=4)

    def fail(*arguments: Any) -> None:
        raise AssertionError("evaluated before training")

    monkeypatch.setattr(baseline, "evaluate", fail)
    with monkeypatch.context() as within:
        within.setattr(baseline, "generate", fail)
        with pytest.raises(ValueError, match="rank was 2, is 3"):
            finetune(model, data, **{**options, "rank": 3}, steps=8, resume=True)
    with pytest.warns(UserWarning, match="total_steps was 4, is 8"):
        more = finetune(model, data, **options, steps=8, resume=True)
    assert more.loss_before == first.loss_before
    assert more.samples[0].before == first.samples[0].before
    (data / "valid.jsonl").write_text('{"text": "other"}\n')
    with (
        pytest.warns(UserWarning, match="total_steps was 8, is 9"),
        pytest.warns(UserWarning, match="validation data before, and continues with other data$") as caught,
    ):
        other = finetune(model, data, **{**options, "sample": ("x",)}, steps=9, resume=True)
    assert __file__ in {warning.filename for warning in caught}
    assert (other.loss_before, other.samples[0].before) == (None, "")
    assert f"validation loss {other.loss_after:.4f} (step 9" in str(other)
    assert other.loss_after == evaluate(model, data, adapter=tmp_path / "out")["loss"]
    (data / "valid.jsonl").unlink()
    with (
        pytest.warns(UserWarning, match="total_steps was 9, is 10"),
        pytest.warns(UserWarning, match="the run used validation data before, and continues without any$"),
    ):
        finetune(model, data, **options, steps=10, resume=True)
    finetune(model, data, **options, steps=10, resume=True)  # nothing is left to do


@pytest.mark.slow
def test_a_run_that_resumes_from_its_start_measures_the_baseline(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Callback):
        def on_fit_start(self, run: Any) -> None:
            raise KeyboardInterrupt

    options = {**QUICK, "sample": ("1+1=",)}
    whole = finetune(model, data, tmp_path / "whole", **options)
    with monkeypatch.context() as within:
        within.setattr(run, "speaks", lambda progress: True)
        within.setattr(run, "TokenProgress", lambda loss: Stop())
        assert not finetune(model, data, tmp_path / "cut", **options).history.steps
    resumed = finetune(model, data, tmp_path / "cut", **options, resume=True)
    assert (resumed.loss_before, resumed.samples) == (whole.loss_before, whole.samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_tokens": "24"}, "micro_tokens was 24, is not set"),
        ({"micro_tokens": -1}, "micro_tokens was -1, is not set"),
        ({"layers": [1]}, "does not state the settings of its layers"),
        ({"layers": {"a": 1}}, "does not state the settings of its layers"),
        ({"layers": {"a": {"compute": ["float32"]}}}, "1 layers had adapters"),
        (None, "does not state its settings"),
    ],
)
def test_a_checkpoint_with_wrong_settings_is_refused(
    model: Path, data: Path, tmp_path: Path, changes: dict[str, Any] | None, message: str
) -> None:
    output = tmp_path / "out"
    finetune(model, data, output, **QUICK)
    with RunDirectory(output) as directory:
        point = directory.latest()
        assert point is not None
        fixed = None if changes is None else point.settings["fixed"] | changes
        settings = point.settings | {"fixed": fixed}
        for _ in range(2):
            directory.save(dataclasses.replace(point, settings=settings))
    with pytest.raises(ValueError, match=message):
        finetune(model, data, output, **QUICK, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(model: Path, data: Path, tmp_path: Path) -> None:
    blame = r"step 2 \(epoch 1\): the loss of batch 2 is nan: the first layer .* is 'model\.layers\.0'"
    with pytest.raises(NonFiniteLossError, match=blame):
        finetune(model, data, tmp_path / "out", **{**QUICK, "lr": 1e30}, schedule="constant")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_diverges_leaves_its_last_good_adapter_and_continues_with_a_lower_lr(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss of step 6 is NaN, and the newest checkpoint before step 5 is of step 3."""
    output, evaluated = tmp_path / "out", tmp_path / "good"
    options = {**QUICK, "epochs": None, "steps": 9, "schedule": "constant", "save_every": 3}
    with monkeypatch.context() as stopped:
        stopped.setattr(run, "speaks", lambda progress: True)
        stopped.setattr(run, "TokenProgress", lambda loss: StopAfter(3))
        finetune(model, data, evaluated, **options)
    real = TokenLoss.forward_backward
    bad = {"calls": 5}

    def forward_backward(self: TokenLoss, *arguments: Any) -> float:
        bad["calls"] -= 1
        return real(self, *arguments) if bad["calls"] >= 0 else math.nan

    line = ["finetune", str(model), "--data", str(data), "--output", str(output), "--rank", "2"]
    line += ["--batch-examples", "4", "--steps", "9", "--schedule", "constant", "--save-every", "3", "--lr"]
    with monkeypatch.context() as diverging:
        diverging.setattr(TokenLoss, "forward_backward", forward_backward)
        assert cli.main([*line, "0.01"]) == 1
    [error] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("nplora: error: ")]
    assert "step 6 (epoch 2): the loss of batch 1 is nan: " in error
    assert "; --resume with a lower --lr continues from step 3; " in error
    assert error.endswith(f"{output} holds the adapter as of step 3")
    assert files_of(output) == files_of(evaluated)
    assert cli.main([*line, "0.01", "--resume"]) == 2
    assert (
        "lower --lr (the optimizer's lr), the run continues from step 3; --overwrite"
        in capsys.readouterr().err
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main([*line, "0.001", "--resume"]) == 0
    printed = capsys.readouterr().err
    assert "nplora: warning: " in printed
    assert "lr was 0.01, is 0.001" in printed
    assert files_of(output) != files_of(evaluated)
    assert [row["step"] for row in steps_of(output)] == list(range(1, 10))
    assert [row["lr"] for row in steps_of(output)] == [0.01] * 3 + [0.001] * 6


class StopAfter(Callback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, record: Any) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


def steps_of(output: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEAD)
def test_progress_that_nobody_reads_ends_no_run(
    kind: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", DEAD[kind])
    report = finetune(model, data, tmp_path / "out", **{**QUICK, "epochs": 1}, progress=True)
    assert (len(report.history.steps), report.history.ended) == (5, "complete")


@pytest.mark.slow
def test_the_adapter_is_saved_before_the_samples_and_the_report(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, output = tmp_path / "plain", tmp_path / "out"
    options = {**QUICK, "epochs": 1}
    finetune(model, data, plain, **options)
    with monkeypatch.context() as within:
        within.setattr(run, "answers_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(model, data, output, **options, sample=("1+1=",))
    assert files_of(output) == files_of(plain)
    with monkeypatch.context() as within:
        within.setattr(FinetuneReport, "__str__", interrupt)
        line = ["finetune", str(model), "--data", str(data), "--output", str(tmp_path / "cli")]
        line += ["--rank", "2", "--lr", "0.01", "--epochs", "1", "--batch-examples", "4"]
        assert cli.main(line) == 130
    assert files_of(tmp_path / "cli") == files_of(plain)


class FailAt(Callback):
    """A callback that does something in one of its hooks."""

    def __init__(self, hook: str, action: Callable[[], Any]) -> None:
        setattr(self, hook, lambda *arguments: action())


def fail() -> None:
    raise ArithmeticError("of a callback")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "error"),
    [
        (fail, ArithmeticError),
        (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
        (lambda: signal.raise_signal(signal.SIGTERM), SystemExit),
    ],
)
def test_the_adapter_is_saved_if_a_callback_fails_or_is_interrupted_after_the_last_step(
    action: Callable[[], None], error: type[BaseException], model: Path, data: Path, tmp_path: Path
) -> None:
    options = {**QUICK, "epochs": 1, "valid": data / "valid.jsonl"}
    finetune(model, data / "train.jsonl", tmp_path / "plain", **options)
    with pytest.raises(error) as raised:
        finetune(
            model, data / "train.jsonl", tmp_path / "out", **options, callbacks=[FailAt("on_fit_end", action)]
        )
    assert raised.value.__notes__[-1] == f"{tmp_path / 'out'} holds the adapter"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


@pytest.mark.slow
def test_ctrl_c_waits_until_the_adapter_is_saved(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **more: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        save_adapter(*arguments, **more)

    options = {**QUICK, "epochs": 1}
    finetune(model, data, tmp_path / "plain", **options)
    monkeypatch.setattr(run, "save_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, tmp_path / "out", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def interrupt(*arguments: Any) -> str:
    raise KeyboardInterrupt


def test_ctrl_c_in_the_samples_before_training_leaves_room_for_the_next_run(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "epochs": 1, "sample": ("1+1=",)}
    with monkeypatch.context() as within:
        within.setattr(baseline, "generate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(model, data, tmp_path / "out", **options)
    assert len(finetune(model, data, tmp_path / "out", **options).history.steps) == 5


def test_an_adapter_that_cannot_be_written_is_written_by_resume(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = {**QUICK, "epochs": 1}
    with monkeypatch.context() as within:
        within.setattr(run, "save_adapter", full)
        with pytest.raises(OSError, match="No space left") as raised:
            finetune(model, data, tmp_path / "out", **options)
    assert raised.value.__notes__ == [
        "the run is saved, but its adapter is not: --resume (resume=True) writes it"
    ]
    assert finetune(model, data, tmp_path / "out", **options, resume=True).was_finished
    finetune(model, data, tmp_path / "whole", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_adapter_that_does_not_fit_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    lm = load_model(model)
    lm.add_lora(rank=3, alpha=5, targets=["q_proj", "down_proj"], layers="last:1", use_rslora=True)
    save_adapter(lm, tmp_path / "adapter")
    fresh = load_model(model)
    attach_adapter(fresh, tmp_path / "adapter")
    assert list(fresh.adapter_layers()) == list(lm.adapter_layers())
    for name, layer in fresh.adapter_layers().items():
        assert (layer.rank, layer.alpha, layer.scale) == (3, 5, lm.adapter_layers()[name].scale)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(FormatError):
        attach_adapter(load_model(model), tmp_path / "adapter")
    with pytest.raises(ValueError, match="already has an adapter, on 2 layers"):
        attach_adapter(fresh, tmp_path / "adapter")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def save_factors(directory: Path, factors: dict[str, tuple[int, ...]], **config: Any) -> Path:
    """An adapter directory with zeros in tensors of these shapes."""
    directory.mkdir()
    safetensors.save(
        directory / "adapter_model.safetensors",
        {name: np.zeros(shape, np.float32) for name, shape in factors.items()},
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


LINEAR = {f"{Q}.lora_A.weight": (2, 32), f"{Q}.lora_B.weight": (32, 2)}


@pytest.mark.parametrize(
    ("factors", "config", "words"),
    [
        (LINEAR, {"r": 65536}, "expected rank 65536"),
        (
            LINEAR | {f"{Q}.lora_A.weight": (2, 31)},
            {},
            "for a weight of shape (32, 31), but the model's layer has shape (32, 32)",
        ),
        (
            {name.replace("model.layers.0.self_attn.", ""): shape for name, shape in LINEAR.items()},
            {},
            "'q_proj': the model has no such layer",
        ),
        ({f"{Q}.lora_A.weight": (2, 32)}, {}, "lora_B.weight' is missing, but the layer's other factor"),
        (
            {f"{Q}.lora_embedding_A": (2, 32), f"{Q}.lora_embedding_B": (32, 2)},
            {},
            "the adapter has an embedding, but the model's layer is a linear layer",
        ),
        (LINEAR, {"use_dora": True}, "lora_magnitude_vector"),
        ({"x": (1,)}, {}, "tensor 'x' is not a LoRA factor of a layer"),
    ],
)
def test_a_model_is_unchanged_after_an_adapter_that_does_not_fit(
    model: Path, tmp_path: Path, factors: dict[str, tuple[int, ...]], config: dict[str, Any], words: str
) -> None:
    lm = load_model(model)
    was = dict(lm.named_modules())
    bad = save_factors(tmp_path / "bad", factors, **config)
    with refused(FormatError, words, bad):
        attach_adapter(lm, bad)
    after = dict(lm.named_modules())
    assert after.keys() == was.keys()
    assert all(after[name] is module for name, module in was.items())
    attach_adapter(lm, save_factors(tmp_path / "good", LINEAR))
    assert list(lm.adapter_layers()) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.slow
def test_a_model_is_unchanged_after_a_run_that_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "out", **QUICK)
    lm = load_model(model)
    with pytest.raises(FileExistsError, match="holds a run"):
        finetune(lm, data, tmp_path / "out", **QUICK)
    assert not lm.adapter_layers()
    finetune(lm, data, tmp_path / "out", **QUICK, overwrite=True)
    for targets in ("all-linear", "lm_head"):
        with pytest.raises(ValueError, match="finetune: the model already has an adapter, on 14 layers"):
            finetune(lm, data, tmp_path / "other", **QUICK, targets=(targets,))


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_fit_start", "on_before_optimizer_step"])
def test_a_model_is_unchanged_after_a_run_that_fails_before_the_end_of_its_first_step(
    hook: str, model: Path, data: Path, tmp_path: Path
) -> None:
    lm, options = load_model(model), {**QUICK, "epochs": 1, "recompute": True}
    was = dict(lm.named_modules())
    with pytest.raises(ArithmeticError, match="of a callback"):
        finetune(lm, data, tmp_path / "out", **options, callbacks=[FailAt(hook, fail)])
    after = dict(lm.named_modules())
    assert after.keys() == was.keys()
    assert all(after[name] is module for name, module in was.items())
    assert not lm.model.recompute
    finetune(lm, data, tmp_path / "out", **options, overwrite=True)
    finetune(load_model(model), data, tmp_path / "plain", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")
    assert not lm.model.recompute

    other = load_model(model)
    with pytest.raises(ValueError, match="rank was 2, is 4"):
        finetune(other, data, tmp_path / "out", **{**options, "rank": 4}, resume=True)
    assert not other.adapter_layers()


def test_a_model_keeps_what_was_trained_before_an_error(model: Path, data: Path, tmp_path: Path) -> None:
    lm = load_model(model)
    with pytest.raises(ArithmeticError, match="of a callback"):
        finetune(lm, data, tmp_path / "out", **QUICK, callbacks=[FailAt("on_epoch_end", fail)])
    trained = [parameter.value for parameter in lm.parameters()]
    assert len(trained) == 28
    assert all(values.any() for values in trained)


@pytest.mark.slow
def test_the_commands_refuse_an_adapter_of_another_model_and_take_it_on_request(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = gguf.open(model)
    tensors = {
        name: 1 + tensor.numpy() if name.endswith("_norm.weight") else tensor for name, tensor in file.items()
    }
    gguf.save(tmp_path / "other.gguf", tensors, file.metadata.typed())
    finetune(model, data, tmp_path / "out", **QUICK)
    where = ["--adapter", str(tmp_path / "out")]
    for line in (
        ["eval", str(tmp_path / "other.gguf"), "--data", str(data), *where],
        ["generate", str(tmp_path / "other.gguf"), "1+1=", "--max-new-tokens", "2", *where],
    ):
        assert cli.main(line) == 2
        assert "out: the adapter belongs to another model" in capsys.readouterr().err
        assert cli.main([*line, "--any-base"]) == 0


def test_an_adapter_that_is_replaced_while_it_is_put_on_is_the_old_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = load_model(model), load_model(model)
    old.add_lora(rank=3, targets="q_proj", seed=1)
    new.add_lora(rank=2, targets="up_proj", seed=2)
    save_adapter(old, tmp_path / "adapter")
    lm = load_model(model)

    def replaced_meanwhile(replaced: Any) -> None:
        save_adapter(new, tmp_path / "adapter")
        type(lm).exchange(lm, replaced)

    monkeypatch.setattr(lm, "exchange", replaced_meanwhile)
    attach_adapter(lm, tmp_path / "adapter")
    assert lm.adapter_layers().keys() == old.adapter_layers().keys()
    for name, value, _ in lm.parameters():
        assert value.tobytes() == next(p.value for p in old.parameters() if p.name == name).tobytes()


@pytest.mark.slow
def test_an_adapter_of_llama_cpp_is_put_on_as_well(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "peft", **QUICK, targets=("all-linear", "embed_tokens", "lm_head"))
    nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "adapter.gguf", model)
    losses = [evaluate(model, data, adapter=tmp_path / name)["loss"] for name in ("peft", "adapter.gguf")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    answers = [
        load_with_adapter(model, tmp_path / name).generate("1+1=", 8) for name in ("peft", "adapter.gguf")
    ]
    assert answers[0] == answers[1]
    lm = load_model(model)
    for content, message in ((b"GGUF", "adapter.gguf"), (model.read_bytes(), "'general.type' is missing")):
        (tmp_path / "adapter.gguf").write_bytes(content)
        with pytest.raises(FormatError, match=message):
            attach_adapter(lm, tmp_path / "adapter.gguf")
    assert not lm.adapter_layers()


def test_an_adapter_of_llama_cpp_is_put_on_a_hugging_face_model(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_models.config()))
    safetensors.save(tmp_path / "model.safetensors", small_models.hf_tensors())
    lm, fresh = load_model(tmp_path), load_model(tmp_path)
    lm.add_lora(rank=2)
    for parameter in lm.parameters():
        parameter.value[...] = rng.standard_normal(parameter.value.shape)
    save_adapter(lm, tmp_path / "peft")
    nplora.adapter_to_gguf(tmp_path / "peft", tmp_path / "adapter.gguf", tmp_path)
    attach_adapter(fresh, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(fresh.logits([1, 2, 3]), lm.logits([1, 2, 3]), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_several_adapters_add_up(model: Path, data: Path, tmp_path: Path) -> None:
    adapters = [tmp_path / "a", tmp_path / "b.gguf"]
    finetune(model, data, tmp_path / "a", **QUICK, targets=("q_proj",))
    finetune(model, data, tmp_path / "b", **QUICK, targets=("q_proj", "up_proj"), seed=1)
    nplora.adapter_to_gguf(tmp_path / "b", adapters[1], model)
    nplora.combine([(adapter, 1) for adapter in adapters], base=model).save(tmp_path / "both")
    both = evaluate(model, data, adapter=tmp_path / "both")["loss"]
    assert evaluate(model, data, adapter=adapters)["loss"] == pytest.approx(both, rel=1e-6)
    assert both != pytest.approx(evaluate(model, data, adapter=adapters[1])["loss"], rel=1e-3)
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    result = json.loads(command("eval", model, "--data", data, "--json", *options).stdout)
    assert result["loss"] == pytest.approx(both, rel=1e-6)
    answer = command("generate", model, "1+1=", "--max-new-tokens", 5, *options).stdout
    assert answer == f"{load_with_adapter(model, tmp_path / 'both').generate('1+1=', 5)}\n"
    with pytest.warns(UserWarning, match=r"a is given 2 times, so its update is added 2 times$"):
        double = evaluate(model, data, adapter=[tmp_path / "a", tmp_path / "." / "data" / ".." / "a"])["loss"]
    nplora.combine([(tmp_path / "a", 2)]).save(tmp_path / "double")
    assert double == pytest.approx(evaluate(model, data, adapter=tmp_path / "double")["loss"], rel=1e-6)
    finetune(model, data, tmp_path / "head", **QUICK, targets=("lm_head",))
    lm = load_model(save_small_llama(tmp_path / "other.gguf", vocab=200))
    words = (
        r"the combined adapter: the adapter does not fit the model in 1 place:\n"
        r"  'lm_head': the adapter is for a weight of shape \(\d+, 32\), "
        r"but the model's layer has shape \(200, 32\)"
    )
    with pytest.raises(FormatError, match=words):
        attach_adapter(lm, [tmp_path / "a", tmp_path / "head"])
    assert not lm.adapter_layers()


@pytest.mark.slow
def test_adapters_have_weights(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    finetune(model, data, tmp_path / "a", **QUICK, targets=("q_proj",))
    finetune(model, data, tmp_path / "b", **QUICK, targets=("q_proj", "up_proj"), seed=1)
    a, b = tmp_path / "a", tmp_path / "b"
    if not systems.IS_WINDOWS:  # a name there holds no colon
        a = a.rename(tmp_path / "a:2")
    plain = evaluate(model, data)["loss"]
    for given, words in (
        ([(a, 0.5), (b, -2.0)], [f"{a}:0.5", f"{b}:-2"]),
        ([(b, 0.25)], [f"{b}:0.25"]),
        ([(a, 1.0)], [str(a)]),  # an existing path, although it ends like a weight
    ):
        nplora.combine(given).save(tmp_path / "sum", overwrite=True)
        wanted = evaluate(model, data, adapter=tmp_path / "sum")["loss"]
        assert wanted != pytest.approx(plain, rel=1e-4)
        assert evaluate(model, data, adapter=given)["loss"] == pytest.approx(wanted, rel=1e-6)
        options = [word for adapter in words for word in ("--adapter", adapter)]
        assert cli.main(["eval", str(model), "--data", str(data), "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match=r"the weight of .* is nan"):
        evaluate(model, data, adapter=[(b, float("nan"))])


@pytest.mark.slow
def test_a_run_continues_from_an_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    options = {**CONTINUE, "lr": 1e-2, "schedule": "constant"}
    start = load_model(model)
    start.add_lora(rank=3, alpha=5, targets="q_proj", use_rslora=True)
    start.add_lora(rank=2, alpha=9, targets="up_proj", layers="last:1", use_rslora=True, init="gaussian")
    save_adapter(start, tmp_path / "start")
    valid = data / "train.jsonl"
    report = finetune(model, data, tmp_path / "out", **options, valid=valid, adapter=str(tmp_path / "start"))
    assert report.loss_before == pytest.approx(evaluate(model, valid, adapter=tmp_path / "start")["loss"])
    assert report.loss_after == pytest.approx(evaluate(model, valid, adapter=tmp_path / "out")["loss"])
    assert report.loss_after < report.loss_before
    trained, before = nplora.read_adapter(tmp_path / "out"), nplora.read_adapter(tmp_path / "start")
    assert list(trained) == list(before)
    for name, delta in trained.items():
        found = (delta.rank, delta.stated_alpha, delta.use_rslora)
        assert found == (before[name].rank, before[name].stated_alpha, True)
        assert not np.array_equal(delta.B, before[name].B)
    again = tmp_path / "again"
    finetune(load_model(model), data, again, **options, valid=valid, adapter=tmp_path / "start")
    assert nplora.read_adapter(tmp_path / "again")[name].A.tobytes() == delta.A.tobytes()
    assert nplora.plan(model, data, **options, adapter=str(tmp_path / "start"))


@pytest.mark.slow
def test_a_run_that_continues_from_an_adapter_resumes_to_the_bit(
    model: Path, data: Path, tmp_path: Path
) -> None:
    finetune(model, data, tmp_path / "start", **QUICK, targets=("q_proj",))
    options: dict[str, Any] = {**CONTINUE, "epochs": None, "adapter": tmp_path / "start", "dropout": 0.25}
    options |= {"schedule": "constant", "save_every": 2}
    finetune(model, data, tmp_path / "whole", **{**options, "steps": 4})
    finetune(model, data, tmp_path / "out", **{**options, "steps": 2})
    with pytest.warns(UserWarning, match="total_steps was 2, is 4"):
        finetune(model, data, tmp_path / "out", **{**options, "steps": 4}, resume=True)
    whole, out = (nplora.read_adapter(tmp_path / name) for name in ("whole", "out"))
    assert all(whole[name].A.tobytes() == out[name].A.tobytes() for name in whole)
    layers = load_with_adapter(model, tmp_path / "out").adapter_layers()
    assert len({layer.dropout_stream for layer in layers.values()}) == len(layers)


def test_a_run_cannot_continue_from_an_adapter_that_does_not_fit(
    model: Path, data: Path, tmp_path: Path
) -> None:
    finetune(model, data, tmp_path / "start", **QUICK, targets=("lm_head",))
    start = tmp_path / "start"
    other = save_small_llama(tmp_path / "other.gguf", vocab=300)
    for target, options, error, words in (
        (model, {"rank": 3}, ValueError, "finetune: rank is decided by the adapter to continue from"),
        (model, {"targets": "q_proj"}, ValueError, "finetune: targets is decided by the adapter"),
        (model, {"adapter": ""}, ValueError, "adapter"),
        (model, {"adapter": tmp_path / "nowhere"}, FileNotFoundError, "nowhere"),
        (other, {}, FormatError, "'lm_head': the adapter is for a weight of shape"),
    ):
        with pytest.raises(error, match=words):
            finetune(target, data, tmp_path / "out", **{**CONTINUE, "adapter": start, **options})
    before = files_of(start)
    with pytest.raises(ValueError, match="is the adapter itself, which is never overwritten"):
        finetune(model, data, start, **CONTINUE, adapter=start, overwrite=True)
    assert files_of(start) == before
    assert not (tmp_path / "out").exists()


def test_compute_is_not_for_a_model_that_is_loaded_already(model: Path, data: Path, tmp_path: Path) -> None:
    lm = load_model(model)
    for call in (
        lambda: finetune(lm, data, tmp_path / "out", compute="bfloat16"),
        lambda: evaluate(lm, data, compute="bfloat16"),
    ):
        with pytest.raises(
            ValueError, match="compute='bfloat16' is given, but the model is loaded already, with 'float32'"
        ):
            call()
    assert evaluate(model, data, compute="bfloat16")["loss"] != evaluate(model, data)["loss"]


def test_a_text_with_tokens_that_the_model_does_not_have_is_refused(data: Path, tmp_path: Path) -> None:
    lm = load_model(save_small_llama(tmp_path / "model.gguf", vocab=200))
    rows = [{"text": "plain"}, {"text": "<tool>"}]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = r"train\.jsonl: the text has token 265 of .*, but the model's vocabulary ends with 199"
    with pytest.raises(FormatError, match=words):
        finetune(lm, data, tmp_path / "out")
    (data / "valid.jsonl").unlink()
    with pytest.raises(FormatError, match=words):
        evaluate(lm, data)
    (data / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    words = (
        "^finetune: sample '<tool>': the prompt has token 265 of .*, "
        "but the model's vocabulary ends with 199$"
    )
    with pytest.raises(ValueError, match=words):
        finetune(lm, data, tmp_path / "out", sample=["<tool>"])
    assert not (tmp_path / "out").exists()


# ---- progress, answers, and adapters in the wrong place ----


def test_a_line_that_is_redrawn_stays_within_the_terminal(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    report = finetune(model, data, tmp_path / "out", **{**QUICK, "epochs": None, "steps": 1})
    assert f", loss {report.history.loss[0]:.4f}\n" in str(report)
    drawn = [line for line in re.split("[\r\n]+", capsys.readouterr().err) if line.startswith("step ")]
    assert drawn
    assert {re.sub(r"[\d.]+", "0", line) for line in drawn} == {"step 0/0, loss 0, 0:0 left"}


def test_a_model_answers_texts_chats_and_lists_of_them(model: Path) -> None:
    lm = load_model(model)
    one = lm.generate("1+1=", 8)
    assert lm.generate(["1+1=", "x"], max_new_tokens=8) == [one, lm.generate("x", 8)]
    chat = [{"role": "user", "content": "1+"}, {"role": "user", "content": "1="}]
    assert lm.generate(chat, 8) == one
    assert lm.generate([chat, "x"], 8) == lm.generate(["1+1=", "x"], 8)
    assert isinstance(one, str)
    assert lm.generate("1+1=", 8, stop=[one[2:4]]) == one[: one.index(one[2:4])]
    assert lm.generate("1+1=", 8, temperature=5.0, seed=1) != one
    assert lm.generate([], 8) == []
    both = lm.generate(["1+1=", "x"], 8)
    several = {"a": "1+1=", "b": "x"}
    for prompts in (several.values(), (prompt for prompt in several.values()), np.array(["1+1=", "x"])):
        assert lm.generate(prompts, 8) == both
    assert lm.generate(iter([chat, tuple(chat)]), 8) == [one, one]
    assert lm.generate(tuple(chat), 8) == one
    with pytest.raises(ValueError, match="top_k is 0"):
        lm.generate("x", top_k=0)


@pytest.mark.slow
def test_an_error_says_where_a_misplaced_adapter_belongs(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(model, data, out, **QUICK)
    with pytest.raises(
        ValueError, match=r"^load_adapter: the LanguageModel has no LoRA layer: call add_lora\(\) first, or"
    ):
        nplora.load_adapter(load_model(model), out)
    tensors = out / "adapter_model.safetensors"
    words = f"{tensors}: this is one file of a PEFT adapter; pass the directory {out}"
    with pytest.raises(FormatError, match=f"^{re.escape(words)}$"):
        load_with_adapter(model, tensors)
    with pytest.raises(
        FileNotFoundError, match=r"holds no config\.json, but an adapter: give the base model"
    ):
        load_model(out)


def test_a_file_to_evaluate_on_is_enough_for_eval(model: Path, data: Path) -> None:
    expected = evaluate(model, data)
    (data / "train.jsonl").unlink()
    assert evaluate(model, data) == expected


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, "step 30/36000, loss 3.0000 (mean of 20 steps), 125 tokens/s (50 trained), MB, 19:59:00 left"),
        (80, "step 30/36000, loss 3.0000, 125 tokens/s (50 trained), MB, 19:59:00 left"),
        (72, "step 30/36000, loss 3.0000, 125 tokens/s (50 trained), 19:59:00 left"),
        (50, "step 30/36000, loss 3.0000, 19:59:00 left"),
        (30, "step 30/36000, loss 3.0000"),
        (10, "step 30/3"),
    ],
)
def test_the_progress_line_fits_its_terminal(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = io.StringIO()
    drawn.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    loss = TokenLoss()
    progress = TokenProgress(loss=loss)
    run = types.SimpleNamespace(total_steps=36_000)
    for step in range(1, 31):
        record = StepRecord(step, 1, 3.0, 100, 1e-3, 1.0, 2.0)
        progress._drawn = -math.inf
        loss.tokens += 250
        progress.on_step_end(run, record)  # type: ignore[arg-type]
    last = drawn.getvalue().rpartition("\r")[2].rstrip()
    assert re.sub(r"\d+ MB", "MB", last) == shown


def test_progress_without_the_loss_shows_the_trained_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    run = types.SimpleNamespace(total_steps=2)
    TokenProgress(0.0).on_step_end(run, StepRecord(1, 1, 3.0, 100, 1e-3, 1.0, 2.0))  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith("step 1/2, loss 3.0000, 50 trained tokens/s, ")


def test_an_adapter_is_a_path_a_pair_or_a_list_of_these(model: Path, tmp_path: Path) -> None:
    lm = load_model(model)
    lm.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(lm, tmp_path / "a")
    pair, ids = (tmp_path / "a", 0.5), [[1, 2, 3]]
    expected = load_with_adapter(model, [pair]).logits(ids)
    assert np.array_equal(load_with_adapter(model, pair).logits(ids), expected)
    assert not np.array_equal(load_with_adapter(model, tmp_path / "a").logits(ids), expected)
    for wrong in ({tmp_path / "a": 0.5}, [(tmp_path / "a", "half")], [3]):
        with pytest.raises(TypeError, match=r"^load_with_adapter: adapter is .*, expected a path, an Ada"):
            load_with_adapter(model, wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_adapter_in_memory_is_taken_as_its_directory_is(model: Path, data: Path, tmp_path: Path) -> None:
    lm = load_model(model)
    lm.add_lora(rank=2, init="gaussian")
    nplora.save_adapter(lm, tmp_path / "a")
    read, ids = nplora.read_adapter(tmp_path / "a"), [[1, 2, 3]]
    for given, same in (
        (read, tmp_path / "a"),
        ((read, 0.5), (tmp_path / "a", 0.5)),
        ([read, (tmp_path / "a", 0.25)], (tmp_path / "a", 1.25)),
    ):
        expected = load_with_adapter(model, same).logits(ids)
        np.testing.assert_allclose(
            load_with_adapter(model, given).logits(ids), expected, rtol=1e-5, atol=1e-6
        )
    assert evaluate(model, data, adapter=read) == evaluate(model, data, adapter=tmp_path / "a")
    options = {"lr": 1e-2, "steps": 2, "batch_examples": 4}
    finetune(model, data, tmp_path / "one", **options, adapter=read)
    finetune(model, data, tmp_path / "other", **options, adapter=tmp_path / "a")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")
    planned = plan(model, data, **options, adapter=read)
    assert planned.memory.factors == 16 * read_size(tmp_path / "a")  # value, gradient and AdamW's two moments
    with pytest.warns(UserWarning, match=r"^evaluate: .*a is given 2 times, so its update is added 2 times$"):
        evaluate(model, data, adapter=[read, read])


def test_evaluate_leaves_the_model_as_it_was(model: Path, data: Path) -> None:
    lm, other = load_model(model), load_model(model)
    for one, seed in ((lm, 1), (other, 2)):
        one.add_lora(rank=2, init="gaussian", seed=seed)
    first, second = map(nplora.adapters.Adapter.from_model, (lm, other))
    plain = load_model(model)
    plain.load_adapter(second, "second")
    loss = evaluate(plain, data)["loss"]
    one = evaluate(plain, data, adapter=first)["loss"]
    assert one == evaluate(lm, data)["loss"] != loss
    assert not plain.adapter_layers()
    plain.set_adapter("second")
    assert evaluate(plain, data, adapter=first)["loss"] == one
    assert evaluate(plain, data)["loss"] == evaluate(other, data)["loss"]
    plain.set_adapter(None)
    assert evaluate(plain, data)["loss"] == loss
    words = r"^evaluate: the model already has an adapter, on 14 layers; expected a model without one$"
    with pytest.raises(ValueError, match=words):
        evaluate(lm, data, adapter=first)


def test_a_weight_may_be_any_real_number(model: Path) -> None:
    lm = load_model(model)
    lm.add_lora(rank=2, init="gaussian")
    adapter = nplora.adapters.Adapter.from_model(lm)
    wanted = load_with_adapter(model, (adapter, 0.5)).logits([1, 2])
    for half in (np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2)):
        assert np.array_equal(load_with_adapter(model, (adapter, half)).logits([1, 2]), wanted)


@pytest.mark.parametrize("empty", [[], ()])
def test_no_adapters_are_refused_in_the_name_of_the_caller(empty: Any, model: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: adapter is .*, expected at least one adapter$"):
        evaluate(model, data, adapter=empty)
    with pytest.raises(ValueError, match=r"^attach_adapter: adapter is .*, expected at least one adapter$"):
        attach_adapter(load_model(model), empty)


def read_size(adapter: Path) -> int:
    """The number of values in the factors of an adapter's directory."""
    return sum(delta.A.size + delta.B.size for delta in nplora.read_adapter(adapter).values())


def test_a_weight_that_is_not_finite_is_refused_in_the_name_of_the_caller(model: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"^evaluate: the weight of out is nan, expected a finite number$"):
        evaluate(model, data, adapter=("out", math.nan))
    with pytest.raises(ValueError, match=r"^load_with_adapter: the weight of out is inf, expected a finite"):
        load_with_adapter(model, [("out", math.inf)])


def test_decoding_in_int8_without_quantised_weights_is_warned_of(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = r"with compute='int8', products with few tokens .* .*model.gguf has no such weights, so decoding"
    with pytest.warns(UserWarning, match=f"^evaluate: {words}") as caught:
        evaluate(model, data, compute="int8")
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match=f"^load_with_adapter: {words}"):
        load_with_adapter(model, compute="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["generate", str(model), "1", "--max-new-tokens", "1", "--compute", "int8"]) == 0
    shown = words.replace("compute='int8'", "--compute int8")
    assert re.search(rf"nplora: warning: load_with_adapter: {shown}", capsys.readouterr().err)
    evaluate(save_small_llama(tmp_path / "low.gguf", "q8_0"), data, compute="int8")  # warns of nothing


@pytest.mark.slow
def test_finetune_and_plan_take_an_adapter_of_another_model_on_request(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = gguf.open(model)
    tensors = {
        name: 1 + tensor.numpy() if name.endswith("_norm.weight") else tensor for name, tensor in file.items()
    }
    other = tmp_path / "other.gguf"
    gguf.save(other, tensors, file.metadata.typed())
    lm = load_model(model)
    lm.add_lora(rank=2)
    save_adapter(lm, tmp_path / "a")
    given = {"steps": 1, "batch_examples": 4, "adapter": tmp_path / "a"}
    for call in (
        lambda **more: finetune(other, data, tmp_path / "out", **given, **more),
        lambda **more: plan(other, data, **given, **more),
    ):
        with pytest.raises(FormatError, match="the adapter belongs to another model"):
            call()
        call(any_base=True)
    line = [str(other), "--data", str(data), "--adapter", str(tmp_path / "a"), "--steps", "1"]
    for command_line in (["plan", *line], ["finetune", *line, "--output", str(tmp_path / "cli")]):
        assert cli.main(command_line) == 2
        assert "--any-base" in capsys.readouterr().err
        assert cli.main([*command_line, "--any-base"]) == 0


@pytest.mark.slow
def test_a_notebook_shows_progress_by_default_in_one_line(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ZMQInteractiveShell:
        """The name that ipykernel's shell has."""

    options = {"steps": 3, "batch_examples": 4}
    finetune(model, data, tmp_path / "script", **options)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(
        sys.modules,
        "IPython",
        types.SimpleNamespace(get_ipython=ZMQInteractiveShell),  # type: ignore[arg-type]
    )
    finetune(model, data, tmp_path / "notebook", **options)
    printed = capsys.readouterr().err
    assert "train.jsonl (completion): 20 examples" in printed
    assert "\rstep 3/3, loss " in printed
    finetune(model, data, tmp_path / "quiet", **options, progress=False)
    assert capsys.readouterr().err == ""


# ---- the word filter ----


@pytest.mark.slow
def test_a_filtered_run_logs_what_it_skips_and_resumes_to_the_bit(
    model: Path, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        **QUICK,
        "batch_examples": 4,
        "schedule": "constant",
        "filter_vocabulary": 0.01,
    }
    del options["epochs"]
    plain = finetune(model, data, tmp_path / "plain", steps=6, **options | {"filter_vocabulary": 0.0})
    lm = load_model(model)
    whole = finetune(lm, data, tmp_path / "whole", steps=6, **options)
    assert lm.model.word_filter is None
    assert whole.history.loss[0] == plain.history.loss[0]
    assert whole.history.loss[-1] == pytest.approx(plain.history.loss[-1], rel=0.05)
    assert whole.history.loss != plain.history.loss
    skipped = [row.metrics["skipped_probability"] for row in whole.history.steps]
    assert all(0 < value < 0.9 for value in skipped)
    finetune(model, data, tmp_path / "parts", steps=2, **options)
    with pytest.warns(UserWarning, match="total_steps was 2, is 6"):
        finetune(model, data, tmp_path / "parts", steps=6, resume=True, **options)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_a_wrong_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="finetune: filter_vocabulary is 1"):
        FinetuneOptions(filter_vocabulary=1)
