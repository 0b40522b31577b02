"""tune: search for the learning rate, the rank, the targets and the epochs of a fine-tuning run."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nplora import _check
from nplora.finetuning.data import Data
from nplora.finetuning.data.batches import TokenBatches
from nplora.finetuning.data.sources import splits_of
from nplora.finetuning.execution import adapters_of, choose_execution, predicted
from nplora.finetuning.load import (
    RunInputs,
    arithmetic_of_head,
    evaluation_batches,
    read_inputs,
    training_batches,
)
from nplora.finetuning.objectives import Objective, objective_of
from nplora.finetuning.options import FinetuneOptions, default_lr
from nplora.finetuning.planning import ExecutionPlan, available_memory
from nplora.finetuning.run import computing, new_trainer, put_on_adapter
from nplora.finetuning.token_progress import speaker
from nplora.finetuning.tuning.bayes import OptunaSampler
from nplora.finetuning.tuning.log import TuneLog
from nplora.finetuning.tuning.options import NOT_PASSED, TuneOptions
from nplora.finetuning.tuning.report import TuneReport, command_of
from nplora.finetuning.tuning.schedule import parse_budget
from nplora.finetuning.tuning.search import Search, winner_of
from nplora.finetuning.tuning.space import Settings, Space, require_values, space_of
from nplora.finetuning.tuning.trial import Trial
from nplora.formats import files
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel
from nplora.models import PrefixCache, WordFilter
from nplora.nn import TrainedHead
from nplora.nn.losses import NonFiniteLossError
from nplora.trainer.directory_lock import DirectoryLock
from nplora.trainer.evaluation import evaluate

# The search warns if there are fewer held-out examples than this, because the standard error is then about as
# large as the differences between good settings.
_FEW = 30
_SPLIT = 0.1  # the share that is held out if there are no validation data
_PREFIX_SHARE = 0.25  # share of the available memory; a larger cache is made only if the options ask for it


def tune(
    model: StrPath | LanguageModel,
    data: Data,
    output: StrPath,
    *,
    valid: Data | None = None,
    progress: bool | None = None,
    budget: str | float = "30m",
    search: Mapping[str, Sequence[Any]] | None = None,
    sampler: str = "halving",
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> TuneReport:
    """Search for the learning rate, the rank, the targets and the epochs of `finetune`, within a time budget.

    The search makes short runs, and compares their losses on held-out data. The search begins with the
    learning rate, which matters most, and then varies the rank and the targets. The best settings are trained
    at full length, and then for more epochs, until the loss no longer falls. All trials share the loaded
    model and the tokenised data. If only upper blocks are adapted, the trials also share the outputs of the
    frozen blocks below.

    Every trial begins anew, with a learning rate schedule that ends with the trial. Each trial is evaluated
    after its last step. The last trials are trained exactly as `finetune` trains with the same options.
    `tune.jsonl` in the output directory records every decision and every trial. Ctrl-C ends the search, and
    `resume=True` continues it.

    Args:
        model, data: as for `finetune`.
        output: directory for tune.jsonl.
        valid: held-out data to compare the trials on. By default, if `data` is a directory with held-out
            data, `tune` uses them; otherwise, it holds out a tenth of the examples (`valid_split=0.1`).
        progress: print progress on stderr; None: only on a terminal or in a notebook.
        budget: time for all trials, such as "90s", "30m" or "1.5h"; a number without a unit means minutes.
            The time to load the model and the data is not included.
        search: values to try, such as {"lr": [1e-4, 1e-3], "dropout": [0, 0.05]}, for any option of
            `finetune` that changes the training. The search starts with the first value of each list. If the
            search varies an option of the loss function, such as `beta`, the validation loss of every trial
            is computed with this option's first value. The learning rate, the rank, the targets and the
            epochs are always searched, unless they are given.
        sampler: source of the first trials: "halving" (a grid of learning rates) or "optuna" (its TPE
            sampler, over all searched options except the epochs).
        resume: continue the search in the output directory; no trial is repeated. The budget includes the
            time of the earlier trials, and may be larger than before.
        overwrite: delete the search in the output directory.
        options: options of `finetune` for all trials, such as `layers="last:8"`. An option that is given is
            not searched.
    Returns:
        the trials, the winner, and the command that trains it; `print` shows them.
    Raises:
        ValueError, TypeError: an option is out of range, or the budget is too small for two trials. The
            message names a budget that is enough.
        FileExistsError: the output directory holds a search, and neither `resume` nor `overwrite` is set.
        BlockingIOError: another search or run writes to the output directory; the message names its PID.
        CorruptError: tune.jsonl is damaged.
        NonFiniteLossError: before training, the validation loss is not finite.
        ModuleNotFoundError: `sampler` is "optuna", and Optuna is not installed.
        Other errors: see `finetune`.

    >>> report = nplora.finetuning.tune(
    ...     "model.gguf", "train.jsonl", "tuned", budget="4s", search={"lr": [1e-3, 1e-2]}, rank=4, epochs=2
    ... )
    >>> sorted(report.options)
    ['epochs', 'lr', 'rank', 'targets', 'valid_split']
    >>> best = nplora.finetune("model.gguf", "train.jsonl", "tuned/best", **report.options)
    """
    chosen = TuneOptions(budget, search or {}, sampler, resume, overwrite)
    _require_options(options)
    files.require_named("tune", output=output)
    files.require_directory(output)
    require_values("tune", chosen.search, options)
    rows = list(data) if isinstance(data, Iterator) else data
    base = FinetuneOptions(**_with_split(rows, valid, options), op="tune")
    return _Tuning(model, rows, valid, Path(output), base, options, chosen, speaker(progress)).run()


def _require_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError if a keyword is no option of `finetune`, or is an option that a search cannot use."""
    known = {field.name for field in dataclasses.fields(FinetuneOptions)} - {*NOT_PASSED}
    for name in options:
        if name in NOT_PASSED:
            raise TypeError(f"tune: unexpected keyword {name!r}: a search cannot use this option of finetune")
        if name not in known:
            raise TypeError(f"tune: unexpected keyword {name!r}{_check.suggestion(name, known)}")


