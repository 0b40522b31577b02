"""`nplora classify`"""

import argparse
import contextlib
import csv
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from nplora.cli.errors import UsageError
from nplora.cli.parser import (
    adapter_path,
    add_any_base,
    add_data,
    add_model,
    add_options,
    checked,
    given_data,
    given_options,
    path,
)
from nplora.distributed.launch import require_one_process
from nplora.distributed.opening import heard_by_all_ranks, require_choice

HELP = (
    "Train a text or word classifier with LoRA, evaluate a classifier on labelled rows, or write the "
    "predictions of a classifier."
)

_OF_TEXTS, _OF_WORDS = (".csv", ".jsonl", ".npy"), (".jsonl", ".conll")  # the suffixes of output files

# Options of train that eval and predict accept too.
_SHARED = {
    "eval": ("columns", "separator", "skip_bad", "compute", "overwrite"),
    "predict": ("columns", "skip_bad", "compute", "overwrite"),
}

_NOT_OF_TRAIN = {
    "adapter": "eval and predict",
    "any_base": "eval and predict",
    "json": "eval",
    "plot": "eval",
    "probabilities": "predict",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import ClassifyOptions

    text = (
        "train (a new head and LoRA), eval (compare predictions with labels) or predict (write predictions)"
    )
    parser.add_argument("what", metavar="WHAT", choices=("train", "eval", "predict"), help=text)
    add_model(parser)
    add_data(parser, "train.csv and, optionally, valid.csv", weighted=False, words=True)
    text = "train: validation rows; their loss is printed after every epoch"
    parser.add_argument("--valid", metavar="FILE", type=path, help=text)
    text = (
        "train: directory for the adapter, the checkpoints and log.jsonl. predict: file for the rows and "
        "their predictions (default: JSON lines on stdout). The file is .csv, .jsonl or .npy for texts, and "
        ".jsonl or .conll for words; .npy holds only the probabilities or predicted numbers"
    )
    parser.add_argument("--output", metavar="PATH", type=path, help=text)
    text = "eval and predict: PEFT adapter (default: none; the model then needs a head of its own)"
    parser.add_argument("--adapter", metavar="DIR", type=adapter_path, help=text)
    add_any_base(parser)
    parser.add_argument("--json", action="store_true", help="eval: print the report as JSON")
    text = "eval: PNG file for a plot of the confusion matrix and of the scores of each label"
    parser.add_argument("--plot", metavar="FILE", type=path, help=text)
    text = "predict: if the classifier labels words, also write the probability of each label for each word"
    parser.add_argument("--probabilities", action="store_true", help=text)
    add_options(parser, ClassifyOptions)


def run(arguments: argparse.Namespace) -> None:
    from nplora.finetuning import ClassifyOptions

    options = given_options(arguments, ClassifyOptions)
    options = {name: value for name, value in options.items() if value is not False}
    if arguments.what == "train":
        _train(arguments, options)
        return
    if arguments.what == "predict" or arguments.output is not None or arguments.plot is not None:
        require_one_process("classify")  # predictions on stdout are an output too
    own = _SHARED[arguments.what]
    others = ["valid"] * (arguments.valid is not None) + [name for name in options if name not in own]
    if others:
        raise UsageError(
            f"classify {arguments.what}: --{others[0].replace('_', '-')} is an option of classify train"
        )
    checked(ClassifyOptions, options)
    options.pop("overwrite", None)
    name = "plot" if arguments.what == "eval" else "output"
    output = getattr(arguments, name)
    if output is not None:
        _require_writable(output, arguments)
    elif arguments.overwrite:
        raise UsageError(f"classify {arguments.what}: --overwrite needs --{name}")
    (_evaluate if arguments.what == "eval" else _predict)(arguments, options)


def _require_writable(output: str, arguments: argparse.Namespace) -> None:
    """Raise an error if a command cannot write its output, or must not.

    The output's directory must exist. The output must not be a directory or one of the inputs. Without
    `--overwrite`, the output must not exist.
    """
    from nplora.finetuning.data.sources import sources_of
    from nplora.formats import files, model_directory, peft_adapter
    from nplora.formats.files import StrPath

    files.require_new(output, arguments.overwrite)
    files.require_parent(output)
    sources = sources_of("classify", given_data(arguments.data))
    read: list[tuple[str, StrPath]] = [("data", source.path) for source in sources if source.path is not None]
    read += [("model", path) for path in model_directory.files_of(arguments.model)]
    if arguments.adapter is not None:
        read += [("adapter", path) for path in peft_adapter.files_of(arguments.adapter)]
    files.require_not_read(f"classify {arguments.what}", [output], read)


def _train(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from nplora import finetuning

    require_choice("classify train", arguments.distributed)
    with heard_by_all_ranks(arguments.distributed):
        for name, owner in _NOT_OF_TRAIN.items():
            if getattr(arguments, name):
                raise UsageError(f"classify train: --{name.replace('_', '-')} is for {owner}")
        if arguments.output is None:
            raise UsageError("classify train: --output DIR is missing")
        checked(finetuning.ClassifyOptions, options)
        data = given_data(arguments.data)
    report = finetuning.train_classifier(
        arguments.model, data, arguments.output, valid=arguments.valid, progress=True, **options
    )
    if report.process == 0:
        print(report, flush=True)
    if report.history.interrupted:
        raise KeyboardInterrupt


def _evaluate(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from nplora import finetuning
    from nplora.formats import files

    if arguments.output is not None:
        raise UsageError("classify eval: --output is for train and predict")
    if arguments.probabilities:
        raise UsageError("classify eval: --probabilities is for predict")
    if arguments.plot is not None and files.suffix(arguments.plot) != ".png":
        raise UsageError(f"classify eval: --plot is {arguments.plot!r}, expected a name that ends in .png")
    classifier = _loaded(arguments, options)
    if arguments.plot is not None and classifier.task == "regression":
        raise UsageError("classify eval: --plot is for labels, but the classifier predicts numbers")
    report = finetuning.evaluate_classifier(classifier, given_data(arguments.data), progress=True, **options)
    print(json.dumps(report.as_json(), allow_nan=False) if arguments.json else report, flush=True)
    if arguments.plot is not None:
        report.plot(arguments.plot, arguments.overwrite)


def _predict(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from nplora.finetuning.classification.prediction import predictions, save_array

    if arguments.json:
        raise UsageError("classify predict: --json is for eval; by default, predictions are JSON lines")
    if arguments.plot is not None:
        raise UsageError("classify predict: --plot is for eval")
    with _opened(arguments.output, arguments.overwrite) as stream:
        classifier = _loaded(arguments, options)
        suffix = f".{(arguments.output or '.jsonl').lower().rpartition('.')[2]}"
        labelled, known = ("words", _OF_WORDS) if classifier.classifies_tokens else ("texts", _OF_TEXTS)
        if suffix not in known:
            raise UsageError(
                f"classify predict: --output is {arguments.output!r}, expected a name that ends in "
                f"{' or '.join(known)}, because the classifier labels {labelled}"
            )
        if suffix == ".conll" and arguments.probabilities:
            raise UsageError("classify predict: a .conll file has no probabilities; write .jsonl")
        found = predictions(
            classifier,
            given_data(arguments.data),
            progress=arguments.output is not None,
            probabilities=arguments.probabilities,
            **options,
        )
        rows = (row for _, row in found)
        if suffix == ".npy":
            save_array(stream.buffer, rows)
        elif suffix == ".conll":
            _write_conll(stream, found)
        else:
            (_write_table if suffix == ".csv" else _write_lines)(stream, rows)


def _loaded(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    from nplora.lm import load_classifier

    compute = options.pop("compute", None)
    return load_classifier(arguments.model, arguments.adapter, compute, arguments.any_base)


@contextlib.contextmanager
def _opened(output: str | None, overwrite: bool) -> Iterator[TextIO]:
    """Open a new file for writing, or return stdout if `output` is None. After an error, delete the file.

    With `overwrite`, the new file has a temporary name until it is complete, and then replaces the earlier
    file and takes over its permissions.
    """
    if output is None:
        yield sys.stdout
        return
    if not output.lower().endswith((*_OF_TEXTS, *_OF_WORDS)):
        raise UsageError(
            f"classify predict: --output is {output!r}, expected a name that ends in "
            f"{' or '.join(_OF_TEXTS)} (texts), or in {' or '.join(_OF_WORDS)} (words)"
        )
    directory, name = os.path.split(output)
    replaces = overwrite and os.path.exists(output)
    target = os.path.join(directory, f".{name}.{secrets.token_hex(6)}.tmp") if replaces else output
    with open(target, "x", encoding="utf-8", newline="") as stream:
        try:
            if replaces:
                os.chmod(target, stat.S_IMODE(os.stat(output).st_mode))
            yield stream
            stream.close()
            if replaces:
                os.replace(target, output)
        except BaseException:
            with contextlib.suppress(OSError):  # if the disk is full, closing the file fails too
                stream.close()  # Windows cannot delete an open file
            os.unlink(target)
            raise


def _write_lines(stream: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    from nplora.formats.strict_json import json_values

    for row in rows:
        stream.write(json.dumps(json_values(row), ensure_ascii=False, allow_nan=False) + "\n")


def _write_table(stream: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    """Write CSV. The fields of the first row become the columns. "|" joins several labels of a row.

    Each label also has a column for its probability.
    """
    from nplora.formats.errors import DataError, brief

    writer: Callable[[list[Any]], Any] = csv.writer(stream).writerow
    columns: dict[str, None] | None = None
    for number, row in enumerate(rows, 1):
        chances = {f"probability {name}": p for name, p in (row.pop("probabilities", None) or {}).items()}
        if both := row.keys() & chances.keys():
            raise DataError(
                f"--output: row {number} has a field {brief(min(both))}, but predict writes a column with "
                "the same name; rename the field, or write .jsonl"
            )
        flat = {name: _cell(value) for name, value in {**row, **chances}.items()}
        if columns is None:
            columns = dict.fromkeys(flat)
            writer(list(columns))
        if others := [name for name in flat if name not in columns]:
            raise DataError(
                f"--output: row {number} has a field {brief(others[0])}, but the first row, whose fields "
                "become the columns of the CSV file, has no such field; write .jsonl"
            )
        writer([flat.get(name, "") for name in columns])


def _write_conll(stream: TextIO, found: Iterable[tuple[Any, dict[str, Any]]]) -> None:
    """Write a line for each word, and an empty line after each sentence.

    A line holds the word and its tag, or "_" if the word has no tag. `found` has pairs of a sentence and its
    row with the predicted tags.
    """
    from nplora.finetuning.data.rows import BEGINS_DOCUMENT
    from nplora.formats.errors import DataError, brief

    for number, (sentence, row) in enumerate(found, 1):
        where, tags = f"--output: row {number}", ("_" if tag is None else tag for tag in row["prediction"])
        for line in zip(sentence.words, tags, strict=True):
            for text in line:
                if not {"\t", "\n", "\r"}.isdisjoint(text):
                    raise DataError(
                        f"{where}: {brief(text)} has a tab or a line break, which would end the field "
                        "in a .conll file; write .jsonl"
                    )
            if line[0].startswith(BEGINS_DOCUMENT):
                raise DataError(f"{where}: {brief(line[0])} begins a document in a .conll file; write .jsonl")
            stream.write("\t".join(line) + "\n")
        stream.write("\n")


def _cell(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "|".join(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False) if isinstance(value, dict | list) else value
