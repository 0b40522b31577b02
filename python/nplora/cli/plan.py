"""`nplora plan`"""

import argparse
import functools

from nplora.cli.errors import UsageError
from nplora.cli.parser import add_data, add_model, add_options, checked, given_data, given_options, path

HELP = (
    "Predict the memory and the time that finetune takes. With --memory, find the fastest plan that fits "
    "into this memory. Nothing is trained."
)

_LATENCY = "50us"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import FinetuneOptions

    parser.epilog = "Options of finetune that are not listed here are accepted, but have no effect."
    add_model(parser)
    add_data(parser)
    parser.add_argument("--valid", metavar="FILE", type=path, help="validation file of the run")
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="list all plans that --memory chooses from")
    group = parser.add_argument_group(
        "several machines (also give --accumulate, the number of batches in a step)"
    )
    group.add_argument("--nodes", metavar="N", type=int, help="number of machines like this one in the run")
    rate = "rate of each machine's network connection, in bits per second (1Gb) or bytes per second (125MB)"
    group.add_argument("--network", metavar="RATE", help=rate)
    latency = f"time that a message takes from one machine to another (default: {_LATENCY})"
    group.add_argument("--latency", metavar="TIME", help=latency)
    add_options(parser, FinetuneOptions, shown="planned")


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.finetuning import FinetuneOptions

    several = arguments.nodes is not None
    _check_nodes(arguments)
    options = given_options(arguments, FinetuneOptions)
    if several:
        options.setdefault("distributed", "mpi")  # so the plan predicts the memory of one rank
    checked(functools.partial(FinetuneOptions, op="plan"), options)
    found = finetuning.plan(arguments.model, given_data(arguments.data), valid=arguments.valid, **options)
    nodes = None
    if several:
        exchange = {name: options[name] for name in ("communication_dtype", "local_steps") if name in options}
        latency = arguments.latency or _LATENCY
        nodes = found.on_nodes(arguments.nodes, arguments.network, latency, **exchange)
    print(found.table() if arguments.verbose else found)
    if nodes is not None:
        print(nodes)


def _check_nodes(arguments: argparse.Namespace) -> None:
    """Check the options for several machines before the model is read, which is slow."""
    from nplora.distributed import Network

    given = {name: getattr(arguments, name) is not None for name in ("nodes", "network", "latency")}
    missing = next((name for name in ("network", "nodes") if not given[name]), None)
    if missing and any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise UsageError(f"plan: --{name} needs --{missing}, as in --nodes 8 --network 1Gb")
    if given["network"]:
        Network.parse(arguments.network, arguments.latency or _LATENCY, "plan")
