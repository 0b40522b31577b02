"""`python -m bench.federated model.gguf combine lr=4e-3`: the federated example in one process.

The ServerApp and the ClientApps of examples/federated run one after another, on the data of loopback.py.
Options are those of the example's pyproject.toml; `pooled` trains on the data of all clients without a
federation. Needs nplora[federated].
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

EXAMPLE = Path(__file__).parents[1] / "examples/federated"
sys.path.insert(0, str(EXAMPLE))


class LocalGrid(Grid):  # type: ignore[misc]
    """Calls the ClientApp of each node at once."""

    def __init__(self, client_app: Any, contexts: dict[int, Context]) -> None:
        self.client_app, self.contexts = client_app, contexts

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> list[Message]:
        return [self.client_app(one, self.contexts[one.metadata.dst_node_id]) for one in messages]

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    set_run = run = create_message = push_messages = pull_messages = None


def federate(model: str, clients: list[dict[str, Path]], config: dict[str, Any]) -> None:
    """Run the federation. The server prints its report."""
    import federated_lora.client_app
    import federated_lora.server_app

    TaskIdentity._task_id = TaskIdentity._run_id = TaskIdentity._node_id = 1
    files = [{name: str(path) for name, path in client.items()} for client in clients]
    nodes = {i: {"model": model, **each} for i, each in enumerate(files, 1)}
    contexts = {node: Context(1, node, own, RecordDict(), config) for node, own in nodes.items()}
    grid = LocalGrid(federated_lora.client_app.app, contexts)
    federated_lora.server_app.app(grid, Context(1, 0, {}, RecordDict(), config))


def main() -> None:
    import loopback

    arguments = loopback.read_arguments(__doc__, [*loopback.RATES, "pooled"])
    config = loopback.DEFAULTS | arguments.options
    for strategy in arguments.strategies or [config["strategy"]]:
        with tempfile.TemporaryDirectory() as place:
            clients = loopback.write_data(Path(place), config["clients"])
            if strategy == "pooled":
                print(json.dumps({"loss": loopback.pooled_loss(arguments.model, clients, config)}))
            else:
                federate(str(arguments.model), clients, config | {"strategy": strategy})


if __name__ == "__main__":
    main()