def _with_split(data: Data, valid: Data | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Copy `options`, and add `valid_split` if there are no validation data."""
    if valid is not None or options.get("valid_split") is not None or splits_of("tune", data).valid:
        return dict(options)
    return {**options, "valid_split": _SPLIT}


@dataclass
class _Tuning:
    """A search: its arguments, and the objects that its trials share."""

    model: StrPath | LanguageModel
    data: Data
    valid: Data | None
    output: Path
    base: FinetuneOptions
    given: Mapping[str, Any]
    chosen: TuneOptions
    say: Callable[[str], None]

    def run(self) -> TuneReport:
        inputs = read_inputs("tune", self.model, self.data, self.valid, self._reading())
        assert inputs.held_out is not None, "examples are held out if there are no validation data"
        rate = default_lr(inputs.lm.config.hidden_size, self.base.objective)
        space = space_of(inputs.lm, self.given, self.chosen.search, rate)
        sampler = OptunaSampler(space, self.base.seed) if self.chosen.sampler == "optuna" else None
        batches = training_batches(inputs.train, self.base)
        epoch = -(-batches.length // self.base.accumulate)
        full = self.base.steps or (self.base.epochs or min(space.epochs, default=1)) * epoch
        largest = self._largest(inputs, space, full)
        execution = choose_execution(self.model, inputs, largest, None, self.say)
        planned = predicted("tune", inputs, adapters_of("tune", inputs, largest), largest, execution)
        for dataset in inputs.datasets:
            self.say(str(dataset.report))
        if noise := _noise(len(inputs.held_out)):
            self.say(noise)

        self.output.mkdir(parents=True, exist_ok=True)
        with files.Directory(self.output) as directory, DirectoryLock(directory, "another search or run"):
            return self._search(inputs, space, sampler, execution, planned.seconds, epoch, full)

    def _search(
        self,
        inputs: RunInputs,
        space: Space,
        sampler: OptunaSampler | None,
        execution: ExecutionPlan,
        seconds: float,
        epoch: int,
        full: int,
    ) -> TuneReport:
        """Make the trials and report them.

        Args:
            seconds: the predicted time of a step.
            epoch, full: the numbers of steps of an epoch and of a whole run.
        """
        log = TuneLog(self.output)
        log.begin(self._identity(inputs, space), self.chosen.resume, self.chosen.overwrite)
        trials = _Trials(inputs, self.base, self._started(inputs), execution, full, self.output, self.say)
        search = Search(
            space, epoch, full, parse_budget(self.chosen.budget), seconds, log, trials.make, sampler,
            self.say,
        )  # fmt: skip
        with trials:
            if log.baseline is None:
                log.add_baseline(*trials.baseline())
            self.say(f"validation loss {log.baseline[0]:.4f} before training")  # type: ignore[index]
            try:
                search.run()
            except KeyboardInterrupt:
                search.ended = "interrupted"
        return self._report(search, _noise(len(inputs.held_out or ())))

    def _reading(self) -> FinetuneOptions:
        """The base options with the value of `loss_type` that needs the most sequences.

        The data are read once, for the trials of all values.
        """
        types = self.chosen.search.get("loss_type", (self.base.loss_type,))
        options = [dataclasses.replace(self.base, loss_type=name) for name in types]
        return max(options, key=lambda one: objective_of(one).extra_passes)

    def _largest(self, inputs: RunInputs, space: Space, full: int) -> FinetuneOptions:
        """The options of the trial with the most trained parameters, which needs the most memory."""
        largest = dataclasses.replace(self.base, **space.settings(space.rates[0]), epochs=None, steps=full)
        for name, values in space.others.items():
            made = [dataclasses.replace(largest, **{name: value}) for value in values]
            largest = max(made, key=lambda options: adapters_of("tune", inputs, options).numbers)
        return largest

    def _started(self, inputs: RunInputs) -> FinetuneOptions:
        """The base options, with the first value of each option in `search` except the epochs.

        Raises:
            ValueError: a value in `search` cannot be used with the teacher.
        """
        for name, values in self.chosen.search.items():
            for value in values:
                inputs.objective.with_options("tune", dataclasses.replace(self.base, **{name: value}))
        first = {name: values[0] for name, values in self.chosen.search.items() if name != "epochs"}
        return dataclasses.replace(self.base, **first)

    def _identity(self, inputs: RunInputs, space: Space) -> dict[str, Any]:
        """Everything that the results of the trials depend on, as JSON values."""
        assert inputs.held_out is not None
        changed = {
            field.name: getattr(self.base, field.name)
            for field in dataclasses.fields(self.base)
            if field.name in self.given or field.name == "valid_split"
        }
        return {
            "model": inputs.lm.base_digest(),
            "data": inputs.train.fingerprint(),
            "validation data": inputs.held_out.fingerprint(),
            "options": {name: _plain(value) for name, value in changed.items() if value is not None},
            "search": {name: _plain(values) for name, values in space.described().items()},
            "sampler": self.chosen.sampler,
        }

    def _report(self, search: Search, noise: str) -> TuneReport:
        log = search.log
        assert log.baseline is not None
        winner = winner_of(log.trials, search.full)
        options: dict[str, Any] = {}
        command = ""
        if winner is not None:
            options = self._options(winner, search)
            command = self._command(options)
        return TuneReport(
            self.output, tuple(log.trials), winner, options, command, log.baseline[0], log.seconds,
            search.budget, search.ended,
            (*([noise] if noise else []), *_notes(winner, log.trials, search.full)),
        )  # fmt: skip

    def _options(self, winner: Trial, search: Search) -> dict[str, Any]:
        options = dict(self.given)
        if self.base.valid_split is not None:
            options["valid_split"] = self.base.valid_split
        options |= winner.settings
        if "steps" not in options and "epochs" not in options:
            longest = max(winner.steps, search.full)
            options["epochs"] = longest // search.epoch_steps
        return options

    def _command(self, options: Mapping[str, Any]) -> str:
        model = self.model.source if isinstance(self.model, LanguageModel) else self.model
        data = _named(self.data, "DATA")
        held_out = [] if self.valid is None else _named(self.valid, "VALID")
        valid = "VALID" if len(held_out) > 1 else next((name for name, _ in held_out), None)
        return command_of(files.name(model), data, valid, self.output / "best", options)


def _named(data: Data, otherwise: str) -> list[tuple[str, float]]:
    """Return pairs (file name, weight). If the data are not in files, return one pair (`otherwise`, 1.0)."""
    given: list[Any] = (
        [data] if isinstance(data, str | os.PathLike) or not isinstance(data, Sequence) else list(data)
    )
    pairs = [item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0) for item in given]
    if not all(isinstance(path, str | os.PathLike) for path, _ in pairs):
        return [(otherwise, 1.0)]
    return [(files.name(path), float(weight)) for path, weight in pairs]


def _noise(examples: int) -> str:
    """A note if there are few held-out examples, else ""."""
    if examples >= _FEW:
        return ""
    return (
        f"with {counted(examples, 'held-out example')}, the differences between the losses are mostly noise; "
        f"use at least {_FEW} examples, better 100 or more"
    )


def _notes(winner: Trial | None, trials: Sequence[Trial], full: int) -> Iterator[str]:
    if winner is None:
        return
    rates = sorted({trial.settings["lr"] for trial in trials})
    if len(rates) > 1 and winner.settings["lr"] in (rates[0], rates[-1]):
        which = "smallest" if winner.settings["lr"] == rates[0] else "largest"
        yield f"the best learning rate is the {which} that was tried: use --search lr=... to try other rates"
    epochs = [trial.epochs for trial in trials if trial.epochs and trial.steps >= full]
    if winner.epochs and len(set(epochs)) > 1 and winner.epochs == max(epochs):
        yield "the best number of epochs is the highest that was tried: use --search epochs=... to try more"
    if winner.steps < full:
        yield (
            f"the longest trials had {winner.steps} of the {full} steps of a full run: use a larger "
            "--budget to compare full runs"
        )


def _plain(value: Any) -> Any:
    """A value as JSON."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | Mapping) else str(value)


class _Trials:
    """Makes trials on one model.

    All trials share the weights, the data, and the outputs of the frozen blocks.

    Args:
        base: the options of every trial, apart from those that the trial's settings change.
        first: `base` with the first value of each searched option. The validation loss of every trial is
            computed with these options, because losses with different options cannot be compared.
    """

    def __init__(
        self,
        inputs: RunInputs,
        base: FinetuneOptions,
        first: FinetuneOptions,
        execution: ExecutionPlan,
        full: int,
        output: Path,
        say: Callable[[str], None],
    ) -> None:
        assert inputs.held_out is not None
        self._inputs, self._base, self._execution, self._full = inputs, base, execution, full
        self._output, self._say = output, say
        self._measure = inputs.objective.with_options("tune", first)
        self._prepared = list[dict[str, Any]]()  # identities of the batches that were prepared
        self._validation: TokenBatches = evaluation_batches(inputs.held_out)
        self._prefix: PrefixCache | None = None

    def __enter__(self) -> _Trials:
        self._output.mkdir(parents=True, exist_ok=True)
        self._prepare(self._measure, self._validation)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._prefix is not None:
            self._prefix.close()

    def _prepare(self, objective: Objective, batches: TokenBatches) -> None:
        """Let the objective precompute what its loss needs for `batches`, if it has not done so before."""
        if batches.identity() not in self._prepared:
            plain = self._inputs.lm.with_tokens(self._inputs.added_tokens)
            with files.Directory(self._output) as directory:
                objective.prepare(plain, [batches], directory, self._say)
            self._prepared.append(batches.identity())

    def baseline(self) -> tuple[float, float]:
        """A pair: the validation loss before training, and the number of seconds that the evaluation took.

        Raises:
            NonFiniteLossError: the loss is not finite.
        """
        lm = self._model(self._base)
        lm.model.prefix = self._shared_prefix(lm)
        loss, seconds = self._evaluated(lm)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"tune: the validation loss before training is {loss}, expected a finite number"
            )
        return loss, seconds

    def make(self, settings: Settings, steps: int) -> tuple[float, float, float]:
        """Make a trial. Return the validation loss, the seconds of training, and the seconds of evaluation.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the training.
        """
        options = dataclasses.replace(self._base, **settings, epochs=None, steps=steps)
        if steps < self._full:
            options = dataclasses.replace(options, warmup=options.warmup * steps // self._full)
        objective = self._inputs.objective.with_options("tune", options)
        batches = training_batches(self._inputs.train, options)
        self._prepare(objective, batches)
        start = time.perf_counter()
        lm = self._model(options)
        loss = objective.loss(self._execution.micro_tokens)
        loss.word_filter = WordFilter(options.filter_vocabulary) if options.filter_vocabulary else None
        trainer = new_trainer(lm, loss, options, [])
        int8_head = arithmetic_of_head(lm, options, isinstance(lm.lm_head, TrainedHead))
        with computing(lm, self._execution, self._shared_prefix(lm), loss.word_filter, int8_head):
            try:
                history = trainer.fit(batches, steps=steps)
            except NonFiniteLossError:
                return math.inf, time.perf_counter() - start, 0.0
            if history.interrupted:
                raise KeyboardInterrupt
            seconds = time.perf_counter() - start
            held_out, evaluation = self._evaluated(lm)
        return held_out if math.isfinite(held_out) else math.inf, seconds, evaluation

    def _model(self, options: FinetuneOptions) -> LanguageModel:
        """The model with a new adapter. The models of all trials share the frozen weights."""
        lm = self._inputs.lm.copied({})
        put_on_adapter(lm, self._inputs.start, options)
        return lm

    def _evaluated(self, lm: LanguageModel) -> tuple[float, float]:
        start = time.perf_counter()
        loss = self._measure.loss(self._execution.micro_tokens)
        found = evaluate(lm, loss, self._validation)["loss"]
        return found, time.perf_counter() - start

    def _shared_prefix(self, lm: LanguageModel) -> PrefixCache | None:
        """The cache that stores the input of the first adapted block.

        The option `keep_prefix` decides where the cache is stored. If the option is "off" and no memory limit
        is given, a small cache is still kept in memory.
        """
        first, nbytes = lm.model.first_adapted(), 4 * self._inputs.tokens * lm.config.hidden_size
        if self._prefix is None and first:
            where = self._base.keep_prefix
            if where == "off" and self._base.memory is None:
                where = "memory" if nbytes < _PREFIX_SHARE * (available_memory() or 0) else "off"
            if where != "off":
                directory = self._output if where == "disk" else None
                self._prefix = PrefixCache(first, self._inputs.tokens, lm.config.hidden_size, directory)
        return self._prefix
