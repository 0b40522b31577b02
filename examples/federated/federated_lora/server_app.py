"""The server: it has no model. It asks the clients for the initial factors and aggregates what they train."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict, UserConfig
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

from federated_lora.factors import adapter_with, record_of
from federated_lora.strategies import check, strategy_of
from nplora.adapters import Adapter, LoraDelta
from nplora.formats.output_directory import require_no_other
from nplora.formats.strict_json import json_values

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    check(config)
    prepare(config)
    nodes = connected(grid, config["clients"], config["wait-seconds"])
    start, digest = agreed_start(grid, nodes)
    strategy = strategy_of(config, start, nodes)
    initial = record_of(start, "A" if config["strategy"] == "frozen-b" else "AB")

    def save(number: int, arrays: ArrayRecord) -> None:
        """Flower calls this after each round, so an error in a later round loses nothing."""
        if config["output"] and arrays is not initial:
            adapter_with(start, arrays).save(config["output"], overwrite=True)

    result = strategy.start(
        grid=grid, initial_arrays=initial, num_rounds=config["rounds"], timeout=24 * 3600, evaluate_fn=save,
        train_config=ConfigRecord({"start": digest}), evaluate_config=ConfigRecord({"start": digest}),
    )  # fmt: skip
    report = report_of(config, result)
    if config["clipping-norm"] > 0:
        report["epsilon"] = strategy.privacy_spent().epsilon
    text = json.dumps(json_values(report), allow_nan=False)
    print(text, flush=True)
    if config["output"]:
        Path(config["output"], "report.json").write_text(text)
    if missing := set(range(1, config["rounds"] + 1)) - result.train_metrics_clientapp.keys():
        raise RuntimeError(
            f"rounds {sorted(missing)} have no aggregate; the log says what the clients replied"
        )


def prepare(config: UserConfig) -> None:
    """Make the output directory, so that a path that cannot be written is an error before the first round.

    Raises:
        FileExistsError: the directory holds a training run or, without `overwrite`, an adapter.
        OSError: the directory cannot be written.
    """
    output = Path(config["output"])
    if not config["output"]:
        return
    require_no_other(output, config["overwrite"])
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()


def report_of(config: UserConfig, result: Result) -> dict[str, Any]:
    """What report.json holds: losses, clients and errors by round. With privacy there are no errors."""
    trained, heard = result.train_metrics_clientapp, result.evaluate_metrics_clientapp
    return {
        "strategy": config["strategy"],
        "losses": {str(number): found["loss"] for number, found in heard.items()},
        "clients": {str(number): found["clients"] for number, found in trained.items()},
        "errors": {str(number): found["error"] for number, found in trained.items() if "error" in found},
        "megabytes": sum(array.nbytes for array in result.arrays.to_numpy_ndarrays()) / 1e6,
    }


def connected(grid: Grid, clients: int, seconds: int) -> list[int]:
    """The nodes that take part in the run: as many as `clients`, even if more are connected.

    Raises:
        TimeoutError: too few nodes connected in time.
    """
    seen, end = -1, time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < clients:
        if len(nodes) != seen:
            seen = len(nodes)
            print(f"waiting for clients: {seen} of {clients} are connected", flush=True)
        if time.monotonic() >= end:
            raise TimeoutError(f"{seen} of {clients} clients connected within {seconds} seconds")
        time.sleep(1)
    return nodes[:clients]


def agreed_start(grid: Grid, nodes: list[int]) -> tuple[Adapter, str]:
    """The adapter that all clients start with, and the digest by which a client knows it.

    Raises:
        ValueError: clients have other base models or other initial factors, or one of them failed.
        TimeoutError: a client did not reply.
    """
    asked = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=3600))
    for reply in replies:
        if reply.has_error():
            raise ValueError(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
    if silent := set(nodes) - {reply.metadata.src_node_id for reply in replies}:
        raise TimeoutError(f"nodes {sorted(silent)} did not reply within an hour")
    arrays, about = replies[0].content["arrays"], replies[0].content["config"]
    for reply in replies[1:]:
        if reply.content["config"] != about:
            different = [each.metadata.src_node_id for each in (replies[0], reply)]
            raise ValueError(f"nodes {different} differ in the base model or in the initial factors")
    names = dict.fromkeys(key.rpartition(".")[0] for key in arrays)
    factors = {name: [arrays[f"{name}.{letter}"].numpy() for letter in "AB"] for name in names}
    deltas = {name: LoraDelta(a, b, about["scale"]) for name, (a, b) in factors.items()}
    start = Adapter("the initial adapter", deltas, task_type="CAUSAL_LM", base_digest=about["base"])
    return start, about["start"]
