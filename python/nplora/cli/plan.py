"""`nplora plan`"""

import argparse
import functools

from nplora.cli.errors import UsageError
from nplora.cli.parser import add_data, add_model, add_options, checked, given_data, given_options, path

HELP = (
    "Predict the memory and the time that finetune takes. With --memory, find the fastest plan that fits. "
    "Nothing is trained."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nplora.finetuning import FinetuneOptions

    parser.epilog = "All other options of finetune are accepted, but have no effect."
    add_model(parser)
    add_data(parser)
    parser.add_argument("--valid", metavar="FILE", type=path, help="validation file of the run")
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="list all plans that --memory chooses from")
    group = parser.add_argument_group("several machines (also give --accumulate, a step's number of batches)")
    group.add_argument("--nodes", metavar="N", type=int, help="machines like this one that train together")
    rate = "rate of each machine's network connection, in bits per second (1Gb) or bytes per second (125MB)"
    group.add_argument("--network", metavar="RATE", help=rate)
    latency = "time from one machine to another (default: 50us)"
    group.add_argument("--latency", metavar="TIME", default="50us", help=latency)
    add_options(parser, FinetuneOptions, shown="planned")


def run(arguments: argparse.Namespace) -> None:
    from nplora import finetuning
    from nplora.finetuning import FinetuneOptions

    several = arguments.nodes is not None
    if several != (arguments.network is not None):
        given, missing = ("nodes", "network") if several else ("network", "nodes")
        raise UsageError(f"plan: --{given} needs --{missing}, as in --nodes 8 --network 1Gb")
    options = given_options(arguments, FinetuneOptions)
    if several:
        options.setdefault("distributed", "mpi")  # the memory is that of a rank
    checked(functools.partial(FinetuneOptions, op="plan"), options)
    found = finetuning.plan(arguments.model, given_data(arguments.data), valid=arguments.valid, **options)
    nodes = None
    if several:
        exchange = {name: options[name] for name in ("communication_dtype", "local_steps") if name in options}
        nodes = found.on_nodes(arguments.nodes, arguments.network, arguments.latency, **exchange)
    print(found.table() if arguments.verbose else found)
    if nodes is not None:
        print(nodes)
