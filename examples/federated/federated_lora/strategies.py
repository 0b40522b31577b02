"""How the server makes one adapter of the clients' adapters. Each strategy reports its error.

- frozen-b: average A, with the B that all clients share. ΔW = mean(A)·B is the exact average of the updates.
- combine: the weighted sum of the updates by `nplora.combine`, cut to `max-rank` by an SVD.
- average: average A and B separately. mean(A)·mean(B) is not the average of A·B; this is for comparison.
"""

from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict, UserConfig
from flwr.serverapp import Grid, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords, aggregate_metricrecords

import nplora
from federated_lora.factors import adapter_with, record_of, relative_error
from nplora.adapters import Adapter, LoraDelta

WEIGHT = "num-examples"


class Averaging(FedAvg):
    """FedAvg of the factors in the records, by the same nodes in each round.

    It reports the number of clients in each aggregate. Without privacy it also reports the error of the
    averaged adapter. With privacy, Flower adds noise after this class has computed the aggregate, so its
    error would say nothing.
    """

    def __init__(self, start: Adapter, nodes: Sequence[int], private: bool) -> None:
        self.initial, self.nodes, self.private = start, nodes, private
        super().__init__(train_metrics_aggr_fn=self.averaged)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        return self.messages(MessageType.TRAIN, server_round, arrays, config)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        return self.messages(MessageType.EVALUATE, server_round, arrays, config)

    def messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        """A message to each node that agreed on the start. FedAvg itself would ask all connected nodes."""
        config["server-round"] = server_round
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, dst_node_id=node, message_type=kind) for node in self.nodes]

    def adapters(self, replies: list[RecordDict]) -> list[tuple[Adapter, float]]:
        """The adapter of each client, and its weight."""
        total = sum(reply["metrics"][WEIGHT] for reply in replies)
        return [
            (adapter_with(self.initial, reply["arrays"]), reply["metrics"][WEIGHT] / total)
            for reply in replies
        ]

    def averaged(self, replies: list[RecordDict], key: str) -> MetricRecord:
        return self.metrics(replies, aggregate_arrayrecords(replies, key))

    def metrics(self, replies: list[RecordDict], arrays: ArrayRecord) -> MetricRecord:
        """The mean of the clients' metrics, the number of clients, and the error of their aggregate."""
        metrics = aggregate_metricrecords(replies, WEIGHT)
        metrics["clients"] = len(replies)
        if not self.private:
            metrics["error"] = relative_error(adapter_with(self.initial, arrays), self.adapters(replies))
        return metrics


class Combining(Averaging):
    """The sum of the clients' updates, exact or cut to a rank."""

    def __init__(self, start: Adapter, nodes: Sequence[int], max_rank: int) -> None:
        super().__init__(start, nodes, private=False)
        self.max_rank = max_rank

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents = [reply.content for reply in self._check_and_log_replies(replies, is_train=True)[0]]
        if not contents:
            return None, None
        combined = nplora.combine(self.adapters(contents), rank=self.max_rank or None)
        scale = next(iter(self.initial.values())).scale
        rescaled = {name: LoraDelta(d.A / scale, d.B, scale) for name, d in combined.items()}
        arrays = record_of(Adapter("the aggregate", rescaled), "AB")
        return arrays, self.metrics(contents, arrays)


def check(config: UserConfig) -> None:
    """Check the options of a run, before the server waits for clients.

    Raises:
        ValueError: an option has a wrong value, or privacy is asked for without a frozen B.
        ImportError: privacy is asked for, and flwr[dp] is not installed.
    """
    name, norm = config["strategy"], config["clipping-norm"]
    if name not in ("frozen-b", "average", "combine"):
        raise ValueError(f"strategy is {name!r}, expected 'frozen-b', 'average' or 'combine'")
    for option in ("rounds", "clients"):
        if config[option] < 1:
            raise ValueError(f"{option} is {config[option]}, expected at least 1")
    for option in ("clipping-norm", "noise-multiplier"):
        if not 0 <= config[option] < float("inf"):
            raise ValueError(f"{option} is {config[option]}, expected a number of at least 0")
    if norm == 0:
        return
    if name != "frozen-b":
        raise ValueError(
            f"clipping-norm is {norm}, which needs strategy='frozen-b': noise on A and B multiplies"
        )
    if config["noise-multiplier"] == 0:
        raise ValueError(f"noise-multiplier is 0.0, expected above 0 with clipping-norm={norm}")
    accountant_of(config)


def strategy_of(config: UserConfig, start: Adapter, nodes: Sequence[int]) -> Strategy:
    """The strategy of a run, with Flower's differential privacy around it if `clipping-norm` is set."""
    norm = config["clipping-norm"]
    if config["strategy"] == "combine":
        return Combining(start, nodes, config["max-rank"])
    strategy = Averaging(start, nodes, private=norm > 0)
    if norm == 0:
        return strategy
    return DifferentialPrivacyClientSideFixedClipping(
        strategy, config["noise-multiplier"], norm, len(nodes), accountant=accountant_of(config)
    )


def accountant_of(config: UserConfig) -> RdpAccountant:
    """Flower's accountant, which computes epsilon."""
    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    return RdpAccountant(PrivacyConfig(config["delta"], config["clients"], relation, sampling))
