"""The grid over Ray actors: the in-process grid's answers, whatever the workers and whoever kills them.

One cluster for the whole module. The client app is made of nested functions, so that it travels by value.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedsim.errors import RunError
from fedsim.federation import ray_grid
from fedsim.federation.cluster import Resources, start_ray
from fedsim.federation.grids import InProcessGrid
from fedsim.federation.messages import to_record, to_vector
from fedsim.federation.ray_grid import RayGrid

pytestmark = pytest.mark.slow

NODES = 40
LENGTH = 50_000
"""200 kB a vector: more than Ray sends inline, so that arrays really pass through the object store."""


def app_maker() -> Callable[[], ClientApp]:
    """A client app whose numbers depend on the node, and which dies or fails as it is told."""

    def make() -> ClientApp:
        import os
        import signal
        import time
        from pathlib import Path

        import torch

        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            order = message.content.config_records["config"]
            if order["fail"] == context.node_id:
                raise RuntimeError(f"node {context.node_id} has no luck")
            if order["kill"] == context.node_id:
                marker = Path(str(order["marker"])) if order["marker"] else None
                if marker is None or not marker.exists():
                    if marker is not None:
                        marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            if order["hang"] == context.node_id:
                time.sleep(1000)
            time.sleep(float(order["sleep"]))
            vector = to_vector(message.content.array_records["arrays"])
            noise = torch.randn(len(vector), generator=torch.Generator().manual_seed(context.node_id))
            metrics = MetricRecord(
                {
                    "num-examples": context.node_id,
                    "pid": os.getpid(),
                    "threads": torch.get_num_threads(),
                    "omp": int(os.environ["OMP_NUM_THREADS"]),
                }
            )
            return Message(RecordDict({"arrays": to_record(vector + noise), "metrics": metrics}), reply_to=message)

        return app

    return make


def messages(
    nodes: int = NODES, *, fail: int = 0, kill: int = 0, hang: int = 0, marker: Path | str = "", sleep: float = 0.0
) -> list[Message]:
    """One message per node, the last node first; all carry the same arrays."""
    arrays = to_record(torch.linspace(0, 1, LENGTH))
    order: dict[str, Any] = {"fail": fail, "kill": kill, "hang": hang, "marker": str(marker), "sleep": sleep}
    return [
        Message(RecordDict({"arrays": arrays, "config": ConfigRecord(dict(order))}), node, MessageType.TRAIN)
        for node in range(nodes, 0, -1)
    ]


def vectors(replies: list[Message]) -> list[torch.Tensor | None]:
    return [None if r.has_error() else to_vector(r.content.array_records["arrays"]).clone() for r in replies]


def same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def pids_of(replies: list[Message]) -> set[int]:
    return {int(r.content.metric_records["metrics"]["pid"]) for r in replies if not r.has_error()}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor | None]:
    """What the in-process grid answers."""
    return vectors(list(InProcessGrid(app_maker()(), NODES).send_and_receive(messages())))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    assert not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        patch.delenv("MKL_NUM_THREADS", raising=False)
        assert start_ray(Resources(workers=3)), "this process started it, so it is ours to stop"
        assert os.environ["OMP_NUM_THREADS"] == "2", "what workers are given is not ours to keep"
        assert "MKL_NUM_THREADS" not in os.environ
    assert not start_ray(Resources(workers=3)), "the second time it is there already"
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def grid_of(cluster: None) -> Iterator[Callable[[int], RayGrid]]:
    """Grids by number of workers; the tests share them. A larger one is made by waiting for a smaller one's end."""
    made: dict[int, RayGrid] = {}

    def get(workers: int) -> RayGrid:
        if workers not in made:
            for other in made.values():
                other.close()
            made.clear()
            made[workers] = RayGrid(app_maker(), NODES, Resources(workers), stop_ray=False)
        return made[workers]

    yield get
    for grid in made.values():
        grid.close()


@pytest.fixture
def grid(grid_of: Callable[[int], RayGrid]) -> RayGrid:
    return grid_of(2)


# ------------------------------------------------------------------------------------------- what is answered


def test_answers_as_the_in_process_grid_in_order(grid: RayGrid, expected: list[torch.Tensor | None]) -> None:
    sent = messages()
    replies = list(grid.send_and_receive(sent))
    assert [r.metadata.src_node_id for r in replies] == list(range(NODES, 0, -1))
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in sent]
    assert same(vectors(replies), expected)
    assert pids_of(replies) == set(grid.pids()), "both workers worked"
    for number in ("threads", "omp"):
        assert {r.content.metric_records["metrics"][number] for r in replies} == {1}


def test_answers_the_same_again_once_it_knows_how_long_clients_take(
    grid: RayGrid, expected: list[torch.Tensor | None]
) -> None:
    for _ in range(2):
        assert same(vectors(list(grid.send_and_receive(messages()))), expected)


def test_push_and_pull(grid: RayGrid, expected: list[torch.Tensor | None]) -> None:
    ids = list(grid.push_messages(messages()))
    assert same(vectors(list(grid.pull_messages(reversed(ids)))), expected[::-1])


