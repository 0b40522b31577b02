"""train_classifier: trains LoRA and a new head on labelled texts, and saves both as a PEFT adapter."""

import contextlib
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import rollback_on_error, save_adapter
from nplora.distributed.communicator import Communicator
from nplora.distributed.opening import (
    heard_by_all_ranks,
    opened_communicator,
    or_none_if_alone,
    say_if_alone,
)
from nplora.finetuning.agreement import require_same_data, require_same_options
from nplora.finetuning.classification.calibration import temperature as fitting_temperature
from nplora.finetuning.classification.calibration import warn_if_all_right
from nplora.finetuning.classification.class_weights import balanced_weights
from nplora.finetuning.classification.encoded import Encoded, cut_in_words, require_words, unit_of
from nplora.finetuning.classification.labelled import (
    Columns,
    LabelledTexts,
    RowReader,
    Targets,
    require_tokens,
    targets_of,
    task_of,
    unfit_tag,
)
from nplora.finetuning.classification.metrics import ClassificationReport
from nplora.finetuning.classification.options import ClassifyOptions
from nplora.finetuning.classification.text_batches import TextBatches
from nplora.finetuning.classification.text_progress import TextProgress
from nplora.finetuning.data import Data
from nplora.finetuning.data.sources import Source, sources_of, splits_of
from nplora.finetuning.earlier_run import compute_for
from nplora.finetuning.int8_callbacks import int8_callbacks
from nplora.finetuning.int8_check import warn_of_slow_int8
from nplora.finetuning.options import default_lr, parse_columns, require_int8
from nplora.finetuning.output import opened_output, require_free_directory
from nplora.finetuning.report import WAS_FINISHED, memory_in_words
from nplora.finetuning.token_progress import speaker, speaks
from nplora.formats import files, model_directory, peft_adapter, run_files
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.formats.label_record import shown
from nplora.lm import Encoder, TextClassifier, new_classifier
from nplora.lm.classifier_loading import opened_encoder, require_room
from nplora.lm.encoder import MOST_TOKENS
from nplora.models.packing import cut
from nplora.nn.losses import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError
from nplora.nn.optim import AdamW
from nplora.runtime.user_warning import warn_user
from nplora.trainer import Callback, History, RankRecord, Run, Trainer
from nplora.trainer.callbacks import checked_callbacks
from nplora.trainer.interrupts import Interrupts

Array = npt.NDArray[Any]

_EPOCHS = 3


@dataclass(frozen=True)
class ClassifierRun:
    """The results of a training run; `print` shows them.

    Attributes:
        output: the directory with the adapter.
        classifier: the trained classifier.
        examples: the number of texts or sentences that were trained on.
        cut: the number of texts in training and validation data that were too long and were cut. If words are
            labelled, only training sentences count, because long validation sentences are not cut but read
            in windows.
        lost: the number of words in the training data that were not used, because they have no token, or
            because the end of their sentence was cut off.
        skipped: a text about the bad rows that were skipped; empty if there are none.
        valid: the report on the validation data; None without such data.
        temperature: the number by which the logits were divided; 1 without `calibrate`.
        history: the records of the trainer.
        process: the rank of this process, if several processes have trained together.
        ranks: the speed and the waiting time of each of these processes.
        was_finished: whether the resumed run was already finished, so that nothing was trained.

    >>> rows = [{"text": "where is my parcel", "label": "order"}, {"text": "a refund", "label": "refund"}]
    >>> run = nplora.finetuning.train_classifier("encoder-model", rows, "out", epochs=2)
    >>> print(run)
    2 steps in ... s, ... texts/s, peak memory ... MB, loss ...
    2 labels: order, refund
    trained ... of ... values
    out/ holds the adapter (PEFT's format)
    """

    output: Path
    classifier: TextClassifier
    examples: int
    cut: int
    lost: int
    skipped: str
    valid: ClassificationReport | None
    temperature: float
    history: History
    process: int = 0
    ranks: tuple[RankRecord, ...] = ()
    was_finished: bool = False

    def __str__(self) -> str:
        model, history = self.classifier, self.history
        counted_each = len(model.labels) if model.task == "multi" else 1  # elements of the loss for a text
        texts = sum(record.count for record in history.steps) / counted_each
        rate, unit = texts / max(1e-9, history.seconds), "words" if model.classifies_tokens else "texts"
        losses = f", loss {history.loss[0]:.4f} -> {history.loss[-1]:.4f}" if history.steps else ""
        names = ", ".join(map(shown, model.labels[:20])) + (", …" if len(model.labels) > 20 else "")
        lines = [
            *([WAS_FINISHED] * self.was_finished),
            f"{counted(len(history.steps), 'step')} in {history.seconds:.1f} s, {rate:.1f} {unit}/s"
            f"{memory_in_words(self.was_finished)}{losses}",
            *(record.in_words("labels" if counted_each > 1 else unit) for record in self.ranks),
            f"{counted(len(model.labels), 'label')}: {names}",
            f"trained {model.num_trainable:,} of {model.num_parameters:,} values",
        ]
        if self.cut or self.lost:
            lines.append(cut_in_words(self.cut, self.lost, model.max_length, unit_of(model)))
        if self.skipped:
            lines.append(self.skipped)
        if history.best_step is not None and len(history.evaluations) > 1:
            lines.append(
                f"the adapter is from step {history.best_step}, which had the lowest validation loss"
            )
        if self.temperature != 1:
            lines.append(f"calibrated: the logits are divided by {self.temperature:.4g}")
        if self.valid is not None:
            lines += ["", "validation data:", str(self.valid), ""]
        ended = ", interrupted: --resume continues" if history.interrupted else ""
        lines.append(f"{self.output}{os.sep} holds the adapter (PEFT's format){ended}")
        return "\n".join(lines)


