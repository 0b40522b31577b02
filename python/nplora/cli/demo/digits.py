"""`nplora demo digits`: a network that was pretrained on handwritten digits adapts to changed images."""

import hashlib
import os
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.adapters import load_adapter, save_adapter
from nplora.formats import files, peft_adapter, safetensors
from nplora.formats.errors import counted
from nplora.formats.output_directory import require_untouched
from nplora.formats.safetensors import SafetensorsFile
from nplora.nn import LoRALinear, ReLU
from nplora.nn.module import Module, saved_nbytes
from nplora.nn.optim import AdamW
from nplora.runtime import get_num_threads
from nplora.trainer import Trainer, plot

Array = npt.NDArray[Any]

BATCH = 32
OUTPUT = "demo-digits"


class DigitsNet(Module):
    """The pretrained network with layers of 64, 512, 512 and 10 units. Each frozen layer has an adapter."""

    def __init__(self, pretrained: SafetensorsFile, rank: int) -> None:
        self.fc1 = _adapted(pretrained, "fc1", rank)
        self.fc2 = _adapted(pretrained, "fc2", rank)
        self.fc3 = _adapted(pretrained, "fc3", rank)
        self.relu = ReLU()

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the logits (n, 10) of images (n, 64), and the values that `backward` needs."""
        h, s1 = self.fc1.forward(x)
        h, r1 = self.relu.forward(h)
        h, s2 = self.fc2.forward(h)
        h, r2 = self.relu.forward(h)
        y, s3 = self.fc3.forward(h)
        return y, (s1, r1, s2, r2, s3)

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Array | None:
        """Compute the gradients of the factors for this batch, and add them to `dA` and `dB` of each layer.

        Return dx (n, 64), or None if `need_dx` is False.
        """
        s1, r1, s2, r2, s3 = saved
        dh = self.relu.backward(self.fc3.backward(dy, s3), r2)
        dh = self.relu.backward(self.fc2.backward(dh, s2), r1)
        return self.fc1.backward(dh, s1, need_dx)


@dataclass(frozen=True)
class Digits:
    """Original and changed images (n, 64) with values from 0 to 1, and their labels (n,)."""

    old: Array
    new: Array
    labels: Array


@dataclass(frozen=True)
class Accuracy:
    """The accuracy on original images (`old`) and on changed images (`new`) of the held-out digits."""

    old: float
    new: float


@dataclass(frozen=True)
class MergeCheck:
    """The difference between outputs before and after merging, for the changed images of held-out digits.

    Attributes:
        difference: the change that merging makes to one element of a layer's output. This element has the
            largest ratio difference / bound of all elements of all layers' outputs.
        bound: the largest change that rounding alone can make to this element.
        logits: the largest change that merging makes to the network's logits.
    """

    difference: float
    bound: float
    logits: float


@dataclass(frozen=True)
class DemoReport:
    """The results that the demo prints.

    Attributes:
        before: accuracy before training.
        after: accuracy after training.
        off: accuracy after training, with the adapter switched off.
        examples, held_out: the numbers of digits for training and for evaluation.
        rank: the rank of the LoRA factors.
        factors: the number of elements of all factors A and B.
        parameters: the number of frozen weights and biases.
        saved_bytes: the size in bytes of the arrays that the forward pass of a batch saves for the backward
            pass.
        seconds, threads: the duration of the training, and the number of threads.
        digests: two SHA-256 digests of all frozen weights and biases: before training, and after the demo.
        merge: the comparison of merged and unmerged outputs.
        reloaded_equal: whether a new network with the saved adapter has the same logits, bit for bit.
    """

    before: Accuracy
    after: Accuracy
    off: Accuracy
    examples: int
    held_out: int
    rank: int
    factors: int
    parameters: int
    saved_bytes: int
    seconds: float
    threads: int
    digests: tuple[str, str]
    merge: MergeCheck
    reloaded_equal: bool

    @property
    def failures(self) -> list[str]:
        """Messages about promised results that the demo did not reach. Without a bug, the list is empty."""
        promises = {
            "the frozen weights changed": self.digests[0] == self.digests[1],
            "the adapter changes the results even when it is off": self.off == self.before,
            "merged and unmerged outputs differ": self.merge.difference <= self.merge.bound,
            "with the reloaded adapter, the logits differ": self.reloaded_equal,
        }
        return [failure for failure, holds in promises.items() if not holds]

    def __str__(self) -> str:
        def row(name: str, before: float, after: float, off: float) -> str:
            return f"  {name:24}{before:>8.1%}{after:>9.1%}{off:>14.1%}"

        untouched = ": W did not change" if self.digests[0] == self.digests[1] else " DIFFER"
        return f"""\
