"""The plot of a run: a PNG image drawn from its log.jsonl."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nplora.formats import files, strict_json
from nplora.formats.errors import DataError, FormatError, brief
from nplora.formats.files import StrPath
from nplora.formats.run_files import LOG
from nplora.trainer.history import EVALUATION

PICTURE = "plot.png"

_MAX_LOG = 1 << 30
_STEEP = 30  # losses that span more than this factor get a logarithmic axis
_WINDOWS = 25  # the smoothed curve averages over about 1 / _WINDOWS of a run
_FEWEST = 10  # a run with fewer steps has no smoothed curve

Records = list[dict[str, Any]]


_FIELDS = {
    "step": ("loss", "lr"),
    "epoch": ("loss", "val_loss", "val_accuracy"),
    EVALUATION: ("val_loss", "val_accuracy"),
}


class RunLog(NamedTuple):
    """The records of a log that a plot shows.

    Attributes:
        steps, epochs: the records of all steps and epochs.
        loss_before: the validation loss before the first step; None if it was not measured.
        evaluations: the records of all evaluations; empty for an older log, which has evaluations only in its
            epoch records.

    >>> import nplora, numpy as np
    >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), loss="mse")
    >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), epochs=2, checkpoint_dir="run", overwrite=True)
    >>> log = nplora.plot.read_log("run/log.jsonl")
    >>> log.steps[0]["loss"], len(log.epochs)
    (0.75, 2)
    """

    steps: Records
    epochs: Records
    loss_before: float | None
    evaluations: Records = []  # noqa: RUF012


def plot_run(directory: StrPath, output: StrPath | None = None, overwrite: bool = False) -> Path:
    """Draw the losses, the accuracy and the learning rate of a run.

    The loss of every step is drawn in a pale colour, and a smoothed curve of these losses is drawn over it.
    The curve of validation losses begins with the loss before training, if the log contains that loss.

        >>> import nplora, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> layer = nplora.LoRALinear(rng.normal(size=(2, 4)), rank=1, rng=0)
        >>> trainer = nplora.Trainer(layer, loss="mse")
        >>> x, y = rng.normal(size=(20, 4)), rng.normal(size=(20, 2))
        >>> history = trainer.fit(x, y, checkpoint_dir="plotted-run", overwrite=True)
        >>> nplora.plot.plot_run("plotted-run", overwrite=True)
        PosixPath('plotted-run/plot.png')

    Args:
        directory: the `checkpoint_dir` of a run. The run need not be finished.
        output: the path of the PNG; None: plot.png in the directory.
        overwrite: replace an existing file.
    Returns:
        the path of the PNG.
    Raises:
        ModuleNotFoundError: matplotlib, from the extra [plot], is not installed.
        ValueError: a path is empty, the name of the output does not end in .png, or `output` is the path of
            the log.
        FileExistsError: the output exists, and `overwrite` is not set.
        FileNotFoundError: the directory has no log.jsonl, so it belongs to no run.
        DataError: nplora did not write the log, or the log has no step yet.
        OSError: the PNG cannot be written.
    """
    files.require_named("plot", directory=directory, output=output)
    path = Path(directory, PICTURE) if output is None else Path(output)
    if files.suffix(path) != ".png":
        raise ValueError(f"plot: the output is {files.name(path)}, expected a name that ends in .png")
    files.require_not_read("plot", [path], [("log", Path(directory, LOG))])
    files.require_new(path, overwrite)
    try:
        log = read_log(Path(directory, LOG))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OSError(error.errno, f"not a run directory: it has no {LOG}", files.name(directory)) from error
    picture = _draw(log, Path(directory).resolve().name)
    files.replace([files.NewFile(path, len(picture), [picture])])
    return path


def read_log(path: StrPath) -> RunLog:
    """Read from a log the records of steps, evaluations and epochs, and the loss before training.

    An incomplete last line is skipped.

        >>> import nplora, numpy as np
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1), loss="mse")
        >>> history = trainer.fit(np.eye(4), np.eye(4), epochs=3, checkpoint_dir="run", overwrite=True)
        >>> log = nplora.plot.read_log("run/log.jsonl")
        >>> [record["step"] for record in log.steps], log.loss_before
        ([1, 2, 3], None)

    Raises:
        DataError: a line is not a record (the message names the line's number), or the log has no step yet.
        OSError: the log cannot be read.
    """
    lines = bytes(files.read(path, _MAX_LOG)).split(b"\n")[:-1]
    found: dict[str, Records] = {"step": [], "epoch": [], EVALUATION: []}
    before: float | None = None
    for number, line in enumerate(lines, 1):
        where = f"{files.name(path)}: line {number}"
        try:
            record = strict_json.loads(line, where)
        except FormatError as error:
            raise DataError(str(error)) from error
        if not isinstance(record, dict) or not isinstance(record.get("event"), str):
            raise DataError(f"{where} is {brief(record)}, expected a JSON object with an event")
        if record["event"] in found:
            _check_record(record, where)
            found[record["event"]].append(record)
        elif record["event"] == "before":
            before = _number(record, "loss", where)
    if not found["step"]:
        raise DataError(f"{files.name(path)}: the log has no step yet")
    return RunLog(found["step"], found["epoch"], before, found[EVALUATION])


def _check_record(record: dict[str, Any], where: str) -> None:
    """Refuse a record whose fields are not numbers."""
    if _number(record, "step", where) is None:
        raise DataError(f"{where}: step is None, expected a number")
    for name in _FIELDS[record["event"]]:
        record[name] = _number(record, name, where)
    for group in ("metrics", "val_metrics"):
        metrics = record.get(group, {})
        if not isinstance(metrics, dict):
            raise DataError(f"{where}: {group} is {brief(metrics)}, expected an object")
        record |= {f"{group}.{name}": _number(metrics, name, where) for name in metrics}


def _number(record: dict[str, Any], name: str, where: str) -> float | None:
    """Return a field of a record as a number, or None if the value was not measured or not finite."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {name} is {brief(value)}, expected a number")
    return value


