"""Training with compute="int8": gradients near those of float32, and runs that resume in int8 alone."""

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from kept_weights import KeptWeights
from nplora import _core
from nplora.finetuning import TokenLoss, finetune
from nplora.finetuning.objectives import PackedLoss
from nplora.finetuning.planning import choice, speed
from nplora.finetuning.planning.memory import ProductMethod
from nplora.models import decoder, head
from nplora.models.packing import pack
from nplora.nn import stack_backward
from nplora.trainer.run_directory import RunDirectory
from small_llama import save_small_llama


@pytest.fixture(scope="module", params=["float32", "q8_0"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "model.gguf"
    return save_small_llama(path, request.param)


def gradient(lm: nplora.LanguageModel, **options: Any) -> tuple[float, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    batch = pack([(ids, ids) for ids in rng.integers(1, 250, (4, 40))])
    lm.add_lora(rank=4, seed=1, **options)
    for layer in lm.adapter_layers().values():  # as after some steps, so that dB is not zero
        layer.A[...] = 0.02 * rng.standard_normal(layer.A.shape, np.float32)
    loss = lm.forward_backward(batch, 1 / batch.num_targets) / batch.num_targets
    return loss, np.concatenate([p.grad.ravel() for p in lm.parameters()])


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("storage", ["float32", "q8_0"])
def test_gradients_point_where_those_of_float32_point(storage: str, tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf", storage)
    loss, exact = gradient(nplora.load_model(path))
    loss_int8, int8 = gradient(nplora.load_model(path, compute="int8"))
    assert loss_int8 == pytest.approx(loss, rel=3e-3)
    assert loss_int8 != loss
    assert cosine(int8, exact) > 0.98


def test_a_head_in_int8_rounds_stochastically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_small_llama(tmp_path / "model.gguf", vocab=3000)
    _, exact = gradient(nplora.load_model(path))

    def with_head(in_int8: bool) -> np.ndarray[Any, Any]:
        lm = nplora.load_model(path, compute="int8")
        lm.model.int8_head = in_int8
        return gradient(lm)[1]

    dithered = with_head(True)
    assert cosine(dithered, exact) > 0.975
    assert np.array_equal(dithered, with_head(True))
    assert not np.array_equal(dithered, with_head(False))
    keys = []

    def to_nearest(*args: Any, dither_key: int | None = None, **more: Any) -> Any:
        keys.append(dither_key)
        return stack_backward(*args, **more)

    monkeypatch.setattr(head, "stack_backward", to_nearest)
    assert not np.array_equal(dithered, with_head(True))
    assert None not in keys
    with_head(False)
    assert keys[-1] is None


@pytest.mark.parametrize(
    "options",
    [{}, {"targets": ("q_proj", "lm_head")}, {"modules_to_save": "lm_head"}, {"add_tokens": ["new"]}],
)
def test_the_gradient_of_the_logits_is_not_rounded_to_int8(model: Path, options: dict[str, Any]) -> None:
    """Each kind of head computes the gradient of its input in bfloat16."""
    results = []
    for compute in ("int8", "bfloat16"):
        lm = nplora.load_model(model, compute=compute)
        lm.add_lora(rank=2, seed=1, **options)
        rng = np.random.default_rng(0)
        x = rng.standard_normal((30, lm.config.hidden_size), np.float32)
        logits, saved = head.logits_forward(lm.lm_head, x)
        results.append(head.logits_backward(lm.lm_head, rng.standard_normal(logits.shape, np.float32), saved))
    assert np.array_equal(*results)


@pytest.mark.parametrize("head", ["off", "forward", "on"])
def test_a_run_computes_the_head_as_its_option_says(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """The first loss of the run is that of a model whose head is switched by hand."""
    losses = {}
    for compute, is_exact in (("int8", False), ("int8", True), ("bfloat16", True)):
        lm = nplora.load_model(model, compute=compute)
        lm.lm_head.int8 = not is_exact
        lm.add_lora(rank=4, seed=0)
        dataset = nplora.data.read_dataset(ROWS, lm.tokenizer)
        batch, _ = next(nplora.data.TokenBatches(dataset, batch_examples=4).epoch(0))
        losses[compute, is_exact] = lm.forward_backward(batch, 1.0) / batch.num_targets
    assert len(set(losses.values())) == 3
    report = finetune(model, ROWS, tmp_path / "run", compute="int8", int8_head=head, steps=1, **SHORT)
    assert report.history.loss[0] == pytest.approx(losses["int8", head == "off"], rel=1e-7)


def test_an_evaluation_computes_as_decoding_and_a_validation_whole_sequences(tmp_path: Path) -> None:
    path = save_small_llama(tmp_path / "model.gguf", "q8_0")
    int8, bfloat16 = (nplora.load_model(path, compute=compute) for compute in ("int8", "bfloat16"))
    batch = pack([(ids, ids) for ids in np.random.default_rng(0).integers(1, 250, (4, 40))])
    assert TokenLoss().evaluate(int8, batch, None) == bfloat16.loss_packed(batch)
    assert int8.loss_packed(batch) != bfloat16.loss_packed(batch)


@pytest.mark.slow
def test_a_run_in_int8_learns_as_in_bfloat16_and_resumes_with_the_same_bits(
    model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    lines = ({"prompt": f"{i} ", "completion": "abc" * (1 + i % 3)} for i in range(12))
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"rank": 4, "lr": 1e-2, "batch_examples": 4, "seed": 3, "save_every": 2, "schedule": "constant"}

    def losses(name: str, compute: str, **more: Any) -> list[float]:
        finetune(model, data, tmp_path / name, compute=compute, progress=False, **options, **more)
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [row["loss"] for row in log if row.get("loss") is not None]

    whole = losses("whole", "int8", steps=8)
    assert np.mean(whole[-3:]) < 0.9 * whole[0]
    assert whole == pytest.approx(losses("bfloat16", "bfloat16", steps=8), rel=0.03)
    losses("stopped", "int8", steps=4)
    with pytest.raises(ValueError, match=r"compute was int8, is bfloat16"):
        losses("stopped", "bfloat16", steps=8, resume=True)
    with pytest.warns(UserWarning, match="total_steps was 4, is 8"):
        losses("stopped", "int8", steps=8, resume=True)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_head_in_int8_is_an_option_that_a_run_keeps(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{i} ", "completion": "abc" * 3}) + "\n" for i in range(12))
    )
    options: dict[str, Any] = {"rank": 4, "lr": 1e-2, "batch_examples": 4, "seed": 3, "schedule": "constant"}

    def adapter(name: str, model: Any = model, **more: Any) -> bytes:
        report = finetune(model, data, tmp_path / name, progress=False, **options, **more)
        return (report.output / "adapter_model.safetensors").read_bytes()

    words = ("on", "forward", "off")
    on, forward, off = whole = [adapter(word, compute="int8", int8_head=word, steps=4) for word in words]
    assert len(set(whole)) == 3
    loaded = nplora.load_model(model, compute="int8")
    loaded.model.int8_head = True
    assert adapter("loaded", loaded, steps=4) == on  # "auto" is what the model says
    loaded = nplora.load_model(model, compute="int8")
    loaded.model.int8_head = True
    assert adapter("loaded_forward", loaded, int8_head="forward", steps=4) == forward
    loaded = nplora.load_model(model, compute="int8")
    assert adapter("loaded_off", loaded, int8_head="off", steps=4) == off
    assert loaded.lm_head.int8
    for name, other, expected in (("on", "off", on), ("forward", "on", forward), ("off", "forward", off)):
        adapter(f"stopped_{name}", compute="int8", int8_head=name, steps=2)
        with pytest.raises(ValueError, match="int8_head"):
            adapter(f"stopped_{name}", compute="int8", int8_head=other, steps=4, resume=True)
        with pytest.warns(UserWarning, match="total_steps"):
            assert adapter(f"stopped_{name}", steps=4, resume=True) == expected  # keeps both choices


@pytest.fixture
def int8_run(model: Path, tmp_path: Path) -> Path:
    """The directory of a run in int8 that made two steps."""
    finetune(model, ROWS, tmp_path / "run", compute="int8", steps=2, **SHORT)
    return tmp_path / "run"


@pytest.mark.usefixtures("repeatable_plans")
@pytest.mark.parametrize("options", [{}, {"layers": "last:1"}, {"layers": "first:1"}, {"memory": "1G"}])
def test_a_run_that_keeps_weights_in_int8_trains_the_same_adapter(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapters = []
    for keeps in (False, True):
        lm = nplora.load_model(model, compute="int8")
        options |= {"keep_int8": keeps, "steps": 2, "batch_examples": 4, "rank": 4}
        callback = KeptWeights()
        planned = nplora.plan(lm, ROWS, **options)
        out = tmp_path / str(keeps)
        report = finetune(lm, ROWS, out, callbacks=[callback], progress=False, **options)
        adapters.append((report.output / "adapter_model.safetensors").read_bytes())
        assert callback.nbytes == 2 * [planned.memory.codes]
        assert bool(planned.memory.codes) == planned.chosen.keep_int8
        assert keeps <= planned.chosen.keep_int8
        assert not any(weight.keeps_int8 for weight in decoder.frozen_weights([lm]))  # after the run
    assert adapters[0] == adapters[1]


def test_a_run_that_is_stopped_while_it_converts_weights_leaves_the_model_as_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = nplora.load_model(model, compute="int8")
    before = lm.lm_head.int8, lm.model.recompute, lm.model.int8_head, lm.model.prefix
    usual = nplora.FrozenWeight.keep_int8

    def stopped(weight: nplora.FrozenWeight) -> None:
        if any(other.keeps_int8 for other in decoder.frozen_weights([lm])):
            raise KeyboardInterrupt
        usual(weight)

    monkeypatch.setattr(nplora.FrozenWeight, "keep_int8", stopped)
    options: dict[str, Any] = {"keep_int8": True, "recompute": True, "int8_head": "off"}
    with pytest.raises(KeyboardInterrupt):
        finetune(lm, ROWS, tmp_path / "out", layers="last:1", keep_prefix="memory", **options, **SHORT)
    assert (lm.lm_head.int8, lm.model.recompute, lm.model.int8_head, lm.model.prefix) == before
    assert not any(weight.keeps_int8 for weight in decoder.frozen_weights([lm]))


def test_a_finished_run_does_not_convert_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted, usual = list[nplora.FrozenWeight](), nplora.FrozenWeight.keep_int8

    def keep_int8(weight: nplora.FrozenWeight) -> None:
        converted.append(weight)
        usual(weight)

    monkeypatch.setattr(nplora.FrozenWeight, "keep_int8", keep_int8)
    options: dict[str, Any] = {"compute": "int8", "keep_int8": True, "epochs": 1}
    finetune(model, ROWS, tmp_path / "run", **options, **SHORT)
    assert converted
    converted.clear()
    finetune(model, ROWS, tmp_path / "run", resume=True, **options, **SHORT)
    assert not converted


def test_a_resumed_run_may_keep_weights_or_not(model: Path, tmp_path: Path) -> None:
    adapters = []
    for name, keeps in (("never", (False, False)), ("later", (False, True)), ("first", (True, False))):
        for steps, keep in zip((2, 4), keeps, strict=True):
            options = {"compute": "int8", "keep_int8": keep, "steps": steps, "resume": steps == 4}
            with warnings.catch_warnings(action="ignore"):  # the number of steps has changed
                report = finetune(model, ROWS, tmp_path / name, **options, **SHORT)
        adapters.append((report.output / "adapter_model.safetensors").read_bytes())
    assert len(set(adapters)) == 1


@pytest.mark.parametrize("compute", ["bfloat16", None])
def test_codes_are_kept_only_with_int8(model: Path, tmp_path: Path, compute: str | None) -> None:
    words = f"finetune: keep_int8 needs compute='int8', but compute is '{compute or 'float32'}'"
    with pytest.raises(ValueError, match=words):
        finetune(model, ROWS, tmp_path / "out", compute=compute, keep_int8=True, **SHORT)
    assert not (tmp_path / "out").exists()


ROWS = [{"prompt": f"{i} ", "completion": "abc" * 3} for i in range(12)]
SHORT: dict[str, Any] = {"rank": 4, "batch_examples": 4, "progress": False, "schedule": "constant"}


def settings(run: Path) -> dict[str, Any]:
    with RunDirectory(run) as directory:
        assert directory.newest is not None
        fixed: dict[str, Any] = directory.newest.settings["fixed"]
    return fixed


@pytest.mark.slow
@pytest.mark.parametrize("in_int8", [True, False])
def test_a_run_that_does_not_state_its_head_resumes_as_it_began(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_int8: bool
) -> None:
    """Runs that are older than the option computed the head as the processor prefers."""
    monkeypatch.setattr(decoder, "has_bfloat16_instructions", lambda: not in_int8)
    finetune(model, ROWS, tmp_path / "whole", compute="int8", steps=4, **SHORT)
    assert settings(tmp_path / "whole")["int8_head"] == ("on" if in_int8 else "forward")
    with monkeypatch.context() as older:
        older.setattr(PackedLoss, "settings", lambda _: {})
        finetune(model, ROWS, tmp_path / "older", compute="int8", steps=2, **SHORT)
    assert "int8_head" not in settings(tmp_path / "older")
    with pytest.raises(ValueError, match="int8_head='on' is given, but the checkpoint"):
        finetune(model, ROWS, tmp_path / "older", steps=4, int8_head="on", resume=True, **SHORT)
    with pytest.warns(UserWarning, match="total_steps"):
        finetune(model, ROWS, tmp_path / "older", steps=4, resume=True, **SHORT)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "older")]
    assert files[0] == files[1]
    assert settings(tmp_path / "older")["int8_head"] == ("on" if in_int8 else "forward")


@pytest.mark.parametrize(("is_on", "word"), [(False, "forward"), (True, "on")])
def test_a_run_that_states_its_head_as_yes_or_no_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on: bool, word: str
) -> None:
    """Early runs in int8 stored whether the backward pass of the head was in int8."""
    usual = PackedLoss.settings
    with monkeypatch.context() as older:
        older.setattr(PackedLoss, "settings", lambda loss: {**usual(loss), "int8_head": is_on})
        finetune(model, ROWS, tmp_path / "run", compute="int8", int8_head=word, steps=1, **SHORT)
    assert f'"int8_head":{json.dumps(is_on)}' in (tmp_path / "run" / "log.jsonl").read_text()
    options = {**SHORT, "steps": 2, "resume": True}
    advice = f"to continue, use the run's earlier settings: int8_head='{word}'; "
    with pytest.raises(ValueError, match=f"int8_head was {word}, is off; {advice}"):
        finetune(model, ROWS, tmp_path / "run", int8_head="off", **options)
    for steps, given in ((2, {}), (3, {"int8_head": word})):
        with pytest.warns(UserWarning, match="total_steps"):
            finetune(model, ROWS, tmp_path / "run", **{**options, **given, "steps": steps})
        assert settings(tmp_path / "run")["int8_head"] == word


@pytest.mark.slow
def test_a_model_in_float32_does_not_resume_a_run_in_int8(model: Path, int8_run: Path) -> None:
    with pytest.raises(ValueError, match="compute was int8, is float32"):
        finetune(nplora.load_model(model), ROWS, int8_run, steps=4, resume=True, **SHORT)
    with pytest.raises(ValueError, match="compute was int8, is float32"):
        finetune(model, ROWS, int8_run, steps=4, compute="float32", resume=True, **SHORT)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"compute": "bfloat16"}, "compute was int8, is bfloat16 in 14 layers"),
        ({"compute": "int8", "int8_head": "off"}, "int8_head was {head}, is off"),
    ],
)
def test_a_run_continues_in_another_arithmetic_if_this_is_asked_for(
    model: Path, int8_run: Path, options: dict[str, Any], changed: str
) -> None:
    changed = changed.format(head=settings(int8_run)["int8_head"])
    options = {**SHORT, **options, "steps": 4, "resume": True}
    with pytest.raises(
        ValueError, match=f"{changed}; to continue, .*; --change-compute .change_compute=True. continues"
    ):
        finetune(model, ROWS, int8_run, **options)
    with (
        pytest.warns(UserWarning, match="total_steps"),
        pytest.warns(UserWarning, match=f"continues in another arithmetic: {changed}$"),
    ):
        report = finetune(model, ROWS, int8_run, change_compute=True, **options)
    assert len(report.history.steps) == 4
    log = [json.loads(line) for line in (int8_run / "log.jsonl").read_text().splitlines()]
    assert [row.get("changed") for row in log if row["event"] == "resume"] == [changed]
    with pytest.warns(UserWarning, match="total_steps"):  # the new arithmetic is that of the run from now on
        finetune(model, ROWS, int8_run, **{**options, "steps": 5})


