"""The in-process grid keeps Flower's promises, and our ClientApp serves Flower's own strategies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedsim.config import Config, build
from fedsim.federation.client import ClientRuntime, client_app
from fedsim.federation.evaluation import Measurement
from fedsim.federation.grids import InProcessGrid
from fedsim.federation.messages import to_record, to_vector
from fedsim.federation.schedule import RoundPlan
from fedsim.federation.server import play
from fedsim.federation.setup import prepare
from fedsim.federation.strategy import FederatedStrategy

NODES = 5


def toy_app() -> ClientApp:
    """Adds the node's id to the vector; node 3 raises where the config says so."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = message.content.config_records["config"]
        if order.get("fail") == context.node_id:
            raise RuntimeError(f"node {context.node_id} has no luck")
        vector = to_vector(message.content.array_records["arrays"]) + context.node_id
        partition = [context.node_config["partition-id"], context.node_config["num-partitions"]]
        metrics = MetricRecord({"num-examples": context.node_id, "partition": partition})
        return Message(RecordDict({"arrays": to_record(vector), "metrics": metrics}), reply_to=message)

    return app


def messages(nodes: list[int], **order: Any) -> list[Message]:
    arrays = to_record(torch.arange(4.0))
    return [
        Message(
            RecordDict({"arrays": arrays, "config": ConfigRecord(dict(order))}),
            node,
            MessageType.TRAIN,
            group_id="7",
        )
        for node in nodes
    ]


@pytest.fixture
def grid() -> InProcessGrid:
    return InProcessGrid(toy_app(), NODES)


def test_it_is_a_flower_grid_with_a_node_per_client(grid: InProcessGrid) -> None:
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [1, 2, 3, 4, 5]
    assert [node.node_id for node in grid.get_nodes()] == [1, 2, 3, 4, 5]
    assert grid.run.run_id == 1


def test_send_and_receive_answers_in_order(grid: InProcessGrid) -> None:
    sent = messages([4, 1, 3])
    replies = list(grid.send_and_receive(sent))
    assert [reply.metadata.src_node_id for reply in replies] == [4, 1, 3]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [m.metadata.message_id for m in sent]
    assert {reply.metadata.group_id for reply in replies} == {"7"}
    assert {reply.metadata.message_type for reply in replies} == {MessageType.TRAIN}
    for node, reply in zip([4, 1, 3], replies, strict=True):
        assert torch.equal(to_vector(reply.content.array_records["arrays"]), torch.arange(4.0) + node)
        assert reply.content.metric_records["metrics"]["partition"] == [node - 1, NODES]


def test_every_message_gets_its_own_id(grid: InProcessGrid) -> None:
    ids = [message_id for _ in range(2) for message_id in grid.push_messages(messages([1, 2, 2]))]
    assert len(set(ids)) == 6
    assert all(ids)


def test_push_and_pull(grid: InProcessGrid) -> None:
    first, second, third = grid.push_messages(messages([1, 2, 3]))
    replies = list(grid.pull_messages([third, first, "unknown"]))
    assert [reply.metadata.src_node_id for reply in replies] == [3, 1]
    assert [reply.metadata.reply_to_message_id for reply in replies] == [third, first]
    assert list(grid.pull_messages([first, third])) == [], "a reply is handed over once"
    assert [reply.metadata.src_node_id for reply in grid.pull_messages([second])] == [2]


def test_nothing_sent_is_nothing_received(grid: InProcessGrid) -> None:
    assert list(grid.send_and_receive([])) == []
    assert list(grid.push_messages([])) == []


def test_messages_may_come_from_a_generator(grid: InProcessGrid) -> None:
    assert len(list(grid.send_and_receive(m for m in messages([1, 2])))) == 2


def test_create_message(grid: InProcessGrid) -> None:
    message = grid.create_message(RecordDict(), MessageType.TRAIN, 2, "g", ttl=5.0)
    assert (message.metadata.dst_node_id, message.metadata.group_id, message.metadata.ttl) == (2, "g", 5.0)
    assert message.metadata.run_id == grid.run.run_id
    assert grid.create_message(RecordDict(), MessageType.TRAIN, 2, "g").metadata.ttl > 0


