"""The strategy: what the server makes of replies, good and bad, round after round."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import Tensor, nn

from fedsim.attack import Attack, AttackContext, CoordinationKnowledge, Knowledge
from fedsim.config import Config, build
from fedsim.defense import Aggregated, Defense, RoundUpdates, Screening, Server
from fedsim.direct import make_server
from fedsim.errors import RunError
from fedsim.federation import ray_grid
from fedsim.federation.evaluation import Measurement
from fedsim.federation.grids import InProcessGrid, LocalGrid
from fedsim.federation.messages import pack_state, to_record, to_vector, unpack_state
from fedsim.federation.records import RoundRecord
from fedsim.federation.schedule import RoundPlan
from fedsim.federation.server import play
from fedsim.federation.strategy import FederatedStrategy
from fedsim.layout import Layout
from fedsim.trigger import StampTrigger

CLIENTS = 5
SIZES = [10, 20, 30, 40, 50]
LAYOUT = Layout.of(nn.BatchNorm1d(2))  # 4 trainable entries, 4 running statistics
START = torch.arange(8.0)

Client = Callable[[Message, int], RecordDict]


def a_config(rounds: int = 1, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "task": {"data": "digits", "model": "logistic"},
        "federation": {"clients": CLIENTS, "clients_per_round": CLIENTS, "rounds": rounds},
        "attack": None,
    }
    for key, value in changes.items():
        raw.setdefault("evaluation" if key == "every" else "federation", {})[key] = value
    return build(raw)


def a_plan(rounds: int = 1, malicious: dict[int, dict[int, int]] | None = None, **same: Any) -> list[RoundPlan]:
    parts = {"replying": tuple(range(CLIENTS)), "dropped": (), "stragglers": (), **same}
    return [RoundPlan(r, malicious=(malicious or {}).get(r, {}), **parts) for r in range(1, rounds + 1)]


def update_of(client: int, round: int = 1) -> Tensor:
    return torch.linspace(-1, 1, 8) * (client + 1) + round


def honest(message: Message, client: int) -> RecordDict:
    """global + its update, under its own number of examples."""
    vector = to_vector(message.content.array_records["arrays"])
    round = int(message.content.config_records["config"]["round"])
    return reply(vector + update_of(client, round), SIZES[client])


def reply(vector: Tensor, examples: Any = 10, **metrics: Any) -> RecordDict:
    return RecordDict(
        {"arrays": to_record(vector), "metrics": MetricRecord({"num-examples": examples, "seconds": 0.5, **metrics})}
    )


def an_app(client: Client) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(client(message, int(context.node_config["partition-id"])), reply_to=message)

    return app


class Table:
    """A strategy at work: what it sent, what it recorded, what it measured."""

    def __init__(self, config: Config | None = None, plan: list[RoundPlan] | None = None, **options: Any) -> None:
        self.config = config or a_config()
        self.plan = plan or a_plan(self.config.federation.rounds)
        self.records: list[RoundRecord] = []
        self.measured: list[Tensor] = []
        self.sent: list[Message] = []
        options.setdefault("attack", None)
        stages: Sequence[Defense] = options.pop("stages", [])
        self.strategy = FederatedStrategy(
            self.config,
            self.plan,
            LAYOUT,
            START.clone(),
            SIZES,
            list(stages),
            measure=self.measure,
            on_round=self.records.append,
            **options,
        )

    def measure(self, vector: Tensor, stages: object, server: object) -> Measurement:
        self.measured.append(vector.clone())
        return Measurement(0.5, 1.0, None, None)

    def play(self, client: Client = honest, grid: LocalGrid | None = None) -> RoundRecord:
        """Play the plan; the last round's record."""

        def noted(message: Message, number: int) -> RecordDict:
            self.sent.append(message)
            return client(message, number)

        play(self.strategy, grid or InProcessGrid(an_app(noted), CLIENTS))
        return self.records[-1]

    @property
    def moved(self) -> Tensor:
        return self.strategy.global_vector - START


def but(odd: int, what: Client) -> Client:
    """Everybody is honest but one client."""
    return lambda message, client: what(message, client) if client == odd else honest(message, client)


def mean_of(clients: Sequence[int], weights: Sequence[float] | None = None) -> Tensor:
    share = torch.tensor(weights if weights is not None else [float(SIZES[c]) for c in clients])
    return (share / share.sum()) @ torch.stack([update_of(c) for c in clients])