def test_a_finished_run_does_not_change_its_arithmetic(model: Path, int8_run: Path) -> None:
    options = {**SHORT, "compute": "bfloat16", "steps": 2, "resume": True, "change_compute": True}
    before = (int8_run / "log.jsonl").read_text()
    finetune(model, ROWS, int8_run, **options)  # without a warning
    added = (int8_run / "log.jsonl").read_text().removeprefix(before)
    assert "changed" not in added
    finetune(model, ROWS, int8_run, steps=2, resume=True, **SHORT)
    assert {row["compute"] for row in settings(int8_run)["layers"].values()} == {"int8"}


@pytest.mark.parametrize("head", ["off", "on"])
def test_a_change_of_the_arithmetic_chooses_the_head_as_in_a_new_run(
    model: Path, tmp_path: Path, head: str
) -> None:
    finetune(model, ROWS, tmp_path / "run", compute="int8", int8_head=head, steps=1, **SHORT)
    chosen = "forward" if decoder.has_bfloat16_instructions() else "on"
    options = {**SHORT, "compute": "int8", "steps": 2, "resume": True, "change_compute": True}
    changed = contextlib.nullcontext()
    if head != chosen:
        changed = pytest.warns(UserWarning, match=f"int8_head was {head}, is {chosen}")
    with pytest.warns(UserWarning, match="total_steps was 1, is 2"), changed:
        finetune(model, ROWS, tmp_path / "run", int8_head="auto", **options)
    assert settings(tmp_path / "run")["int8_head"] == chosen