def test_an_exception_becomes_an_error_reply_with_its_traceback(grid: InProcessGrid) -> None:
    replies = list(grid.send_and_receive(messages([2, 3, 4], fail=3)))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    error = replies[1].error
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert error.reason is not None
    assert "RuntimeError: node 3 has no luck" in error.reason
    assert "Traceback" in error.reason
    assert replies[1].metadata.src_node_id == 3


def test_a_message_nobody_handles_is_an_error_reply_too(grid: InProcessGrid) -> None:
    message = Message(RecordDict(), 1, MessageType.EVALUATE)
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert "evaluate" in str(reply.error.reason)


def test_an_interrupt_is_not_a_reply() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InProcessGrid(app, 1).send_and_receive(messages([1]))


def test_every_reply_is_counted() -> None:
    heard: list[int] = []
    grid = InProcessGrid(toy_app(), NODES, on_reply=lambda: heard.append(1))
    grid.send_and_receive(messages([1, 2, 3], fail=2))
    assert len(heard) == 3


# --------------------------------------------------------------------------------------- Flower's strategies


@pytest.fixture(scope="module")
def experiment() -> tuple[Config, Callable[[], ClientRuntime], torch.Tensor, list[int]]:
    config = build(
        {
            "seed": 3,
            "task": {"data": "digits", "model": "logistic", "train_examples": 120, "test_examples": 20},
            "federation": {"clients": 4, "clients_per_round": 4, "rounds": 1, "partition": {"name": "dirichlet"}},
            "training": {"local_epochs": 1, "lr": 0.1},
            "attack": None,
        }
    )
    setup = prepare(config)
    runtime = ClientRuntime(config, setup.data, setup.parts, torch.device("cpu"))
    return config, lambda: runtime, runtime.model.vector.clone(), setup.sizes


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_round_of_flowers_fedavg_is_a_round_of_ours(
    experiment: tuple[Config, Callable[[], ClientRuntime], torch.Tensor, list[int]],
    weighting: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, runtime, initial, sizes = experiment
    assert len(set(sizes)) > 1, "the weighting would not show"
    config.federation.weighting = weighting
    grid = InProcessGrid(client_app(lambda context: runtime()), 4)
    plan = [RoundPlan(1, (0, 1, 2, 3), (), (), {})]
    ours = FederatedStrategy(
        config,
        plan,
        runtime().model.layout,
        initial.clone(),
        sizes,
        [],
        attack=None,
        measure=lambda vector, stages, server: Measurement(0.5, 1.0, None, None),
        on_round=lambda record: None,
    )
    play(ours, grid)

    caplog.set_level(logging.WARNING, logger="flwr")
    flower = FedAvg(fraction_evaluate=0.0, min_train_nodes=4, min_available_nodes=4)
    result = flower.start(grid, to_record(initial), num_rounds=1)
    theirs = to_vector(result.arrays)
    moved = float((ours.global_vector - initial).norm())
    assert moved > 0.1
    distance = float((ours.global_vector - theirs.float()).norm())
    if weighting == "examples":
        assert torch.allclose(ours.global_vector, theirs.float(), atol=1e-6)
        assert set(result.train_metrics_clientapp[1]) == {"train-loss", "seconds"}
    else:
        assert distance > 1e-3


def test_two_rounds_of_flowers_fedavg_use_the_rounds_own_streams(
    experiment: tuple[Config, Callable[[], ClientRuntime], torch.Tensor, list[int]],
) -> None:
    """``server-round`` is the round, the partition id the client."""
    _, runtime, initial, _ = experiment
    grid = InProcessGrid(client_app(lambda context: runtime()), 4)

    def vector(**order: Any) -> torch.Tensor:
        content = RecordDict({"arrays": to_record(initial), "config": ConfigRecord(order)})
        (reply,) = grid.send_and_receive([Message(content, 3, MessageType.TRAIN)])
        return to_vector(reply.content.array_records["arrays"])

    assert torch.equal(vector(**{"server-round": 2}), vector(round=2, client=2, malicious=False))
    assert not torch.equal(vector(**{"server-round": 2}), vector(**{"server-round": 1}))
    assert not torch.equal(vector(**{"server-round": 2}), vector(round=2, client=1, malicious=False))
