"""Int8Check: the errors of int8 in a sample's loss and gradients, and the return of parts to bfloat16."""

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nplora
import small_llama
from nplora.distributed.communicator import Alone
from nplora.finetuning import finetune, int8_check
from nplora.finetuning.int8_check import Comparison, Errors, Int8Check
from nplora.models.packing import pack
from nplora.nn.int8 import Int8Layer
from nplora.nn.product_errors import int8_layers
from nplora.trainer import Callback
from small_llama import save_small_llama

BATCH = pack([(ids, ids) for ids in np.random.default_rng(0).integers(1, 250, (4, 40))])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_small_llama(tmp_path / "model.gguf", "q8_0")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = ({"prompt": f"{i} ", "completion": "abc" * (1 + i % 3)} for i in range(12))
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def with_adapter(path: Path, compute: str, dropout: float = 0.0) -> nplora.LanguageModel:
    lm = nplora.load_model(path, compute=compute)
    lm.add_lora(rank=4, dropout=dropout, seed=1)
    rng = np.random.default_rng(2)
    for layer in lm.adapter_layers().values():  # as after some steps, so that dB is not zero
        layer.A[...] = 0.02 * rng.standard_normal(layer.A.shape, np.float32)
    return lm


def add_gradient(lm: nplora.LanguageModel) -> float:
    return lm.forward_backward(BATCH, 1 / BATCH.num_targets) / BATCH.num_targets


def gradients(lm: nplora.LanguageModel) -> dict[str, Any]:
    lm.zero_grad()
    add_gradient(lm)
    return {p.name: p.grad.copy() for p in lm.parameters()}


def errors(lm: nplora.LanguageModel, add: Any = None) -> Errors:
    return Comparison(lm, add or (lambda: add_gradient(lm))).measure()


def test_errors_are_those_of_models_that_compute_in_int8_and_in_bfloat16(path: Path) -> None:
    found = errors(with_adapter(path, "int8"))
    models = [with_adapter(path, compute) for compute in ("int8", "bfloat16")]
    int8, exact = (gradients(lm) for lm in models)
    for part, cosine in [("", found.cosine), *found.parts.items()]:
        a, b = (
            np.concatenate([g[name].ravel() for name in g if name.startswith(part)]).astype(np.float64)
            for g in (int8, exact)
        )
        assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
        assert cosine < 0.99999
    assert len(found.parts) > 1
    losses = [add_gradient(lm) for lm in models]
    assert found.loss == pytest.approx(losses[0] - losses[1], abs=1e-9)
    assert found.loss