def test_another_change_is_refused_even_if_the_arithmetic_may_change(model: Path, int8_run: Path) -> None:
    options = {**SHORT, "compute": "bfloat16", "batch_examples": 3, "steps": 4, "resume": True}
    changed, advice = "batch_examples was 4, is 3", "to continue, use the run's earlier settings"
    with pytest.raises(ValueError, match=f"{changed}; {advice}: batch_examples=4; --overwrite"):
        finetune(model, ROWS, int8_run, change_compute=True, **options)
    changed += ", compute was int8, is bfloat16 in 14 layers"
    with pytest.raises(ValueError, match=f"{changed}; {advice}: batch_examples=4 and compute='int8'; "):
        finetune(model, ROWS, int8_run, **options)
    with pytest.warns(UserWarning, match="total_steps"):
        finetune(model, ROWS, int8_run, **{**options, "batch_examples": 4, "compute": "int8"})


def test_advice_covers_the_head_of_a_run_that_began_in_bfloat16(model: Path, tmp_path: Path) -> None:
    options = {**SHORT, "steps": 2, "resume": True}
    finetune(model, ROWS, tmp_path / "run", compute="bfloat16", **{**SHORT, "steps": 1})
    with pytest.raises(ValueError, match="earlier settings: compute='bfloat16' and no int8_head; "):
        finetune(model, ROWS, tmp_path / "run", compute="int8", int8_head="on", **options)


