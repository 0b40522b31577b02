"""The plot of a run: log.jsonl becomes a PNG."""

import io
from pathlib import Path
from typing import Any, NamedTuple

from nplora.formats import files, strict_json
from nplora.formats.errors import DataError, FormatError, brief
from nplora.formats.files import StrPath
from nplora.formats.run_files import LOG

PICTURE = "plot.png"

_MAX_LOG = 1 << 30
_STEEP = 30  # losses that span more than this factor get a logarithmic axis

Records = list[dict[str, Any]]


def plot_run(directory: StrPath, output: StrPath | None = None, overwrite: bool = False) -> Path:
    """Draw the losses, the accuracy and the learning rate of a run.

    Args:
        directory: the `checkpoint_dir` of a run, finished or not.
        output: the PNG; None: plot.png in the directory.
        overwrite: replace an existing file.
    Returns:
        the path of the PNG.
    Raises:
        ModuleNotFoundError: matplotlib, from the extra [plot], is not installed.
        ValueError: a path is empty, or the name of the output does not end in .png, or it is the log.
        FileExistsError: the output exists, and `overwrite` is not set.
        FileNotFoundError: the directory has no log.jsonl, so it is not the directory of a run.
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
        steps, epochs = read_log(Path(directory, LOG))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OSError(error.errno, f"no run directory, it has no {LOG}", files.name(directory)) from error
    picture = _draw(steps, epochs, Path(directory).resolve().name)
    files.replace([files.NewFile(path, len(picture), [picture])])
    return path


def read_log(path: StrPath) -> tuple[Records, Records]:
    """The records of the steps, and those of the epochs. A last line that is cut short is skipped.

    Raises:
        DataError: a line is not a record (its number is named), or there is no step yet.
        OSError: the log cannot be read.
    """
    lines = bytes(files.read(path, _MAX_LOG)).split(b"\n")[:-1]
    found: dict[str, Records] = {"step": [], "epoch": []}
    for number, line in enumerate(lines, 1):
        where = f"{files.name(path)}: line {number}"
        try:
            record = strict_json.loads(line, where)
        except FormatError as error:
            raise DataError(str(error)) from error
        if not isinstance(record, dict) or not isinstance(record.get("event"), str):
            raise DataError(f"{where}: {brief(record)}, expected an object with an event")
        if record["event"] in found:
            _check_record(record, where)
            found[record["event"]].append(record)
    if not found["step"]:
        raise DataError(f"{files.name(path)}: there is no step in it yet")
    return found["step"], found["epoch"]


def _check_record(record: dict[str, Any], where: str) -> None:
    """Refuse a record whose fields are not numbers; null stands for NaN and for what was not measured."""
    for name in ("step", "loss", *(("lr",) if record["event"] == "step" else ("val_loss", "val_accuracy"))):
        value = record.get(name)
        if value is None and name != "step":
            record[name] = None
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{where}: {name} is {brief(value)}, expected a number")


class _Curve(NamedTuple):
    label: str
    x: list[float]
    y: list[float]
    style: dict[str, Any]


def _curve(label: str, records: Records, name: str, **style: Any) -> _Curve:
    """The points of a curve, without those that are null."""
    points = [(record["step"], record[name]) for record in records if record[name] is not None]
    return _Curve(label, [x for x, _ in points], [y for _, y in points], style)


def _draw(steps: Records, epochs: Records, title: str) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plot: matplotlib is not installed: pip install "nplora[plot]"', name=error.name
        ) from error
    curves = {
        "loss": [
            _curve("step", steps, "loss", color="0.75", linewidth=1),
            _curve("epoch", epochs, "loss", color="C0", marker="."),
            _curve("validation", epochs, "val_loss", color="C1", marker="."),
        ],
        "validation accuracy": [_curve("", epochs, "val_accuracy", color="C2", marker=".")],
        "learning rate": [_curve("", steps, "lr", color="C3")],
    }
    panels = {name: drawn for name, lines in curves.items() if (drawn := [c for c in lines if c.x])}
    figure = Figure(figsize=(7, 1 + 2 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            axis.plot(line.x, line.y, label=line.label, **line.style)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if name == "loss":
            axis.legend()
            axis.set_yscale(_scale([value for line in lines for value in line.y]))
    axes[0].set_title(title, parse_math=False)  # a name may contain dollar signs
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")  # without pyplot, Agg draws it, and no display is needed
    return buffer.getvalue()


def _scale(values: list[float]) -> str:
    return "log" if 0 < min(values) < max(values) / _STEEP else "linear"
