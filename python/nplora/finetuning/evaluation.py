"""Measures a language model on a file: loss, accuracy, and scores of generated answers."""

from collections.abc import Callable, Mapping, Sequence

from nplora import _check
from nplora.finetuning.attach import Adapters, warn_of_form, with_adapters
from nplora.finetuning.data import Data, TokenBatches
from nplora.finetuning.data.sources import Source, sources_of
from nplora.finetuning.judging.judge import Judge, Record, read_judge
from nplora.finetuning.judging.metrics import Metric, MetricFunction, metrics_of
from nplora.finetuning.judging.results import Evaluation, MeanLoss, evaluation_of
from nplora.finetuning.load import opened
from nplora.finetuning.options import EvaluateOptions, from_arguments
from nplora.finetuning.token_progress import speaker
from nplora.formats.files import StrPath
from nplora.lm import LanguageModel

TEXT_AND_REMEDY = "this text", "chat=True (--chat) applies the template"  # arguments of `warn_of_form`


@_check.keywords
def evaluate(
    model: StrPath | LanguageModel,
    data: Data,
    *,
    adapter: Adapters | None = None,
    any_base: bool = False,
    progress: bool | None = None,
    record: Record | None = None,
    metric: str | MetricFunction | Sequence[str | MetricFunction] = (),
    max_new_tokens: int = 128,
    format: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    chat: bool = False,
    max_length: int | None = None,
    learn: str = "completion",
    skip_bad: bool = False,
    strict: bool = False,
    compute: str | None = None,
) -> Evaluation:
    """Compute the mean loss of a language model over a file of text, and other metrics.

    In multiple-choice rows {"prompt": …, "choices": […], "answer": …}, "answer" is the text of the right
    choice, its index from 0, or its letter. The model's answer is the choice with the largest likelihood. The
    loss counts only the right choice of a multiple-choice row, and only the chosen answer of a preference row
    {"prompt": …, "chosen": …, "rejected": …}.

    Args:
        model: a GGUF file or a Hugging Face directory, as for `load_model`; or a loaded model.
        data: rows to evaluate on, as for `nplora.data.read_dataset`, but without sampling weights; or a
            directory. In a directory, valid.jsonl is read, or train.jsonl if there is no valid.jsonl.
        adapter: adapter to evaluate the model with: a PEFT directory, a llama.cpp file or an `Adapter`; or a
            pair (adapter, weight). A list of adapters and pairs means the weighted sum of these adapters. A
            loaded model itself is not changed.
        any_base: accept an adapter that was trained on another model with the same shapes.
        progress: print a report of the data on stderr; None: only on a terminal or in a notebook.
        record: a function that is called for each generated answer and each multiple-choice question. Its
            argument is a dictionary with the results.
        metric: how generated answers are scored: exact_match, f1, or a function of yours as module:function,
            which is called with the answer, the reference and the row. Commas separate several metrics. In
            Python, `metric` may also be a function, or a list of names and functions.
        max_new_tokens: maximum tokens of a generated answer.
        format: format of the rows: messages, sharegpt, alpaca, completion, text, preference or choice
            (default: the names of the fields decide).
        columns: names of fields in the data, as in prompt=question,completion=answer.
        chat: write prompts and completions with the model's chat template.
        max_length: maximum tokens of an example; longer examples are cut (default: the model's context).
        learn: tokens in the loss: completion (completions and assistant turns) or all.
        skip_bad: skip bad lines of the data, and count them.
        strict: refuse examples that are longer than `max_length`.
        compute: arithmetic of the products with frozen weights: float32, bfloat16 or int8 (default: float32);
            int8 needs weights in GGUF's quantised formats. In int8, the loss is computed a few tokens at a
            time, as in decoding.
    Returns:
        the mean loss, the number of tokens in the mean, the other metrics, and a report of the data.
    Raises:
        DataError: a line of the data is wrong; or `metric` is given, and a line has no prompt.
        ValueError, TypeError: an option is out of range; or a file in `data` has a sampling weight; or there
            is no such metric; or `learn` is "all", and the rows are multiple-choice questions or preference
            pairs; or `model` is a loaded model, and `compute` is given; or the model already has an adapter,
            and `adapter` is given.
        FormatError: a file is invalid, or the adapter does not fit the model or was trained on another model.
        OSError: a file cannot be read.
    Warns:
        UserWarning: `compute` is "int8", but decoding cannot use int8; or a metric failed in some examples;
            or the adapter was trained with the chat template, and is evaluated without it, or the other way
            round.
        Other warnings: see `attach_adapter`.

    >>> result = nplora.evaluate("model.gguf", "valid.jsonl", adapter="adapter")
    >>> result["loss"] > 0
    True
    >>> result = nplora.evaluate("model.gguf", "valid.jsonl", metric="exact_match", max_new_tokens=4)
    >>> result["metrics"]["exact_match"]["examples"]
    4
    """
    chosen = from_arguments("evaluate", EvaluateOptions, locals())
    plain = list[LanguageModel]()

    def prepare(lm: LanguageModel) -> LanguageModel:
        plain.append(lm)
        return lm if adapter is None else with_adapters("evaluate", lm, adapter, any_base)

    lm, judge = read_all("evaluate", model, data, chosen, prepare)
    if adapter is not None:
        judge.refer_to(plain[0].with_tokens(lm.added_tokens))
        warn_of_form("evaluate", adapter, judge.report.chat, *TEXT_AND_REMEDY)
    speaker(progress)(str(judge.report))
    return evaluation_of(judge.report, judge.measure(lm, record or (lambda entry: None)))


