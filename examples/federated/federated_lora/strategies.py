"""How the server makes one adapter of the clients' adapters. Each strategy reports its error.

- frozen-b: average A, with the B that all clients share. ΔW = mean(A)·B is the exact average of the updates.
- combine: the weighted sum of the updates by `nplora.combine`, cut to `max-rank` by an SVD.
- average: average A and B separately. mean(A)·mean(B) is not the average of A·B; this is for comparison.
"""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict, UserConfig
from flwr.serverapp import NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords, aggregate_metricrecords

import nplora
from federated_lora.factors import adapter_with, record_of, relative_error
from nplora.adapters import Adapter, LoraDelta

WEIGHT = "num-examples"


class Averaging(FedAvg):
    """FedAvg of the factors in the records, which reports the error of the averaged adapter."""

    def __init__(self, start: Adapter, clients: int) -> None:
        self.initial = start
        nodes = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
        super().__init__(**dict.fromkeys(nodes, clients), train_metrics_aggr_fn=self.averaged)

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
        """The mean of the clients' metrics, and the error of their aggregate."""
        metrics = aggregate_metricrecords(replies, WEIGHT)
        metrics["error"] = relative_error(adapter_with(self.initial, arrays), self.adapters(replies))
        return metrics


class Combining(Averaging):
    """The sum of the clients' updates, exact or cut to a rank."""

    def __init__(self, start: Adapter, clients: int, max_rank: int) -> None:
        super().__init__(start, clients)
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


def strategy_of(config: UserConfig, start: Adapter) -> Strategy:
    """The strategy of a run, with Flower's differential privacy around it if `clipping-norm` is set.

    Raises:
        ValueError: the strategy is unknown, or privacy is asked for without a frozen B.
    """
    name, clients, norm = config["strategy"], config["clients"], config["clipping-norm"]
    if name not in ("frozen-b", "average", "combine"):
        raise ValueError(f"strategy is {name!r}, expected 'frozen-b', 'average' or 'combine'")
    if name == "combine":
        strategy: Averaging = Combining(start, clients, config["max-rank"])
    else:
        strategy = Averaging(start, clients)
    if norm <= 0:
        return strategy
    if name != "frozen-b":
        raise ValueError(
            f"clipping-norm is {norm}, which needs strategy='frozen-b': noise on A and B multiplies"
        )
    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    accountant = RdpAccountant(PrivacyConfig(config["delta"], clients, relation, sampling))
    return DifferentialPrivacyClientSideFixedClipping(
        strategy, config["noise-multiplier"], norm, clients, accountant=accountant
    )
