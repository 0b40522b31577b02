"""The federated example: its ServerApp and ClientApps in one process, with a grid that calls them."""

import json
import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nplora
from nplora.adapters import Adapter
from small_llama import save_small_llama

flwr_app = pytest.importorskip("flwr.app")
serverapp = pytest.importorskip("flwr.serverapp")
pytest.importorskip("tokenizers")

EXAMPLE = Path(__file__).parents[2] / "examples/federated"
CLIENTS, ROUNDS = 2, 2

pytestmark = pytest.mark.slow


class LocalGrid(serverapp.Grid):  # type: ignore[misc]
    """Calls the ClientApp of each node at once, and keeps all messages."""

    def __init__(self, client_app: Any, contexts: dict[int, Any]) -> None:
        self.client_app, self.contexts, self.sent = client_app, contexts, list[tuple[Any, Any]]()

    def send_and_receive(self, messages: Iterable[Any], **options: Any) -> list[Any]:
        asked = list(messages)
        replies = [self.client_app(one, self.contexts[one.metadata.dst_node_id]) for one in asked]
        self.sent += zip(asked, replies, strict=True)
        return replies

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def trained(self) -> list[tuple[Any, Any]]:
        return [pair for pair in self.sent if pair[0].metadata.message_type == "train"]

    set_run = run = create_message = push_messages = pull_messages = None


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs the example with changed options and returns its grid and its report."""
    from flwr.supercore.task_identity import TaskIdentity

    monkeypatch.syspath_prepend(EXAMPLE)
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    import federated_lora.client_app
    import federated_lora.server_app

    model = save_small_llama(tmp_path / "model.gguf")
    nodes = {}
    for client in range(CLIENTS):
        rows = [{"prompt": f"{n}+{n}=", "completion": str((2 + client) * n)} for n in range(10 + 6 * client)]
        for name, part in (("data", rows), ("valid", rows[:4])):
            (tmp_path / f"{name}{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        files = {name: str(tmp_path / f"{name}{client}.jsonl") for name in ("data", "valid")}
        nodes[client + 1] = {"model": str(model), **files}
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    defaults = project["tool"]["flwr"]["app"]["config"] | {
        "clients": CLIENTS, "rounds": ROUNDS, "rank": 4, "lr": 1e-2, "output": str(tmp_path / "out"),
    }  # fmt: skip

    def run(of_node: dict[int, dict[str, Any]] | None = None, **changes: Any) -> tuple[LocalGrid, Any]:
        config = defaults | {name.replace("_", "-"): value for name, value in changes.items()}

        def context(node: int) -> Any:
            own = config | (of_node or {}).get(node, {})
            return flwr_app.Context(1, node, nodes.get(node, {}), flwr_app.RecordDict(), own)

        grid = LocalGrid(federated_lora.client_app.app, {node: context(node) for node in nodes})
        federated_lora.server_app.app(grid, context(0))
        return grid, json.loads((tmp_path / "out/report.json").read_text())

    run.place = tmp_path  # type: ignore[attr-defined]
    return run


def dense(arrays: Any, frozen: Adapter | None = None) -> dict[str, Any]:
    """ΔW of each layer in float64, with scale 1."""
    names = {key[:-2] for key in arrays}
    return {
        name: arrays[f"{name}.A"].numpy().astype(np.float64)
        @ (frozen[name].B if frozen else arrays[f"{name}.B"].numpy())
        for name in names
    }


def error_of(grid: LocalGrid, number: int, aggregate: dict[str, Any], frozen: Adapter | None) -> float:
    """The error of round `number`, computed with whole matrices."""
    replies = [reply.content for _, reply in grid.trained()[number * CLIENTS :][:CLIENTS]]
    updates = [dense(reply["arrays"], frozen) for reply in replies]
    weights = np.array([reply["metrics"]["num-examples"] for reply in replies])
    exact = {
        n: sum(w * u[n] for w, u in zip(weights, updates, strict=True)) / weights.sum() for n in aggregate
    }
    norms = [math.sqrt(sum((m**2).sum() for m in each)) for each in (
        [aggregate[n] - exact[n] for n in exact], exact.values(),
    )]  # fmt: skip
    return norms[0] / norms[1]


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"strategy": "frozen-b"}, 0, 1e-6),
        ({"strategy": "average"}, 1e-3, 1),
        ({"strategy": "combine", "max_rank": 0}, 0, 1e-6),
        ({"strategy": "combine", "max_rank": 4}, 1e-4, 0.5),
    ],
    ids=["frozen B", "average", "exact sum", "truncated sum"],
)
def test_a_strategy_learns_and_reports_its_error(
    options: dict[str, Any], least: float, most: float, federation: Any
) -> None:
    grid, report = federation(**options)
    assert report["losses"][1] < report["losses"][0]
    frozen = options["strategy"] == "frozen-b"
    for asked, reply in grid.trained():
        for arrays in (asked.content["arrays"], reply.content["arrays"]):
            assert {key[-2:] for key in arrays} == ({".A"} if frozen else {".A", ".B"})
    saved = Adapter.read(federation.place / "out")
    shared = saved if frozen else None
    aggregates = [dense(grid.trained()[CLIENTS][0].content["arrays"], shared)]
    aggregates.append({name: delta.A.astype(np.float64) @ delta.B for name, delta in saved.items()})
    for number, aggregate in enumerate(aggregates):
        wanted = error_of(grid, number, aggregate, shared)
        assert least <= wanted <= most
        assert report["errors"][number] == pytest.approx(wanted, rel=1e-2, abs=1e-7)

    held_out = [federation.place / f"valid{client}.jsonl" for client in range(CLIENTS)]
    loss = nplora.evaluate(federation.place / "model.gguf", held_out, adapter=federation.place / "out")[
        "loss"
    ]
    assert report["losses"][-1] == pytest.approx(loss, rel=1e-5)


def test_clients_with_another_b_are_refused(federation: Any) -> None:
    with pytest.raises(
        ValueError, match=r"nodes \[1, 2\] differ in the base model or in the initial factors"
    ):
        federation(of_node={2: {"seed": 1}})


def test_privacy_clips_changes_and_counts_epsilon(federation: Any) -> None:
    """Compared with the Rényi divergence of Gaussians, converted as in Canonne et al. 2020."""
    pytest.importorskip("dp_accounting")
    norm, noise, delta = 0.05, 2.0, 1e-5
    grid, report = federation(clipping_norm=norm, noise_multiplier=noise, delta=delta)
    for asked, reply in grid.trained():
        sent, got = (message.content["arrays"].to_numpy_ndarrays() for message in (asked, reply))
        change = math.sqrt(sum(((g - s) ** 2).sum() for g, s in zip(got, sent, strict=True)))
        assert change == pytest.approx(norm, rel=1e-4)
        assert reply.content["metrics"]["num-examples"] == 1
    order = np.linspace(1.01, 60, 100_000)
    divergence = ROUNDS * order / (2 * noise**2)
    epsilon = divergence + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)
    assert report["epsilon"] == pytest.approx(epsilon.min(), rel=1e-2)


def test_a_round_without_an_aggregate_is_an_error(federation: Any) -> None:
    """The clients send B too, which Flower's clipping refuses."""
    pytest.importorskip("dp_accounting")
    wrong = {node: {"strategy": "average"} for node in (1, 2)}
    with pytest.raises(RuntimeError, match=r"rounds \[1, 2\] have no aggregate"):
        federation(of_node=wrong, clipping_norm=1.0, noise_multiplier=1.0)


def test_privacy_without_a_frozen_b_is_refused(federation: Any) -> None:
    with pytest.raises(ValueError, match=r"clipping-norm is 1\.0, which needs strategy='frozen-b'"):
        federation(strategy="average", clipping_norm=1.0, noise_multiplier=1.0)
