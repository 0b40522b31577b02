"""Fine-tuning a language model on a file of text, and its evaluation: what the commands do.

The model knows no trainer and the trainer no model; they meet here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.adapters import load_adapter, save_adapter
from nplora.checkpoint import RunDirectory
from nplora.data import LEARN, DataReport, Dataset, TokenBatches, find_splits, read_dataset
from nplora.formats import peft_adapter
from nplora.formats.errors import FormatError, brief, nearest_names
from nplora.formats.files import StrPath
from nplora.formats.peft_adapter import PeftAdapter
from nplora.formats.peft_config import MAX_RANK
from nplora.generate import Sampling, generate
from nplora.layers import Embedding, Linear, LoRALinear
from nplora.models import KeptPrefix, LanguageModel, load_model
from nplora.models.adapting import chosen_blocks
from nplora.module import Module, quiet
from nplora.optim import SCHEDULES, AdamW
from nplora.packing import PackedBatch
from nplora.planning import Adapters, Candidate, Plan, Wishes, Work, choose, parse_bytes, peak_memory
from nplora.trainer import Callback, EpochRecord, FusedLoss, History, Run, StepRecord, Trainer
from nplora.weights import COMPUTES

Array = npt.NDArray[Any]

_OP = "finetune"
_DEFAULT_EXAMPLES = 8
_EVALUATION_TOKENS = 1024
_LOOKED_AT = 1_000_000  # examples of which a plan looks at the batches, epoch by epoch
_SAMPLING = Sampling(max_new_tokens=48, repetition_penalty=1.1)  # small models fall into loops
_MOST_SUGGESTIONS = 10  # layers of an adapter, unknown to the model, for which the nearest ones are looked up
KEEP_PREFIX = ("off", "memory", "disk")


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class FinetuneOptions:
    """All that can be chosen; the help of each is what `nplora finetune --help` prints.

    Raises:
        ValueError, TypeError: a value is out of its range, or two exclude each other.
    """

    rank: int = _option(8, "of the factors")
    alpha: float = _option(16.0, "the update is scaled by alpha / rank")
    targets: tuple[str, ...] = _option(
        ("all-linear",),
        "layers with an adapter: all-linear, or q_proj,v_proj,... (may be given several times)",
    )
    layers: str | None = _option(None, "blocks with an adapter: last:N or first:N; all without it")
    dropout: float = _option(0.0, "share of an adapter's inputs that a step leaves out")
    use_rslora: bool = _option(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = _option(False, "train the magnitudes of the weights' rows too (DoRA)")
    init: str = _option(
        "zero",
        "how the factors start: zero (as the model), gaussian (both random), or pissa, olora: from the "
        "principal part of each weight, which must be of floats",
        choices=LoRALinear.inits,
    )
    lr: float = _option(2e-4, "learning rate at its highest")
    schedule: str = _option("cosine", "what becomes of the learning rate", choices=tuple(SCHEDULES))
    warmup: int = _option(0, "steps over which the learning rate rises")
    weight_decay: float = _option(0.01, "of AdamW")
    max_grad_norm: float = _option(1.0, "gradients that are larger together are scaled down to this")
    epochs: int | None = _option(None, "passes over the data (1 if no steps are given)")
    steps: int | None = _option(None, "updates, instead of epochs")
    batch_tokens: int | None = _option(None, "most tokens of a batch, which has as many examples as fit")
    batch_examples: int | None = _option(None, f"examples of a batch ({_DEFAULT_EXAMPLES} without both)")
    accumulate: int = _option(1, "batches that make one step")
    max_length: int = _option(1024, "longer examples are cut to this many tokens")
    learn: str = _option(
        "completion",
        "what is learned: completions and assistants' turns, or all tokens",
        choices=LEARN,
    )
    skip_bad: bool = _option(False, "pass over bad lines of the data, and count them")
    strict: bool = _option(False, "take an example that is too long for an error")
    compute: str | None = _option(
        None,
        "arithmetic of the frozen products (float32, unless memory is too small for it)",
        choices=tuple(COMPUTES),
    )
    checkpoint_blocks: bool = _option(
        False, "keep less for backward and compute it again: slower, less memory"
    )
    memory: str | int | None = _option(
        None, "the most memory of the process in all, as 600M or 1.5G: the way of computing that fits is used"
    )
    keep_prefix: str = _option(
        "off",
        "keep what the frozen blocks below the lowest adapter make of each example, for later epochs: "
        "4 bytes x hidden size a token, in memory, or on disk in the output directory while the run lasts",
        choices=KEEP_PREFIX,
    )
    seed: int = _option(0, "of the factors' start, the dropout and the order of the data")
    save_every: int = _option(100, "steps between checkpoints")
    resume: bool = _option(False, "go on with the run in the output directory, to the bit")
    overwrite: bool = _option(False, "drop the run in the output directory")
    sample: tuple[str, ...] = _option((), "a prompt answered before and after (may be given several times)")

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"{_OP}: epochs and steps are both given; one of them ends the run")
        if self.batch_tokens is not None and self.batch_examples is not None:
            raise ValueError(f"{_OP}: batch_tokens and batch_examples are both given")
        if self.resume and self.overwrite:
            raise ValueError(f"{_OP}: resume and overwrite exclude each other")
        for name in ("epochs", "steps", "batch_tokens", "batch_examples"):
            if getattr(self, name) is not None:
                _check.integer(_OP, name, getattr(self, name), least=1)
        _check.integer(_OP, "rank", self.rank, least=1, most=MAX_RANK)
        for name, least in (("accumulate", 1), ("save_every", 1), ("warmup", 0), ("seed", 0)):
            _check.integer(_OP, name, getattr(self, name), least=least)
        _check.integer(_OP, "max_length", self.max_length, least=2)
        for name, words in (
            ("schedule", SCHEDULES), ("learn", LEARN), ("init", LoRALinear.inits),
            ("keep_prefix", KEEP_PREFIX),
        ):  # fmt: skip
            _check.choice(_OP, name, getattr(self, name), words)
        if self.compute is not None:
            _check.choice(_OP, "compute", self.compute, COMPUTES)
        if self.memory is not None:
            parse_bytes(self.memory)
        for name in ("lr", "alpha", "max_grad_norm"):
            if _check.number(_OP, name, getattr(self, name)) <= 0:
                raise ValueError(f"{_OP}: {name} is {getattr(self, name)}, expected above 0")
        _check.probability(_OP, "dropout", self.dropout)
        _check.at_least(_OP, "weight_decay", self.weight_decay, 0)
        if isinstance(self.layers, str):
            chosen_blocks(self.layers, 1)


@dataclass(frozen=True)
class Sample:
    """A prompt, and the answers before and after."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class FinetuneReport:
    """What came of a run; `str(report)` is what the command prints.

    Attributes:
        output: the directory with the adapter.
        loss_before, loss_after: of the validation data, None without it (and after an interruption).
        history: the trainer's records.
        trained: numbers in the factors, `parameters`: of the whole model.
        tokens: that were learned from, those before a resumed run went on included.
    """

    output: Path
    train: DataReport
    valid: DataReport | None
    loss_before: float | None
    loss_after: float | None
    samples: tuple[Sample, ...]
    history: History
    trained: int
    parameters: int

    @property
    def tokens(self) -> int:
        return sum(record.count for record in self.history.steps)

    def __str__(self) -> str:
        history = self.history
        lines = [
            f"  {sample.prompt!r}\n    before  {sample.before!r}\n    after   {sample.after!r}"
            for sample in self.samples
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"validation loss {self.loss_before:.4f} -> {self.loss_after:.4f}")
        losses = f", loss {history.loss[0]:.4f} -> {history.loss[-1]:.4f}" if history.steps else ""
        rate = self.tokens / max(1e-9, history.seconds)
        lines.append(
            f"{len(history.steps)} steps in {history.seconds:.1f} s, {rate:.0f} learned tokens/s, "
            f"peak memory {peak_memory() / 1e6:.0f} MB{losses}"
        )
        lines.append(f"trained {self.trained:,} of {self.parameters:,} numbers")
        ended = ", interrupted: --resume goes on" if history.interrupted else ""
        lines.append(f"{self.output}{os.sep} holds the adapter (PEFT's format){ended}")
        return "\n".join(lines)