A network reads handwritten digits (layers 64-512-512-10, {self.parameters:,} frozen parameters).
With {self.examples} examples, LoRA adapts it to images that are rotated by 90 degrees and inverted.

  {f"{self.held_out} held-out digits":24}{"before":>8}{"after":>9}{"adapter off":>14}
{row("changed images", self.before.new, self.after.new, self.off.new)}
{row("original images", self.before.old, self.after.old, self.off.old)}

  trained    {self.factors:,} parameters (rank {self.rank}), \
{self.factors / self.parameters:.1%} of the network
  time       {self.seconds:.1f} s of training on {counted(self.threads, "thread")}
  memory     {self.saved_bytes / 1000:.0f} kB kept for the backward pass of a batch of {BATCH}
  frozen     sha256 before and after {self.digests[1][:16]}{untouched}
  merged     a layer's output changes by {self.merge.difference:.1e},
             while rounding alone can change it by {self.merge.bound:.1e};
             the logits change by {self.merge.logits:.1e}; unmerging restores W bit for bit
  reloaded   into a fresh network: logits {"equal bit for bit" if self.reloaded_equal else "DIFFER"}
"""


def run(
    output: str | os.PathLike[str] = OUTPUT,
    rank: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    epochs: int = 80,
    lr: float = 4e-3,
) -> DemoReport:
    """Adapt the pretrained network to digit images that are rotated by 90° and inverted. Print the results.

    Args:
        output: directory for the adapter, log.jsonl and, if matplotlib is installed, the plot. A missing
            directory is created.
        rank: rank of the LoRA factors.
        seed: random seed of the initial factors and the order of the examples.
        overwrite: delete the run, the adapter and the plot that `output` already holds.
        epochs: number of passes over the 600 examples.
        lr: peak learning rate of AdamW.
    Returns:
        the report that was printed.
    Raises:
        ModuleNotFoundError: scikit-learn, which contains the data set, is not installed.
        FileExistsError: `output` holds a run, an adapter or a plot, and `overwrite` is not set.
        RuntimeError: the results differ from what the demo promises, which is a bug.
    """
    directory = Path(output)
    if not overwrite:
        require_untouched(directory)
    files.require_directory(directory)
    peft_adapter.require_ours(directory, overwrite)
    files.require_new(directory / plot.PICTURE, overwrite)
    pretrained = pretrained_weights()
    examples = digits(pretrained["split.adaptation"].numpy())
    held_out = digits(pretrained["split.held_out"].numpy())
    model = DigitsNet(pretrained, rank)
    model.seed(seed)
    digest, before = frozen_digest(model), accuracy(model, held_out)
    os.makedirs(directory, exist_ok=True)
    with files.Directory(directory) as held:
        seconds = adapt(model, examples, held, seed, overwrite, epochs, lr)
        save_adapter(model, held)
        directory = held.seen_from(directory)
    after = accuracy(model, held_out)
    with model.disable_adapter():
        off = accuracy(model, held_out)
    fresh = DigitsNet(pretrained, rank)
    load_adapter(fresh, directory)
    report = DemoReport(
        before=before,
        after=after,
        off=off,
        examples=len(examples.labels),
        held_out=len(held_out.labels),
        rank=rank,
        factors=model.num_trainable,
        parameters=model.num_parameters - model.num_trainable,
        saved_bytes=saved_nbytes(model.forward(examples.new[:BATCH])[1]),
        seconds=seconds,
        threads=get_num_threads(),
        reloaded_equal=fresh(held_out.new).tobytes() == model(held_out.new).tobytes(),
        merge=check_merge(model, held_out.new),
        digests=(digest, frozen_digest(model)),
    )
    print(report)
    plotted = _plotted(directory, overwrite)
    print(f"{directory}{os.sep} holds the adapter (PEFT's format), log.jsonl and {plotted}.")
    if report.failures:
        raise RuntimeError(f"demo: {'; '.join(report.failures)} (a bug: please report it)")
    return report


def pretrained_weights() -> SafetensorsFile:
    """Open the file with the pretrained weights and the indices of the training and held-out digits.

    The first layer's weight matrix is the int8 codes in `fc1.weight` times the number in `fc1.step`.
    `split.adaptation` has the indices of the digits to train on, and `split.held_out` those of the held-out
    digits.
    """
    with resources.as_file(resources.files("nplora.cli.demo") / "digits.safetensors") as path:
        return safetensors.open(path, mmap=False)


def digits(numbers: Array) -> Digits:
    """Return scikit-learn's digits with the indices `numbers` (from 0 to 1796), and rotated, inverted copies.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        message = 'demo: scikit-learn, the source of the digits, is not installed: pip install "nplora[demo]"'
        raise ModuleNotFoundError(message, name="sklearn") from None
    images, labels = load_digits(return_X_y=True)  # (1797, 64) of 0..16
    old = images[numbers].reshape(-1, 8, 8)
    return Digits(_flat(old), _flat(16 - np.rot90(old, axes=(1, 2))), labels[numbers])


