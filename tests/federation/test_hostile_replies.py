"""Every defense against every reply a malicious client may send: rejected by the guard, or harmless to the process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedsim import plugins
from fedsim.config import build
from fedsim.defense import Server
from fedsim.direct import make_server
from fedsim.federation.evaluation import Measurement
from fedsim.federation.grids import InProcessGrid
from fedsim.federation.messages import to_record
from fedsim.federation.records import ClientRecord, RoundRecord
from fedsim.federation.schedule import RoundPlan
from fedsim.federation.server import play
from fedsim.federation.strategy import FederatedStrategy
from fedsim.layout import FlatModel, Layout
from tests.support.defenses import REQUIRED

CLASSES, EXAMPLES = 3, 20
SOURCE = torch.Generator().manual_seed(0)
HELD = torch.randn(24, 6, generator=SOURCE), torch.randint(0, CLASSES, (24,), generator=SOURCE)
OPTIONS: dict[str, dict[str, Any]] = {**REQUIRED, "snowball": {"furthest": 2}}
DEFENSES = plugins.names("defense")


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


LAYOUT = Layout.of(network())
START = FlatModel(network()).vector.clone()
SIZE = LAYOUT.size


def reply(vector: Any, examples: Any = EXAMPLES, **more: Any) -> RecordDict:
    arrays = ArrayRecord({"model": Array(np.asarray(vector)), **more})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": examples})})


def filled(value: float, dtype: type = np.float32) -> Any:
    vector = START.numpy().astype(dtype)
    vector[3] = value
    return vector


UNUSABLE: dict[str, tuple[Callable[[], RecordDict], str]] = {
    "NaN": (lambda: reply(filled(math.nan)), "not finite"),
    "+Inf": (lambda: reply(filled(math.inf)), "not finite"),
    "-Inf": (lambda: reply(filled(-math.inf)), "not finite"),
    "beyond float32": (lambda: reply(filled(1e200, np.float64)), "not finite"),
    "a huge norm": (lambda: reply(np.full(SIZE, 1e30, np.float32)), "beyond measure"),
    "one huge entry": (lambda: reply(filled(-1e30)), "beyond measure"),
    "too short": (lambda: reply(START.numpy()[:-1]), "of shape"),
    "too long": (lambda: reply(np.zeros(SIZE + 1, np.float32)), "of shape"),
    "a matrix": (lambda: reply(START.numpy()[None]), "of shape"),
    "a number": (lambda: reply(np.float32(1)), "of shape"),
    "nothing": (lambda: reply(np.zeros(0, np.float32)), "of shape"),
    "whole numbers": (lambda: reply(np.zeros(SIZE, np.int64)), "holds int64"),
    "half precision": (lambda: reply(np.zeros(SIZE, np.float16)), "holds float16"),
    "complex numbers": (lambda: reply(np.zeros(SIZE, np.complex64)), "holds complex64"),
    "text": (lambda: reply(np.array(["x"] * SIZE)), "the array"),
    "missing arrays": (lambda: RecordDict({"metrics": MetricRecord({"num-examples": EXAMPLES})}), "it has no"),
    "no array": (
        lambda: RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": EXAMPLES})}),
        "expected one array",
    ),
    "an extra array": (lambda: reply(START.numpy(), extra=Array(np.zeros(3, np.float32))), "expected one array"),
    "missing metrics": (lambda: RecordDict({"arrays": to_record(START)}), "it has no"),
    "no examples": (lambda: reply(START.numpy(), 0), "a number of examples"),
    "examples below zero": (lambda: reply(START.numpy(), -5), "a number of examples"),
    "too many examples": (lambda: reply(START.numpy(), 10**9), "a number of examples"),
    "half an example": (lambda: reply(START.numpy(), 0.5), "a number of examples"),
    "examples that are no number": (lambda: reply(START.numpy(), [1, 2]), "a number of examples"),
}
USABLE: dict[str, Callable[[], RecordDict]] = {
    "a large norm": lambda: reply(START.numpy() + np.float32(1e6)),
    "just within measure": lambda: reply(filled(9e14)),
    "float64": lambda: reply(START.numpy().astype(np.float64)),
    "no change": lambda: reply(START.numpy()),
    "all zero": lambda: reply(np.zeros(SIZE, np.float32)),
    "denormal numbers": lambda: reply(START.numpy() + np.float32(1e-40)),
}


class Table:
    """One defense, some clients, the first of which is told what to reply in the second round."""

    def __init__(self, defense: str, clients: int) -> None:
        options = {"name": defense, **OPTIONS.get(defense, {})}
        everybody = tuple(range(clients))
        config = build(
            {
                "task": {"data": "digits", "model": "logistic"},
                "federation": {"clients": clients, "clients_per_round": clients, "rounds": 3},
                "attack": None,
                "server_data": {"examples": 24},
            }
        )
        self.rounds: list[RoundRecord] = []
        self.models: list[Tensor] = []
        stage = plugins.create("defense", options.pop("name"), **options)
        self.strategy = FederatedStrategy(
            config,
            [RoundPlan(number, everybody, (), (), {}) for number in (1, 2, 3)],
            LAYOUT,
            START.clone(),
            [EXAMPLES] * clients,
            [stage],
            attack=None,
            serve=lambda number: self.server(number),
            measure=self.measure,
            on_round=self.rounds.append,
        )

    @staticmethod
    def server(number: int) -> Server:
        return make_server(network(), CLASSES, data=HELD, round=number)

    def measure(self, vector: Tensor, stages: object, server: object) -> Measurement:
        self.models.append(vector.clone())
        return Measurement(0.5, 1.0, None, None)

    def play(self, say: Callable[[int, int], RecordDict | None]) -> None:
        """``say`` gives what a client replies in a round, None for an honest reply."""
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            order = message.content.config_records["config"]
            number, client = int(order["round"]), int(order["client"])
            source = torch.Generator().manual_seed(100 * number + client)
            sent = torch.from_numpy(message.content.array_records["arrays"]["model"].numpy().copy())
            honest = sent + 0.01 * torch.randn(SIZE, generator=source)
            told = say(number, client)
            return Message(reply(honest.numpy()) if told is None else told, reply_to=message)

        play(self.strategy, InProcessGrid(app, self.strategy.config.federation.clients))

    def first(self, number: int) -> ClientRecord:
        return self.rounds[number - 1].clients[0]

    def check(self) -> None:
        assert len(self.rounds) == 3
        assert all(bool(torch.isfinite(model).all()) for model in self.models)


def least(defense: str) -> int:
    cls: Any = plugins.get("defense", defense)
    return int(cls.required_clients(cls.Parameters(**OPTIONS.get(defense, {}))))


@pytest.mark.parametrize("defense", DEFENSES)
def test_unusable_replies_are_rejected_by_name_and_hurt_nobody(defense: str) -> None:
    clients = max(5, least(defense) + 1)
    without = Table(defense, clients)
    without.play(lambda number, client: RecordDict() if (number, client) == (2, 0) else None)
    for kind, (make, said) in UNUSABLE.items():
        table = Table(defense, clients)
        table.play(lambda number, client, make=make: make() if (number, client) == (2, 0) else None)  # type: ignore[misc]
        record = table.first(2)
        assert (record.status, record.accepted, record.weight) == ("rejected", False, 0.0), kind
        assert said in record.reason, kind
        table.check()
        for found, expected in zip(table.models, without.models, strict=True):
            assert torch.equal(found, expected), f"{kind}: as if that client had not been there"


@pytest.mark.parametrize("defense", DEFENSES)
def test_usable_replies_of_any_kind_break_no_defense(defense: str) -> None:
    for kind, make in USABLE.items():
        table = Table(defense, max(5, least(defense)))
        table.play(lambda number, client, make=make: make() if (number, client) == (2, 0) else None)  # type: ignore[misc]
        assert table.first(2).status == "ok", kind
        table.check()


@pytest.mark.parametrize("clients", [1, 2, 3])
@pytest.mark.parametrize("defense", DEFENSES)
def test_few_clients_equal_updates_and_no_updates(defense: str, clients: int) -> None:
    """Where the defense needs more clients, the model stays and the round says why."""
    says: dict[str, Callable[[int, int], RecordDict | None]] = {
        "honest": lambda number, client: None,
        "equal": lambda number, client: reply(START.numpy() + np.float32(0.01)),
        "zero": lambda number, client: reply(START.numpy()),
        "one unusable": lambda number, client: reply(filled(math.nan)) if client == 0 else None,
    }
    for kind, say in says.items():
        table = Table(defense, clients)
        table.play(say)
        table.check()
        replied = clients - (kind == "one unusable")
        if 0 < replied < least(defense):
            assert "the model stays" in table.rounds[1].note, kind
            assert "needs at least" in table.rounds[1].note, kind
            assert not any(c.accepted for c in table.rounds[1].clients)


@pytest.mark.parametrize("defense", DEFENSES)
def test_if_all_are_rejected_the_model_stays(defense: str) -> None:
    table = Table(defense, max(4, least(defense)))
    table.play(lambda number, client: reply(filled(math.nan)) if number == 2 else None)
    assert table.rounds[1].note == "no usable reply: the model stays"
    cls: Any = plugins.get("defense", defense)
    if cls.broadcast is plugins.get("defense", "fedavg").broadcast:  # type: ignore[attr-defined]
        assert torch.equal(table.models[1], table.models[0])
    table.check()
