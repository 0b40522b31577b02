"""Reporters: callbacks that send the metrics of a run to CSV files, TensorBoard, Weights & Biases or MLflow.

Each reporter except `CsvReporter` needs a library, which is imported at the start of the run.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from nplora import _check
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.platform.files import open_file
from nplora.runtime.error_text import message_of
from nplora.runtime.user_warning import warn_user
from nplora.trainer.callbacks import Callback
from nplora.trainer.history import EvaluationRecord, StepRecord
from nplora.trainer.run import Run

_PROJECT = "nplora"  # the default name of the W&B project or the MLflow experiment
_LONGEST = 500  # the most characters that MLflow allows for a setting
_MAX_CSV = 1 << 30
_FLUSH_SECONDS = 10


class Reporter(Callback):
    """The base class of reporters. A resumed run appends to the report of the run that was stopped.

    If a report fails during the run, for example because there is no network, there is a warning, and the run
    continues without the report.

    Args:
        directory: the directory for files of the report, created if needed.
        settings: the hyper-parameters that the report shows.
        tokens: a function that returns the number of tokens processed so far. With `tokens`, the report shows
            tokens per second; otherwise, it shows items per second. Items are the examples, tokens or
            elements over which the loss is averaged.

    >>> import nplora, numpy as np
    >>> from nplora.trainer.reporters import CsvReporter
    >>> report = CsvReporter("reports", {"rank": 1})
    >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    >>> trainer = nplora.Trainer(layer, loss="mse", callbacks=[report])
    >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), steps=2)
    >>> print(Path("reports/metrics.csv").read_text())
    step,epoch,loss,learning_rate,grad_norm,tokens_per_second,items_per_second,eval_loss,eval_accuracy
    1,1,0.75,0.001,...
    2,2,0.74...,0.001,...
    """

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    pip: ClassVar[str] = ""  # the argument of `pip install` that installs the package

    def __init__(
        self,
        directory: StrPath,
        settings: Mapping[str, Any] | None = None,
        tokens: Callable[[], int] | None = None,
    ) -> None:
        self.require_package(type(self).__name__)
        self._directory, self._settings = Path(directory), _plain(settings or {})
        self._tokens, self._seen = tokens, 0
        self._is_open = False

    @classmethod
    def require_package(cls, op: str) -> None:
        """If the library is not installed, raise a ModuleNotFoundError with the `pip install` command."""
        if cls.package is not None and importlib.util.find_spec(cls.package) is None:
            raise ModuleNotFoundError(
                f"{op}: {cls.name} needs {cls.package}, which is not installed: pip install {cls.pip}",
                name=cls.package,
            )

    # ---- methods that a subclass overrides ----

    def _open(self, run: Run) -> None:
        """Open the report, or open it again if the run is resumed."""
        raise NotImplementedError

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        raise NotImplementedError

    def _close(self, ended: str | None) -> None:
        """Close the report. `ended` is the value of `History.ended`, or None after an error."""

    # ---- hooks ----

    def on_fit_start(self, run: Run) -> None:
        self._seen = self._tokens() if self._tokens else 0
        self._open(run)
        self._is_open = True

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        metrics = _of_step(record)
        seconds = max(1e-9, record.seconds)
        if self._tokens is None:
            metrics["train/items_per_second"] = record.count / seconds
        else:
            before, self._seen = self._seen, self._tokens()
            metrics["train/tokens_per_second"] = (self._seen - before) / seconds
        self._report(record.step, metrics)

    def on_evaluation(self, run: Run, record: EvaluationRecord) -> None:
        self._report(record.step, _of_evaluation(record))

    def on_fit_end(self, run: Run) -> None:
        self.close(run.history.ended)

    def close(self, ended: str | None = None) -> None:
        """Close the report, if it is open. A run closes its reports when it ends without an error.

        >>> from nplora.trainer.reporters import CsvReporter
        >>> CsvReporter("reports").close()

        Args:
            ended: the value of `History.ended`; None after an error.
        """
        if self._is_open:
            self._is_open = False
            self._succeeds(lambda: self._close(ended))

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        """Write to the report, if it is open. If the write fails, close the report."""
        if self._is_open and not self._succeeds(lambda: self._write(step, metrics)):
            self._is_open = False
            with contextlib.suppress(Exception):  # there was already a warning about this report
                self._close(None)

    def _succeeds(self, action: Callable[[], None]) -> bool:
        """Call `action`, which writes to the report or closes the report; return whether the call succeeded.

        If the call fails, warn that the report gets no more values, and that the run continues.
        """
        try:
            action()
        except Exception as error:
            warn_user(f"the {self.name} report ends here, but the run continues: {message_of(error)}")
            return False
        return True


class CsvReporter(Reporter):
    """Writes a row into metrics.csv for each step and each evaluation.

    If the loss has metrics, such as the rewards of DPO, the file has further columns for these metrics. The
    settings are written to settings.json in the same directory.

    >>> import nplora, numpy as np
    >>> report = CsvReporter("reports", {"rank": 1})
    >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    >>> trainer = nplora.Trainer(layer, loss="mse", callbacks=[report])
    >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), steps=2)
    >>> with open("reports/metrics.csv") as file:
    ...     rows = list(csv.DictReader(file))
    >>> rows[0]["step"], rows[0]["loss"]
    ('1', '0.75')
    """

    name = "csv"
    _usual = (
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "items_per_second",
        "eval_loss", "eval_accuracy",
    )  # fmt: skip

    def _open(self, run: Run) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path = self._directory / "metrics.csv"
        rows = self._rows_before(run)
        settings = json.dumps(self._settings, indent=2, allow_nan=False) + "\n"
        files.replace([_new_file(self._directory / "settings.json", settings)])
        self._begin(rows)

    def _begin(self, rows: list[dict[str, str]], more: Iterable[str] = ()) -> None:
        """Replace the content of the file by the given rows, and open the file to append more.

        Args:
            more: names of additional columns.
        """
        self._names = tuple(dict.fromkeys([*self._usual, *(name for row in rows for name in row), *more]))
        text = _csv_text([self._names, *map(self._cells, rows)])
        files.replace([_new_file(self._path, text)])
        descriptor = open_file(self._path, os.O_WRONLY | os.O_APPEND, follow_links=False)
        self._file = open(descriptor, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def _rows_before(self, run: Run) -> list[dict[str, str]]:
        """The rows for all steps and evaluations that a resumed run made before its checkpoint.

        Rows of steps after the checkpoint are dropped, because the resumed run writes them again. If a row
        is missing, for example after Ctrl-C between a step and its report, it is made from the run's history.
        """
        rows = self._rows() if os.path.lexists(self._path) else []
        found = {(row["step"], "loss" not in row): row for row in rows if "step" in row}
        steps = {(str(r.step), False): _row(r.step, _of_step(r)) for r in run.history.steps}
        evaluated = {(str(r.step), True): _row(r.step, _of_evaluation(r)) for r in run.history.evaluations}
        wanted = steps | evaluated
        order = sorted(wanted, key=lambda key: (int(key[0]), key[1]))
        return [found.get(key, wanted[key]) for key in order]

    def _rows(self) -> list[dict[str, str]]:
        """The complete rows of the file, as dicts from column names to the cells that are not empty.

        Raises:
            FileExistsError: the file has other columns, so it was not written by a run of nplora.
        """
        text = bytes(files.read(self._path, _MAX_CSV)).decode(errors="replace")
        header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
        if tuple(header[: len(self._usual)]) != self._usual:
            raise FileExistsError(
                errno.EEXIST, "the file exists, but was not written by a run", str(self._path)
            )
        complete = (zip(header, row, strict=True) for row in rows if len(row) == len(header))
        return [{name: cell for name, cell in row if cell} for row in complete]

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        row = _row(step, metrics)
        if not row.keys() <= set(self._names):
            self._file.close()
            self._begin(self._rows(), row)
        self._file.write(_csv_text([self._cells(row)]))
        self._file.flush()

    def _cells(self, row: Mapping[str, str]) -> list[str]:
        return [row.get(name, "") for name in self._names]

    def _close(self, ended: str | None) -> None:
        self._file.close()


class TensorBoardReporter(Reporter):
    """Writes event files with tensorboardX. `tensorboard --logdir DIRECTORY` shows the files.

    >>> import nplora, numpy as np
    >>> report = TensorBoardReporter("reports/tensorboard", {"rank": 1})
    >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    >>> trainer = nplora.Trainer(layer, loss="mse", callbacks=[report])
    >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), steps=2)
    >>> [name.split(".")[0] for name in os.listdir("reports/tensorboard")]
    ['events']
    """

    name = "tensorboard"
    package, pip = "tensorboardX", '"nplora[report]"'

    def _open(self, run: Run) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        # With `purge_step`, TensorBoard drops earlier events of the steps that follow, also those of an
        # overwritten run.
        self._writer = SummaryWriter(
            str(self._directory),
            purge_step=run.step + 1,
            filename_suffix=f".{run.step:09}",  # without it, two writers within a second would share a file
            flush_secs=_FLUSH_SECONDS,
        )
        if not run.step:
            for summary in hparams(self._settings, {"train/loss": 0.0, "eval/loss": 0.0}):
                self._writer.file_writer.add_summary(summary)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _close(self, ended: str | None) -> None:
        self._writer.close()


class WandbReporter(Reporter):
    """Sends the metrics to Weights & Biases.

    Environment variables of wandb, such as WANDB_PROJECT (default: nplora) and WANDB_MODE=offline, select the
    destination.

    >>> import nplora, numpy as np
    >>> report = WandbReporter("reports", {"rank": 1})
    >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    >>> trainer = nplora.Trainer(layer, loss="mse", callbacks=[report])
    """

    name = "wandb"
    package, pip = "wandb", "wandb"

    def _open(self, run: Run) -> None:
        import wandb

        self._directory.mkdir(parents=True, exist_ok=True)
        known = run.logged(self.name).get("id") if run.step else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", self._directory.resolve().parent.name),
            dir=str(self._directory),
            config=dict(self._settings),
            id=known,
            resume="allow" if known else None,
        )
        run.log(self.name, {"id": self._run.id})
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")  # W&B's own steps cannot go back

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({**metrics, "train/global_step": step})

    def _close(self, ended: str | None) -> None:
        self._run.finish(exit_code=1 if ended is None else 0)


class MlflowReporter(Reporter):
    """Sends the metrics to MLflow.

    Environment variables of MLflow select the destination: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME
    (default: nplora).

    >>> import nplora, numpy as np
    >>> report = MlflowReporter("reports", {"rank": 1})
    >>> layer = nplora.LoRALinear(np.eye(4), rank=1, rng=0)
    >>> trainer = nplora.Trainer(layer, loss="mse", callbacks=[report])
    """

    name = "mlflow"
    package, pip = "mlflow", "mlflow"

    def _open(self, run: Run) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        known = run.logged(self.name).get("id") if run.step else None
        if known:
            self._id = str(known)
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        name = self._directory.resolve().parent.name
        self._id = self._client.create_run(place, run_name=name).info.run_id
        params = [Param(name, str(value)) for name, value in self._settings.items()]
        self._client.log_batch(self._id, params=params)
        run.log(self.name, {"id": self._id})

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def _close(self, ended: str | None) -> None:
        status = {None: "FAILED", "interrupted": "KILLED"}.get(ended, "FINISHED")
        self._client.set_terminated(self._id, status)


REPORTERS: dict[str, type[Reporter]] = {
    kind.name: kind for kind in (TensorBoardReporter, WandbReporter, MlflowReporter, CsvReporter)
}


def require_reporters(op: str, names: Iterable[str]) -> None:
    """Raise an error if there is no reporter of a given name, or if its library is not installed.

    This function imports the libraries, so that a memory plan that is made afterwards includes their memory.
    """
    for name in names:
        kind = REPORTERS[_check.choice(op, "report_to", name, REPORTERS)]
        kind.require_package(op)
        if kind.package is not None:
            importlib.import_module(kind.package)


@contextlib.contextmanager
def reporting(
    names: Iterable[str], directory: Path, settings: Mapping[str, Any], tokens: Callable[[], int] | None
) -> Iterator[list[Reporter]]:
    """A context manager that makes the reporters with the given names. Their files are in `directory`.

    All reporters are closed after the `with` block.
    """
    made = [
        REPORTERS[name](directory / name if name == "tensorboard" else directory, settings, tokens)
        for name in names
    ]
    try:
        yield list(made)
    finally:
        for reporter in made:
            reporter.close()


def _row(step: int, metrics: Mapping[str, float]) -> dict[str, str]:
    """A row as a dict from column names to cells. The metric "eval/loss" is in the column "eval_loss"."""
    names = {name: name.removeprefix("train/") for name in metrics}
    names |= {name: f"eval_{name[5:]}" for name in metrics if name.startswith("eval/")}
    return {"step": str(step), **{names[name]: str(value) for name, value in metrics.items()}}


def _of_step(record: StepRecord) -> dict[str, float]:
    return {
        **{f"train/{name}": value for name, value in record.metrics.items()},
        "train/epoch": record.epoch,
        "train/loss": record.loss,
        "train/learning_rate": record.lr,
        "train/grad_norm": record.grad_norm,
    }


def _of_evaluation(record: EvaluationRecord) -> dict[str, float]:
    accuracy = {} if record.val_accuracy is None else {"eval/accuracy": record.val_accuracy}
    measured = {f"eval/{name}": value for name, value in record.val_metrics.items()}
    return {**measured, "eval/loss": record.val_loss, **accuracy}


def _plain(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The settings as numbers and short texts. A setting that is None is left out."""
    found = dict[str, str | int | float | bool]()
    for name, value in settings.items():
        if isinstance(value, tuple | list):
            value = ",".join(map(str, value))
        if value is not None:
            found[name] = value if isinstance(value, bool | int | float) else str(value)[:_LONGEST]
    return found


def _csv_text(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _new_file(path: Path, text: str) -> files.NewFile:
    content = text.encode()
    return files.NewFile(path, len(content), [content])


__all__ = ["CsvReporter", "MlflowReporter", "Reporter", "TensorBoardReporter", "WandbReporter"]