def adapt(
    model: DigitsNet,
    examples: Digits,
    directory: files.Directory,
    seed: int,
    overwrite: bool,
    epochs: int,
    lr: float,
) -> float:
    """Train the factors on the changed images, with a log in `directory`. Return the seconds of training."""
    trainer = Trainer(model, "cross_entropy", AdamW(lr, weight_decay=0.0), schedule="cosine", seed=seed)
    start = time.perf_counter()
    history = trainer.fit(
        examples.new,
        examples.labels,
        epochs=epochs,
        batch_size=BATCH,
        checkpoint_dir=directory,
        checkpoint_every=epochs * len(examples.labels),  # checkpoints only at the beginning and the end
        overwrite=overwrite,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    return time.perf_counter() - start


def accuracy(model: Module, held_out: Digits) -> Accuracy:
    """The shares of the original images and of the changed images that the model classifies correctly."""
    right = [np.mean(model(x).argmax(axis=1) == held_out.labels) for x in (held_out.old, held_out.new)]
    return Accuracy(old=float(right[0]), new=float(right[1]))


def frozen_digest(model: DigitsNet) -> str:
    """SHA-256 of the bytes of all frozen weights and biases."""
    digest = hashlib.sha256()
    for layer in (model.fc1, model.fc2, model.fc3):
        digest.update(layer.weight.to_numpy().tobytes())
        digest.update(np.asarray(layer.bias).tobytes())
    return digest.hexdigest()


def check_merge(model: DigitsNet, x: Array) -> MergeCheck:
    """Merge the adapters, compare the layers' outputs with those before the merge, and unmerge.

    A layer gets the same inputs h before and after the merge. Both times, the layer computes
    (W + s A B) h + b, where s is the scale and b the bias. Rounding changes each element of the result by at
    most γ (|W| |h| + s |A| |B| |h| + |b|), so the two results differ by at most twice this value. Here, γ is
    γ_k of Higham 2002, section 3.1. The value k = 2 d_in + r + 6 is large enough for both computations, in
    any order of summation.
    """
    layers = (model.fc1, model.fc2, model.fc3)
    inputs, outputs, bounds = [x], [], []
    for layer in layers:
        h, W, A, B, b = (
            np.abs(np.asarray(part, dtype=np.float64))
            for part in (inputs[-1], layer.weight.to_numpy(), layer.A, layer.B, layer.bias)
        )
        k = 2 * W.shape[1] + layer.rank + 6
        gamma = k * 2.0**-24 / (1 - k * 2.0**-24)
        bounds.append(2 * gamma * (h @ W.T + layer.scale * (h @ B.T) @ A.T + b))
        outputs.append(layer(inputs[-1]))
        inputs.append(np.maximum(outputs[-1], 0))
    model.merge()
    differences = [np.abs(layer(h) - y) for layer, h, y in zip(layers, inputs[:-1], outputs, strict=True)]
    logits = np.abs(model(x) - outputs[-1]).max()
    model.unmerge()
    difference, bound = (np.concatenate([a.ravel() for a in each]) for each in (differences, bounds))
    nearest = np.argmax(difference / bound)
    return MergeCheck(float(difference[nearest]), float(bound[nearest]), float(logits))


def _adapted(pretrained: SafetensorsFile, name: str, rank: int) -> LoRALinear:
    codes, step, bias = (pretrained[f"{name}.{part}"].numpy() for part in ("weight", "step", "bias"))
    return LoRALinear(codes * step, rank, alpha=2 * rank, bias=bias.astype(np.float32))


def _flat(images: Array) -> Array:
    return np.ascontiguousarray(images.reshape(-1, 64) / 16, dtype=np.float32)


def _plotted(directory: Path, overwrite: bool) -> str:
    try:
        return plot.plot_run(directory, overwrite=overwrite).name
    except ModuleNotFoundError:
        return f'no plot: pip install "nplora[plot]", then nplora plot {directory}'
