"""The client: it trains on its own data, and only LoRA factors leave its machine.

Its node configuration names its files: model="model.gguf" data="train.jsonl" valid="valid.jsonl".
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod

import nplora
from federated_lora.factors import adapter_with, digest_of, record_of
from nplora.adapters import Adapter

app = ClientApp()


def clip(message: Message, context: Context, call: Callable[[Message, Context], Message]) -> Message:
    """Clip the client's change with Flower's own mod, if the run has differential privacy."""
    private = context.run_config["clipping-norm"] > 0
    return fixedclipping_mod(message, context, call) if private else call(message, context)


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Reply with the initial factors, their scale, and digests of the base model and of both together."""
    start = initial_adapter(context)
    scale = next(iter(start.values())).scale
    about = ConfigRecord({"base": start.base_digest, "scale": scale, "start": digest_of(start)})
    return Message(RecordDict({"arrays": record_of(start, "AB"), "config": about}), reply_to=message)


@app.train(mods=[clip])
def train(message: Message, context: Context) -> Message:
    """Train the server's adapter for some steps on the client's data."""
    config, node = context.run_config, context.node_config
    frozen, private = config["strategy"] == "frozen-b", config["clipping-norm"] > 0
    start = server_adapter(message, context)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "run")
        report = nplora.finetune(
            node["model"], node["data"], output, adapter=start, freeze_B=frozen, lr=config["lr"],
            schedule="constant", steps=config["local-steps"], batch_examples=config["batch-examples"],
            seed=config["seed"] + message.content["config"]["server-round"], progress=False,
        )  # fmt: skip
        arrays = record_of(Adapter.read(output), "A" if frozen else "AB")
    # The number of examples is private too, so with differential privacy all clients have the same weight.
    weight = 1 if private else report.train.examples
    metrics = MetricRecord({"train-loss": report.history.loss[-1], "num-examples": weight})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the loss on the client's held-out data. Its weight is the number of tokens in the loss."""
    node, private = context.node_config, context.run_config["clipping-norm"] > 0
    adapter = server_adapter(message, context)
    found = nplora.evaluate(node["model"], node["valid"], adapter=adapter, progress=False)
    weight = 1 if private else found["tokens"]  # this number is private as well
    metrics = MetricRecord({"loss": found["loss"], "num-examples": weight})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def server_adapter(message: Message, context: Context) -> Adapter:
    """The adapter that the server sent.

    Raises:
        ValueError: this client's base model or initial factors are not those that the run began with.
    """
    start = initial_adapter(context)
    if message.content["config"]["start"] != digest_of(start):
        raise ValueError("the base model or the initial factors are not those that the run began with")
    return adapter_with(start, message.content["arrays"])


def initial_adapter(context: Context) -> Adapter:
    """The adapter that every client starts with. The seed decides B, so all clients have the same B."""
    config = context.run_config
    lm = nplora.load_model(context.node_config["model"])
    options = {name: config[name] for name in ("rank", "alpha", "targets", "seed")}
    lm.add_lora(**options, layers=config["layers"] or None)
    return Adapter.from_model(lm)
