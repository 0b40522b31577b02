"""Weighted sums of adapters: the dense sum in float64, from factors of any rank, scale and kind of file."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gguf_files import SHAPES, Settings, alike, base_gguf, factors, patterned, peft_delta, write_peft

import nplora
from figures import Figure
from nplora import cli
from nplora.adapters import Adapter
from nplora.formats.errors import FormatError, UnsupportedError
from nplora.lora.delta import LoraDelta

Array = np.ndarray[Any, Any]


def dense(update: LoraDelta) -> Array:
    return update.scale * update.A.astype(np.float64) @ update.B.astype(np.float64)


def random_adapter(rng: np.random.Generator, shapes: dict[str, tuple[int, int]], rank: int = 4) -> Adapter:
    return Adapter(
        "random",
        {
            name: LoraDelta(
                rng.standard_normal((d_out, rank), np.float32),
                rng.standard_normal((rank, d_in), np.float32),
                float(rng.uniform(0.2, 3)),
            )
            for name, (d_out, d_in) in shapes.items()
        },
    )


def relative(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def assert_weighted_sum(combined: Adapter, parts: list[tuple[Adapter, float]]) -> None:
    """Within the rounding of two float32 factors: 2^-24 each, relative to norms that a sum keeps."""
    assert set(combined) == {name for adapter, _ in parts for name in adapter}
    for name, update in combined.items():
        expected = sum(weight * dense(adapter[name]) for adapter, weight in parts if name in adapter)
        assert relative(dense(update), expected) < 1e-6, name


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0), (-2.5, 0.0)])
def test_the_sum_is_the_dense_one_for_any_rank_scale_and_weight(
    weights: tuple[float, float], tmp_path: Path, figure: Figure
) -> None:
    first, second = alike(), patterned(use_rslora=True)
    pairs = factors(first), factors(second, seed=1)
    for directory, settings, pair in zip("ab", (first, second), pairs, strict=True):
        write_peft(tmp_path / directory, settings, pair)
    combined = nplora.combine([(tmp_path / d, w) for d, w in zip("ab", weights, strict=True)])
    combined.save(tmp_path / "both")
    saved = nplora.read_adapter(tmp_path / "both")
    assert set(saved) == set(SHAPES)
    for name, update in saved.items():
        expected = sum(
            weight * peft_delta(settings, pair, name)
            for weight, settings, pair in zip(weights, (first, second), pairs, strict=True)
        )
        assert relative(dense(update), expected) < 1e-6, name
        figure("error of a weighted sum, relative", relative(dense(update), expected))
        assert update.rank == (4 if weights[1] == 0 else first.rank[name] + second.rank[name])
        assert combined.errors[name] == 0


def test_targets_need_not_be_the_same(rng: np.random.Generator) -> None:
    one = random_adapter(rng, {"q": (12, 8), "v": (5, 8)}, rank=2)
    two = random_adapter(rng, {"v": (5, 8), "up": (20, 8)}, rank=3)
    combined = nplora.combine([(one, 0.25), (two, -3)])
    assert_weighted_sum(combined, [(one, 0.25), (two, -3)])
    assert {name: update.rank for name, update in combined.items()} == {"q": 2, "v": 5, "up": 3}


def test_what_the_adapters_share_or_cancel_takes_no_rank(rng: np.random.Generator) -> None:
    one = random_adapter(rng, {"q": (30, 20)}, rank=4)
    assert nplora.combine([(one, 0.5), (one, 0.25)])["q"].rank == 4
    nothing = nplora.combine([(one, 1), (one, -1)])
    assert nothing["q"].rank == 1
    assert not dense(nothing["q"]).any()
    assert nothing.errors == {"q": 0}


def test_a_rank_keeps_the_largest_singular_values_and_tells_the_error(rng: np.random.Generator) -> None:
    shapes = {"q": (30, 20), "v": (9, 40)}
    one, two = random_adapter(rng, shapes, rank=4), random_adapter(rng, shapes, rank=6)
    combined = nplora.combine([(one, 0.7), (two, 0.3)], rank=5)
    for name, update in combined.items():
        exact = 0.7 * dense(one[name]) + 0.3 * dense(two[name])
        values = np.linalg.svd(exact, compute_uv=False)
        best = np.sqrt(np.sum(values[5:] ** 2) / np.sum(values**2))
        assert update.rank == 5
        np.testing.assert_allclose(relative(dense(update), exact), best, rtol=1e-6)
        np.testing.assert_allclose(combined.errors[name], best, rtol=1e-6)
        assert f"{best:.3g}" in combined.table()
    parts = [(0.7 * dense(one[name]) + 0.3 * dense(two[name])).ravel() for name in shapes]
    cut = [dense(combined[name]).ravel() - part for name, part in zip(shapes, parts, strict=True)]
    total = float(np.linalg.norm(np.concatenate(cut)) / np.linalg.norm(np.concatenate(parts)))
    np.testing.assert_allclose(combined.error, total, rtol=1e-6)
    assert f"2 layers of rank 5, 495 numbers, relative error {total:.3g} over all layers" in str(combined)


def test_files_of_llama_cpp_and_models_join_in(rng: np.random.Generator, tmp_path: Path) -> None:
    settings, base = patterned(), base_gguf(tmp_path / "base.gguf")
    pairs = factors(settings)
    nplora.adapter_to_gguf(write_peft(tmp_path / "a", settings, pairs), tmp_path / "a.gguf", base)

    class Model(nplora.Module):
        def __init__(self) -> None:
            self.lm_head = nplora.LoRALinear(
                np.zeros(SHAPES["lm_head"]), 2, init="gaussian", use_rslora=True, rng=0
            )

    model = Model()
    combined = nplora.combine([(tmp_path / "a.gguf", 2), (tmp_path / "a", -1), (model, 3)], base=base)
    for name, update in combined.items():
        expected = peft_delta(settings, pairs, name)
        if name == "lm_head":
            expected = expected + 3 * model.lm_head.delta_weight().astype(np.float64)
        assert relative(dense(update), expected) < 1e-6, name
        assert update.embedding == (name == "model.embed_tokens")


def test_no_matrix_of_the_weights_shape_is_made(rng: np.random.Generator, figure: Figure) -> None:
    d_out, d_in, rank = 4000, 3000, 4
    adapters = [(random_adapter(rng, {"q": (d_out, d_in)}, rank), weight) for weight in (0.5, 0.5)]
    tracemalloc.start()
    try:
        nplora.combine(adapters, rank=4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    factors_of_all = 2 * rank * (d_out + d_in) * 8
    assert peak < 8 * factors_of_all < d_out * d_in * 4 / 5
    figure("memory of a weighted sum over that of its matrix", peak / (d_out * d_in * 4))


def test_what_does_not_add_up_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    one = random_adapter(rng, {"q": (12, 8), "v": (5, 8)})
    with pytest.raises(ValueError, match=r"^combine: got no adapters, expected at least one$"):
        nplora.combine([])
    for wrong in (["a"], "a", [("a", 1, 2)], [one], [3], 3):
        words = r"combine: adapters is .*, expected a list of pairs \(adapter, weight\)$"
        with pytest.raises(TypeError, match=words):
            nplora.combine(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"read_adapter: got 3, expected a PEFT directory, a llama\.cpp file"):
        nplora.combine([(3, 1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="weight is nan"):
        nplora.combine([(one, float("nan"))])
    with pytest.raises(ValueError, match="rank is 0, expected at least 1"):
        nplora.combine([(one, 1)], rank=0)
    other = Adapter("other", {"q": LoraDelta(one["q"].A, one["v"].B[:, :4], 1.0), "v": one["v"]})
    with pytest.raises(
        ValueError, match=r"in 1 place:\n  q: a linear layer \(12, 8\) in random, .* \(12, 4\) in other"
    ):
        nplora.combine([(one, 1), (other, 1)])
    table = Adapter("table", {"q": LoraDelta(one["q"].A, one["q"].B, 1.0, embedding=True)})
    with pytest.raises(ValueError, match=r"q: a linear layer .* an embedding \(12, 8\) in table"):
        nplora.combine([(one, 1), (table, 1)])
    broken = Adapter("broken", {"q": LoraDelta(one["q"].A, np.full((4, 8), np.inf, np.float32), 1.0)})
    with pytest.raises(ValueError, match="a factor of q holds NaN or an infinity"):
        nplora.combine([(one, 0), (broken, 1)])

    large = Adapter("large", {"q": LoraDelta(np.full((12, 1), 1e38), np.full((1, 8), 1e38), 1.0)})
    with pytest.raises(ValueError, match="the sum of q is too large for float32"):
        nplora.combine([(large, 1e10)])
    with pytest.raises(ValueError, match="a factor of q holds NaN or an infinity"):
        nplora.combine([(large, 1e300)])

    dora = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=2, use_dora=True))
    nplora.save_adapter(dora, tmp_path / "dora")
    for source in (dora, tmp_path / "dora"):
        with pytest.raises(UnsupportedError, match="uses DoRA, which rescales the rows"):
            nplora.combine([(source, 1)])
    head = nplora.Sequential(nplora.LoRALinear(np.eye(4), rank=2), nplora.Linear(np.eye(4), trainable=True))
    nplora.save_adapter(head, tmp_path / "head")
    with pytest.raises(UnsupportedError, match=r"fully trained layers \('1'\)"):
        nplora.combine([(tmp_path / "head", 1)])


def test_a_read_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    """Also with DoRA. The saved files equal those of the model, except for fields that only a model knows."""
    model = nplora.Sequential(nplora.LoRALinear(np.eye(6), 2, 5, use_dora=True, init="gaussian", rng=0))
    model[0].m[...] *= np.arange(1, 7)
    nplora.save_adapter(model, tmp_path / "a")
    adapter = nplora.read_adapter(tmp_path / "a")
    adapter.save(tmp_path / "b")
    twin = nplora.Sequential(nplora.LoRALinear(np.eye(6), 2, use_dora=True))
    nplora.load_adapter(twin, tmp_path / "b")
    np.testing.assert_array_equal(twin[0].merged_weight(), model[0].merged_weight())
    assert adapter.use_dora
    assert repr(adapter) == f"Adapter({str(tmp_path / 'a')!r}, 1 layer)"


def test_a_directory_that_is_no_whole_adapter_is_refused(tmp_path: Path) -> None:
    pairs = factors(alike())
    wrong = Settings(alike().rank | {"lm_head": 3}, alike().alpha)
    write_peft(tmp_path / "a", wrong, pairs)
    with pytest.raises(FormatError, match=r"cannot be used \(1 reason\):\n"):
        nplora.read_adapter(tmp_path / "a")
    write_peft(tmp_path / "b", alike(), pairs, use_dora=True)
    with pytest.raises(
        FormatError, match=r"DoRA needs the tensor '.*lora_magnitude_vector', which is missing"
    ):
        nplora.read_adapter(tmp_path / "b")


def test_the_command_combines_and_reports(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = random_adapter(rng, {"q": (12, 8)}, rank=3)
    two = random_adapter(rng, {"q": (12, 8)}, rank=2)
    one.save(tmp_path / "one:1x")
    two.save(tmp_path / "two")
    arguments = [str(tmp_path / "one:1x"), f"{tmp_path / 'two'}:-0.5", "--output", str(tmp_path / "both")]
    assert cli.main(["combine", *arguments]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'both'}: 1 layer of rank 5, 100 numbers, nothing is truncated\n"
    )
    assert_weighted_sum(nplora.read_adapter(tmp_path / "both"), [(one, 1), (two, -0.5)])
    arguments += ["--rank", "2", "--overwrite"]
    assert cli.main(["combine", *arguments]) == 0
    combined = nplora.combine([(one, 1), (two, -0.5)], 2)
    lines = capsys.readouterr().out.splitlines()
    error = f"{combined.errors['q']:.3g}"
    assert lines == [
        f"{tmp_path / 'both'}: 1 layer of rank 2, 40 numbers, relative error {error} over all layers; "
        "layers with the largest errors:",
        f"  q  rank   2  relative error {error}",
    ]
    assert cli.main(["combine", *arguments, "--verbose"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"q  rank   2  relative error {error}", *lines]


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ("checkpoint-1.safetensors", "holds a run"),
        ("log.jsonl", "holds an adapter"),  # a run whose checkpoints were deleted
        (None, "holds an adapter"),
    ],
)
@pytest.mark.parametrize("command", ["combine", "convert"])
def test_what_was_trained_is_left_alone(
    command: str, beside: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = base_gguf(tmp_path / "base.gguf"), tmp_path / "run"
    for directory, seed in ((tmp_path / "one", 0), (run, 1)):
        write_peft(directory, alike(), factors(alike(), seed))
    nplora.adapter_to_gguf(tmp_path / "one", tmp_path / "one.gguf", base)
    if beside is not None:
        (run / beside).touch()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    output = ["--output", str(run)] if command == "combine" else [str(run)]
    arguments = [command, str(tmp_path / "one.gguf"), *output, "--base", str(base)]
    assert cli.main(arguments) == 2
    assert f"run: the directory {words}" in capsys.readouterr().err

    def write(**options: Any) -> None:
        if command == "combine":
            nplora.combine([(tmp_path / "one", 1)]).save(run, **options)
        else:
            nplora.adapter_from_gguf(tmp_path / "one.gguf", run, base, **options)

    with pytest.raises(FileExistsError, match=words):
        write()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    if words == "holds a run":  # it would go on and replace the adapter
        with pytest.raises(FileExistsError, match="a run, whose adapter would be replaced; name another"):
            write(overwrite=True)
        assert cli.main([*arguments, "--overwrite"]) == 2
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        return
    write(overwrite=True)
    assert {path.name for path in run.iterdir()} == before.keys()
    assert (run / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_an_adapter_that_is_added_is_not_replaced_by_the_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        write_peft(tmp_path / name, alike(), factors(alike(), seed))
    (tmp_path / "link").symlink_to(tmp_path / "two")
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    for output in ("two", "link"):
        line = ["combine", str(tmp_path / "one"), str(tmp_path / "two"), "--overwrite"]
        assert cli.main([*line, "--output", str(tmp_path / output)]) == 2
        assert "adapter_config.json is the adapter itself, which is never" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


def test_a_log_alone_is_no_obstacle(tmp_path: Path) -> None:
    write_peft(tmp_path / "one", alike(), factors(alike()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").touch()  # which others write too
    assert cli.main(["combine", str(tmp_path / "one"), "--output", str(tmp_path / "out")]) == 0