@pytest.mark.parametrize("pattern_first", [True, False])
def test_no_advice_is_given_about_a_setting_from_a_pattern(
    model: Path, tmp_path: Path, pattern_first: bool
) -> None:
    options = [{}, {"rank_pattern": {"q_proj": 2}}]
    first, second = reversed(options) if pattern_first else options
    finetune(model, ROWS, tmp_path / "run", steps=1, **SHORT, **first)
    ranks = "rank was 2, is 4" if pattern_first else "rank was 4, is 2"
    with pytest.raises(ValueError, match=f"{ranks} in 2 layers; --overwrite"):
        finetune(model, ROWS, tmp_path / "run", steps=2, resume=True, **SHORT, **second)


def test_the_arithmetic_of_a_new_run_cannot_change(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finetune: change_compute=True needs resume=True"):
        finetune(model, ROWS, tmp_path / "run", change_compute=True, **SHORT)
    trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1))
    with pytest.raises(ValueError, match="fit: change_compute=True needs resume=True"):
        trainer.fit(np.eye(4), np.eye(4), checkpoint_dir=tmp_path / "run", change_compute=True)


@pytest.mark.slow
def test_a_filter_of_words_does_not_resume_a_run_with_its_head_in_int8(model: Path, tmp_path: Path) -> None:
    finetune(model, ROWS, tmp_path / "run", compute="int8", int8_head="on", steps=2, **SHORT)
    with pytest.raises(ValueError, match=r"filter_vocabulary was not set, is 0\.001"):
        finetune(model, ROWS, tmp_path / "run", filter_vocabulary=1e-3, steps=4, resume=True, **SHORT)


