"""The command `nplora`: arguments in, one call, and errors as one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nplora import _core

_INTERRUPTED = 128 + 2  # what a shell reports for a program that Ctrl-C ended


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nplora: error: {message} (try {self.prog} --help)\n")


def _demo(arguments: argparse.Namespace) -> None:
    from nplora import demo

    demo.run(arguments.output, arguments.rank, arguments.seed)


def _plot(arguments: argparse.Namespace) -> None:
    from nplora import plot

    print(plot.plot_run(arguments.run, arguments.output))


def _info(arguments: argparse.Namespace) -> None:
    from nplora import info, runtime

    if arguments.file is None:
        runtime.show_config()
    else:
        print(info.describe(arguments.file))


def _convert(arguments: argparse.Namespace) -> None:
    from nplora import convert, model_conversion

    if model_conversion.is_model(arguments.source):
        print(model_conversion.model_to_gguf(arguments.source, arguments.target, arguments.dtype))
    else:
        print(convert.convert_adapter(arguments.source, arguments.target, arguments.base))


def _combine(arguments: argparse.Namespace) -> None:
    from nplora import combination

    combined = combination.combine(arguments.adapters, arguments.rank, arguments.base)
    combined.save(arguments.output)
    print(combined)


def _merge(arguments: argparse.Namespace) -> None:
    from nplora import merge_files

    print(merge_files.merge_adapter(arguments.base, arguments.adapter, arguments.output, arguments.dtype))


def _weighted(text: str) -> tuple[str, float]:
    """ADAPTER:WEIGHT, or ADAPTER alone."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nplora", description="LoRA fine-tuning on CPUs, from NumPy.")
    parser.add_argument("--version", action="version", version=f"nplora {_core.config()['version']}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run_command=run)
        return added

    demo = command("demo", "Adapt a pretrained network of handwritten digits to a changed world.", _demo)
    demo.add_argument(
        "--output", metavar="DIR", default="demo", help="where adapter, log and plot are left (default: demo)"
    )
    demo.add_argument("--rank", type=int, default=4, help="of the factors (default: 4)")
    demo.add_argument(
        "--seed", type=int, default=0, help="of the starting factors and the order (default: 0)"
    )
    plot = command("plot", "Draw the losses and the learning rate of a run as a PNG.", _plot)
    plot.add_argument("run", metavar="RUN_DIR", help="the directory with the run's log.jsonl")
    plot.add_argument("--output", metavar="FILE", help="the PNG (default: RUN_DIR/plot.png)")
    text = "Print what a file holds; without one: versions, instruction set and threads, for a bug report."
    info = command("info", text, _info)
    info.add_argument(
        "file", metavar="FILE", nargs="?", help="GGUF, safetensors, *.safetensors.index.json, or an adapter"
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
        help="the adapter: a directory, or a .gguf file; or the model: a directory, or its model.safetensors",
    )
    convert.add_argument("target", metavar="TARGET", help="what is written: a .gguf file, or a directory")
    convert.add_argument(
        "--dtype",
        default="same",
        help="of a model's matrices: same, float32, float16, bfloat16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, "
        "q5_k or q6_k (default: same)",
    )
    convert.add_argument(
        "--base",
        metavar="MODEL",
        help="the adapter's model: a GGUF file, config.json, or its directory",
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
    combine.add_argument("--output", metavar="DIR", required=True, help="the new adapter's directory")
    combine.add_argument("--rank", type=int, help="cut the ranks to at most this (default: exact)")
    combine.add_argument(
        "--base", metavar="MODEL", help="the adapters' model, as for convert; needed for some .gguf files"
    )
    text = (
        "Write a model with a LoRA adapter merged into it, and tell how much of the adapter each weight kept."
    )
    merge = command("merge", text, _merge)
    merge.add_argument("base", metavar="BASE", help="a GGUF or safetensors file, or a Hugging Face directory")
    merge.add_argument("adapter", metavar="ADAPTER", help="PEFT's directory or llama.cpp's file")
    merge.add_argument("--output", metavar="FILE", required=True, help="of the base's kind; or a directory")
    merge.add_argument(
        "--dtype",
        default="same",
        help="the merged weights' storage: same, float32, bfloat16, float16; in GGUF also q8_0, q4_k, ... "
        "(default: same)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0: done. 1: it failed, and one line on stderr tells why. 2: the arguments are wrong. 130: Ctrl-C.
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run_command(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, ArithmeticError, ImportError) as error:
        print(f"nplora: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