class _Start(Callback):
    """Stores whether the run was already finished when it was resumed."""

    was_finished = False

    def on_fit_start(self, run: Run) -> None:
        self.was_finished = run.was_finished


@_check.keywords
def train_classifier(
    model: StrPath | Encoder,
    data: Data,
    output: StrPath,
    *,
    valid: Data | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    communicator: Communicator | None = None,
    task: str | None = None,
    class_weights: str = "none",
    separator: str = "|",
    calibrate: bool = False,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Sequence[str] = ("all-linear",),
    layers: str | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "zero",
    lr: float | None = None,
    schedule: str = "cosine",
    warmup: int = 0,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_examples: int = 32,
    accumulate: int = 1,
    columns: Mapping[str, str] | str | None = None,
    valid_split: float | None = None,
    max_length: int | None = None,
    skip_bad: bool = False,
    eval_every: int | None = None,
    patience: int | None = None,
    keep: str = "best",
    compute: str | None = None,
    keep_int8: bool = False,
    save_every: int = 100,
    save_minutes: float = 5.0,
    resume: bool = False,
    change_compute: bool = False,
    overwrite: bool = False,
    distributed: str | None = None,
) -> ClassifierRun:
    """Train LoRA on an encoder, and a new head, to classify texts or words, or to predict numbers.

    There are four tasks:
    - "single": a row has a text and its label, {"text": ..., "label": ...}.
    - "multi": the label of a text is a list of texts, or a text with separators.
    - "regression": the label of a text is a number.
    - "tokens": a row has the words of a sentence and a tag for each word, {"tokens": [...], "tags": [...]}.
      The loss compares only the prediction for a word's first token with the tag.

    The adapter has PEFT's task type TOKEN_CLS for the task "tokens", and SEQ_CLS for the other tasks. The
    adapter includes the head and the names of the labels. The output directory also holds checkpoints and
    `log.jsonl`. Ctrl-C ends the run and saves the current adapter. `resume=True` continues the run; the
    results are bit for bit the same as without a stop. Nothing is written before all rows are read and
    checked.

    For a regression, the model is trained on targets with mean 0 and variance 1. The saved head predicts the
    original targets. The head of a language model has no bias. So for a language model, the targets are only
    divided by the root of their mean square, and their mean is not subtracted.

    Args:
        model: a path as for `load_encoder`, or a loaded encoder without an adapter. A loaded encoder is
            itself trained, and has the adapter after the call.
        data: rows to train on: a file (.csv, .jsonl, .parquet, …), an iterable of dictionaries, a data frame;
            or a directory with train.csv and perhaps valid.csv. In pairs (file, weight), the weight is
            ignored.
        output: directory for the adapter, the checkpoints and the log.
        valid: rows to evaluate on, after every epoch and at the end.
        progress: print progress on stderr; None: only on a terminal or in a notebook.
        callbacks: your `Callback`s; `run.model` is the classifier.
        communicator: the ranks that train together, as in `Trainer`; with `distributed`, this function opens
            a communicator itself. The ranks divide the batches of each step among themselves, so there may be
            at most `accumulate` ranks. The adapter has the same bits for any number of ranks. Every rank
            makes the same call. Only rank 0 writes to `output`.
        task: kind of the labels: single (one label for each text, the default), multi (any number of labels
            for each text), regression (a number for each text) or tokens (one label for each word, the
            default for rows with words and tags).
        class_weights: weights of the labels in the loss: none, or balanced (rare labels count more, so that
            all labels have the same total weight; only for single and tokens).
        separator: text between two labels of a row, if the labels are not given as a list.
        calibrate: after training, divide the logits by the temperature that fits the validation data best.
        rank: rank of the LoRA factors.
        alpha: LoRA alpha: the update is scaled by alpha / rank.
        targets: layers that get an adapter: all-linear, or a list of names such as query,value.
        layers: blocks that get an adapter: last:N or first:N (default: all).
        dropout: LoRA dropout probability.
        use_rslora: scale the update by alpha / sqrt(rank) (rsLoRA).
        use_dora: also train the magnitude of each row of the weights (DoRA).
        init: initial factors: zero (the model is unchanged at first), gaussian (both factors are random, so
            that the model changes at once), pissa or olora (the principal part of each weight; unquantised
            weights only).
        lr: peak learning rate (default: 0.8 / hidden size of the model, at most 2e-3).
        schedule: learning rate schedule: cosine, linear or constant.
        warmup: warm-up steps, in which the learning rate rises to its peak.
        weight_decay: weight decay of AdamW.
        max_grad_norm: maximum norm of the gradients; larger gradients are scaled down to this norm.
        epochs: passes over the data (default: 3, unless `steps` is given).
        steps: optimiser steps, instead of `epochs`.
        seed: random seed of the initial values, the dropout and the order of the data.
        batch_examples: texts in a batch.
        accumulate: batches in one step (gradient accumulation).
        columns: names of fields in the data, as in text=review,label=stars or tokens=words,tags=pos.
        valid_split: share of the rows to hold out for validation; a hash of each row's text decides
            which rows.
        max_length: maximum tokens of a text; longer texts are cut (default: the model's maximum).
        skip_bad: skip bad rows of the data, and count them.
        eval_every: number of steps between two evaluations of the validation data; the run also
            evaluates after every epoch.
        patience: end the run after this number of evaluations in a row without a lower validation loss (early
            stopping).
        keep: adapter to save if there are validation data: best (with the lowest validation loss) or last.
        compute: arithmetic of the products with frozen weights: float32, bfloat16 or int8 (default: float32,
            or with `resume` the arithmetic of the run).
        keep_int8: keep weights in memory as 8-bit integers too, with compute int8, so that they are converted
            only once; steps become faster, but the integers take one byte for each weight of the first
            adapted block and of all later blocks.
        save_every: steps between checkpoints.
        save_minutes: maximum minutes between checkpoints; 0: no limit.
        resume: continue the run in the output directory; the results are bit for bit the same as without a
            stop.
        change_compute: with `resume`: continue the run even if `compute` has changed.
        overwrite: delete the run and the adapter in the output directory.
        distributed: how several processes train: mpi (all processes of one mpirun train one adapter
            together, each with some batches of every step) or off (each process makes a separate run).
    Returns:
        the classifier, the report on the validation data, and the history; `print` shows them.
    Raises:
        DataError: a row is wrong, labels are of mixed types, there is only one label, no word has a token, or
            the validation data have a label that the training data do not have.
        ValueError, TypeError: an option is out of range, or `calibrate` is set without validation data; or
            the ranks do not have the same options and data.
        FileExistsError: the output directory holds a run, and neither `resume` nor `overwrite` is set; or it
            holds an adapter, and `overwrite` is not set.
        Other errors: see `load_encoder` and `Trainer.fit`.
    Warns:
        UserWarning: tags look like those of entities, but one of them fits no scheme such as IOB2.

    >>> rows = [{"text": "where is my parcel", "label": "order"}, {"text": "a refund", "label": "refund"}]
    >>> run = nplora.finetuning.train_classifier("encoder-model", rows, "out", epochs=20, lr=1e-2)
    >>> nplora.load_classifier("encoder-model", "out").predict(["a refund"])
    ['refund']

    >>> rows = [{"tokens": ["return", "my", "parcel"], "tags": ["O", "O", "THING"]}]
    >>> run = nplora.finetuning.train_classifier("encoder-model", rows, "tags", epochs=60, lr=1e-2)
    >>> run.classifier.predict_words([["return", "my", "parcel"]])
    [['O', 'O', 'THING']]
    """
    arguments = locals()
    op = "train_classifier"
    with heard_by_all_ranks(distributed):
        options = ClassifyOptions(**{field.name: arguments[field.name] for field in fields(ClassifyOptions)})
        own = checked_callbacks(op, callbacks)
        files.require_named(op, output=output)
    undo = rollback_on_error(model) if isinstance(model, Encoder) else contextlib.nullcontext(_nothing)
    with opened_communicator(op, distributed, communicator) as ranks, undo as keep_layers:
        return _Training(model, data, output, valid, options, ranks, progress).run(own, keep_layers)