# ------------------------------------------------------------------------------------------- a good round


def test_fedavg_weighs_by_examples() -> None:
    table = Table()
    record = table.play()
    assert torch.allclose(table.moved, mean_of(range(CLIENTS)), atol=1e-6)
    assert [c.client for c in record.clients] == list(range(CLIENTS))
    assert [c.status for c in record.clients] == ["ok"] * CLIENTS
    assert [c.examples for c in record.clients] == SIZES
    assert [c.weight for c in record.clients] == pytest.approx([s / sum(SIZES) for s in SIZES])
    assert all(c.accepted and not c.malicious for c in record.clients)
    norms = [float(update_of(c).norm()) for c in range(CLIENTS)]
    assert [c.update_norm for c in record.clients] == pytest.approx(norms, rel=1e-5)
    assert record.seconds["slowest_client"] == 0.5
    assert {"train", "aggregate", "evaluate"} <= set(record.seconds)
    assert record.measurement == Measurement(0.5, 1.0, None, None)


def test_uniform_weighting_counts_every_client_once() -> None:
    table = Table(a_config(weighting="uniform"))
    record = table.play()
    assert torch.allclose(table.moved, mean_of(range(CLIENTS), [1.0] * CLIENTS), atol=1e-6)
    assert [c.weight for c in record.clients] == pytest.approx([1 / CLIENTS] * CLIENTS)


@pytest.mark.parametrize("rate", [0.25, 2.0])
def test_server_lr_scales_the_step(rate: float) -> None:
    table = Table(a_config(server_lr=rate))
    table.play()
    assert torch.allclose(table.moved, rate * mean_of(range(CLIENTS)), atol=1e-5)
    assert table.strategy.last_aggregate is not None
    assert torch.allclose(table.strategy.last_aggregate, table.moved, atol=1e-6)


def test_rounds_build_on_each_other_and_what_is_measured_is_the_new_model() -> None:
    table = Table(a_config(rounds=3))
    table.play()
    assert [r.round for r in table.records] == [1, 2, 3]
    assert len(table.measured) == 3
    assert torch.equal(table.measured[-1], table.strategy.global_vector)
    first = mean_of(range(CLIENTS))
    assert torch.allclose(table.measured[0], START + first, atol=1e-5)
    assert torch.allclose(table.measured[1], START + 2 * first + 1, atol=1e-5)
    arrays = {id(m.content["arrays"]) for m in table.sent[:CLIENTS]}
    assert len(arrays) == 1, "one record for all clients of a round"


def test_evaluates_every_nth_round_and_the_last() -> None:
    table = Table(a_config(rounds=5, every=3))
    table.play()
    assert [r.round for r in table.records if r.measurement is not None] == [3, 5]


def test_a_resumed_strategy_counts_on() -> None:
    table = Table(a_config(rounds=4, every=3), start_round=2)
    table.play()
    assert [r.round for r in table.records] == [3, 4]
    assert {int(m.content.config_records["config"]["round"]) for m in table.sent} == {3, 4}
    assert all(r.measurement is not None for r in table.records)


def test_nothing_is_played_when_all_rounds_are() -> None:
    table = Table(a_config(rounds=2), start_round=2)
    play(table.strategy, InProcessGrid(an_app(honest), CLIENTS))
    assert table.records == []
    assert torch.equal(table.moved, torch.zeros(8))


def test_the_plan_decides_who_is_asked() -> None:
    table = Table(plan=a_plan(replying=(0, 3), dropped=(1,), stragglers=(2, 4)))
    record = table.play()
    assert sorted(int(m.content.config_records["config"]["client"]) for m in table.sent) == [0, 3]
    assert {int(m.content.config_records["config"]["participants"]) for m in table.sent} == {2}
    assert {int(m.content.config_records["config"]["total-examples"]) for m in table.sent} == {50}
    assert [(c.client, c.status) for c in record.clients] == [
        (0, "ok"),
        (1, "dropped"),
        (2, "straggler"),
        (3, "ok"),
        (4, "straggler"),
    ]
    assert torch.allclose(table.moved, mean_of([0, 3]), atol=1e-6)
    absent = record.clients[1]
    assert (absent.update_norm, absent.weight, absent.accepted, absent.examples) == (None, 0.0, False, 20)


