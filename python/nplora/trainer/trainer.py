"""Trainer: fits the trainable arrays of a model to data, with checkpoints, logs and early stopping."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.distributed.communicator import Communicator
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.nn import optim
from nplora.nn.losses import CrossEntropy, LossFunction
from nplora.nn.module import Module
from nplora.nn.optim import Optimizer
from nplora.runtime.user_warning import warn_user
from nplora.trainer.batches import ArrayBatches, batches_of, validation_of
from nplora.trainer.callbacks import Callback, checked_callbacks
from nplora.trainer.evaluation import check_rows, evaluate, predict
from nplora.trainer.fit_config import KEEP, FitConfig, require_outer_steps, require_resume
from nplora.trainer.fused import FusedLoss
from nplora.trainer.history import History
from nplora.trainer.progress import progress_line
from nplora.trainer.run_directory import RunDirectory
from nplora.trainer.training_run import TrainingRun
from nplora.trainer.training_setup import TrainingSetup

Array = npt.NDArray[Any]

_OP = "Trainer.fit"
_EVALUATION_ROWS = 256


class Trainer(TrainingSetup):
    """Trains the trainable arrays of a model. The frozen weights never change.

        >>> import nplora, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x, labels = rng.normal(size=(200, 16)), rng.integers(0, 3, 200)
        >>> layer = nplora.LoRALinear(rng.normal(size=(3, 16)), rank=2, rng=0)
        >>> trainer = nplora.Trainer(layer, loss="cross_entropy", optimizer=nplora.AdamW(lr=0.01))
        >>> trainer.fit(x, labels, epochs=5, batch_size=50)
        History(20 steps, 5 epochs, ended='complete', loss 3.439 -> 3.261)

    Args:
        model: a Module.
        loss: "mse", "cross_entropy", "bce", "huber", a callable (prediction, target) -> (loss, gradient), or
            a `FusedLoss` for a model whose output is too large to keep.
        optimizer: AdamW or SGD; None: AdamW(). The optimiser's state is kept from one call of `fit` to the
            next.
        schedule: learning rate schedule after the warm-up: "constant", "linear" or "cosine".
        warmup_steps: the number of steps in which the learning rate rises to the `lr` of the optimiser.
        accumulate: the number of batches in one step. The gradient of each batch is weighted by its number of
            labelled rows or elements, so the step is the same as for one large batch. The last step of an
            epoch may have fewer batches.
        clip_norm: a limit on the Euclidean norm of all gradients together; None: no limit.
        seed: the seed for the random order of the examples. (`model.seed` seeds the initial factors and
            dropout.)
        callbacks: a list of `Callback`s, which are called in the order of the list.
        progress: whether to show a progress line on stderr (tqdm's if tqdm is installed); None: only in a
            terminal or a Jupyter notebook.
        communicator: the ranks that train together, such as an `MPICommunicator`; None: this process trains
            alone. The batches of a step are divided among the ranks, and the results have the same bits for
            any number of ranks up to `accumulate`. Every rank makes the same calls with the same model and
            data. Only rank 0 writes to the `checkpoint_dir` and shows progress.
        communication_dtype: the precision in which ranks send gradients: "float32" or "bfloat16". With
            "bfloat16", ranks send half as many bytes. The gradient of every batch (or of every micro-batch,
            if the loss divides batches) is rounded before it is added, and the sum is rounded too. A run in a
            single process rounds in the same way, so the results have the same bits for any number of ranks.
        local_steps: if given, every rank updates its copy of the trained values with its own batches. After
            every `local_steps` steps, and at the end of every epoch, the ranks average the changes of their
            trained values (DiLoCo). Ranks then exchange values much less often. `accumulate` still counts the
            batches of all ranks in one step. The results depend on the number of ranks.
        outer_lr, outer_momentum: learning rate and Nesterov momentum of the outer step, which adds the
            average change to the trained values. With `outer_lr` 1 and `outer_momentum` 0, the values become
            the averages of the ranks' values. The DiLoCo paper uses 0.7 and 0.9 for runs with hundreds of
            outer steps.
    Attributes:
        ranks: after a run on several ranks, a `RankRecord` for each rank, with its speed and waiting time.
    Raises:
        ValueError, TypeError: an argument does not fit its description above.
    """

    @_check.keywords
    def __init__(
        self,
        model: Module,
        loss: str | LossFunction | FusedLoss = "cross_entropy",
        optimizer: Optimizer | None = None,
        *,
        schedule: str = "constant",
        warmup_steps: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        progress: bool | None = None,
        communicator: Communicator | None = None,
        communication_dtype: str = "float32",
        local_steps: int | None = None,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.5,
    ) -> None:
        super().__init__(
            model, loss, optimizer, schedule, warmup_steps, accumulate, clip_norm, seed, communicator,
            communication_dtype, local_steps, outer_lr, outer_momentum,
        )  # fmt: skip
        self.callbacks = checked_callbacks("Trainer", callbacks)
        if not isinstance(progress, bool | None):
            raise TypeError(f"Trainer: progress is {_check.kind(progress)}, expected True, False or None")
        self.progress = progress

    @_check.keywords
    def fit(
        self,
        x: Any,
        y: npt.ArrayLike | None = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        batch_size: int = 32,
        shuffle: bool = True,
        validation: tuple[npt.ArrayLike, npt.ArrayLike] | Iterable[Any] | None = None,
        eval_every: int | None = None,
        patience: int | None = None,
        keep: str = "best",
        checkpoint_dir: StrPath | None = None,
        checkpoint_every: int | None = None,
        save_minutes: float = 5.0,
        resume: bool = False,
        change_compute: bool = False,
        overwrite: bool = False,
    ) -> History:
        """Train, and return the records of the run.

        Ctrl-C ends the run early. The run is then saved in the `checkpoint_dir`, if there is one, and the
        history is returned with `interrupted` set to True. A second Ctrl-C within half a second, or while the
        run is being saved, ends the program with KeyboardInterrupt after the checkpoint is written. If there
        is a `checkpoint_dir`, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 save the run and end the
        program.

        An error in a step leaves the parameters and the optimiser's moments as they were after the last
        complete step. After any error, the state of the last complete step is saved in the `checkpoint_dir`,
        and a note on the error names this step. If a checkpoint cannot be written during the run, for example
        because the disk is full, there is a warning, and the run tries again at the next checkpoint.

            >>> import nplora, numpy as np
            >>> rng = np.random.default_rng(0)
            >>> x, y = rng.normal(size=(40, 8)), rng.normal(size=(40, 2))
            >>> layer = nplora.LoRALinear(rng.normal(size=(2, 8)), rank=2, rng=0)
            >>> trainer = nplora.Trainer(layer, loss="mse")
            >>> history = trainer.fit(x, y, steps=30, batch_size=20, validation=(x, y))
            >>> len(history.steps), len(history.epochs)
            (30, 15)
            >>> history.val_loss[-1] < history.val_loss[0]
            True

        Args:
            x, y: arrays of the same length. Without y, x is an iterable of batches (x, y) or a `Batches`, and
                `batch_size` and `shuffle` have no effect. An iterable is read once per epoch, so a generator
                is enough for only one epoch. If a run is resumed in the middle of an epoch, the iterable is
                read from its beginning and the used batches are skipped, so it must yield the same batches
                again.
            epochs, steps: the length of the run in passes over the data, or in updates of the parameters. At
                most one of `epochs` and `steps` may be given; the default is 1 epoch.
            batch_size: the number of rows in a batch; the last batch of an epoch may have fewer.
            shuffle: whether each epoch has the rows in a new random order, which depends only on the seed and
                the epoch.
            validation: a tuple of two arrays, or an iterable of batches, evaluated after every epoch and at
                the end of the run.
            eval_every: also evaluate the validation data after every `eval_every` steps.
            patience: stop after this many evaluations in a row without a new lowest validation loss (early
                stopping). A loss that is NaN or infinite never counts as a new lowest loss.
            keep: which factors the model gets at the end of a run with validation data: "best" (the factors
                at the evaluation with the lowest loss) or "last". Without validation data, and after Ctrl-C
                or an error, the model has the factors of the last step. Checkpoints hold the best and the
                last factors.
            checkpoint_dir: a directory for checkpoints and `log.jsonl`, created if needed.
            checkpoint_every: the number of steps between two checkpoints. None: a checkpoint is written at
                the end of an epoch if the last checkpoint is at least a second old. In any case, a run writes
                a checkpoint at the beginning, after the first step, at the end, and after Ctrl-C.
            save_minutes: the longest time between two checkpoints in minutes; 0: no limit.
            resume: continue from the checkpoint in `checkpoint_dir`, or begin a new run if there is none. The
                results are the same, bit for bit, as those of a run without a break. The earlier history is
                read from `log.jsonl`. A run that ended with NonFiniteLossError continues from the last
                checkpoint before the step that caused the error, and only with other settings, such as a
                lower learning rate.
            change_compute: with `resume`: continue the run even if the `compute` of layers has changed.
                Without `change_compute`, this change is refused.
            overwrite: begin a new run in a `checkpoint_dir` that holds an old run. The files of the old run,
                and its adapter, are deleted when the first checkpoint of the new run is on the disk.
        Raises:
            NonFiniteLossError: a loss or a gradient is NaN or infinite. The message names the step, the batch
                and the first layer whose output is not finite. The parameters and moments stay as they were
                after the last complete step, and the state after that step is saved. The error is also raised
                if an update has made a parameter NaN or infinite; that step is not saved.
            ValueError: the arguments, the data and the checkpoint do not fit each other, or a label is out of
                range.
            TypeError: the validation data, or the results of the model or the loss, have the wrong type.
            RuntimeError: the model has replaced the array of a parameter or gradient by a new array, a layer
                is merged, or an adapter is switched off.
            CorruptError: every checkpoint in the directory is damaged, or belongs to another model.
            FileExistsError: the directory holds a run, and neither `resume` nor `overwrite` is set; or one of
                the files that the run would write exists, but was not made by a run.
            UnsafeError: one of the run's files is a symbolic link.
            BlockingIOError: another process writes to the directory.
            RankError: another rank has failed or does not respond.
            OSError: the directory, the log, or the first or last checkpoint cannot be written. The earlier
                checkpoint is kept, and the message says how many bytes were needed.
        Warns:
            UserWarning: a damaged checkpoint was skipped, and an earlier one is used; the settings, the
                instruction set or the version differ from the checkpoint's; `log.jsonl` has lost records; a
                checkpoint cannot be written during the run; the run ends before the end of the warm-up; or no
                step had a label to train on.
        """
        require_resume(_OP, change_compute, resume)
        if checkpoint_dir is not None and not self.communicator.rank:
            files.require_named(_OP, checkpoint_dir=checkpoint_dir)
            files.require_directory(checkpoint_dir)
        config = self._fit_config(
            x, y, epochs, steps, batch_size, shuffle, validation, eval_every, patience, keep,
            checkpoint_every, save_minutes, change_compute,
        )  # fmt: skip
        self._check_model()
        for batches in (config.batches, config.validation):
            if isinstance(batches, ArrayBatches):
                self._check_labels(batches)
        if self.communicator.rank:  # only rank 0 uses the directory; it sends the state of a resumed run
            return self._run(config, None, resume)
        if checkpoint_dir is None:
            if resume or overwrite or checkpoint_every is not None:
                raise ValueError(f"{_OP}: resume, overwrite and checkpoint_every need a checkpoint_dir")
            return self._run(config, None, resume=False)
        if resume and overwrite:
            raise ValueError(f"{_OP}: resume and overwrite exclude each other")
        with RunDirectory(checkpoint_dir, overwrite) as directory:
            if directory.occupied and not (resume or overwrite):
                raise FileExistsError(
                    f"{_OP}: {directory.path} holds a run{_at(directory)}: "
                    "resume=True continues the run, overwrite=True deletes it"
                )
            return self._run(config, directory, resume)

    def evaluate(
        self, x: Any, y: npt.ArrayLike | None = None, *, batch_size: int = _EVALUATION_ROWS
    ) -> dict[str, float]:
        """Return the mean loss over x and y, without dropout, as {"loss": ...}.

            >>> import nplora, numpy as np
            >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(3), rank=1))
            >>> trainer.evaluate(np.eye(3), np.array([0, 1, 1]))["accuracy"]
            0.6666666666666666

        Args:
            x, y: as in `fit`.
            batch_size: the number of rows in a call of the model.
        Returns:
            the "loss". For integer labels (...) and predictions (..., C), the result also has "accuracy", the
            share of labels that are predicted correctly. The predicted label is the index of the largest of
            the C values. Labels that the loss ignores do not count.
        Raises:
            ValueError: x and y have different lengths, the loss or the model does not accept them, or x is a
                single example.
        """
        op = "Trainer.evaluate"
        batches = batches_of(op, x, y, batch_size)
        if isinstance(batches, ArrayBatches):
            check_rows(op, self.model, batches.x)
        return evaluate(self.model, self.loss, batches)

    def predict(self, x: npt.ArrayLike, *, batch_size: int = _EVALUATION_ROWS) -> Array:
        """Compute the model's output for the rows of x (n, ...) without dropout, `batch_size` rows at a time.

            >>> import nplora, numpy as np
            >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(3), rank=1))
            >>> trainer.predict(np.ones((5, 3))).shape
            (5, 3)

        Raises:
            ValueError: x does not fit the model. (A single example must be passed as x[None].)
        """
        return predict(self.model, x, _check.integer("Trainer.predict", "batch_size", batch_size, least=1))

    def __repr__(self) -> str:
        loss = getattr(self.loss, "name", type(self.loss).__name__)
        options = {"schedule": "constant", "warmup_steps": 0, "accumulate": 1, "clip_norm": None, "seed": 0}
        changed = [
            f"{name}={getattr(self, name)!r}" for name in options if getattr(self, name) != options[name]
        ]
        settings = ", ".join([f"loss={loss!r}", f"optimizer={self.optimizer!r}", *changed])
        model = repr(self.model).replace("\n", "\n  ")
        return f"Trainer({settings})\n  {model}"

    def _run(self, config: FitConfig, directory: RunDirectory | None, resume: bool) -> History:
        line = None if self.communicator.rank else progress_line(self.progress)
        try:
            return TrainingRun(self, config, self.callbacks + ([line] if line else []), directory).execute(
                resume
            )
        finally:
            if line is not None:
                line.close()

    # ---- checks before the first step ----

    def _fit_config(
        self,
        x: Any,
        y: Any,
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        shuffle: bool,
        validation: Any,
        eval_every: int | None,
        patience: int | None,
        keep: str,
        checkpoint_every: int | None,
        save_minutes: float,
        change_compute: bool,
    ) -> FitConfig:
        if epochs is not None and steps is not None:
            raise ValueError(f"{_OP}: epochs and steps are both given, expected only one of them")
        epochs = 1 if epochs is None and steps is None else epochs
        counts = {"eval_every": eval_every, "patience": patience, "checkpoint_every": checkpoint_every}
        for name, value in counts.items():
            if value is not None:
                _check.integer(_OP, name, value, least=1)
                if name != "checkpoint_every" and validation is None:
                    raise ValueError(f"{_OP}: {name} needs validation data")
        require_outer_steps(_OP, eval_every, self.local_steps)
        minutes = _check.at_least(_OP, "save_minutes", save_minutes, 0)
        _check.choice(_OP, "keep", keep, KEEP)
        batches = batches_of(_OP, x, y, batch_size, shuffle, self.seed)
        total = steps
        if epochs is not None and batches.length is not None:
            total = _check.integer(_OP, "epochs", epochs, least=0) * -(-batches.length // self.accumulate)
        if total is None and self.schedule != "constant":
            raise ValueError(
                f"{_OP}: schedule={self.schedule!r} needs the number of steps in the run: "
                "give steps, or batches that have a len"
            )
        several = epochs is None or epochs > 1 or eval_every is not None
        config = FitConfig(
            batches=batches,
            validation=None
            if validation is None
            else validation_of(_OP, validation, _EVALUATION_ROWS, several),
            epochs=None if epochs is None else _check.integer(_OP, "epochs", epochs, least=0),
            steps=None if steps is None else _check.integer(_OP, "steps", steps, least=0),
            total_steps=total,
            eval_every=eval_every,
            patience=patience,
            keep=keep,
            checkpoint_every=checkpoint_every,
            save_seconds=60 * minutes or math.inf,
            change_compute=bool(change_compute),
        )
        if total is not None and 0 < total <= self.warmup_steps:
            warn_user(f"{_OP}: the warm-up takes {self.warmup_steps} steps, but the run ends after {total}")
        return config

    def _check_model(self) -> None:
        optim.require(_OP, self.optimizer)  # the user may have replaced the optimiser after `__init__`
        if not self.model.parameters():
            raise ValueError(f"{_OP}: the model has no trainable parameters")
        self.model.require_trainable("fit")
        if not all(layer.adapter_enabled for layer in self.model.adapter_layers().values()):
            raise RuntimeError(f"{_OP}: the adapters are switched off here by disable_adapter()")

    def _check_labels(self, batches: ArrayBatches) -> None:
        """Check all labels before the first step. The output for one row shows the number of classes."""
        if isinstance(self.loss, CrossEntropy) and batches.y.dtype.kind in "iu":
            with np.errstate(over="ignore", invalid="ignore"):
                classes = self.model(batches.x[:1]).shape[-1]
            labelled = batches.y[batches.y != self.loss.ignore_index]
            _check.in_range(_OP, "y", labelled, classes)


def _at(directory: RunDirectory) -> str:
    return f" (step {directory.newest.step})" if directory.newest else ""
