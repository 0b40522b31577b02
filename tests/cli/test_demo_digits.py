"""`nplora demo digits`: its claims, recomputed in float64 from the files that it reads and writes."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

import nplora
from nplora.cli.demo import digits as demo

pytestmark = pytest.mark.slow

PRETRAINED = Path(nplora.__file__).parent / "cli/demo" / "digits.safetensors"
LAYERS = ("fc1", "fc2", "fc3")
HELD_OUT = 360


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def report(directory):
    return demo.run(directory)


@pytest.fixture(scope="module")
def pretrained():
    file = load_file(PRETRAINED)
    return file | {f"{name}.weight": file[f"{name}.weight"] * file[f"{name}.step"] for name in LAYERS}


def worlds(numbers):
    """The digits as they are, and rotated by 90° and inverted, index by index."""
    images, labels = load_digits(return_X_y=True)
    old = images[numbers].reshape(-1, 8, 8)
    new = np.empty_like(old)
    for row in range(8):
        for column in range(8):
            new[:, 7 - column, row] = 16 - old[:, row, column]
    return old.reshape(-1, 64) / 16, new.reshape(-1, 64) / 16, labels[numbers]


def accuracies(pretrained, adapter):
    """(old, new) of the held-out digits, with W + 2 · lora_B lora_A: alpha is twice the rank."""
    old, new, labels = worlds(pretrained["split.held_out"])
    found = []
    for h in (old, new):
        for name in LAYERS:
            W = pretrained[f"{name}.weight"].astype(np.float64)
            if adapter is not None:
                up, down = (adapter[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "BA")
                W = W + 2.0 * up.astype(np.float64) @ down
            h = h @ W.T + pretrained[f"{name}.bias"]
            h = h if name == "fc3" else np.maximum(h, 0)
        found.append(np.mean(h.argmax(axis=1) == labels))
    return tuple(found)


def test_accuracies_are_those_of_the_files_in_float64(report, directory, pretrained):
    adapter = load_file(directory / "adapter_model.safetensors")
    assert (report.before.old, report.before.new) == accuracies(pretrained, None)
    assert (report.after.old, report.after.new) == accuracies(pretrained, adapter)
    assert report.off == report.before


def test_new_world_is_learned_from_few_factors(report, directory):
    adapter = load_file(directory / "adapter_model.safetensors")
    assert report.before.new < 0.20
    assert report.after.new >= 0.93
    assert report.off.old > 0.98
    assert report.factors == sum(factor.size for factor in adapter.values())
    assert report.factors <= 0.05 * report.parameters


@pytest.mark.parametrize("seed", [1, 2])
def test_every_seed_learns_the_new_world(seed, tmp_path):
    report = demo.run(tmp_path, seed=seed)
    assert report.after.new >= 0.93
    assert not report.failures


def test_held_out_digits_are_in_no_other_part(pretrained):
    parts = [pretrained[f"split.{part}"] for part in ("train", "adaptation", "held_out")]
    assert [len(part) for part in parts] == [837, 600, HELD_OUT]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))


def test_frozen_digest_is_that_of_the_pretrained_file(report, pretrained):
    content = b"".join(
        pretrained[f"{name}.{kind}"].astype(np.float32).tobytes()
        for name in LAYERS
        for kind in ("weight", "bias")
    )
    assert report.digests == (hashlib.sha256(content).hexdigest(),) * 2
    assert report.parameters == len(content) // 4


def test_saved_bytes_are_the_inputs_and_the_rank_sized_products(report):
    inputs, products = (
        64 + 512 + 512,
        3 * report.rank,
    )  # ReLU's outputs are the next layers' inputs, kept once
    assert report.saved_bytes == 4 * demo.BATCH * (inputs + products)


def test_saved_adapter_gives_a_fresh_network_of_another_rank_the_same_skill(report, directory):
    assert report.reloaded_equal
    model = demo.DigitsNet(demo.pretrained_weights(), rank=2)
    nplora.load_adapter(model, directory)
    held_out = demo.digits(demo.pretrained_weights()["split.held_out"].numpy())
    assert demo.accuracy(model, held_out) == report.after


def test_output_directory_holds_adapter_log_and_plot(report, directory):
    names = {path.name for path in directory.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "plot.png"} <= names


def test_text_shows_the_table_and_fits_a_terminal(report):
    text = str(report)
    for share in (*dataclasses.astuple(report.before), *dataclasses.astuple(report.after)):
        assert f"{share:.1%}" in text
    assert f"{report.factors:,} parameters" in text
    assert f"{report.merge.difference:.1e}" in text
    assert max(map(len, text.splitlines())) <= 90


def test_running_again_replaces_the_earlier_demo_with_the_same_bits(report, directory, capsys):
    path = directory / "adapter_model.safetensors"
    before = path.read_bytes()
    repeated = demo.run(directory, overwrite=True)
    assert path.read_bytes() == before
    assert dataclasses.replace(repeated, seconds=report.seconds) == report
    assert str(repeated) in capsys.readouterr().out


def test_no_run_is_replaced_without_overwrite(tmp_path):
    layer = nplora.LoRALinear(np.eye(3, dtype=np.float32), rank=1)
    x = np.ones((4, 3), np.float32)
    nplora.Trainer(layer, "mse", progress=False).fit(x, x, checkpoint_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("[cl]*.*")}
    with pytest.raises(FileExistsError, match="holds a run"):
        demo.run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[cl]*.*")} == before


def test_no_picture_is_replaced_without_overwrite(tmp_path):
    (tmp_path / "plot.png").write_bytes(b"a user's")
    with pytest.raises(FileExistsError, match=r"the file already exists; .*plot\.png"):
        demo.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes() == b"a user's"


def test_no_adapter_is_replaced_without_overwrite(tmp_path):
    layer = nplora.LoRALinear(np.eye(3, dtype=np.float32), rank=1)
    nplora.save_adapter(nplora.Sequential(layer), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds an adapter"):
        demo.run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_demo_that_overwrites_leaves_no_adapter_of_the_earlier_one(tmp_path, monkeypatch):
    demo.run(tmp_path, epochs=1)

    def interrupted(model, directory):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "save_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, epochs=1, overwrite=True)
    with pytest.raises(FileNotFoundError, match="a run that has no adapter yet"):
        nplora.load_adapter(demo.DigitsNet(demo.pretrained_weights(), rank=2), tmp_path)


def test_a_run_that_came_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "require_untouched", lambda path: None)
    test_no_run_is_replaced_without_overwrite(tmp_path)


def test_missing_scikit_learn_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'scikit-learn.*pip install "nplora\[demo\]"$') as caught:
        demo.run(tmp_path / "demo")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "demo").exists()


def test_without_matplotlib_only_the_plot_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    demo.run(tmp_path, epochs=1)
    assert 'pip install "nplora[plot]"' in capsys.readouterr().out
    assert not (tmp_path / "plot.png").exists()
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_merge_check_finds_a_merge_that_is_off_by_more_than_rounding(report):
    model = demo.DigitsNet(demo.pretrained_weights(), rank=4)
    model.seed(0)
    x = worlds(np.arange(50))[1].astype(np.float32)
    sound = demo.check_merge(model, x)
    assert sound.difference <= sound.bound

    def merge_something_else():
        model.fc2.A[7, 0] += 0.1
        demo.DigitsNet.merge(model)

    model.merge = merge_something_else
    wrong = demo.check_merge(model, x)
    assert wrong.difference > wrong.bound
    assert dataclasses.replace(report, merge=wrong).failures == ["merged and unmerged outputs differ"]


def test_broken_promises_are_listed(report):
    assert report.failures == []
    broken = dataclasses.replace(report, digests=("a", "b"), off=report.after, reloaded_equal=False)
    assert len(broken.failures) == 3
    assert "DIFFER" in str(broken)


def test_ctrl_c_while_it_learns_ends_the_demo(tmp_path, monkeypatch):
    history = nplora.Trainer.fit

    def interrupted(trainer, *arguments, **options):
        return dataclasses.replace(
            history(trainer, *arguments, **(options | {"epochs": 1})), ended="interrupted"
        )

    monkeypatch.setattr(nplora.Trainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path)