def test_too_few_nodes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import fedsim.federation.strategy as module

    monkeypatch.setattr(module, "_REGISTRATION_SECONDS", 0.0)
    with pytest.raises(RunError, match=r"the grid has 3 nodes; federation.clients is 5"):
        Table().play(grid=InProcessGrid(an_app(honest), 3))


class Shuffled(InProcessGrid):
    """A grid as a network is: node ids are large numbers, replies come as they come, some never."""

    lost: frozenset[int] = frozenset()

    def get_node_ids(self) -> list[int]:
        return [node * 1000 + 17 for node in (3, 1, 5, 2, 4)]

    def answer(self, messages: list[Message]) -> list[Message]:
        for message in messages:
            message.metadata.__dict__["_dst_node_id"] = message.metadata.dst_node_id // 1000
        replies = super().answer(messages)
        for answered in replies:
            answered.metadata.__dict__["_src_node_id"] = answered.metadata.src_node_id * 1000 + 17
        kept = [r for r in replies if r.metadata.src_node_id // 1000 - 1 not in self.lost]
        return kept[::-1]


def test_replies_may_come_in_any_order() -> None:
    table, straight = Table(), Table()
    straight.play()
    record = table.play(grid=Shuffled(an_app(honest), CLIENTS))
    assert torch.equal(table.moved, straight.moved)
    assert [c.examples for c in record.clients] == SIZES
    assert [c.status for c in record.clients] == ["ok"] * CLIENTS


def test_a_reply_that_never_comes_is_a_failed_client() -> None:
    grid = Shuffled(an_app(honest), CLIENTS)
    grid.lost = frozenset({1, 4})
    table = Table()
    record = table.play(grid=grid)
    assert [(c.status, c.reason) for c in record.clients if c.client in (1, 4)] == [("failed", "no reply in time")] * 2
    assert torch.allclose(table.moved, mean_of([0, 2, 3]), atol=1e-6)


# -------------------------------------------------------------------------------------------- bad replies


def poisoned(value: float) -> Client:
    def client(message: Message, number: int) -> RecordDict:
        vector = to_vector(message.content.array_records["arrays"]) + 1
        vector[3] = value
        return reply(vector, SIZES[number])

    return client


def without(record: str, key: str | None = None) -> Client:
    def client(message: Message, number: int) -> RecordDict:
        content = honest(message, number)
        if key is None:
            del content[record]
        else:
            del content[record][key]
        return content

    return client


def counting(examples: Any) -> Client:
    def client(message: Message, number: int) -> RecordDict:
        content = honest(message, number)
        content.metric_records["metrics"].__dict__["_data"]["num-examples"] = examples  # past Flower's own checks
        return content

    return client


def sending(array: Array, name: str = "model") -> Client:
    def client(message: Message, number: int) -> RecordDict:
        content = honest(message, number)
        content["arrays"] = ArrayRecord({name: array})
        return content

    return client


@pytest.mark.parametrize(
    ("client", "reason", "examples"),
    [
        (poisoned(float("nan")), "an update that is not finite", 30),
        (poisoned(float("inf")), "an update that is not finite", 30),
        (poisoned(float("-inf")), "an update that is not finite", 30),
        (sending(Array(np.zeros(7, np.float32))), r"an array of shape \(7,\), the model has \(8,\)", 30),
        (sending(Array(np.zeros((8, 1), np.float32))), r"an array of shape \(8, 1\)", 30),
        (sending(Array(np.zeros((), np.float32))), r"an array of shape \(\)", 30),
        (sending(Array(np.full(8, 1e300))), "an update that is not finite", 30),
        (sending(Array(np.zeros(8, np.int64))), "unusable reply: the array holds int64", 0),
        (sending(Array(np.zeros(8, np.float32)), "weights"), "unusable reply: expected one array named 'model'", 0),
        (sending(Array("float32", (8,), "numpy.ndarray", b"")), "unusable reply: the array cannot be read", 0),
        (without("arrays"), "unusable reply: it has no 'arrays'", 0),
        (without("metrics"), "unusable reply: it has no 'metrics'", 0),
        (without("metrics", "num-examples"), "unusable reply: it has no 'num-examples'", 0),
        (counting(0), "a number of examples of 0", 0),
        (counting(-5), "a number of examples of -5", 0),
        (counting(2.5), "a number of examples of 2.5", 0),
        (counting(True), "a number of examples of True", 0),
        (counting([30]), r"a number of examples of \[30\]", 0),
        (counting(10**400), "a number of examples of 1000", 0),
    ],
)
def test_an_unusable_reply_is_rejected_and_the_round_goes_on(client: Client, reason: str, examples: int) -> None:
    table = Table()
    record = table.play(but(2, client))
    odd = record.clients[2]
    assert odd.status == "rejected"
    assert pytest.approx(0) == odd.weight
    assert not odd.accepted
    assert odd.update_norm is None
    assert odd.examples == examples
    assert re.search(reason, odd.reason), odd.reason
    assert len(odd.reason) < 200
    assert [c.status for c in record.clients if c.client != 2] == ["ok"] * 4
    assert torch.allclose(table.moved, mean_of([0, 1, 3, 4]), atol=1e-6)


def test_float64_is_welcome() -> None:
    table = Table()
    wide = START.double().numpy() + update_of(2).double().numpy()
    record = table.play(but(2, sending(Array(wide))))
    assert record.clients[2].status == "ok"
    assert torch.allclose(table.moved, mean_of(range(CLIENTS)), atol=1e-5)


@pytest.mark.parametrize("seconds", [[1.0, 2.0], 10**400, None])
def test_odd_metrics_hurt_nobody(seconds: Any) -> None:
    def client(message: Message, number: int) -> RecordDict:
        content = honest(message, number)
        data = content.metric_records["metrics"].__dict__["_data"]
        data.pop("seconds") if seconds is None else data.update(seconds=seconds)
        return content

    assert Table().play(but(2, client)).clients[2].status == "ok"


def test_if_every_reply_is_rejected_the_model_stays() -> None:
    table = Table(a_config(rounds=2))
    record = table.play(poisoned(float("nan")))
    assert torch.equal(table.moved, torch.zeros(8))
    assert table.strategy.last_aggregate is None
    assert {c.status for c in record.clients} == {"rejected"}
    assert len(table.records) == 2
    assert record.measurement is not None


class RejectAll(Defense):
    def screen(self, round: RoundUpdates) -> Screening:
        return Screening(accepted=torch.zeros(round.count, dtype=torch.bool), scores={"odd": torch.ones(round.count)})


class Lending(Defense):
    """Sends the model out as it lies in the server's network, and then uses that network."""

    def broadcast(self, vector: Tensor, server: Server) -> Tensor:
        server.model.load(vector + 1)
        return server.model.vector

    def screen(self, round: RoundUpdates) -> Screening:
        assert round.server is not None
        round.server.model.load(torch.zeros(8))
        return Screening()


def test_a_broadcast_model_is_the_global_one_whatever_becomes_of_the_servers_network() -> None:
    server = make_server(nn.BatchNorm1d(2), 2)
    table = Table(stages=[Lending()], serve=lambda round: server)
    table.play()
    assert torch.equal(to_vector(table.sent[0].content.array_records["arrays"]), START + 1)
    assert torch.allclose(table.moved, 1 + mean_of(range(CLIENTS)), atol=1e-6)


def test_if_the_defense_rejects_everybody_the_model_stays() -> None:
    table = Table(stages=[RejectAll()])
    record = table.play()
    assert torch.equal(table.moved, torch.zeros(8))
    assert [(c.status, c.accepted, c.weight) for c in record.clients] == [("ok", False, 0.0)] * CLIENTS
    assert [c.scores for c in record.clients] == [{".odd": 1.0}] * CLIENTS
    assert all(c.update_norm is not None for c in record.clients)


def test_a_round_without_replies_keeps_the_model() -> None:
    table = Table(plan=a_plan(replying=(), dropped=(0, 1), stragglers=(2, 3, 4)))
    record = table.play()
    assert torch.equal(table.moved, torch.zeros(8))
    assert len(record.clients) == CLIENTS


class Last(Defense):
    """Keeps who was there in its state and takes the last client's update."""

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        self.state["clients"] = [*self.state.get("clients", []), list(round.clients)]
        weights = torch.zeros(round.count)
        weights[-1] = 1.0
        return Aggregated(round.updates[-1].clone(), weights, {"place": torch.arange(round.count).double()})


def test_a_defense_sees_the_usable_clients_only_in_ascending_order() -> None:
    stage = Last()
    table = Table(plan=a_plan(replying=(0, 2, 3, 4), dropped=(1,)), stages=[stage])
    record = table.play(but(4, poisoned(float("nan"))))
    assert stage.state == {"clients": [[0, 2, 3]]}
    assert torch.allclose(table.moved, update_of(3), atol=1e-6)
    assert [c.weight for c in record.clients] == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert [list(c.scores.values()) for c in record.clients] == [[0.0], [], [1.0], [2.0], []]


# ------------------------------------------------------------------------------------------------- errors


def test_an_exception_in_a_client_ends_the_run_naming_it() -> None:
    def failing(message: Message, client: int) -> RecordDict:
        raise ZeroDivisionError("by zero, in the plugin")

    table = Table(a_config(rounds=2))
    with pytest.raises(RunError, match=r"round 1, client 3 failed:\n") as caught:
        table.play(but(3, failing))
    assert "ZeroDivisionError: by zero, in the plugin" in str(caught.value)
    assert "Traceback" in str(caught.value)
    assert table.records == [], "the round is not recorded"


class Crashing(InProcessGrid):
    """A grid that lost the workers of some clients for good."""

    crashed: tuple[int, ...] = ()

    def answer(self, messages: list[Message]) -> list[Message]:
        error = Error(ErrorCode.CLIENT_APP_CRASHED, "its worker died 3 times (killed)")
        answered = super().answer(messages)
        return [
            Message(error, reply_to=message) if message.metadata.dst_node_id - 1 in self.crashed else reply
            for message, reply in zip(messages, answered, strict=True)
        ]


def test_a_client_whose_worker_crashed_is_recorded_as_failed() -> None:
    grid = Crashing(an_app(honest), CLIENTS)
    grid.crashed = (0, 2)
    table = Table(plan=a_plan(malicious={1: {2: 0}}), attack=Attack())
    record = table.play(grid=grid)
    failed = record.clients[2]
    assert (failed.status, failed.malicious, failed.examples) == ("failed", True, 30)
    assert failed.reason == "its worker died 3 times (killed)"
    assert torch.allclose(table.moved, mean_of([1, 3, 4]), atol=1e-6)
    assert record.malicious_submitted == 0


def test_a_rejected_malicious_reply_counts_as_submitted_but_not_accepted() -> None:
    table = Table(plan=a_plan(malicious={1: {1: 0, 2: 1}}), attack=Attack())
    record = table.play(but(2, poisoned(float("nan"))))
    assert (record.malicious_submitted, record.malicious_accepted) == (2, 1)


# ------------------------------------------------------------------------------------------------ attackers


class Colluders(Attack):
    """Remembers what it is shown; replaces the malicious rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, CoordinationKnowledge]] = []

    def coordinate(self, updates: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        self.seen.append((updates.clone(), knowledge))
        updates[~knowledge.malicious] = 77.0  # nobody must care
        updates[knowledge.malicious] = 9.0
        return updates


class Spies(Colluders):
    knows = frozenset({Knowledge.OWN_DATA, Knowledge.BENIGN_UPDATES})


@pytest.mark.parametrize("kind", [Colluders, Spies])
def test_colluders_see_benign_updates_only_if_they_declared_it(kind: type[Colluders]) -> None:
    attack = kind()
    table = Table(plan=a_plan(malicious={1: {1: 0, 4: 1}}), attack=attack)
    record = table.play()
    ((shown, knowledge),) = attack.seen
    assert knowledge.malicious.tolist() == [False, True, False, False, True]
    assert knowledge.benign_visible == (kind is Spies)
    assert knowledge.num_examples.tolist() == SIZES
    assert torch.equal(knowledge.global_vector, START)
    everything = torch.stack([update_of(c) for c in range(CLIENTS)])
    assert torch.allclose(shown[[1, 4]], everything[[1, 4]], atol=1e-5)
    if kind is Spies:
        assert torch.allclose(shown, everything, atol=1e-5)
    else:
        assert bool(shown[[0, 2, 3]].isnan().all())
    nine = torch.full((8,), 9.0)
    rows = torch.stack([update_of(0), nine, update_of(2), update_of(3), nine])
    assert torch.allclose(table.moved, (torch.tensor(SIZES) / 150.0) @ rows, atol=1e-5)
    assert record.clients[1].update_norm == pytest.approx(float(nine.norm())), "the norm as submitted"
    assert [c.malicious for c in record.clients] == [False, True, False, False, True]


def test_colluders_draw_from_the_rounds_own_stream() -> None:
    draws = []
    for rounds in (1, 2):
        attack = Colluders()
        table = Table(a_config(rounds=rounds), a_plan(rounds, malicious={r: {1: 0} for r in (1, 2)}), attack=attack)
        table.play()
        draws.append([float(torch.rand((), generator=k.generator)) for _, k in attack.seen])
    assert draws[0][0] == draws[1][0]
    assert draws[1][0] != draws[1][1]


def test_nobody_coordinates_in_a_round_without_attackers() -> None:
    attack = Colluders()
    Table(attack=attack).play()
    assert attack.seen == []


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (torch.zeros(5, 7), r"their shape is \(5, 7\), not \(5, 8\)"),
        (torch.full((5, 8), float("nan")), "an update that is not finite"),
        (torch.full((5, 8), -1e20), r"beyond measure, with an entry of 1\.0e\+20"),
    ],
)
def test_unusable_coordinated_updates_end_the_run(made: Tensor, why: str) -> None:
    class Broken(Attack):
        name = "broken"

        def coordinate(self, updates: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
            return made

    with pytest.raises(RunError, match=f"attack 'broken': coordinate returned unusable updates: .*{why}"):
        Table(plan=a_plan(malicious={1: {1: 0}}), attack=Broken()).play()


def test_the_orders_say_who_attacks_and_as_which_part() -> None:
    table = Table(plan=a_plan(malicious={1: {1: 6, 4: 7}}), attack=Attack())
    table.play()
    orders = [message.content.config_records["config"] for message in table.sent]
    said = {order["client"]: (order["malicious"], order["attacker"]) for order in orders}
    assert said == {0: (False, 0), 1: (True, 6), 2: (False, 0), 3: (False, 0), 4: (True, 7)}


def test_attack_state_travels_to_the_next_malicious_round_and_to_attackers_only() -> None:
    got: dict[tuple[int, int], Any] = {}

    def client(message: Message, number: int) -> RecordDict:
        order = message.content.config_records["config"]
        round = int(order["round"])
        state = unpack_state(message.content)
        if "state" in message.content or "state-arrays" in message.content:
            got[round, number] = state
        content = honest(message, number)
        if order["malicious"]:
            mask = state.get("mask", torch.zeros(2)) + 1
            content = RecordDict({**pack_state({"rounds": [*state.get("rounds", []), round], "mask": mask}), **content})
        return content

    table = Table(a_config(rounds=5), a_plan(5, malicious={2: {1: 0}, 4: {3: 1}, 5: {1: 2, 3: 3}}), attack=Attack())
    table.play(client)
    assert set(got) == {(2, 1), (4, 3), (5, 1), (5, 3)}
    assert got[2, 1] == {}, "nothing is kept before the first malicious round"
    assert got[4, 3]["rounds"] == [2]
    assert got[5, 1]["rounds"] == got[5, 3]["rounds"] == [2, 4]
    assert got[5, 1]["mask"].tolist() == [2.0, 2.0]
    assert table.strategy.attack_state["rounds"] == [2, 4, 5]


def test_a_benign_client_cannot_smuggle_state_in() -> None:
    def client(message: Message, number: int) -> RecordDict:
        return RecordDict({**pack_state({"mine": number}), **honest(message, number)})

    table = Table(a_config(rounds=2), a_plan(2, malicious={1: {3: 0}}), attack=Attack())
    table.play(client)
    assert table.strategy.attack_state == {"mine": 3}


class Merging(Attack):
    """Counts with everybody, and clears what it keeps in round 3."""

    def merge(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"numbers": [state["number"] for state in states]} if states[0] else {}


def test_colluders_states_are_merged_in_the_order_of_their_numbers_and_may_be_cleared() -> None:
    def client(message: Message, number: int) -> RecordDict:
        state = {} if message.content.config_records["config"]["round"] == 2 else {"number": number}
        return RecordDict({**pack_state(state), **honest(message, number)})

    table = Table(a_config(rounds=1), a_plan(1, malicious={1: {1: 7, 3: 2, 4: 5}}), attack=Merging())
    table.play(client)
    assert table.strategy.attack_state == {"numbers": [3, 4, 1]}
    table = Table(a_config(rounds=2), a_plan(2, malicious={1: {1: 0}, 2: {1: 0}}), attack=Merging())
    table.play(client)
    assert table.strategy.attack_state == {}


@pytest.mark.parametrize("kept", [{}, None])
def test_a_state_that_comes_back_empty_replaces_the_old_one(kept: dict[str, Any] | None) -> None:
    """Emptied by the attack, or left out of the reply."""
    got: list[dict[str, Any]] = []

    def client(message: Message, number: int) -> RecordDict:
        order = message.content.config_records["config"]
        if order["malicious"]:
            got.append(unpack_state(message.content))
        state = {"mask": torch.ones(2)} if order["round"] == 1 else kept
        return RecordDict({**({} if state is None else pack_state(state)), **honest(message, number)})

    table = Table(a_config(rounds=3), a_plan(3, malicious={r: {1: 0} for r in (1, 2, 3)}), attack=Attack())
    table.play(client)
    assert [set(state) for state in got] == [set(), {"mask"}, set()]
    assert table.strategy.attack_state == {}


class Remembering(Attack):
    """Its colluders see who they are and what they keep."""

    knows = frozenset({Knowledge.OWN_DATA, Knowledge.LAST_AGGREGATE})

    def coordinate(self, updates: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        assert knowledge.layout is LAYOUT
        kept = knowledge.state.setdefault("seen", [])
        row = [knowledge.clients[int(i)] for i in torch.nonzero(knowledge.malicious)]
        kept.append([row, list(knowledge.attackers), knowledge.last_aggregate is not None])
        return updates


def test_what_colluders_keep_reaches_the_clients_of_their_next_round() -> None:
    got: list[dict[str, Any]] = []

    def client(message: Message, number: int) -> RecordDict:
        if not message.content.config_records["config"]["malicious"]:
            return honest(message, number)
        got.append(unpack_state(message.content))
        return RecordDict({**pack_state(got[-1]), **honest(message, number)})

    table = Table(a_config(rounds=2), a_plan(2, malicious={1: {1: 6, 4: 2}, 2: {3: 1}}), attack=Remembering())
    table.play(client)
    assert got[-1] == {"seen": [[[1, 4], [6, 2], False]]}
    assert table.strategy.attack_state == {"seen": [[[1, 4], [6, 2], False], [[3], [1], True]]}


class Learnt(StampTrigger):
    """Its state counts how often it was improved, and by whom."""

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        return inputs

    def optimise(self, context: AttackContext) -> None:
        raise AssertionError("clients optimise, not the server")


def test_one_colluder_improves_the_trigger_and_all_of_the_round_get_it() -> None:
    seen: list[tuple[int, int, bool, dict[str, Any]]] = []

    def client(message: Message, number: int) -> RecordDict:
        order = message.content.config_records["config"]
        if not order["malicious"]:
            assert "trigger" not in message.content
            return honest(message, number)
        state = unpack_state(message.content, "trigger")
        seen.append((int(order["round"]), number, bool(order["optimise"]), state))
        if order["optimise"]:
            return pack_state({"by": [*state.get("by", []), number]}, "trigger")
        return honest(message, number)

    trigger = Learnt()
    measured: list[dict[str, Any]] = []
    plan = a_plan(4, malicious={2: {1: 5, 4: 3}, 4: {2: 0}})
    table = Table(a_config(rounds=4), plan, attack=Attack(), trigger=trigger)
    table.strategy.measure = lambda *_: measured.append(dict(trigger.state)) or Measurement(0.5, 1.0, None, None)  # type: ignore[func-returns-value]
    table.play(client)
    assert seen == [
        (2, 4, True, {}),
        (2, 1, False, {"by": [4]}),
        (2, 4, False, {"by": [4]}),
        (4, 2, True, {"by": [4]}),
        (4, 2, False, {"by": [4, 2]}),
    ]
    assert measured == [{}, {"by": [4]}, {"by": [4]}, {"by": [4, 2]}]


def test_the_twin_never_improves_the_trigger_and_is_measured_with_the_one_given() -> None:
    trigger = Learnt()
    plan = a_plan(1, malicious={1: {1: 0}})
    table = Table(plan=plan, attack=Attack(), trigger=trigger, trigger_state={"by": [9]}, honest=True)
    table.play()
    assert trigger.state == {"by": [9]}
    assert len(table.sent) == CLIENTS


@pytest.mark.parametrize(
    "state",
    [
        ConfigRecord({"json": "{"}),
        ConfigRecord({"json": "[1]"}),
        ConfigRecord({"json": '{"mask": {"__tensor__": "nowhere"}}'}),
        ConfigRecord({"text": "{}"}),
        ConfigRecord({"json": "[" * 100_000}),
    ],
)
def test_a_state_that_cannot_be_read_rejects_the_reply(state: ConfigRecord) -> None:
    def client(message: Message, number: int) -> RecordDict:
        if not message.content.config_records["config"]["malicious"]:
            return honest(message, number)
        return RecordDict({**honest(message, number), **pack_state({}), "state": state})

    table = Table(plan=a_plan(malicious={1: {2: 0}}), attack=Attack())
    record = table.play(client)
    (rejected,) = [c for c in record.clients if c.status != "ok"]
    assert rejected.client == 2
    assert "its state" in rejected.reason
    assert table.strategy.attack_state == {}
    assert record.malicious_submitted == 1


class Follows(Attack):
    knows = frozenset({Knowledge.OWN_DATA, Knowledge.LAST_AGGREGATE})


class Sometimes(Follows):
    @classmethod
    def knowledge(cls, parameters: Any) -> frozenset[Knowledge]:
        return frozenset({Knowledge.OWN_DATA})


@pytest.mark.parametrize(("attack", "sees"), [(Attack, False), (Follows, True), (Sometimes, False)])
def test_the_last_aggregate_goes_to_attacks_that_declare_it(attack: type[Attack], sees: bool) -> None:
    table = Table(a_config(rounds=2, server_lr=0.5), a_plan(2, malicious={1: {1: 0}, 2: {1: 1}}), attack=attack())
    table.play()
    got = {
        (int(o["round"]), int(o["client"])): m.content.array_records["last-aggregate"]
        for m in table.sent
        for o in [m.content.config_records["config"]]
        if "last-aggregate" in m.content
    }
    assert set(got) == ({(2, 1)} if sees else set()), "there is none in round 1, and benign clients never see it"
    if sees:
        assert torch.allclose(to_vector(got[2, 1]), 0.5 * mean_of(range(CLIENTS)), atol=1e-5)


def test_colluders_are_sent_the_same_records_so_that_ray_stores_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(
        a_config(rounds=2),
        a_plan(2, malicious={2: {1: 0, 4: 1}}),
        attack=Follows(),
        trigger_state={"patch": torch.ones(2)},
    )
    table.strategy.attack_state = {"mask": torch.zeros(3)}
    table.play()
    sent = table.sent[CLIENTS:]
    one, other = (m.content for m in sent if m.content.config_records["config"]["malicious"])
    arrays = ["arrays", "state-arrays", "trigger-arrays", "last-aggregate"]
    assert set(one) == set(other) == {*arrays, "state", "trigger", "config"}
    assert all(one[name] is other[name] for name in (*arrays, "state", "trigger"))
    records = {id(one[name]) for name in arrays}
    monkeypatch.setattr(ray_grid.ray, "put", lambda record: record)
    shared, places = ray_grid.RayGrid._share(object.__new__(ray_grid.RayGrid), sent)
    assert sorted(map(id, shared)) == sorted(records), "each once"
    assert sorted(map(len, places.values())) == [1, 1, 1, 4, 4]
    assert not any(name in message.content for message in sent for name in arrays), "and off the messages"


def test_the_honest_twin_has_no_attackers() -> None:
    attack = Colluders()
    table = Table(a_config(rounds=2), a_plan(2, malicious={1: {1: 0}, 2: {1: 1}}), attack=attack, honest=True)
    record = table.play()
    assert attack.seen == []
    assert not any(m.content.config_records["config"]["malicious"] for m in table.sent)
    assert not any(c.malicious for c in record.clients)
    assert record.malicious_submitted == 0
    clean = Table(a_config(rounds=2))
    clean.play()
    assert torch.equal(table.moved, clean.moved)


def test_the_attacks_own_numbers_are_timed() -> None:
    def client(message: Message, number: int) -> RecordDict:
        content = honest(message, number)
        content["metrics"]["attack-mask-size"] = 3.0
        content["metrics"]["seconds"] = 2.0
        return content

    record = Table(plan=a_plan(malicious={1: {1: 0}}), attack=Attack()).play(but(1, client))
    assert record.seconds["attack_mask_size"] == 3.0
    assert record.seconds["malicious_client"] == 2.0
    assert record.seconds["slowest_client"] == 2.0


def test_config_records_are_plain_flower_records() -> None:
    table = Table()
    table.play()
    for message in table.sent:
        assert isinstance(message.content["config"], ConfigRecord)
        assert message.metadata.group_id == "1"