class _Training:
    """One run of `train_classifier`. The constructor reads and checks all input."""

    def __init__(
        self,
        model: StrPath | Encoder,
        data: Data,
        output: StrPath,
        valid: Data | None,
        options: ClassifyOptions,
        ranks: Communicator,
        progress: bool | None,
    ) -> None:
        op = "train_classifier"
        self.options, self.given, self.output = options, output, Path(files.absolute(output))
        self.ranks, self.is_first = ranks, ranks.rank == 0  # the first rank writes the output and prints
        self.speaking = self.is_first and speaks(progress)
        self.say = speaker(self.speaking)
        say_if_alone(ranks, options.distributed, progress)
        require_same_options(ranks, options, op)
        if self.is_first:
            files.require_directory(output)
        compute = compute_for(model, output, options.compute, options.resume, ranks, self.say)
        used = model.compute if isinstance(model, Encoder) else compute or "float32"
        require_int8(op, used, keep_int8=options.keep_int8)
        splits = splits_of(op, data)
        held_out = splits.valid if valid is None else sources_of(op, valid)
        columns = parse_columns(options.columns, op)
        self.task = task_of(options.task, columns, splits.train)
        self.columns = Columns.of(op, columns, self.task)
        self.train, self.valid = self._read(splits.train, held_out)
        require_same_data(ranks, self.train, self.valid, op)
        if self.valid is None and options.calibrate:
            raise ValueError(
                f"{op}: calibrate=True needs validation data: give --valid (valid=...) or --valid-split "
                "(valid_split=...)"
            )
        labels = self.train.labels(self.task)
        encoder = opened_encoder(op, model, compute)
        warn_of_slow_int8(op, encoder)
        if isinstance(model, Encoder) and model.adapter_layers():
            raise ValueError(f"{op}: the encoder has an adapter already, expected an encoder without one")
        if self.is_first:
            self._require_not_read(encoder, [*splits.train, *(held_out or [])])
        tokens = self.task == "tokens"
        self.classifier = new_classifier(
            encoder, labels, "single" if tokens else self.task, tokens, options.seed
        )
        if options.max_length is not None:
            most = encoder.config.max_position_embeddings
            self.classifier.max_length = _check.integer(op, "max_length", options.max_length, 1, most)
            require_room(op, self.classifier)
        self.train_ids = self._encoded(self.train)
        self.valid_ids = None if self.valid is None else self._encoded(self.valid)
        self.base = os.fspath(encoder.source if isinstance(model, Encoder) else model)
        if self.is_first:
            require_free_directory(output, options.resume, options.overwrite)

    def _read(
        self, sources: Sequence[Source], held_out: Sequence[Source] | None
    ) -> tuple[LabelledTexts, LabelledTexts | None]:
        options = self.options
        reader = RowReader(self.columns, self.task, options.separator)
        train = reader.read(sources, options.skip_bad)
        if held_out is None:
            return (train, None) if options.valid_split is None else self._divided(train, options.valid_split)
        if options.valid_split is not None:
            raise ValueError(
                "train_classifier: valid_split and validation data are both given, expected only one of them"
            )
        known = None if self.task == "regression" else train.labels(self.task)
        valid = RowReader(self.columns, self.task, options.separator, known)
        return train, valid.read(held_out, options.skip_bad)

    def _divided(self, rows: LabelledTexts, share: float) -> tuple[LabelledTexts, LabelledTexts]:
        """Divide the rows. The known labels of the training rows include those of the held-out rows."""
        train, valid = rows.divided(share)
        labels = () if self.task == "regression" else rows.labels(self.task)
        return train.with_labels(labels), valid

    def _require_not_read(self, encoder: Encoder, sources: Sequence[Source]) -> None:
        names = [*run_files.NAMES, peft_adapter.CONFIG, peft_adapter.TENSORS]
        read: list[tuple[str, StrPath]] = [
            ("model", path) for path in model_directory.files_of(encoder.config.source)
        ]
        read += [("data", source.path) for source in sources if source.path is not None]
        files.require_not_read("train_classifier", [Path(self.output, name) for name in names], read)

    def _encoded(self, rows: LabelledTexts) -> Encoded:
        made = Encoded.of(self.classifier, rows.rows)
        for where, text in zip(rows.places, made.ids, strict=True):
            require_tokens(where, text, unit_of(self.classifier))
        if made.words is not None:
            require_words(rows.names, sum(map(len, made.words.first)) - made.lost)
        return made

    # ---- the run ----

    def run(self, own: list[Callback], keep_layers: Any) -> ClassifierRun:
        options, classifier, say = self.options, self.classifier, self.say
        labels = classifier.labels
        examples = counted(len(self.train), unit_of(classifier))
        say(f"{examples} to train on, {counted(len(labels), 'label')}")
        if self.is_first and self.task == "tokens":
            data = [self.train] if self.valid is None else [self.train, self.valid]
            if unfit := unfit_tag(labels, *data):
                warn_user(f"train_classifier: {unfit}")
        targets = targets_of(self.train, self.task, labels)
        truth = None if self.valid is None else targets_of(self.valid, self.task, labels)
        centre, spread = 0.0, 1.0
        if self.task == "regression":
            centre, spread = _standard(np.asarray(targets), classifier)
        classifier.add_lora(
            options.rank, options.alpha, options.targets, options.layers, options.dropout, options.use_rslora,
            options.use_dora, options.seed, options.init,
        )  # fmt: skip
        start, loss = _Start(), self._loss(targets)
        train, valid = self._batches(targets, truth, centre, spread)
        sample = functools.partial(train.sample_gradient, classifier, loss)
        in_int8 = int8_callbacks(classifier, classifier.encoder.model, sample, options.keep_int8, say)
        found_at = self.output
        with opened_output(self.output, self.ranks) as directory, in_int8 as checks:
            callbacks = [start, *checks, *own, *([TextProgress(*self._counted())] * self.speaking)]
            trainer = self._trainer(loss, callbacks)
            history = self._fit(trainer, train, valid, directory)
            classifier.head.rescale(spread, centre)
            fitted, report = 1.0, None
            if self.valid is not None and self.valid_ids is not None and truth is not None:
                encoded = self.valid_ids
                if encoded.cut and classifier.classifies_tokens:
                    encoded = Encoded.of(classifier, self.valid.rows, whole=True)
                ids, chosen = encoded.inputs(classifier)
                logits, truth = self._logits(ids)[chosen], encoded.truth(truth)
                if options.calibrate:
                    fitted = fitting_temperature(classifier.task, logits, _joined(truth))
                    warn_if_all_right("train_classifier", fitted)
                    classifier.head.rescale(1 / fitted)
                    logits = logits / fitted
                report = ClassificationReport.of(self.task, labels, logits, truth)
            if directory is not None:
                with Interrupts(terminate=False) as interrupts, interrupts.hold():
                    save_adapter(classifier, directory, self.base)
                found_at = directory.seen_from(self.given)
            keep_layers()  # if saving fails, this is not reached, and the encoder is restored
        cut_off = [self.train_ids]
        if self.valid_ids is not None and self.task != "tokens":  # the report reads long sentences in windows
            cut_off.append(self.valid_ids)
        bad = [rows.bad.reason() for rows in (self.train, self.valid) if rows is not None and rows.bad.count]
        return ClassifierRun(
            found_at, classifier, len(self.train), sum(each.cut for each in cut_off),
            sum(each.lost for each in cut_off), "; ".join(dict.fromkeys(bad)), report, fitted, history,
            self.ranks.rank, tuple(trainer.ranks), start.was_finished,
        )  # fmt: skip

    def _counted(self) -> tuple[int, str]:
        """The arguments of `TextProgress`."""
        if self.task == "tokens":
            return 1, "words"
        return len(self.classifier.labels) if self.task == "multi" else 1, "texts"

    def _logits(self, ids: list[list[int]]) -> Array:
        """Compute the logits of texts, bit for bit equal to those of `logits_of_ids`.

        The batches are divided among the ranks.
        """
        cuts = cut(np.array([len(text) for text in ids]), MOST_TOKENS)
        batches = [ids[first:end] for first, end in itertools.pairwise(cuts)]
        made = list[Array]()
        for begin in range(0, len(batches), self.ranks.size):
            own = batches[begin : begin + self.ranks.size][self.ranks.rank :][:1]
            logits = [self.classifier.logits_of_ids(batch) for batch in own]
            made += itertools.chain(*self.ranks.gather(logits, "the report on the validation data"))
        return np.concatenate(made)

    def _batches(
        self, targets: Targets, truth: Targets | None, centre: float, spread: float
    ) -> tuple[TextBatches, TextBatches | None]:
        size, seed = self.options.batch_examples, self.options.seed

        def standardised(values: Targets) -> Targets:
            if self.task != "regression":
                return values
            return ((np.asarray(values, np.float64) - centre) / spread).astype(np.float32)

        train = self.train_ids.batches(standardised(targets), size, True, seed)
        if self.valid_ids is None or truth is None:
            return train, None
        return train, self.valid_ids.batches(standardised(truth), size)

    def _loss(self, targets: Targets) -> Loss:
        if self.task == "regression":
            return MeanSquaredError()
        if self.task == "multi":
            return BinaryCrossEntropy()
        if self.options.class_weights == "none":
            return CrossEntropy()
        known = _joined(self.train_ids.truth(targets))
        return CrossEntropy(class_weights=balanced_weights(known, len(self.classifier.labels)))

    def _trainer(self, loss: Loss, callbacks: list[Callback]) -> Trainer:
        options = self.options
        lr = default_lr(self.classifier.encoder.config.hidden_size) if options.lr is None else options.lr
        return Trainer(
            self.classifier,
            loss,
            AdamW(lr, weight_decay=options.weight_decay),
            schedule=options.schedule,
            warmup_steps=options.warmup,
            accumulate=options.accumulate,
            clip_norm=options.max_grad_norm,
            seed=options.seed,
            callbacks=callbacks,
            progress=False,
            communicator=or_none_if_alone(self.ranks),
        )

    def _fit(
        self,
        trainer: Trainer,
        train: TextBatches,
        valid: TextBatches | None,
        directory: files.Directory | None,
    ) -> History:
        options = self.options
        epochs = _EPOCHS if options.epochs is None and options.steps is None else options.epochs
        return trainer.fit(
            train,
            epochs=epochs,
            steps=options.steps,
            validation=valid,
            eval_every=options.eval_every,
            patience=options.patience,
            keep=options.keep,
            checkpoint_dir=directory,
            checkpoint_every=options.save_every,
            save_minutes=options.save_minutes,
            resume=options.resume,
            change_compute=options.change_compute,
            overwrite=options.overwrite,
        )


def _standard(targets: Array, classifier: TextClassifier) -> tuple[float, float]:
    """The mean and the standard deviation of the targets. After training, both numbers are merged into the
    last layer.

    If the last layer has no bias, it cannot add the mean. In this case, the function returns 0 and the root
    of the mean square of the targets.
    """
    wide = targets.astype(np.float64)
    centre = 0.0 if classifier.head.out.bias is None else float(wide.mean())
    spread = float(np.sqrt(((wide - centre) ** 2).mean()))
    return centre, spread or 1.0


def _joined(targets: Targets) -> Array:
    return np.concatenate(targets) if isinstance(targets, list) else targets


def _nothing() -> None:
    pass
