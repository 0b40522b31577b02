"""`nplora merge`"""

import argparse
import functools

from nplora.cli.errors import UsageError, show_warning
from nplora.cli.parser import (
    STORAGES,
    adapter_path,
    add_any_base,
    add_options,
    checked,
    given_options,
    path,
)

HELP = (
    "Merge a LoRA adapter into a model, write the new model, and report how much of the adapter's change the "
    "new model keeps."
)

_EPILOG = (
    "With --check, the loss of the new model is compared with the loss of BASE with the adapter. If the loss "
    "rises too much, no file is written, and the error names a storage type that is precise enough. ΔW is "
    "the adapter's change to the weights. 'ΔW kept' is the share of ΔW that is left after rounding to the "
    "storage type; a merge that keeps less than 90 % is refused. Noise is the part of the rounding error "
    "that is orthogonal to ΔW. Noise spreads over all directions, while ΔW acts in only a few directions. So "
    "noise that is larger than ΔW can still be harmless. Relative error is the norm of the whole rounding "
    "error, divided by the norm of ΔW."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.adapters.merge_gate import TOLERANCE
    from nplora.finetuning import EvaluateOptions
    from nplora.finetuning.held_out import READING

    parser.epilog = _EPILOG
    text = "GGUF or safetensors file, or Hugging Face directory"
    parser.add_argument("base", metavar="BASE", type=path, help=text)
    text = "PEFT directory or llama.cpp file"
    parser.add_argument("adapter", metavar="ADAPTER", type=adapter_path, help=text)
    text = "new model of the same kind as BASE; a directory if BASE is a directory"
    parser.add_argument("--output", metavar="FILE", type=path, required=True, help=text)
    text = "storage type of the merged weights; for safetensors, only the float types (default: same)"
    parser.add_argument("--dtype", choices=STORAGES, default="same", help=text)
    add_any_base(parser)
    text = (
        "write the model even if less than 90 %% of the adapter's change to the weights is left after "
        "rounding"
    )
    parser.add_argument("--lossy", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    text = "print 'ΔW kept' and the rounding error of each merged tensor"
    parser.add_argument("--verbose", action="store_true", help=text)
    text = (
        "held-out data; if the loss of the new model on these data is more than --tolerance above the loss "
        "of BASE with the adapter, no file is written"
    )
    parser.add_argument("--check", metavar="FILE", type=path, help=text)
    text = (
        f"accepted rise of the loss, in nats per token (default: {TOLERANCE}, which raises the perplexity by "
        "2 %%)"
    )
    parser.add_argument("--tolerance", metavar="NATS", type=float, help=text)
    add_options(parser, EvaluateOptions, names=READING)


def run(arguments: argparse.Namespace) -> None:
    from nplora import adapters
    from nplora.finetuning import EvaluateOptions, held_out_loss

    reading = given_options(arguments, EvaluateOptions)
    checked(functools.partial(EvaluateOptions, op="merge"), reading)
    held_out = arguments.check
    if held_out is None:
        for name in ("tolerance", *reading):
            given = getattr(arguments, name)
            if given is not None and given is not False:
                raise UsageError(f"--{name.replace('_', '-')} needs held-out data: add --check FILE")
    check = None if held_out is None else held_out_loss(held_out, progress=True, **reading)
    merged = adapters.merge_adapter(
        arguments.base,
        arguments.adapter,
        arguments.output,
        arguments.dtype,
        arguments.any_base,
        arguments.overwrite,
        arguments.lossy,
        check=check,
        tolerance=arguments.tolerance,
    )
    if arguments.verbose:
        print(merged.table())
    print(merged, flush=True)
    if merged.warning:
        show_warning(merged.warning)
