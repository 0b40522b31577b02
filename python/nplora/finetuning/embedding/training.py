"""Training of a LoRA adapter for embeddings, from files of pairs to a PEFT directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nplora import _check
from nplora.adapters import rollback_on_error, save_adapter
from nplora.finetuning.data.sources import Data
from nplora.finetuning.embedding.batches import TextBatches
from nplora.finetuning.embedding.examples import TextReport, read_examples
from nplora.finetuning.embedding.loss import MICRO_TOKENS, EmbeddingLoss
from nplora.finetuning.token_progress import speaker
from nplora.formats import files
from nplora.formats.errors import counted
from nplora.formats.files import StrPath
from nplora.lm import Encoder, load_encoder
from nplora.nn.embedding_losses import EmbeddingFunction
from nplora.nn.optim import AdamW
from nplora.trainer import Callback, History, Trainer


@dataclass(frozen=True)
class EmbeddingTraining:
    """The result of `train`; `print` describes it.

    Attributes:
        encoder: the encoder with the trained adapter.
        output: the directory of the adapter.
        train, valid: what the examples were.
        history: the records of the run.

    >>> import nplora
    >>> rows = [{"anchor": "a cat", "positive": "the cat"}, {"anchor": "a dog", "positive": "the dog"}]
    >>> print(nplora.embedding.train("encoder-model", rows, "trained", steps=2))
    trained: 2 steps, training loss ... -> ...
    """

    encoder: Encoder
    output: Path
    train: TextReport
    valid: TextReport | None
    history: History

    def __str__(self) -> str:
        words = f"{self.output}: {counted(len(self.history.steps), 'step')}"
        if self.history.loss:
            words += f", training loss {self.history.loss[0]:.4f} -> {self.history.loss[-1]:.4f}"
        if self.history.best_loss is not None:
            words += f", validation loss {self.history.best_loss:.4f}"
        return words


@_check.keywords
def train(
    model: StrPath | Encoder,
    data: Data,
    output: StrPath,
    *,
    valid: Data | None = None,
    loss: str | EmbeddingFunction = "ranking",
    dims: Sequence[int] | None = None,
    columns: Mapping[str, str] | None = None,
    prompts: str | Mapping[str, str] | None = None,
    max_length: int | None = None,
    skip_bad: bool = False,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = "all-linear",
    dropout: float = 0.0,
    lr: float = 2e-4,
    weight_decay: float = 0.0,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    micro_tokens: int = MICRO_TOKENS,
    schedule: str = "linear",
    warmup: int = 0,
    max_grad_norm: float | None = 1.0,
    eval_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> EmbeddingTraining:
    """Train a LoRA adapter on pairs, triplets or scored pairs of texts, and save it for PEFT.

        >>> import nplora
        >>> rows = [{"anchor": "a cat", "positive": "the cat"}, {"anchor": "a dog", "positive": "the dog"}]
        >>> result = nplora.embedding.train("encoder-model", rows, "out", lr=1e-2, epochs=10)
        >>> result.history.loss[-1] < result.history.loss[0]
        True
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> nplora.read_adapter("out").attach(encoder)

    Args:
        model: a directory or GGUF file, as for `load_encoder`, or an encoder. An encoder that has an adapter
            continues with it.
        data: the examples, as in `read_examples`.
        output: the directory for checkpoints and the adapter.
        valid: examples for the validation loss, which is evaluated after every epoch; the adapter with the
            lowest is saved. In a ranking, this loss depends on `batch_size`.
        loss: "ranking" (each anchor against all other texts of the batch), "triplet", "cosine" or "cosent",
            or a loss such as `RankingLoss(scale=50)`.
        dims: widths to which embeddings are also cut in training (Matryoshka); name the full width too.
        columns, prompts, max_length, skip_bad: as in `read_examples`.
        rank, alpha, targets, dropout: as in `Encoder.add_lora`.
        lr, weight_decay: of AdamW.
        epochs, steps: the length of the run; by default, one epoch.
        batch_size: examples in a step. In a ranking, a larger batch has more negatives.
        micro_tokens: maximum tokens of a micro-batch: fewer take less memory.
        schedule: learning rate schedule after the warm-up: linear, cosine or constant.
        warmup: steps in which the learning rate rises.
        max_grad_norm: maximum norm of the gradients; None: no limit.
        eval_every: steps between evaluations, besides those after every epoch.
        patience: evaluations in a row without a lower validation loss after which the run ends.
        seed: seed of the initial factors, dropout and the order of the examples.
        callbacks: callbacks of the trainer.
        progress: print progress on stderr; None: only on a terminal or in a notebook.
        resume: continue the run in `output`; the results are bit for bit the same as without a stop.
        overwrite: delete the run and the adapter in `output`.
    Returns:
        the encoder with the adapter, and the history of the run.
    Raises:
        DataError: a row is wrong; the message names the file and the line.
        ValueError, TypeError: an argument does not fit.
        NonFiniteLossError, CorruptError, FileExistsError, OSError: as in `Trainer.fit`.
    """
    op = "train"
    files.require_named(op, output=output)
    encoder = model if isinstance(model, Encoder) else load_encoder(model)
    function = EmbeddingLoss(loss, dims=dims, micro_tokens=micro_tokens)
    read = [
        read_examples(each, encoder, function.function, columns, prompts, max_length, skip_bad)
        for each in (data, valid)
        if each is not None
    ]
    say = speaker(progress)
    for examples in read:
        say(str(examples.report))
    with rollback_on_error(encoder):
        if not encoder.adapter_layers():
            encoder.add_lora(rank, alpha, targets, dropout=dropout, seed=seed)
        trainer = Trainer(
            encoder, function, AdamW(lr, weight_decay=weight_decay), schedule=schedule, warmup_steps=warmup,
            clip_norm=max_grad_norm, seed=seed, callbacks=callbacks, progress=progress,
        )  # fmt: skip
        history = trainer.fit(
            TextBatches(read[0], batch_size, seed=seed),
            epochs=epochs,
            steps=steps,
            validation=TextBatches(read[1], batch_size, shuffle=False) if valid is not None else None,
            eval_every=eval_every,
            patience=patience,
            checkpoint_dir=output,
            resume=resume,
            overwrite=overwrite,
        )
        save_adapter(encoder, output, os.fspath(encoder.source))
    report = read[1].report if valid is not None else None
    return EmbeddingTraining(encoder, Path(output), read[0].report, report, history)
