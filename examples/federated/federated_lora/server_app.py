"""The server: it has no model. It asks the clients for the initial factors and aggregates what they train."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from federated_lora.factors import adapter_with, record_of
from federated_lora.strategies import strategy_of
from nplora.adapters import Adapter, LoraDelta

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    start = agreed_start(grid, config["clients"])
    strategy = strategy_of(config, start)
    letters = "A" if config["strategy"] == "frozen-b" else "AB"
    result = strategy.start(
        grid=grid, initial_arrays=record_of(start, letters), num_rounds=config["rounds"], timeout=24 * 3600
    )
    trained, heard = result.train_metrics_clientapp, result.evaluate_metrics_clientapp
    if missing := set(range(1, config["rounds"] + 1)) - trained.keys():
        raise RuntimeError(
            f"rounds {sorted(missing)} have no aggregate; the log says what the clients replied"
        )
    report = {
        "strategy": config["strategy"],
        "losses": [heard[number]["loss"] for number in sorted(heard)],
        "errors": [trained[number]["error"] for number in sorted(trained)],
        "megabytes": sum(array.nbytes for array in result.arrays.to_numpy_ndarrays()) / 1e6,
    }
    if config["clipping-norm"] > 0:
        report["epsilon"] = strategy.privacy_spent().epsilon
    print(json.dumps(report), flush=True)
    if config["output"]:
        adapter_with(start, result.arrays).save(config["output"], overwrite=True)
        Path(config["output"], "report.json").write_text(json.dumps(report))


def agreed_start(grid: Grid, clients: int) -> Adapter:
    """The adapter that all clients start with.

    Raises:
        ValueError: clients have other base models or other initial factors, or one of them failed.
    """
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(1)
    asked = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=3600))
    for reply in replies:
        if reply.has_error():
            raise ValueError(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
    first = replies[0].content
    for reply in replies[1:]:
        if reply.content["config"] != first["config"] or not same(reply.content["arrays"], first["arrays"]):
            nodes = [each.metadata.src_node_id for each in (replies[0], reply)]
            raise ValueError(f"nodes {nodes} differ in the base model or in the initial factors")
    arrays, about = first["arrays"], first["config"]
    names = dict.fromkeys(key.rpartition(".")[0] for key in arrays)
    factors = {name: [arrays[f"{name}.{letter}"].numpy() for letter in "AB"] for name in names}
    deltas = {name: LoraDelta(a, b, about["scale"]) for name, (a, b) in factors.items()}
    return Adapter("the initial adapter", deltas, task_type="CAUSAL_LM", base_digest=about["base"])


def same(one: ArrayRecord, other: ArrayRecord) -> bool:
    """Whether two records have the same names and bits."""
    return one.keys() == other.keys() and all(one[key].data == other[key].data for key in one)