def test_an_exception_becomes_an_error_reply(grid: RayGrid, expected: list[torch.Tensor | None]) -> None:
    replies = list(grid.send_and_receive(messages(fail=7)))
    (failed,) = [r for r in replies if r.has_error()]
    assert failed.metadata.src_node_id == 7
    assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "RuntimeError: node 7 has no luck" in str(failed.error.reason)
    wanted = list(expected)
    wanted[NODES - 7] = None
    assert same(vectors(replies), wanted)
    assert grid.replaced == 0, "the worker goes on"


def test_nothing_sent_is_nothing_received(grid: RayGrid) -> None:
    assert list(grid.send_and_receive([])) == []


# ------------------------------------------------------------------------------------------------ how it works


def test_shared_arrays_go_into_the_object_store_once_a_round(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    put = []
    real = ray.put
    monkeypatch.setattr(ray_grid.ray, "put", lambda value: put.append(value) or real(value))
    sent = messages()
    arrays = sent[0].content["arrays"]
    grid.send_and_receive(sent)
    assert len(put) == 1
    assert put[0] is arrays


def test_arrays_of_one_message_alone_travel_with_it(grid: RayGrid) -> None:
    """A malicious client's state, say; what others share does not get lost by it."""

    def some() -> list[Message]:
        sent = messages(4)
        sent[1].content["own"] = to_record(torch.full((LENGTH,), 5.0))
        sent[2].content["arrays"] = to_record(torch.full((LENGTH,), 7.0))
        return sent

    wanted = vectors(list(InProcessGrid(app_maker()(), NODES).send_and_receive(some())))
    assert same(vectors(list(grid.send_and_receive(some()))), wanted)


def test_small_clients_share_a_call_and_long_ones_go_first(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []
    real = grid._calls

    def spy(given: list[Message]) -> Any:
        made = real(given)
        calls.clear()
        calls.extend([m.metadata.dst_node_id for m in call.messages] for call in made)
        return made

    monkeypatch.setattr(grid, "_calls", spy)
    monkeypatch.setattr(grid, "size_of", lambda m: ("long" if m.metadata.dst_node_id == 3 else "short", 1.0))
    monkeypatch.setattr(grid, "_rates", {"long": 1.0, "short": 0.0001})
    replies = list(grid.send_and_receive(messages()))
    assert [r.metadata.src_node_id for r in replies] == list(range(NODES, 0, -1))
    assert calls[0] == [3], "the long client goes first, in a call of its own"
    assert len(calls) < NODES / 4, "the short ones share calls"
    assert sorted(node for call in calls for node in call) == list(range(1, NODES + 1))


def test_two_clients_go_to_two_workers(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_rates", {})
    for _ in range(2):  # the second time it knows how long they take
        assert len(pids_of(list(grid.send_and_receive(messages(2, sleep=0.2))))) == 2


def test_the_object_store_is_released(grid: RayGrid) -> None:
    from ray._private.worker import global_worker

    def references() -> int:
        return len(global_worker.core_worker.get_all_reference_counts())

    grid.send_and_receive(messages())
    before = references()
    for _ in range(5):
        grid.send_and_receive(messages())
    deadline = time.monotonic() + 5
    while references() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert references() <= before


# --------------------------------------------------------------------------------------------------- accidents


def test_a_client_that_kills_its_worker_once_is_played_again(
    grid: RayGrid, expected: list[torch.Tensor | None], tmp_path: Path
) -> None:
    before = grid.replaced
    replies = list(grid.send_and_receive(messages(kill=11, marker=tmp_path / "killed")))
    assert (tmp_path / "killed").exists()
    assert grid.replaced == before + 1
    assert same(vectors(replies), expected)


def test_a_worker_killed_from_outside_is_replaced(grid: RayGrid, expected: list[torch.Tensor | None]) -> None:
    before, pids = grid.replaced, grid.pids()
    os.kill(pids[0], signal.SIGKILL)
    replies = list(grid.send_and_receive(messages()))
    assert same(vectors(replies), expected)
    assert grid.replaced == before + 1
    assert pids[0] not in grid.pids()
    assert pids[1] in grid.pids()


def test_a_client_that_always_kills_its_worker_is_given_up(
    grid: RayGrid, expected: list[torch.Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "resources", Resources(2, retries=1))
    heard: list[int] = []
    monkeypatch.setattr(grid, "on_reply", lambda: heard.append(1))
    before = grid.replaced
    replies = list(grid.send_and_receive(messages(kill=5)))
    (failed,) = [r for r in replies if r.has_error()]
    assert failed.metadata.src_node_id == 5
    assert failed.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert "its worker died 2 times" in str(failed.error.reason)
    assert grid.replaced == before + 2, "once among others, once alone"
    wanted = list(expected)
    wanted[NODES - 5] = None
    assert same(vectors(replies), wanted), "nobody else is lost"
    assert len(heard) == NODES, "progress counts the client that was given up, too"


def test_a_client_that_hangs_is_given_up_when_its_time_is_over(
    grid: RayGrid, expected: list[torch.Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "resources", Resources(2, timeout=0.5))
    before, pids = grid.replaced, grid.pids()
    replies = list(grid.send_and_receive(messages(hang=7)))
    (failed,) = [r for r in replies if r.has_error()]
    assert failed.metadata.src_node_id == 7
    assert failed.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert "no reply within 0.5 s" in str(failed.error.reason)
    wanted = list(expected)
    wanted[NODES - 7] = None
    assert same(vectors(replies), wanted), "those who shared its call, or waited behind it, are played again"
    assert before < grid.replaced <= before + 2, "once among others, once alone"
    assert len(grid.pids()) == 2
    assert any(gone([pid]) for pid in pids), "the one that hung is stopped"


def test_killing_every_worker_in_the_middle_of_a_round(
    grid: RayGrid, expected: list[torch.Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []

    def kill_all() -> None:
        heard.append(1)
        if len(heard) == 5:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    pids = grid.pids()
    monkeypatch.setattr(grid, "on_reply", kill_all)
    replies = list(grid.send_and_receive(messages(sleep=0.02)))
    assert same(vectors(replies), expected)
    assert gone(pids)


def test_a_replacement_that_finds_no_room_is_given_up(
    grid: RayGrid, expected: list[torch.Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a node leaves the cluster: the others do its work; with nobody left the round fails in so many words."""

    class Nowhere:
        @staticmethod
        def remote(*_: Any) -> Any:
            endless = ray.remote(num_cpus=1000)(_Never)
            return endless.remote()

    class _Never:
        def ready(self) -> int:
            return 0

    monkeypatch.setattr(ray_grid, "_START_SECONDS", 1.0)
    monkeypatch.setattr(grid, "_spawn", Nowhere.remote)
    kept = list(grid._slots)
    os.kill(grid.pids()[0], signal.SIGKILL)
    assert same(vectors(list(grid.send_and_receive(messages(sleep=0.05)))), expected)
    assert len(grid._slots) == 1
    os.kill(grid.pids()[0], signal.SIGKILL)
    with pytest.raises(RunError, match=r"no worker is left.*resume the run"):
        grid.send_and_receive(messages())
    monkeypatch.undo()
    for slot in kept:
        slot.actor, slot.calls, slot.starting = grid._spawn(), [], None
    grid._slots = kept
    assert same(vectors(list(grid.send_and_receive(messages()))), expected)


def test_more_workers_than_the_cluster_has_room_for(cluster: None) -> None:
    with pytest.raises(RunError, match=r"4 workers of 1 cores need 4; the Ray cluster has 3: lower engine\.workers"):
        RayGrid(app_maker(), NODES, Resources(4), stop_ray=False)
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (0.5, r"1 workers of 0\.5 GPUs do not fit; the Ray cluster has 0: lower engine\.workers or engine\.gpus_per"),
        (1.5, r"engine\.gpus_per_worker is 1\.5; write a share of one GPU, or a whole number of them"),
    ],
)
def test_more_gpus_than_the_cluster_has_to_give(cluster: None, gpus: float, said: str) -> None:
    with pytest.raises(RunError, match=said):
        RayGrid(app_maker(), NODES, Resources(1, gpus=gpus), stop_ray=False)
    assert ray.is_initialized()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(
    grid_of: Callable[[int], RayGrid], expected: list[torch.Tensor | None], workers: int
) -> None:
    grid = grid_of(workers)
    for _ in range(2):
        replies = list(grid.send_and_receive(messages()))
        assert [r.metadata.src_node_id for r in replies] == list(range(NODES, 0, -1))
        assert same(vectors(replies), expected)
    assert len(set(grid.pids())) == workers


def test_close_leaves_no_process_behind_and_the_cluster_of_others_alone(grid_of: Callable[[int], RayGrid]) -> None:
    grid = grid_of(3)
    pids = grid.pids()
    assert all(map(alive, pids))
    grid.close()
    assert gone(pids)
    assert ray.is_initialized()
    grid.close()  # twice does no harm


def test_an_app_that_cannot_be_made_is_reported(cluster: None) -> None:
    def make() -> ClientApp:
        raise RuntimeError("the data is not here")

    with pytest.raises(RunError, match=r"^the workers cannot start: RuntimeError: the data is not here$"):
        RayGrid(make, 1, Resources(1), stop_ray=False)


def test_close_stops_the_ray_that_is_ours(cluster: None) -> None:
    """Last: it ends the module's cluster."""
    grid = RayGrid(app_maker(), 1, Resources(1), stop_ray=True)
    pids = grid.pids()
    grid.close()
    assert gone(pids)
    assert not ray.is_initialized()
    grid.close()


def test_a_cluster_that_is_not_there_is_reported() -> None:
    assert not ray.is_initialized()
    started = time.monotonic()
    with pytest.raises(RunError, match="Ray cannot be started"):
        start_ray(Resources(1, address="127.0.0.1:1"))
    assert time.monotonic() - started < 15, "Ray itself would try for five minutes"
    assert not ray.is_initialized()