def test_many_values_are_compared_by_a_sample(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = with_adapter(path, "int8")
    exact = errors(lm)
    monkeypatch.setattr(int8_check, "COMPARED", lm.num_trainable // 3)
    sampled = errors(lm)
    assert sampled.cosine != exact.cosine
    assert sampled.cosine == pytest.approx(exact.cosine, abs=0.01)
    assert sampled.parts.keys() == exact.parts.keys()


def test_a_sample_has_values_of_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nplora.LoRALinear(np.ones((16, 576)), rank=16)
    monkeypatch.setattr(int8_check, "COMPARED", layer.num_trainable // 3 + 1)  # every third value, or fewer
    signs = np.where(np.arange(576) % 3, -1, 1)
    calls = iter((signs, 1))

    def wrong_in_most_columns() -> float:
        layer.dB[...] = next(calls)
        return 0.0

    assert Comparison(layer, wrong_in_most_columns).measure().cosine < 0


def test_a_comparison_leaves_gradients_and_dropout_alone(path: Path) -> None:
    plain, compared = (with_adapter(path, "int8", dropout=0.5) for _ in range(2))
    for lm in (plain, compared):
        lm.forward_backward(BATCH, 1.0)
    errors(compared)
    for lm in (plain, compared):
        lm.forward_backward(BATCH, 1.0)
    for p, q in zip(plain.parameters(), compared.parameters(), strict=True):
        assert np.array_equal(p.grad, q.grad)


class RunOfSteps:
    """What `Int8Check` uses of a run that is alone and has no log."""

    def __init__(self, step: int = 1) -> None:
        self.step, self.ranks, self.rows = step, Alone(), list[dict[str, Any]]()

    def log(self, event: str, row: dict[str, Any]) -> None:
        self.rows.append(row)


def compared(lm: nplora.LanguageModel, **options: Any) -> tuple[list[str], list[str], int]:
    """Make one comparison. Return the lines, the parts in bfloat16, and the number of gradients."""
    said, run, count = list[str](), RunOfSteps(), list[int]()

    def counted() -> float:
        count.append(1)
        return add_gradient(lm)

    Int8Check(lm, counted, said.append, **options).on_step_end(run, None)  # type: ignore[arg-type]
    return said, run.rows[0]["in_bfloat16"], len(count)


def outlier(tmp_path: Path, part: str) -> Path:
    """A model with a column of large weights for a channel of small values, in the head or in the last MLP.

    In int8, a row of weights has one scale. So the large weight leaves all other weights of its row inexact.
    """
    weights, norm, size = (
        (["output"], "output_norm", 2000)
        if part == "lm_head"
        else (["blk.1.ffn_gate", "blk.1.ffn_up"], "blk.1.ffn_norm", 300)
    )

    def edit(tensors: dict[str, Any]) -> None:
        for name in weights:
            tensors[f"{name}.weight"][:, 0] = size
        tensors[f"{norm}.weight"][0] = 1e-4

    return save_small_llama(tmp_path / "outlier.gguf", edit=edit)


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1"])
def test_only_the_part_that_causes_the_errors_returns_to_bfloat16(tmp_path: Path, part: str) -> None:
    """With the outlier in a frozen head, all cosines are high, but the loss is wrong."""
    lm = with_adapter(outlier(tmp_path, part), "int8")
    before = errors(lm)
    said, parts, _ = compared(lm)
    assert parts == [part]
    assert f"these parts compute in bfloat16: {part}. With this change, " in said[0]
    assert {int8_check.part_of(name) for name, each in int8_layers(lm) if not each.int8} == {part}
    after = errors(lm)
    assert min(after.parts.values()) > max(0.95, min(before.parts.values()))
    assert abs(after.loss) < 0.02
    if part == "lm_head":
        assert min(before.parts.values()) > 0.95
        assert abs(before.loss) > 0.1


BLOCKS = 6


def with_outliers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[int]) -> Path:
    """A model of six blocks. In the MLPs of `blocks`, W has a column of large weights, as in `outlier`."""
    monkeypatch.setattr(small_llama, "BLOCKS", BLOCKS)

    def edit(tensors: dict[str, Any]) -> None:
        for block in blocks:
            tensors[f"blk.{block}.ffn_gate.weight"][:, 0] = 300
            tensors[f"blk.{block}.ffn_up.weight"][:, 0] = 300
            tensors[f"blk.{block}.ffn_norm.weight"][0] = 1e-4

    return save_small_llama(tmp_path / "outliers.gguf", edit=edit)


def with_first_block_trained(path: Path) -> nplora.LanguageModel:
    lm = nplora.load_model(path, compute="int8")
    lm.add_lora(rank=4, seed=1, layers=[0])
    for layer in lm.adapter_layers().values():
        layer.A[...] = 0.02 * np.random.default_rng(2).standard_normal(layer.A.shape)
    return lm


@pytest.mark.parametrize("block", [2, 3])
def test_a_frozen_block_above_the_adapter_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """The block has no gradient of its own. Only the gradients of block 0 are wrong."""
    lm = with_first_block_trained(with_outliers(tmp_path, monkeypatch, [block]))
    assert errors(lm).cosine < 0.9
    assert compared(lm)[1] == [f"model.layers.{block}"]
    assert errors(lm).cosine > 0.99


def test_more_parts_are_tried_if_the_first_do_not_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors of the products are hidden, so block 3 is not among the first candidates."""
    lm = with_first_block_trained(with_outliers(tmp_path, monkeypatch, [3]))
    exact = SimpleNamespace(measured=0.0, bound=0.0)
    monkeypatch.setattr(nplora.FrozenWeight, "int8_error", lambda *_: exact)
    _, parts, count = compared(lm)
    assert parts == ["model.layers.3"]
    assert count <= 2 + int8_check.MOST_TRIALS


@pytest.mark.parametrize("blocks", [[1, 4], [0, 2, 4]])
def test_only_the_blocks_with_outliers_are_switched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[int]
) -> None:
    lm = with_adapter(with_outliers(tmp_path, monkeypatch, blocks), "int8")
    _, parts, count = compared(lm)
    assert sorted(parts) == [f"model.layers.{block}" for block in blocks]
    assert count <= 2 + int8_check.MOST_TRIALS
    assert errors(lm).cosine > 0.99


def test_inexact_blocks_that_do_no_harm_return_to_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All suspects are switched together. Those that the gradients do not need go back."""
    monkeypatch.setattr(int8_check, "LARGEST_PRODUCT_ERROR", 0.0)  # every part is a suspect
    blocks = [1, 4]
    lm = with_adapter(with_outliers(tmp_path, monkeypatch, blocks), "int8")
    _, parts, count = compared(lm)
    assert {f"model.layers.{block}" for block in blocks} < set(parts)
    assert len(parts) < BLOCKS
    assert count <= 2 + int8_check.MOST_TRIALS


def test_parts_that_do_not_help_stay_in_int8_and_this_is_said_once(path: Path) -> None:
    lm, said, run = with_adapter(path, "int8"), list[str](), RunOfSteps()
    exact = iter([True])

    def wrong_gradient() -> float:
        loss = add_gradient(lm)
        if not next(exact, False):  # after the gradient in bfloat16, every gradient is wrong
            for parameter in lm.parameters():
                parameter.grad[...] = -1
        return loss

    check = Int8Check(lm, wrong_gradient, said.append, every=1)
    for _ in range(2):
        exact = iter([True])
        check.on_step_end(run, None)  # type: ignore[arg-type]
    assert [row["in_bfloat16"] for row in run.rows] == [[], []]
    assert len(said) == 1
    assert "does not help; the run continues in int8" in said[0]
    assert all(layer.int8 for _, layer in int8_layers(lm))


@pytest.mark.parametrize("order", [1, -1])
def test_nan_on_any_rank_is_the_largest_error(order: int) -> None:
    ranks = [Errors(0.99, {"p": 0.99}, 0.0, 1.0), Errors(np.nan, {"p": np.nan}, np.nan, 1.0)][::order]
    found = Errors.largest(ranks)
    assert np.isnan([found.cosine, found.parts["p"], found.loss]).all()
    assert found.size(0.95) == np.inf


@pytest.mark.slow
def test_a_run_that_is_resumed_in_int8_is_compared_at_once(tmp_path: Path, data: Path) -> None:
    options: dict[str, Any] = {"rank": 4, "progress": False, "schedule": "constant", "lr": 1e-2}
    path = outlier(tmp_path, "lm_head")

    def events(compute: str, steps: int, **more: Any) -> list[tuple[int, list[str]]]:
        finetune(path, data, tmp_path / "run", compute=compute, steps=steps, **options, **more)
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        return [(row["step"], row["in_bfloat16"]) for row in log if row["event"] == "int8"]

    assert events("float32", 2) == []
    with pytest.warns(UserWarning, match="another arithmetic|total_steps"):
        assert events("int8", 3, resume=True, change_compute=True) == [(2, ["lm_head"])]
    with pytest.warns(UserWarning, match="another arithmetic|total_steps"):
        events("float32", 4, resume=True, change_compute=True)
    with pytest.warns(UserWarning, match="another arithmetic|total_steps"):
        found = events("int8", 5, resume=True, change_compute=True)
    assert found == [(2, ["lm_head"]), (4, ["lm_head"])]


@pytest.mark.parametrize("targets", [5, 8, 9])
def test_a_head_in_int8_only_in_the_backward_pass_is_found(tmp_path: Path, targets: int) -> None:
    """With 5 to 8 targets, the head's forward pass is in float32, and its backward pass in int8."""
    lm = with_adapter(outlier(tmp_path, "lm_head"), "int8")
    lm.model.int8_head = True
    ids = np.random.default_rng(0).integers(1, 250, 40)
    batch = pack([(ids, np.where(np.arange(40) < 40 - targets, -100, ids))])
    said, run = list[str](), RunOfSteps()
    check = Int8Check(lm, lambda: lm.forward_backward(batch, 1 / targets) / targets, said.append)
    check.on_step_end(run, None)  # type: ignore[arg-type]
    assert run.rows[0]["in_bfloat16"] == ["lm_head"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_int8_is_not_blamed_if_bfloat16_is_not_finite_either(path: Path, value: float) -> None:
    lm, said, run = with_adapter(path, "int8"), list[str](), RunOfSteps()

    def diverged() -> float:
        loss = add_gradient(lm)
        next(iter(lm.parameters())).grad[0, 0] = value
        return loss

    Int8Check(lm, diverged, said.append).on_step_end(run, None)  # type: ignore[arg-type]
    assert [line.partition(": the sample has a loss or a gradient that")[0] for line in said] == [
        "step 1: the sample's gradients in int8 and bfloat16 are not compared"
    ]
    assert run.rows == []
    assert all(layer.int8 for _, layer in int8_layers(lm))


@pytest.mark.parametrize(("difference", "size"), [(0.05, 1), (-0.25, 1), (0.5, 2)])
def test_the_limit_of_a_difference_follows_the_loss(difference: float, size: float) -> None:
    loss = (abs(difference) / size - 0.05) / 0.02
    assert Errors(1.0, {}, difference, loss).size(0.95) == pytest.approx(size)


@pytest.mark.parametrize("options", [{"trainable_tokens": (5, 6)}, {"targets": ("q_proj", "lm_head")}])
def test_a_trained_head_returns_to_bfloat16(tmp_path: Path, options: dict[str, Any]) -> None:
    lm = nplora.load_model(outlier(tmp_path, "lm_head"), compute="int8")
    lm.add_lora(rank=4, seed=1, **options)
    assert "lm_head" in compared(lm)[1]
    assert abs(errors(lm).loss) < 0.02


def test_a_head_of_trained_rows_alone_is_no_part_that_computes_in_int8(path: Path) -> None:
    lm = nplora.load_model(path, compute="int8")
    lm.add_lora(rank=4, modules_to_save="lm_head")
    assert sorted(compared(lm, least_cosine=2.0)[1]) == ["model.layers.0", "model.layers.1"]


def test_frozen_blocks_below_the_adapters_never_compute_in_int8(path: Path) -> None:
    lm = nplora.load_model(path, compute="int8")
    lm.add_lora(rank=4, layers="last:1")
    assert sorted(compared(lm, least_cosine=2.0)[1]) == ["lm_head", "model.layers.1"]


def test_a_comparison_computes_few_gradients(path: Path) -> None:
    """If the errors remain, all parts return after a limited number of trials."""
    lm = with_adapter(path, "int8")
    said, parts, count = compared(lm, least_cosine=2.0)  # never reached
    assert sorted(parts) == ["lm_head", "model.layers.0", "model.layers.1"]
    assert count <= 3 + int8_check.MOST_TRIALS
    assert not said[1:]
    assert errors(lm).cosine == pytest.approx(1, abs=1e-6)


def test_small_errors_need_no_trial(path: Path) -> None:
    assert compared(with_adapter(path, "int8")) == ([], [], 2)


class Stopped(Callback):
    def on_step_end(self, run: Any, record: Any) -> None:
        if run.step == 2:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("callbacks", [[], [Stopped()]])
def test_after_a_run_all_parts_can_compute_in_int8_again(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callbacks: list[Callback]
) -> None:
    monkeypatch.setattr(int8_check, "LEAST_COSINE", 2.0)  # all parts return
    lm, options = nplora.load_model(path, compute="int8"), {"rank": 4, "steps": 2, "progress": False}
    lm.model.layers[0].mlp.up_proj.int8 = False  # the user's choice
    stops = pytest.raises(RuntimeError, match="stopped") if callbacks else contextlib.nullcontext()
    with stops:
        finetune(lm, data, tmp_path / "out", callbacks=callbacks, **options)
    flags = {name: module.int8 for name, module in lm.named_modules() if isinstance(module, Int8Layer)}
    assert [name for name, is_int8 in flags.items() if not is_int8] in ([], ["model.layers.0.mlp.up_proj"])


class StopsEarly(Callback):
    def on_step_end(self, run: Any, record: Any) -> None:
        if run.step == 2:
            run.stop()


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_keeps_its_parts_in_bfloat16_even_without_its_log(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setattr(int8_check, "LEAST_COSINE", 2.0)  # all parts return
    options: dict[str, Any] = {"compute": "int8", "progress": False, "rank": 4, "schedule": "constant"}
    options |= {"steps": 3, "save_every": 1}
    finetune(path, data, tmp_path / "out", callbacks=[StopsEarly()], **options)
    if lost:
        (tmp_path / "out" / "log.jsonl").unlink()
    seen = list[list[str]]()

    class Flags(Callback):
        def on_step_begin(self, run: Any) -> None:
            seen.append([name for name, layer in int8_layers(run.model) if layer.int8])

    warns = pytest.warns(UserWarning, match="the log is missing") if lost else contextlib.nullcontext()
    with warns:
        finetune(path, data, tmp_path / "out", resume=True, callbacks=[Flags()], **options)
    assert seen == [[]]


def test_a_comparison_that_a_signal_prevented_is_made_when_the_run_is_resumed(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"compute": "int8", "progress": False, "rank": 4, "steps": 2}

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(int8_check, "Comparison", interrupted)
        assert finetune(path, data, tmp_path / "out", **options).history.interrupted
    finetune(path, data, tmp_path / "out", resume=True, **options)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["event"] == "int8"] == [1]


@pytest.mark.slow
def test_a_run_logs_its_cosines_and_resumes_with_its_parts(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_check, "LEAST_COSINE", 2.0)  # all parts return
    options: dict[str, Any] = {"compute": "int8", "progress": False, "rank": 4, "lr": 1e-2, "seed": 3}
    options |= {"batch_examples": 4, "save_every": 2, "schedule": "constant"}

    def rows(name: str, **more: Any) -> list[dict[str, Any]]:
        finetune(path, data, tmp_path / name, **options, **more)
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [row for row in log if row["event"] == "int8"]

    (first,) = rows("whole", steps=6)
    assert first["step"] == 1
    assert 0.5 < first["cosine"] < 1
    assert first["worst"] in first["in_bfloat16"]
    rows("stopped", steps=4)
    with pytest.warns(UserWarning, match="total_steps was 4, is 6"):
        rows("stopped", steps=6, resume=True)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"every": 0}, ValueError, "every is 0"),
        ({"every": "2"}, TypeError, "every is"),
        ({"least_cosine": math.nan}, ValueError, "least_cosine is nan"),
        ({"least_cosine": "x"}, TypeError, "least_cosine is"),
        ({"model": "m"}, TypeError, "model is 'm', expected a module"),
        ({"add_gradient": None}, TypeError, "add_gradient is a NoneType, expected a function"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=1))
    arguments = {"model": model, "add_gradient": lambda: 0.0, **change}
    with pytest.raises(kind, match=f"Int8Check: {message}"):
        Int8Check(**arguments)