def read_all(
    op: str,
    model: StrPath | LanguageModel,
    data: Data,
    options: EvaluateOptions,
    prepare: Callable[[LanguageModel], LanguageModel],
) -> tuple[LanguageModel, Judge]:
    """Read the model and the data.

    Args:
        prepare: a function that takes the loaded model, and returns the model to evaluate. The function is
            called before the data are read, because adapters may add tokens to the vocabulary.
    """
    sources, metrics = sources_to_judge(op, data), metrics_of(op, options.metric)
    lm = prepare(opened(op, model, options.compute, to_decode=True))
    return lm, judge_for(op, lm, sources, options, metrics)


def sources_to_judge(op: str, data: Data) -> list[Source]:
    """The sources of an evaluation's data.

    Raises:
        ValueError: a source has a sampling weight, which an evaluation cannot use.
        Other errors: see `sources_of`.
    """
    sources = sources_of(op, data)
    for source in sources:
        if source.weight != 1:
            raise ValueError(
                f"{op}: {source.name} has the weight {source.weight:g}, but an evaluation counts each "
                "example once; weights are for training only"
            )
    return sources


def judge_for(
    op: str, lm: LanguageModel, sources: list[Source], options: EvaluateOptions, metrics: list[Metric]
) -> Judge:
    """Read the data with the tokenizer of `lm`. The `Judge` can measure all models with this tokenizer."""
    reading = options.reading(options.max_length or lm.config.max_position_embeddings)
    return read_judge(op, lm, sources, reading, metrics, options.max_new_tokens)


def evaluate_batches(lm: LanguageModel, batches: TokenBatches) -> MeanLoss:
    """Compute the mean loss over the trained tokens of all batches.

    >>> lm = nplora.load_model("model.gguf")
    >>> dataset = nplora.data.read_dataset("valid.jsonl", lm.tokenizer)
    >>> batches = nplora.data.TokenBatches(dataset, batch_examples=2)
    >>> nplora.finetuning.evaluate_batches(lm, batches)["tokens"]
    12
    """
    total, tokens = 0.0, 0
    for batch, _ in batches.epoch(0):
        total += lm.loss_packed(batch) * batch.num_targets
        tokens += batch.num_targets
    return MeanLoss(loss=total / max(1, tokens), tokens=tokens)
