"""The command `nplora`: arguments in, one call, and errors as one line."""

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO, TypeVar

from nplora import _core
from nplora.runtime.stderr import stderr

_LONG_LIST = 300  # characters that a line may list: of more, the first example tells enough
_INTERRUPTED = 128 + 2  # what a shell reports for a program that Ctrl-C ended
T = TypeVar("T")

_MODEL = "a GGUF file, or a directory with config.json, *.safetensors and tokenizer.json"
_DATA = "a .jsonl, .csv or .txt file, or a directory with train.jsonl and valid.jsonl"
_ADAPTER = "PEFT's directory or llama.cpp's file and its weight (default: 1); several add up"
_ANY_BASE = "take an adapter that was trained on another model of these shapes"
_COMPUTES = ("float32", "bfloat16", "int8")
_BLOCKS = tuple(name for name, of in _core.block_formats().items() if of.ggml_name is not None)
_MERGED = ("same", "float32", "float64", "float16", "bfloat16", *_BLOCKS)
_CONVERTED = tuple(name for name in _MERGED if name != "float64")
_COMPUTE = "arithmetic of the frozen products; int8: of low-bit blocks with few tokens (default: float32)"


class _UsageError(ValueError):
    """An option that is not known, or whose value is out of its range."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nplora: error: {_one_line(message)} (try {self.prog} --help)\n")


def _demo(arguments: argparse.Namespace) -> None:
    output = f"demo-{arguments.what}" if arguments.output is None else arguments.output
    if arguments.what == "digits":
        from nplora.cli.demo import digits

        rank = 4 if arguments.rank is None else arguments.rank
        digits.run(output, rank, arguments.seed, arguments.overwrite)
    else:
        from nplora.cli.demo import dictionary

        rank = 8 if arguments.rank is None else arguments.rank
        dictionary.run(output, rank, arguments.seed, arguments.overwrite)


def _finetune(arguments: argparse.Namespace) -> None:
    from nplora import finetuning

    options = _finetune_options(arguments)
    report = finetuning.finetune(
        arguments.model, arguments.data, arguments.output, valid=arguments.valid, progress=True, **options
    )
    try:
        print(report, flush=True)
    except OSError as error:
        error.add_note(f"stdout could not be written; {report.output} holds the adapter")
        raise
    if report.history.interrupted:
        raise KeyboardInterrupt


def _plan(arguments: argparse.Namespace) -> None:
    from nplora import finetuning

    options = _finetune_options(arguments)
    found = finetuning.plan(arguments.model, arguments.data, valid=arguments.valid, **options)
    print(found.table() if arguments.verbose else found)


def _finetune_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of `FinetuneOptions`, checked."""
    from nplora.finetuning import FinetuneOptions

    options = _chosen(arguments, FinetuneOptions)
    _checked(FinetuneOptions, options)
    return options