def finetune(
    model: StrPath | LanguageModel,
    data: StrPath,
    output: StrPath,
    *,
    valid: StrPath | None = None,
    progress: bool | None = None,
    **options: Any,
) -> FinetuneReport:
    """Train a LoRA adapter for a language model on a file of text, and save it as a PEFT adapter directory.

    Everything is checked and read before the first file is written. The output directory also holds
    checkpoints and `log.jsonl`, from which an interrupted run goes on (`resume=True`), to the bit as if it
    had not been stopped. Ctrl-C ends the run after what it has learned: that is saved, and returned.

    Args:
        model: what `load_model` reads, or a model without an adapter.
        data: a .jsonl, .csv or .txt file as `nplora.data.read_dataset` has it, or a directory with
            train.jsonl and, if it is to be evaluated, valid.jsonl.
        valid: the file to evaluate on, before and after every epoch.
        progress: print what happens to stderr; None: if that is a terminal.
        options: as `FinetuneOptions` has them; `compute` only for a model that is loaded here.
    Raises:
        DataError: a line of the data is not what it should be.
        ValueError, TypeError: an option is out of range or does not fit the model.
        FileExistsError: the output directory holds a run, and neither `resume` nor `overwrite` is set.
        NonFiniteLossError, CorruptError, OSError: as `Trainer.fit`.
    """
    chosen, pieces = _resumed(FinetuneOptions(**options), output, isinstance(model, LanguageModel))
    say = _speaker(progress)
    lm, train, held_out = _opened_all(_OP, model, data, valid, chosen)
    way = Candidate(lm.compute, chosen.checkpoint_blocks, None if pieces is None else pieces[0])
    if chosen.memory is not None:
        planned = _planned(lm, train, held_out, chosen, pieces)
        say(str(planned))
        way = planned.chosen
    if way.compute != lm.compute and not isinstance(model, LanguageModel):
        del lm  # before the file is mapped again
        lm = load_model(model, way.compute)
    for dataset in (train, held_out):
        if dataset is not None:
            say(str(dataset.report))
    batches = _batches(train, chosen)
    checks = (
        None if held_out is None else TokenBatches(held_out, batch_tokens=_EVALUATION_TOKENS, shuffle=False)
    )
    with _as_it_was(lm):
        lm.add_lora(
            chosen.rank, chosen.alpha, chosen.targets, chosen.layers, chosen.dropout, chosen.use_rslora,
            chosen.use_dora, chosen.seed, chosen.init,
        )  # fmt: skip
        if chosen.keep_prefix != "off" and not lm.model.first_adapted():
            raise ValueError(
                f"{_OP}: keep_prefix: no frozen block lies below the adapters; layers='last:4' leaves some"
            )
        _require_free(output, chosen)
    lm.model.checkpoint_blocks = way.checkpoint_blocks
    with _kept_prefix(lm, [train] if held_out is None else [train, held_out], output, chosen.keep_prefix):
        before = None if checks is None else evaluate_batches(lm, checks)["loss"]
        if before is not None:
            say(f"validation loss {before:.4f} before training")
        answers = _answers(lm, chosen.sample)
        trainer = Trainer(
            lm,
            TokenLoss(way.micro_tokens),
            AdamW(chosen.lr, weight_decay=chosen.weight_decay),
            schedule=chosen.schedule,
            warmup_steps=chosen.warmup,
            accumulate=chosen.accumulate,
            clip_norm=chosen.max_grad_norm,
            seed=chosen.seed,
            callbacks=[TokenProgress()] if _speaks(progress) else [],
            progress=False,
        )
        history = trainer.fit(
            batches,
            epochs=chosen.epochs,
            steps=chosen.steps,
            validation=checks,
            checkpoint_dir=output,
            checkpoint_every=chosen.save_every,
            resume=chosen.resume,
            overwrite=chosen.overwrite,
        )
    save_adapter(lm, output, None if isinstance(model, LanguageModel) else os.fspath(model))
    last = history.epochs[-1].val_loss if history.epochs and not history.interrupted else None
    after = [""] * len(answers) if history.interrupted else _answers(lm, chosen.sample)
    return FinetuneReport(
        output=Path(output),
        train=train.report,
        valid=None if held_out is None else held_out.report,
        loss_before=before,
        loss_after=last,
        samples=tuple(map(Sample, chosen.sample, answers, after)),
        history=history,
        trained=lm.num_trainable,
        parameters=lm.num_parameters,
    )