def test_a_processor_without_vector_instructions_is_warned_of(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**_core.config(), "isa": "generic"}
    monkeypatch.setattr(_core, "config", lambda: here)
    with pytest.warns(UserWarning, match="compute='int8' is about 8 times slower than 'float32' here"):
        nplora.plan(model, ROWS, compute="int8", rank=4, batch_examples=4)


HEADS_WITHOUT_INT8: list[dict[str, Any]] = [
    {"filter_vocabulary": 1e-3},
    {"trainable_tokens": "5,6"},
    {"add_tokens": ["3 "]},
    {"modules_to_save": "lm_head"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", HEADS_WITHOUT_INT8)
def test_a_run_whose_head_is_not_in_int8_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(decoder, "has_bfloat16_instructions", lambda: False)
    timed = list[str]()

    def measured(lm: nplora.LanguageModel, methods: tuple[ProductMethod, ...], int8_head: str) -> Any:
        timed.append(int8_head)
        return speed.measured(lm, methods, int8_head)

    monkeypatch.setattr(choice, "measured", measured)
    nplora.plan(model, ROWS, compute="int8", rank=4, batch_examples=4, **options)
    finetune(model, ROWS, tmp_path / "run", compute="int8", steps=1, **SHORT, **options)
    assert settings(tmp_path / "run")["int8_head"] == "forward"
    assert timed == ["forward"]
    with pytest.raises(ValueError, match=rf"plan: int8_head='on' .*{next(iter(options))}.* "):
        nplora.plan(model, ROWS, compute="int8", int8_head="on", rank=4, batch_examples=4, **options)
    with pytest.raises(ValueError, match=r"finetune: int8_head='on' .*"):
        finetune(model, ROWS, tmp_path / "on", compute="int8", int8_head="on", **SHORT, **options)


def test_an_adapter_that_trains_the_head_has_no_head_in_int8(model: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"compute": "int8", "steps": 1, "batch_examples": 4, "progress": False}
    finetune(model, ROWS, tmp_path / "run", rank=4, modules_to_save="lm_head", **more)
    with pytest.raises(
        ValueError, match=r"int8_head='on' needs .*; the adapter to continue from trains rows"
    ):
        finetune(model, ROWS, tmp_path / "on", adapter=tmp_path / "run", int8_head="on", **more)


def test_an_embedding_that_is_trained_beside_another_head_leaves_it_in_int8(
    model: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"compute": "int8", "int8_head": "on", "modules_to_save": "embed_tokens"}
    if nplora.load_model(model).ties_head:
        with pytest.raises(ValueError, match="int8_head='on' needs a head without trained rows"):
            finetune(model, ROWS, tmp_path / "run", steps=1, **SHORT, **options)
        return
    finetune(model, ROWS, tmp_path / "run", steps=1, **SHORT, **options)
    assert settings(tmp_path / "run")["int8_head"] == "on"


@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_the_head_in_int8_needs_int8(model: Path, tmp_path: Path, compute: str | None) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match="finetune: int8_head='on' needs compute='int8', but compute is"):
        finetune(model, rows, tmp_path / "out", compute=compute, int8_head="on", progress=False)
