"""The federated example: its ServerApp and ClientApps in one process, with a grid that calls them."""

import json
import math
import tomllib
from collections.abc import Callable, Iterable
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

    def __init__(self, client_app: Any, contexts: dict[int, Any], before: Callable[[Any], None]) -> None:
        self.client_app, self.contexts, self.before = client_app, contexts, before
        self.sent = list[tuple[Any, Any]]()

    def send_and_receive(self, messages: Iterable[Any], **options: Any) -> list[Any]:
        asked = list(messages)
        replies = [self.reply(one) for one in asked]
        self.sent += zip(asked, replies, strict=True)
        return replies

    def reply(self, asked: Any) -> Any:
        """An error of a client is a reply, as in Flower."""
        try:
            self.before(asked)
            return self.client_app(asked, self.contexts[asked.metadata.dst_node_id])
        except Exception as error:
            return flwr_app.Message(flwr_app.Error(0, str(error)), reply_to=asked)

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

    def run(
        of_node: dict[int, dict[str, Any]] | None = None,
        before: Callable[[Any], None] = lambda message: None,
        **changes: Any,
    ) -> tuple[LocalGrid, Any]:
        config = defaults | {name.replace("_", "-"): value for name, value in changes.items()}

        def context(node: int) -> Any:
            own = config | (of_node or {}).get(node, {})
            return flwr_app.Context(1, node, nodes.get(node, {}), flwr_app.RecordDict(), own)

        grid = LocalGrid(federated_lora.client_app.app, {node: context(node) for node in nodes}, before)
        run.grid = grid  # type: ignore[attr-defined]
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
    assert report["losses"]["2"] < report["losses"]["1"]
    assert report["clients"] == {"1": CLIENTS, "2": CLIENTS}
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
        assert report["errors"][str(number + 1)] == pytest.approx(wanted, rel=1e-2, abs=1e-7)

    held_out = [federation.place / f"valid{client}.jsonl" for client in range(CLIENTS)]
    loss = nplora.evaluate(federation.place / "model.gguf", held_out, adapter=federation.place / "out")[
        "loss"
    ]
    assert report["losses"][str(ROUNDS)] == pytest.approx(loss, rel=1e-5)


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
    weights = [r.content["metrics"]["num-examples"] for _, r in grid.sent if "metrics" in r.content]
    assert weights == [1] * (2 * CLIENTS * ROUNDS)
    assert not report["errors"]
    assert report["clients"] == {"1": CLIENTS, "2": CLIENTS}
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


def test_an_error_in_a_late_round_keeps_the_rounds_before(federation: Any) -> None:
    def fail(message: Any) -> None:
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            raise OSError("the disk is full")

    with pytest.raises(RuntimeError, match=r"rounds \[2\] have no aggregate"):
        federation(before=fail)
    saved, report = Adapter.read(federation.place / "out"), federation.place / "out/report.json"
    factors = [reply.content for _, reply in federation.grid.trained()[:CLIENTS]]
    weights = [reply["metrics"]["num-examples"] for reply in factors]
    for name, delta in saved.items():
        each = [reply["arrays"][f"{name}.A"].numpy() for reply in factors]
        np.testing.assert_allclose(delta.A, np.average(each, axis=0, weights=weights), rtol=1e-5, atol=1e-9)
    assert json.loads(report.read_text())["errors"].keys() == {"1"}


@pytest.mark.parametrize("privacy", [False, True], ids=["no privacy", "privacy"])
def test_nodes_beyond_the_clients_take_no_part(privacy: bool, federation: Any) -> None:
    if privacy:
        pytest.importorskip("dp_accounting")
    grid, report = federation(clients=1, clipping_norm=float(privacy), noise_multiplier=float(privacy))
    assert {message.metadata.dst_node_id for message, _ in grid.sent} == {1}
    assert report["losses"].keys() == {"1", "2"}


def test_a_client_that_changes_its_b_later_is_refused(federation: Any) -> None:
    def change(message: Any) -> None:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 2:
            federation.grid.contexts[2].run_config["seed"] = 1

    grid, report = federation(before=change)
    assert report["clients"] == {"1": 1, "2": 1}
    for asked, reply in grid.trained():
        assert reply.has_error() == (asked.metadata.dst_node_id == 2)
    assert "not those that the run began with" in grid.trained()[1][1].error.reason


def test_an_adapter_is_not_replaced_unless_asked(federation: Any) -> None:
    out = federation.place / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds an adapter"):
        federation()
    assert not federation.grid.sent
    federation(rounds=1, overwrite=True)
    assert Adapter.read(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "mean"}, "strategy is 'mean', expected 'frozen-b', 'average' or 'combine'"),
        ({"rounds": 0}, "rounds is 0, expected at least 1"),
        ({"clipping_norm": -1.0}, r"clipping-norm is -1\.0, expected a number of at least 0"),
        ({"clipping_norm": 0.5}, r"noise-multiplier is 0\.0, expected above 0 with clipping-norm=0\.5"),
        ({"clients": 3, "wait_seconds": 0}, "2 of 3 clients connected within 0 seconds"),
        (
            {"strategy": "average", "clipping_norm": 1.0, "noise_multiplier": 1.0},
            r"clipping-norm is 1\.0, which needs strategy='frozen-b'",
        ),
    ],
    ids=["strategy", "rounds", "clipping norm", "noise", "clients", "privacy of two factors"],
)
def test_options_are_checked_before_any_client_is_asked(
    options: dict[str, Any], message: str, federation: Any
) -> None:
    with pytest.raises((ValueError, TimeoutError), match=message):
        federation(**options)
    assert not federation.grid.sent