def plan(
    model: StrPath | LanguageModel, data: StrPath, *, valid: StrPath | None = None, **options: Any
) -> Plan:
    """What `finetune` would take with the same arguments, in memory and time; nothing is trained or written.

    With `memory`, how `finetune` would compute its steps so that the process stays below it.

    Returns:
        the way of computing, bytes and seconds; `str` of it is what the command prints.
    Raises:
        BudgetError: nothing fits into `memory`; the message says what is needed, and what would fit.
        Others as `finetune`.
    """
    chosen = FinetuneOptions(**options)
    lm, train, held_out = _opened_all("plan", model, data, valid, chosen)
    return _planned(lm, train, held_out, chosen)


def evaluate(
    model: StrPath | LanguageModel,
    data: StrPath,
    *,
    adapter: StrPath | None = None,
    compute: str | None = None,
    max_length: int | None = None,
    learn: str = "completion",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """The mean loss of a model over a file, per learned token: {"loss": ..., "tokens": ...}.

    Args:
        data: as in `finetune`; of a directory, its valid.jsonl, or its train.jsonl where there is none.
        adapter: a PEFT adapter directory that is put on the model.
        max_length: longer examples are cut; None: to the model's context.
        compute: as in `FinetuneOptions`, of a model that is loaded here; None: "float32".
        learn, skip_bad: as in `FinetuneOptions`.
    Raises: as `finetune` and `load_adapter`.
    """
    train_path, valid_path = find_splits(data)
    lm = _opened("evaluate", model, compute)
    if adapter is not None:
        attach_adapter(lm, adapter)
    dataset = read_dataset(
        valid_path or train_path,
        lm.tokenizer,
        max_length=lm.config.max_position_embeddings if max_length is None else max_length,
        learn=learn,
        skip_bad=skip_bad,
    )
    _require_vocabulary(lm, dataset)
    return evaluate_batches(lm, TokenBatches(dataset, batch_tokens=_EVALUATION_TOKENS, shuffle=False))


def evaluate_batches(lm: LanguageModel, batches: TokenBatches) -> dict[str, Any]:
    """The mean loss over all targets of all batches, and their number."""
    total, tokens = 0.0, 0
    for batch, _ in batches.epoch(0):
        total += lm.loss_packed(batch) * batch.num_targets
        tokens += batch.num_targets
    return {"loss": total / max(1, tokens), "tokens": tokens}


def load_with_adapter(
    model: StrPath, adapter: StrPath | None = None, compute: str = "float32"
) -> LanguageModel:
    """A model, with a PEFT adapter directory put on it. Raises as `load_model` and `attach_adapter`."""
    lm = load_model(model, compute)
    if adapter is not None:
        attach_adapter(lm, adapter)
    return lm


def attach_adapter(lm: LanguageModel, directory: StrPath) -> None:
    """Put the adapter of a PEFT directory on a model that has none: on the layers that are in the file.

    Raises:
        FormatError: it does not fit the model, which stays as it was. Others as `load_adapter`.
        ValueError: the model has an adapter.
    """
    if lm.adapter_layers():
        raise ValueError(f"{_OP}: the model has an adapter already, on {len(lm.adapter_layers())} layers")
    with peft_adapter.reading(directory) as adapter:
        names, use_dora = _fitting(lm, adapter), adapter.config.use_dora
    with _as_it_was(lm):
        lm.add_lora(1, targets=names, use_dora=use_dora)  # load_adapter brings the file's ranks
        load_adapter(lm, directory)


@contextlib.contextmanager
def _as_it_was(lm: LanguageModel) -> Iterator[None]:
    """Take the adapters that the body adds off again where it fails."""
    modules = dict(lm.named_modules())
    try:
        yield
    except BaseException:
        for name in lm.adapter_layers():
            parent, _, attribute = name.rpartition(".")
            setattr(modules[parent], attribute, modules[name])
        raise


def _fitting(lm: LanguageModel, adapter: PeftAdapter) -> list[str]:
    """The layers of an adapter, each of which the model has, and with factors of its shape."""
    layers = {name: m for name, m in lm.named_modules() if isinstance(m, Linear | Embedding)}
    problems: list[str] = []
    factors = adapter.factors(problems)
    for name, halves in factors.items():
        layer = layers.get(name)
        if layer is None:
            near = (
                ", ".join(map(repr, nearest_names(name, layers))) if len(problems) < _MOST_SUGGESTIONS else ""
            )
            problems.append(
                f"layer {brief(name)} is not in the model{near and f', the nearest names: {near}'}"
            )
            continue
        try:
            adapter.require_rank(name, halves)
        except FormatError as error:
            problems.append(str(error))
            continue
        d_in, d_out = (adapter.tensors.entries[half].shape[1 - i] for i, half in enumerate(halves))
        wanted = layer.weight.shape[::-1] if isinstance(layer, Linear) else layer.weight.shape
        if (d_in, d_out) != wanted:
            problems.append(
                f"layer {brief(name)}: the adapter is of {(d_out, d_in)}, the weight {wanted[::-1]}"
            )
    if not factors and not problems:
        raise FormatError(f"{adapter.directory}: the adapter has no layers")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise FormatError(
            f"{adapter.directory}: the adapter does not fit the model in {len(problems)} places:{lines}"
        )
    return list(factors)


# ---- the model and its loss, as the trainer takes them ----


class TokenLoss(FusedLoss):
    """The mean over all targets of -log p(target); the logits are never there at once.

    Args:
        micro_tokens: a batch is passed through in pieces of at most so many tokens; None: in one.
    """

    def __init__(self, micro_tokens: int | None = None) -> None:
        self.micro_tokens = micro_tokens

    def settings(self) -> dict[str, Any]:
        return {} if self.micro_tokens is None else {"micro_tokens": self.micro_tokens}

    def count(self, x: PackedBatch, y: Any) -> int:
        return x.num_targets

    def forward_backward(self, model: Module, x: PackedBatch, y: Any, factor: float) -> float:
        assert isinstance(model, LanguageModel)
        return sum(model.forward_backward(piece, factor) for piece in x.pieces(self.micro_tokens))

    def evaluate(self, model: Module, x: PackedBatch, y: Any) -> float:
        assert isinstance(model, LanguageModel)
        return model.loss_packed(x)

    def blame(self, model: Module, x: PackedBatch) -> str:
        assert isinstance(model, LanguageModel)
        found: list[str] = []
        prefix, model.model.prefix = model.model.prefix, None
        for index, block in enumerate(model.model.layers):
            vars(block)["run"] = _watched(block.run, f"model.layers.{index}", found)
        try:
            with quiet():
                model.loss_packed(x)
        finally:
            for block in model.model.layers:
                del vars(block)["run"]
            model.model.prefix = prefix
        return f"the first layer whose output is not finite is {(found or ['lm_head'])[0]!r}"


def _watched(run: Callable[..., Any], name: str, found: list[str]) -> Callable[..., Any]:
    def watching(*arguments: Any, **named: Any) -> Any:
        result = run(*arguments, **named)
        if not np.isfinite(result[0]).all():
            found.append(name)
        return result

    return watching


def _opened_all(
    op: str, model: StrPath | LanguageModel, data: StrPath, valid: StrPath | None, options: FinetuneOptions
) -> tuple[LanguageModel, Dataset, Dataset | None]:
    """The model, what it learns from and what it is evaluated on."""
    train_path, found = find_splits(data)
    valid_path = found if valid is None else Path(valid)
    lm = _opened(op, model, options.compute)
    train = _read(lm, train_path, options)
    return lm, train, None if valid_path is None else _read(lm, valid_path, options)


# ---- the plan ----


def _planned(
    lm: LanguageModel,
    train: Dataset,
    held_out: Dataset | None,
    options: FinetuneOptions,
    pieces: tuple[int | None, ...] | None = None,
) -> Plan:
    """How steps are computed with these options; pieces: those of the run that goes on."""
    batches = _batches(train, options)
    steps = options.steps or (options.epochs or 1) * -(-batches.length // options.accumulate)
    epochs = min(-(-steps * options.accumulate // batches.length), 1 + _LOOKED_AT // len(train))
    lengths, targets = train.lengths, train.targets
    return choose(
        lm,
        Adapters.of(lm, options.rank, options.targets, options.layers, options.use_dora, options.init),
        Work(
            [(lengths[batch], targets[batch]) for epoch in range(epochs) for batch in batches.members(epoch)],
            steps,
            options.accumulate,
            0 if held_out is None else min(_EVALUATION_TOKENS, held_out.report.tokens),
            sum(d.report.tokens for d in (train, held_out) if d and options.keep_prefix == "memory"),
        ),
        Wishes(options.compute, options.checkpoint_blocks, pieces),
        None if options.memory is None else parse_bytes(options.memory),
    )


def _resumed(
    options: FinetuneOptions, output: StrPath, loaded: bool
) -> tuple[FinetuneOptions, tuple[int | None, ...] | None]:
    """The options of a run that goes on, and its pieces: as an earlier plan had them, whatever fits now.

    Args:
        loaded: the model is given, and its arithmetic with it.
    """
    if not options.resume or not Path(output).is_dir():
        return options, None
    with RunDirectory(output) as directory:
        checkpoint = directory.newest
    fixed = {} if checkpoint is None else checkpoint.settings.get("fixed", {})
    computes = {layer.get("compute") for layer in fixed.get("layers", {}).values()} - {"float64"}
    if options.compute is None and not loaded and len(computes) == 1:
        options = dataclasses.replace(options, compute=computes.pop())
    return options, None if checkpoint is None else (fixed.get("micro_tokens"),)


def _batches(dataset: Dataset, options: FinetuneOptions) -> TokenBatches:
    examples = options.batch_examples
    if examples is None and options.batch_tokens is None:
        examples = _DEFAULT_EXAMPLES
    return TokenBatches(
        dataset, batch_tokens=options.batch_tokens, batch_examples=examples, seed=options.seed
    )


def _opened(op: str, model: StrPath | LanguageModel, compute: str | None) -> LanguageModel:
    if not isinstance(model, LanguageModel):
        return load_model(model, compute or COMPUTES[0])
    if compute is not None:
        raise ValueError(f"{op}: compute={compute!r} is for a file; this model was loaded with its own")
    return model


def _require_vocabulary(lm: LanguageModel, dataset: Dataset) -> None:
    if dataset.largest_id >= lm.config.vocab_size:
        raise FormatError(
            f"{dataset.report.source}: its text has token {dataset.largest_id} of {lm.tokenizer}, "
            f"the model's vocabulary ends with {lm.config.vocab_size - 1}"
        )


def _read(lm: LanguageModel, path: Path, options: FinetuneOptions) -> Dataset:
    dataset = read_dataset(
        path,
        lm.tokenizer,
        max_length=min(options.max_length, lm.config.max_position_embeddings),
        learn=options.learn,
        skip_bad=options.skip_bad,
        strict=options.strict,
    )
    _require_vocabulary(lm, dataset)
    return dataset


def _require_free(output: StrPath, options: FinetuneOptions) -> None:
    """Refuse a directory with a run, or one in use, before anything that takes time."""
    with RunDirectory(output) as directory:
        if directory.occupied and not (options.resume or options.overwrite):
            raise FileExistsError(
                17, "the directory holds a run: resume goes on with it, overwrite drops it", os.fspath(output)
            )


@contextlib.contextmanager
def _kept_prefix(lm: LanguageModel, datasets: list[Dataset], output: StrPath, where: str) -> Iterator[None]:
    """What the blocks below the adapters make of these examples is kept meanwhile, if it is to be."""
    if where == "off":
        yield
        return
    tokens = sum(dataset.report.tokens for dataset in datasets)
    directory = output if where == "disk" else None
    prefix = KeptPrefix(lm.model.first_adapted(), tokens, lm.config.hidden_size, directory)
    lm.model.prefix = prefix
    try:
        yield
    finally:
        lm.model.prefix = None
        prefix.close()


def _answers(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    return generate(lm, prompts, _SAMPLING)


# ---- what is told meanwhile ----


def _speaks(progress: bool | None) -> bool:
    return sys.stderr is not None and (sys.stderr.isatty() if progress is None else progress)


def _speaker(progress: bool | None) -> Callable[[str], None]:
    if not _speaks(progress):
        return lambda text: None
    return lambda text: print(text, file=sys.stderr, flush=True)


class TokenProgress(Callback):
    """A line on stderr: loss, tokens a second, peak memory and the time that is left.

    On a terminal it is redrawn; elsewhere there is a new one from time to time.
    """

    def __init__(self, every: float = 10.0) -> None:
        self._redraws = sys.stderr.isatty()
        self._every = 0.1 if self._redraws else every
        self._drawn = -np.inf
        self._width = 0
        self._recent: list[StepRecord] = []

    def on_step_end(self, run: Run, record: StepRecord) -> None:
        self._recent = [*self._recent[-19:], record]
        last = record.step == run.total_steps
        if last or time.monotonic() - self._drawn >= self._every:
            self._drawn = time.monotonic()
            self._draw(self._text(run, record))

    def on_epoch_end(self, run: Run, record: EpochRecord) -> None:
        validation = "" if record.val_loss is None else f", validation loss {record.val_loss:.4f}"
        self._draw(f"epoch {record.epoch}: loss {record.loss:.4f}{validation}")
        self._break()

    def on_fit_end(self, run: Run) -> None:
        self._break()

    def _text(self, run: Run, record: StepRecord) -> str:
        recent = self._recent
        loss = sum(r.loss * r.count for r in recent) / max(1, sum(r.count for r in recent))
        seconds = sum(r.seconds for r in recent)
        rate = sum(r.count for r in recent) / max(1e-9, seconds)
        total = "" if run.total_steps is None else f"/{run.total_steps}"
        text = f"step {record.step}{total}, loss {loss:.4f}, {rate:.0f} tokens/s"
        text += f", {peak_memory() / 1e6:.0f} MB"
        if run.total_steps is not None:
            left = round((run.total_steps - record.step) * seconds / len(recent))
            text += f", {left // 60}:{left % 60:02} left"
        return text

    def _draw(self, text: str) -> None:
        if self._redraws:
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _break(self) -> None:
        if self._width:
            print(file=sys.stderr, flush=True)
            self._width = 0