class _Curve(NamedTuple):
    label: str
    x: list[float]
    y: list[float]
    style: dict[str, Any]


def _curve(label: str, records: Records, name: str, **style: Any) -> _Curve:
    """Make a curve from the records. Records whose value is null or missing are left out."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return _Curve(label, [x for x, _ in points], [y for _, y in points], style)


def smoothed(values: Sequence[float], window: float) -> list[float]:
    """The exponential moving average of a curve.

    Each later step multiplies the weight of a value by exp(-1 / window). The weights of each average add up
    to 1, so the first average is the first value.

        >>> import nplora
        >>> nplora.plot.smoothed([4.0, 4.0, 4.0], window=2)
        [4.0, 4.0, 4.0]
    """
    keep = math.exp(-1 / window)
    mean = weight = 0.0
    means = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def _loss_curves(log: RunLog) -> list[_Curve]:
    raw = _curve("step", log.steps, "loss", color="0.75", linewidth=1)
    before = [] if log.loss_before is None else [{"step": 0, "val_loss": log.loss_before}]
    curves = [raw]
    if len(raw.x) >= _FEWEST:
        mean = smoothed(raw.y, max(2.0, len(raw.y) / _WINDOWS))
        curves.append(_Curve("step, smoothed", raw.x, mean, {"color": "C0"}))
    return [
        *curves,
        _curve("epoch mean", log.epochs, "loss", color="C0", marker=".", linestyle="none"),
        _curve("validation", [*before, *_validated(log)], "val_loss", color="C1", marker="."),
    ]


def _validated(log: RunLog) -> Records:
    """All evaluations of a log, sorted by step. An older log has evaluations only in its epoch records."""
    found = {record["step"]: record for record in [*log.epochs, *log.evaluations]}
    return [found[step] for step in sorted(found)]


def _reward_curves(log: RunLog) -> list[_Curve]:
    """Curves of the rewards that a preference objective (such as DPO) measures in steps and evaluations."""
    sides = ("chosen", "C0"), ("rejected", "C3")
    steps = [
        _curve(side, log.steps, f"metrics.rewards/{side}", color=color, linewidth=1) for side, color in sides
    ]
    return steps + [
        _curve(f"{side}, validation", _validated(log), f"val_metrics.rewards/{side}", color=color, marker=".")
        for side, color in sides
    ]


def _draw(log: RunLog, title: str) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plot: matplotlib is not installed: pip install "nplora[plot]"', name=error.name
        ) from error
    validated = _validated(log)
    curves = {
        "loss": _loss_curves(log),
        "reward": _reward_curves(log),
        "reward accuracy": [
            _curve("step", log.steps, "metrics.rewards/accuracies", color="0.75", linewidth=1),
            _curve("validation", validated, "val_metrics.rewards/accuracies", color="C1", marker="."),
        ],
        "validation accuracy": [_curve("", validated, "val_accuracy", color="C2", marker=".")],
        "learning rate": [_curve("", log.steps, "lr", color="C3")],
    }
    panels = {name: drawn for name, lines in curves.items() if (drawn := [c for c in lines if c.x])}
    figure = Figure(figsize=(7, 1 + 2 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            axis.plot(line.x, line.y, label=line.label, **line.style)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
        if name == "loss":
            axis.set_yscale(_scale([value for line in lines for value in line.y]))
    axes[0].set_title(title, parse_math=False)  # a name may contain dollar signs
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")  # without pyplot, matplotlib draws with Agg and needs no display
    return buffer.getvalue()


def _scale(values: list[float]) -> str:
    return "log" if 0 < min(values) < max(values) / _STEEP else "linear"