def _eval(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.formats.errors import counted

    result = finetuning.evaluate(
        arguments.model,
        arguments.data,
        adapter=arguments.adapter,
        compute=arguments.compute,
        max_length=arguments.max_length,
        learn=arguments.learn,
        skip_bad=arguments.skip_bad,
        any_base=arguments.any_base,
        strict=arguments.strict,
        progress=True,
    )
    tokens, is_finite = counted(result["tokens"], "token"), math.isfinite(result["loss"])
    if arguments.json:
        shown = result if is_finite else result | {"loss": None}
        print(json.dumps(shown, allow_nan=False), flush=True)
    elif is_finite:
        print(f"loss {result['loss']:.4f} over {tokens}")
    if not is_finite:
        raise FloatingPointError(
            f"eval: the loss over {tokens} is {result['loss']}, expected a finite number"
        )


def _generate(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.lm.generation import Sampling, stream

    if arguments.system is not None and not arguments.chat:
        raise _UsageError("--system is a message of a chat, which needs --chat")
    sampling = _checked(Sampling, _chosen(arguments, Sampling))
    lm = finetuning.load_with_adapter(
        arguments.model, arguments.adapter, arguments.compute, arguments.any_base
    )
    prompt: Any = _prompt(arguments.prompt)
    if arguments.chat:
        said = [("system", arguments.system), ("user", prompt)]
        prompt = [{"role": role, "content": text} for role, text in said if text is not None]
    with warnings.catch_warnings(record=True) as found:  # told below the text, not in it
        for piece in stream(lm, prompt, sampling):
            print(piece, end="", flush=True)
    print(flush=True)
    for warning in found:
        _show_warning(warning.message)


def _prompt(given: str) -> str:
    """The prompt of the command line, or for "-" that of standard input."""
    if given == "-" and sys.stdin is None:
        raise ValueError("the prompt is to come from standard input, which is closed")
    text = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        return text.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8, at byte {error.start}") from error


def _plot(arguments: argparse.Namespace) -> None:
    from nplora.trainer import plot

    print(plot.plot_run(arguments.run, arguments.output, arguments.overwrite))


def _info(arguments: argparse.Namespace) -> None:
    from nplora import runtime
    from nplora.cli import info

    if arguments.file is None:
        runtime.show_config()
    else:
        print(info.describe(arguments.file))


def _convert(arguments: argparse.Namespace) -> None:
    from nplora import adapters
    from nplora.models import gguf_export as model_conversion

    if model_conversion.is_model(arguments.source):
        if arguments.base is not None:
            raise _UsageError("--base is the model of an adapter, SOURCE is a model")
        if arguments.any_base:
            raise _UsageError("--any-base is of an adapter, SOURCE is a model")
        dtype = arguments.dtype or "same"
        print(model_conversion.model_to_gguf(arguments.source, arguments.target, dtype, arguments.overwrite))
    else:
        if arguments.dtype is not None:
            os.stat(arguments.source)
            raise _UsageError("--dtype is for a Hugging Face model, and SOURCE is not one")
        print(
            adapters.convert_adapter(
                arguments.source, arguments.target, arguments.base, arguments.any_base, arguments.overwrite
            )
        )


def _combine(arguments: argparse.Namespace) -> None:
    from nplora import adapters
    from nplora.formats import files
    from nplora.formats.model_directory import require_no_model
    from nplora.formats.output_directory import require_no_other
    from nplora.formats.peft_adapter import files_of

    if files.suffix(arguments.output) in (".gguf", ".safetensors"):
        raise _UsageError(
            f"--output names a directory, got {arguments.output!r}; nplora convert makes a .gguf of it"
        )
    require_no_other(arguments.output, arguments.overwrite)  # before anything that takes time
    require_no_model(arguments.output)
    inputs = [("adapter", path) for adapter, _ in arguments.adapters for path in files_of(adapter)]
    files.require_not_read("combine", files_of(arguments.output), inputs)
    combined = adapters.combine(arguments.adapters, arguments.rank, arguments.base, arguments.any_base)
    combined.save(arguments.output, arguments.overwrite)
    if arguments.verbose:
        print(combined.table())
    print(f"{arguments.output}: {combined}")


def _merge(arguments: argparse.Namespace) -> None:
    from nplora import adapters

    merged = adapters.merge_adapter(
        arguments.base,
        arguments.adapter,
        arguments.output,
        arguments.dtype,
        arguments.any_base,
        arguments.overwrite,
        arguments.lossy,
    )
    if arguments.verbose:
        print(merged.table())
    print(merged, flush=True)
    if merged.warning:
        _show_warning(merged.warning)


def _path(text: str) -> str:
    """A path, which an unset variable of the shell is not."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _weighted(text: str) -> tuple[str, float]:
    """ADAPTER:WEIGHT, or ADAPTER alone, whose path may have a colon."""
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return _path(text), 1.0
    try:
        return _path(path), float(weight)
    except ValueError:
        told = f"{text!r} is not there, and for ADAPTER:WEIGHT {weight!r} is no number"
        raise argparse.ArgumentTypeError(told) from None


def _add_options(parser: argparse.ArgumentParser, options: type, shown: str = "help") -> None:
    """An option for every field of a dataclass, with the help that its metadata holds.

    Args:
        shown: where a field's metadata say False to this, its option is taken, but help leaves it out.
    """
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, name = kinds[field.name], f"--{field.name.replace('_', '-')}"
        text, choices = field.metadata["help"], field.metadata.get("choices")
        hidden = not field.metadata.get(shown, True)
        if kind is bool:
            parser.add_argument(name, action="store_true", help=argparse.SUPPRESS if hidden else text)
            if alias := field.metadata.get("alias"):
                old = f"--{alias.replace('_', '-')}"
                parser.add_argument(old, dest=field.name, action="store_true", help=argparse.SUPPRESS)
            continue
        several = typing.get_origin(kind) is tuple
        plain = [part for part in typing.get_args(kind) if part not in (types.NoneType, ...)] or [kind]
        if field.default not in (None, ()):
            default: Any = field.default
            text = f"{text} (default: {' '.join(default) if several else default})"
        parser.add_argument(
            name,
            type=plain[0],
            action="append" if several else "store",
            choices=choices,
            metavar=None if choices else plain[0].__name__.upper().replace("STR", "TEXT"),
            help=argparse.SUPPRESS if hidden else text.replace("%", "%%"),
        )


def _chosen(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """What was given of a dataclass's fields."""
    found = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(options)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def _checked(options: Callable[..., T], chosen: dict[str, Any]) -> T:
    try:
        return options(**chosen)
    except (ValueError, TypeError) as error:
        raise _UsageError(str(error)) from error


def _parser(command_name: str | None = None) -> argparse.ArgumentParser:
    parser = _Parser(prog="nplora", description="LoRA fine-tuning on CPUs, from NumPy.")
    parser.add_argument("--version", action="version", version=f"nplora {_core.config()['version']}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run_command=run, prog=added.prog)
        return added

    text = "Fine-tune a language model on a file of text; the adapter is PEFT's."
    finetune = command("finetune", text, _finetune)
    finetune.add_argument("model", metavar="MODEL", type=_path, help=_MODEL)
    finetune.add_argument("--data", metavar="FILE", type=_path, required=True, help=_DATA)
    finetune.add_argument(
        "--valid", metavar="FILE", type=_path, help="evaluated before and after every epoch"
    )
    finetune.add_argument(
        "--output",
        metavar="DIR",
        type=_path,
        required=True,
        help="gets the adapter, the checkpoints and log.jsonl",
    )
    text = "Predict the memory and the time of finetune; with --memory, find how it fits. Nothing is trained."
    plan = command("plan", text, _plan)
    plan.add_argument("model", metavar="MODEL", type=_path, help=_MODEL)
    plan.add_argument("--data", metavar="FILE", type=_path, required=True, help=_DATA)
    plan.add_argument("--valid", metavar="FILE", type=_path, help="as finetune evaluates on")
    plan.add_argument("--output", help=argparse.SUPPRESS)
    plan.add_argument("--verbose", action="store_true", help="with --memory: tell every way of computing")
    plan.epilog = "The other options of finetune are taken too, and change nothing."
    evaluate = command("eval", "Print the mean loss of a language model over a file.", _eval)
    evaluate.add_argument("model", metavar="MODEL", type=_path, help=_MODEL)
    evaluate.add_argument(
        "--data",
        metavar="FILE",
        type=_path,
        required=True,
        help=f"{_DATA}, of which the latter is read where it is there",
    )
    evaluate.add_argument(
        "--adapter", metavar="PATH[:WEIGHT]", type=_weighted, action="append", help=_ADAPTER
    )
    evaluate.add_argument("--any-base", action="store_true", help=_ANY_BASE)
    evaluate.add_argument("--max-length", metavar="INT", type=int, help="longer examples are cut")
    evaluate.add_argument(
        "--learn", choices=("completion", "all"), default="completion", help="the tokens that count"
    )
    evaluate.add_argument("--skip-bad", action="store_true", help="pass over bad lines")
    evaluate.add_argument(
        "--strict", action="store_true", help="take an example that is too long for an error"
    )
    evaluate.add_argument("--compute", choices=_COMPUTES, default="float32", help=_COMPUTE)
    evaluate.add_argument(
        "--json", action="store_true", help='print {"loss": ..., "tokens": ..., "examples": ..., ...}'
    )
    text = "Print what a language model says after a prompt."
    generate = command("generate", text, _generate)
    generate.add_argument("model", metavar="MODEL", type=_path, help=_MODEL)
    generate.add_argument("prompt", metavar="PROMPT", help="the text that goes on; -: standard input")
    generate.add_argument(
        "--adapter", metavar="PATH[:WEIGHT]", type=_weighted, action="append", help=_ADAPTER
    )
    generate.add_argument("--any-base", action="store_true", help=_ANY_BASE)
    generate.add_argument("--chat", action="store_true", help="ask by the model's chat template")
    generate.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    generate.add_argument("--compute", choices=_COMPUTES, default="float32", help=_COMPUTE)
    if command_name in (
        None,
        "finetune",
        "plan",
        "generate",
    ):  # the modules that know the options take time to load
        from nplora.finetuning import FinetuneOptions
        from nplora.lm.generation import Sampling

        _add_options(finetune, FinetuneOptions)
        _add_options(plan, FinetuneOptions, shown="planned")
        _add_options(generate, Sampling)
    text = (
        "Fine-tune a small language model on The Devil's Dictionary; or (digits) adapt a network that reads "
        "handwritten digits to a changed world."
    )
    demo = command("demo", text, _demo)
    demo.add_argument(
        "what",
        metavar="WHAT",
        nargs="?",
        choices=("dictionary", "digits"),
        default="dictionary",
        help="dictionary (default) or digits",
    )
    demo.add_argument(
        "--output", metavar="DIR", type=_path, help="where adapter and log are left (default: demo-WHAT)"
    )
    demo.add_argument("--rank", type=int, help="of the factors (default: 8, of digits 4)")
    demo.add_argument(
        "--seed", type=int, default=0, help="of the starting factors and the order (default: 0)"
    )
    demo.add_argument(
        "--overwrite",
        action="store_true",
        help="drop the run, the adapter and the plot in the output directory",
    )
    plot = command("plot", "Draw the losses and the learning rate of a run as a PNG.", _plot)
    plot.add_argument("run", metavar="RUN_DIR", type=_path, help="the directory with the run's log.jsonl")
    plot.add_argument("--output", metavar="FILE", type=_path, help="the PNG (default: RUN_DIR/plot.png)")
    plot.add_argument("--overwrite", action="store_true", help="replace the PNG if there is one")
    text = "Print what a file holds; without one: versions, instruction set and threads, for a bug report."
    info = command("info", text, _info)
    info.add_argument(
        "file",
        metavar="FILE",
        type=_path,
        nargs="?",
        help="GGUF, safetensors, *.safetensors.index.json, or the directory of a model or an adapter",
    )
    text = (
        "Convert a LoRA adapter from PEFT's directory to llama.cpp's GGUF file, or back; or a model (Llama, "
        "Mistral, Qwen2, Qwen3) from Hugging Face's directory to GGUF. Of tokenizers, byte-level BPE alone "
        "goes along."
    )
    convert = command("convert", text, _convert)
    convert.add_argument(
        "source",
        metavar="SOURCE",
        type=_path,
        help="the adapter: a directory, or a .gguf file; or the model: a directory, or its model.safetensors",
    )
    convert.add_argument(
        "target", metavar="TARGET", type=_path, help="what is written: a .gguf file, or a directory"
    )
    convert.add_argument(
        "--dtype",
        choices=_CONVERTED,
        help="of a model's matrices (default: same)",
    )
    convert.add_argument(
        "--base",
        metavar="MODEL",
        type=_path,
        help="the adapter's model: a GGUF file, config.json, or its directory",
    )
    convert.add_argument("--any-base", action="store_true", help=_ANY_BASE)
    convert.add_argument(
        "--overwrite", action="store_true", help="replace TARGET, or the adapter in that directory"
    )
    text = "Add up LoRA adapters with weights, exactly, as one adapter."
    combine = command("combine", text, _combine)
    combine.add_argument(
        "adapters",
        metavar="ADAPTER[:WEIGHT]",
        nargs="+",
        type=_weighted,
        help="PEFT's directory or llama.cpp's file, and what it is multiplied with (default: 1)",
    )
    combine.add_argument(
        "--output", metavar="DIR", type=_path, required=True, help="the new adapter's directory"
    )
    combine.add_argument("--rank", type=int, help="cut the ranks to at most this (default: exact)")
    combine.add_argument(
        "--base",
        metavar="MODEL",
        type=_path,
        help="the adapters' model, as for convert; needed for some .gguf files",
    )
    combine.add_argument("--any-base", action="store_true", help="also of adapters of different models")
    combine.add_argument(
        "--overwrite", action="store_true", help="replace the adapter in the output directory"
    )
    combine.add_argument("--verbose", action="store_true", help="tell the rank and the error of every layer")
    text = (
        "Write a model with a LoRA adapter merged into it, and tell how much of the adapter each weight kept."
    )
    merge = command("merge", text, _merge)
    merge.epilog = (
        "ΔW kept: how much of the adapter's change is in the weights as they are stored; less than 90 % is "
        "refused. Noise: what rounding changes beside that. It spreads over all directions and the adapter's "
        "change acts in a few, so noise may be larger than ΔW and hardly matter. Relative error: both "
        "together, over ΔW."
    )
    merge.add_argument(
        "base", metavar="BASE", type=_path, help="a GGUF or safetensors file, or a Hugging Face directory"
    )
    merge.add_argument("adapter", metavar="ADAPTER", type=_path, help="PEFT's directory or llama.cpp's file")
    merge.add_argument(
        "--output", metavar="FILE", type=_path, required=True, help="of the base's kind; or a directory"
    )
    merge.add_argument(
        "--dtype",
        choices=_MERGED,
        default="same",
        help="the merged weights' storage, of which safetensors has the floats (default: same)",
    )
    merge.add_argument("--any-base", action="store_true", help=_ANY_BASE)
    merge.add_argument(
        "--lossy", action="store_true", help="merge even if less than 90 %% of the adapter's change is kept"
    )
    merge.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    merge.add_argument("--verbose", action="store_true", help="report what every tensor kept of the adapter")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0: done. 2: an argument is wrong, a file or the disk, a package is not there, or nothing fits into
    --memory. 1: anything else failed, or the reader of stdout is gone. 130: Ctrl-C. 129, 143: SIGHUP or
    SIGTERM ended a training run, which is saved. 135: a mapped model file was cut short. With 1, 2 or 135,
    one line on stderr says why, unless stdout's reader is gone. Warnings are a line each. A stderr that
    cannot be written changes nothing.

    Raises:
        SystemExit: --help, or SIGHUP or SIGTERM during training.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # stderr never fails at a letter that it cannot show
    try:
        return _status(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        for stream in (sys.stdout, sys.stderr):
            _discard_unwritable(stream)


def _status(given: list[str]) -> int:
    """Run the command; return the exit status."""
    try:
        parsed, unknown = _parser(given[0] if given else "").parse_known_args(given)
        if unknown:
            raise _UsageError(f"unrecognized arguments: {' '.join(unknown)}")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            parsed.run_command(parsed)
        print(end="", flush=True)
    except (KeyboardInterrupt, SystemExit) as end:
        for note in getattr(end, "__notes__", ()):
            print(f"nplora: {note}", file=stderr)
        if isinstance(end, SystemExit):
            raise
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has gone
        return 1
    except _UsageError as error:
        print(f"nplora: error: {_one_line(str(error))} (try {parsed.prog} --help)", file=stderr)
        return 2
    except (OSError, ValueError, ArithmeticError, ImportError, MemoryError) as error:
        words = [_told(error), *getattr(error, "__notes__", ())]
        print(f"nplora: error: {'; '.join(map(_one_line, words))}", file=stderr)
        return 2 if isinstance(error, ValueError | OSError | ModuleNotFoundError) else 1
    return 0


def _discard_unwritable(stream: TextIO | None) -> None:
    """Send what a stream still holds and cannot write to /dev/null: else Python fails with it at its exit."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())


def _told(error: Exception) -> str:
    """What is wrong; with a file of it where there is one, and without the system's numbers."""
    if not isinstance(error, OSError) or error.strerror is None or error.errno is None:
        return str(error) or "out of memory"
    text, file = error.strerror, error.filename
    is_systems = text == os.strerror(error.errno)
    if is_systems:
        text = "no such file" if error.errno == errno.ENOENT else text[0].lower() + text[1:]
    if file is None:
        return text
    path = os.fsdecode(file) if isinstance(file, (str, bytes, os.PathLike)) else str(file)
    return f"{text}: {path}" if is_systems else f"{path}: {text}"


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    print(f"nplora: warning: {_one_line(str(message))}", file=stderr)


def _one_line(text: str) -> str:
    """A list of lines behind a colon becomes one behind the same colon; of a long one, the first."""
    head, colon, items = text.partition(":\n  ")
    if len(items) > _LONG_LIST and "\n  " in items:
        items = f"{items.partition(chr(10))[0]}\n  …"
    return " ".join((head + colon + items.replace("\n  ", "; ")).split())
