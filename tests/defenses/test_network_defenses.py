"""FLTrust, FLARE, DeepSight and FDCR: what they compute, by hand, and what they do in a small federation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses import deepsight, fdcr, flare, fltrust
from fedsim import plugins, training
from fedsim.config import build
from fedsim.defense import RoundUpdates, Server
from fedsim.direct import aggregate, make_server
from fedsim.errors import RunError
from fedsim.experiment import run
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.pipeline import Aggregation, apply_pipeline
from tests.support.parity import tensor

Rounds = Callable[..., RoundUpdates]


def near(found: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, tensor(expected), rtol=tolerance, atol=tolerance)


def network(*layers: nn.Module) -> nn.Module:
    """In float64 and the same every time."""
    module = nn.Sequential(*layers).double()
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return module


def examples(count: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(4)
    inputs = torch.randn(count, width, generator=source, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (count,), generator=source)


def drawn(n: int, size: int, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(n, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------- FLTrust


def rooted(update: Tensor) -> Server:
    """A server of a model with two parameters whose training changes it by ``update`` (2,)."""

    def fit(model: FlatModel, *arguments: Any, **options: Any) -> float:
        model.vector += update
        return 0.0

    return replace(make_server(nn.Linear(1, 1).double(), 1, data=examples(3, 1, 1)), fit=fit)


def test_fltrust_by_hand() -> None:
    server = rooted(tensor([0, 4]))
    updates = tensor([[0, 2], [3, 0], [0, -1], [1, 1], [0, 0]])
    result = aggregate("fltrust", updates=updates, num_examples=[1, 9, 9, 9, 9], server=server)
    half = math.sqrt(0.5)
    near(result.scores["fltrust.distance"], [0, 1, 2, 1 - half, 1])
    near(result.weights, [1 / (1 + half), 0, 0, half / (1 + half), 0])
    assert result.accepted.tolist() == [True, False, False, True, False]
    near(result.vector, [half * 4 * half / (1 + half), (4 + half * 4 * half) / (1 + half)])


@pytest.mark.parametrize(("rows", "root"), [([[1, 0], [-1, 0]], [0, 1]), ([[1, 2]], [0, 0]), ([[0, 0]] * 3, [1, 1])])
def test_fltrust_keeps_the_model_where_it_trusts_nobody(rows: list[list[float]], root: list[float]) -> None:
    result = aggregate("fltrust", updates=tensor(rows), server=rooted(tensor(root)))
    assert result.vector.tolist() == [0, 0]
    assert not bool(result.accepted.any())
    assert result.weights.tolist() == [0] * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fltrust_does_not_see_how_long_updates_are(dtype: torch.dtype) -> None:
    updates, server = tensor([[1, 2], [2, 1], [-1, 3]]), rooted(tensor([0.3, 0.4]))
    wanted = aggregate("fltrust", updates=updates, server=server).vector
    scaled = (updates * tensor([[1e-30], [1e12], [1]])).to(dtype)
    found = aggregate("fltrust", updates=scaled, server=server).vector
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


def test_the_root_update_is_honest_training_from_the_global_model() -> None:
    module, data = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), examples(10, 3, 2)
    settings = LocalSettings(lr=0.2, epochs=2, batch_size=4, momentum=0.5, weight_decay=0.01)
    server = make_server(module, 2, data=data, settings=settings, round=3)
    start = torch.linspace(-1, 1, server.model.layout.size, dtype=torch.float64)
    server.model.load(torch.zeros_like(start))
    found = fltrust.root_update(start, server)
    model = FlatModel(network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model.load(start)
    assert server.epoch is not None
    batches = server.epoch(4, server.generator("fltrust"))
    training.fit(model, batches, nn.CrossEntropyLoss(), settings)
    assert float(found.norm()) > 0.1
    assert torch.equal(found, model.vector - start)
    assert torch.equal(found, fltrust.root_update(start, server)), "the same in the same round"
    assert not torch.equal(found, fltrust.root_update(start, replace(server, round=4)))


def test_fltrust_averages_running_statistics_by_trust(make_round: Rounds) -> None:
    round, t = make_round(), make_round().trainable
    result = apply_pipeline([plugins.create("defense", "fltrust")], round)
    assert 0 < int(result.accepted.sum()) < round.count
    near(result.vector[t:], (result.weights @ round.updates[:, t:]).tolist())
    assert round.server is not None
    root = fltrust.root_update(round.global_vector, round.server)[:t]
    factors = result.weights * root.norm() / round.updates[:, :t].norm(dim=1)
    near(result.vector[:t], (factors @ round.updates[:, :t]).tolist())
    whole = apply_pipeline([plugins.create("defense", "fltrust", scope="all")], round)
    assert not torch.allclose(whole.vector, result.vector)


def test_fltrust_says_that_the_servers_training_diverges(make_round: Rounds) -> None:
    round = make_round()
    assert round.server is not None
    wild = replace(round.server, settings=LocalSettings(lr=1e300, epochs=3))
    with pytest.raises(RunError, match=r"diverges; lower training\.lr"):
        apply_pipeline([plugins.create("defense", "fltrust")], replace(round, server=wild))


@pytest.mark.parametrize("name", ["fltrust", "flare"])
def test_it_needs_data_at_the_server(name: str, make_round: Rounds) -> None:
    round = make_round()
    assert round.server is not None
    with pytest.raises(RunError, match=f"'{name}' needs data at the server; set some aside"):
        apply_pipeline([plugins.create("defense", name)], replace(round, server=replace(round.server, data=None)))


# ----------------------------------------------------------------------------------------------------- FLARE


def test_discrepancies_by_hand() -> None:
    features = tensor([[[0], [1]], [[3], [4]], [[0], [1]]])
    within, cross = math.exp(-0.5), (2 * math.exp(-4.5) + math.exp(-8) + math.exp(-2)) / 4
    same = within - 2 * (2 + 2 * math.exp(-0.5)) / 4 + within  # the estimate is unbiased: below zero for equal sets
    far = 2 * within - 2 * cross
    near(flare.discrepancies(features, 1.0), [[0, far, same], [far, 0, far], [same, far, 0]])
    wide = tensor([[[0] * 8, [1] + [0] * 7], [[3] + [0] * 7, [4] + [0] * 7]])
    near(flare.discrepancies(wide), flare.discrepancies(features[:2], 2.0).tolist())  # √(8 / 2)


def test_discrepancies_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = flare.discrepancies(features)
    monkeypatch.setattr(flare, "CHUNK", 50)
    near(flare.discrepancies(features), whole.tolist())


def test_votes_and_weights_by_hand() -> None:
    distances = tensor([[0, 1, 2, 3], [1, 0, 4, 5], [2, 4, 0, 6], [3, 5, 6, 0]])
    votes = flare.count_votes(distances, 2)
    assert votes.tolist() == [3, 3, 2, 0]
    assert flare.count_votes(distances, 1).tolist() == [3, 1, 0, 0]
    tied = tensor([[0, 1, 1, 1], [1, 0, 1, 9], [1, 1, 0, 9], [1, 9, 9, 0]])
    near(flare.count_votes(tied, 2), [3, 2 / 3 + 3 / 2, 2 / 3 + 3 / 2, 2 / 3])
    powers = tensor([3, 3, 2, 0]).div(2 * 0.5).exp()
    near(flare.weigh(votes, "exponential", 0.5), (powers / powers.sum()).tolist())
    near(flare.weigh(votes, "share", 0.5), [3 / 8, 3 / 8, 1 / 4, 0])
    near(flare.weigh(tensor([0]), "share", 1.0), [1])
    assert [flare.neighbours(n, 0.5) for n in (1, 2, 3, 5, 7, 10)] == [0, 1, 2, 2, 4, 5]


def test_flare_looks_at_what_enters_the_last_layer() -> None:
    module, data = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), examples(9, 3, 2)
    server = make_server(module, 2, data=data)
    start, updates = server.model.vector.clone(), drawn(5, server.model.layout.size, 1.0)
    wanted = []
    for row in start + updates:
        part = server.model.layout.unflatten(row)
        wanted.append(torch.tanh(data[0] @ part["0.weight"].T + part["0.bias"]))
    distances = flare.discrepancies(torch.stack(wanted))
    result = aggregate("flare", updates=updates, global_vector=start, server=server)
    near(result.scores["flare.mmd"], (distances.sum(dim=1) / 4).tolist())
    votes = flare.count_votes(distances, 2)
    near(result.scores["flare.votes"], (-votes).tolist())
    near(result.weights, flare.weigh(votes, "exponential", 1.0).tolist())
    few = aggregate("flare", updates=updates, global_vector=start, server=server, samples=3)
    wanted = [features[[0, 4, 8]] for features in wanted]
    near(few.scores["flare.mmd"], (flare.discrepancies(torch.stack(wanted)).sum(dim=1) / 4).tolist())


def test_flare_takes_every_position_of_a_text() -> None:
    module = network(nn.Embedding(7, 3), nn.Linear(3, 7))
    words = torch.arange(15).reshape(3, 5) % 7
    server = make_server(module, 7, data=(words, words), shape=(5,))
    start, updates = server.model.vector.clone(), drawn(4, server.model.layout.size, 1.0)
    found = aggregate("flare", updates=updates, global_vector=start, server=server)
    seen = torch.stack([server.model.layout.unflatten(row)["0.weight"][words.flatten()] for row in start + updates])
    near(found.scores["flare.mmd"], (flare.discrepancies(seen).sum(dim=1) / 3).tolist())


def test_flare_with_a_client_whose_features_are_not_finite() -> None:
    module, data = network(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), examples(9, 3, 2)
    server = make_server(module.float(), 2, data=(data[0].float(), data[1]))
    updates = drawn(6, server.model.layout.size).float()
    updates[2] = 1e25
    start = server.model.vector.clone()
    result = aggregate("flare", updates=updates, global_vector=start, server=server)
    assert result.scores["flare.mmd"][2] == 2
    assert result.scores["flare.votes"].argmax() == 2
    assert bool(torch.isfinite(result.vector).all())


def test_flare_refuses_a_single_example(make_round: Rounds) -> None:
    round = make_round()
    assert round.server is not None
    assert round.server.data is not None
    one = replace(round.server, data=round.server.data._replace(inputs=round.server.data.inputs[:1]))
    with pytest.raises(RunError, match=r"set server_data\.examples to at least 2"):
        apply_pipeline([plugins.create("defense", "flare")], replace(round, server=one))


def test_flare_weighs_equal_clients_alike(make_round: Rounds) -> None:
    round = make_round()
    equal = make_round(round.updates[:1].expand(12, -1).clone())
    near(apply_pipeline([plugins.create("defense", "flare")], equal).weights, [1 / 12] * 12)


# ------------------------------------------------------------------------------------------------- DeepSight


def of_round(updates: Tensor, server: Server) -> RoundUpdates:
    ones = torch.ones(len(updates), dtype=torch.float64)
    start = server.model.vector.clone()
    clients = tuple(range(len(updates)))
    return RoundUpdates(updates, ones, start, ones, ones.bool(), server.model.layout.trainable, clients, server=server)


@pytest.mark.parametrize("bias", [True, False])
def test_energies_by_hand(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server(network(nn.Linear(2, 2), nn.Linear(2, 3, bias=bias)), 3, shape=(2,))
    head = [[1, -1], [0, 2], [-3, 0]], [-4, 0, 1]  # ΔW, Δb
    updates = torch.zeros(2, server.model.layout.size, dtype=torch.float64)
    updates[0, :6] = 100  # the first layer plays no part
    updates[0, 6:12] = tensor(head[0]).flatten()
    if bias:
        updates[0, 12:] = tensor(head[1])
    squares = [36, 4, 16] if bias else [4, 4, 9]
    wanted = [[square / sum(squares) for square in squares], [1 / 3] * 3]  # no energy at all counts as even
    near(deepsight.energies(of_round(updates, server), server), wanted)
    monkeypatch.setattr(deepsight, "CHUNK", 1)
    near(deepsight.energies(of_round(updates, server), server), wanted)


def test_exceedings_by_hand() -> None:
    energy = tensor([[0.6, 0.3, 0.1, 0.0], [0.4, 0.4, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert deepsight.count_exceedings(energy, 0.01).tolist() == [2, 2, 4]  # 1/4 of the largest, exceeded
    assert deepsight.count_exceedings(energy, 0.6).tolist() == [1, 2, 4]


def test_energies_of_a_last_layer_tied_to_the_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 2)
            self.out = nn.Linear(2, 4)
            self.out.weight = self.embedding.weight

        def forward(self, words: Tensor) -> Tensor:
            return self.out(self.embedding(words))  # type: ignore[no-any-return]

    server = make_server(Tied().double(), 4, shape=(3,))
    updates = torch.zeros(1, 12, dtype=torch.float64)
    updates[0] = tensor([1, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0])
    near(deepsight.energies(of_round(updates, server), server), [[0.5, 0.5, 0, 0]])


@pytest.mark.parametrize("sequence", [False, True], ids=["images", "words"])
def test_differences_by_hand(sequence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = network(nn.Embedding(5, 3), nn.Linear(3, 5)) if sequence else network(nn.Linear(3, 4), nn.Linear(4, 5))
    server = make_server(module, 5, shape=(6,) if sequence else (3,))
    draws: list[Tensor] = []

    def draw(count: int, source: torch.Generator) -> Tensor:
        made = torch.rand(count, *((6,) if sequence else (3,)), generator=source, dtype=torch.float64)
        draws.append((5 * made).long() if sequence else made)
        return draws[-1]

    server = replace(server, random_inputs=draw)
    updates = drawn(3, server.model.layout.size, 1.0)
    round = of_round(updates, server)
    stage = deepsight.Deepsight(deepsight.DeepsightParameters(inputs=11, sets=2, epsilon=0.01))
    monkeypatch.setattr(deepsight, "CHUNK", 100)
    found = stage.differences(round, server)
    assert max(len(inputs) for inputs in draws) == (100 // 30 if sequence else 10)
    inputs = torch.cat(draws)
    assert len(inputs) == 22
    wanted = []
    for part in (inputs[:11], inputs[11:]):
        base = torch.softmax(server.outputs(round.global_vector, part), dim=-1)
        rows = [torch.softmax(server.outputs(round.global_vector + row, part), dim=-1) for row in updates]
        wanted.append(torch.stack([(row / (base + 0.01)).reshape(-1, 5).mean(dim=0) for row in rows]))
    near(found, torch.stack(wanted).tolist())
    assert not torch.allclose(found[0], found[1])
    draws.clear()
    assert torch.equal(stage.differences(round, server), found), "the same in the same round"


def test_deepsight_refuses_a_network_without_a_linear_layer() -> None:
    server = make_server(network(nn.Conv1d(1, 2, 3), nn.Flatten()), 2, shape=(1, 3))
    with pytest.raises(RunError, match="the last linear layer, and the network has none"):
        aggregate("deepsight", updates=drawn(6, 8), server=server)


@pytest.mark.parametrize("bias", [True, False])
def test_deepsight_drops_the_cluster_of_clients_that_train_one_class(bias: bool) -> None:
    server = make_server(network(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=bias)), 5, shape=(4,))
    layout = server.model.layout
    updates = drawn(14, layout.size)
    places = layout.slices()
    updates[:, places["2.weight"]] += 0.3 * drawn(1, 30, 1.0)  # what honest clients have in common
    updates[:6, places["2.weight"].start :] = 0.01 * updates[:6, places["2.weight"].start :]
    updates[:6, places["2.weight"].start + 12 : places["2.weight"].start + 18] += 1.0  # class 2
    updates[:6] *= 3
    start = server.model.vector.clone()
    result = aggregate("deepsight", updates=updates, global_vector=start, server=server, inputs=100)
    assert result.accepted.tolist() == [False] * 6 + [True] * 8
    assert result.scores["deepsight.exceedings"][:6].tolist() == [-1] * 6
    assert result.scores["deepsight.cluster"].tolist() == [1] * 6 + [0] * 8
    length = updates.norm(dim=1)
    clipped = updates * (length.quantile(0.5) / length).clamp(max=1)[:, None]
    near(result.vector, clipped[6:].mean(dim=0).tolist())


@pytest.mark.parametrize("bad", [2, 3])
def test_deepsight_by_default_drops_fewer_attackers_than_the_ports_clusters_have(bad: int) -> None:
    server = make_server(network(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), 5, shape=(8,))
    head = server.model.layout.slices()["2.weight"]
    updates = drawn(10, server.model.layout.size, 0.05)
    updates += drawn(1, server.model.layout.size, 0.1)  # what all have in common
    updates[:bad, head.start :] *= 0.01
    updates[:bad, head.start + 12 : head.start + 18] += 1.0  # class 2
    given: dict[str, Any] = {"updates": updates, "global_vector": server.model.vector.clone(), "server": server}
    assert not bool(aggregate("deepsight", **given, inputs=100).accepted[:bad].any())
    port = aggregate("deepsight", **given, inputs=100, min_cluster_size=5, min_samples=3)
    assert bool(port.accepted.all())


# ------------------------------------------------------------------------------------------------------ FDCR


def test_first_neighbours_by_hand() -> None:
    values = tensor([10, 0, 1, 12, 13, 2.5, 40, 50])
    assert fdcr.first_neighbours(values).tolist() == [0, 1, 1, 0, 0, 1, 2, 2]
    assert fdcr.farthest(values).tolist() == [False] * 6 + [True] * 2
    for few in ([5], [1, 7], [1, 2, 9], [3, 3, 3, 3]):  # a cluster has two members at least
        assert fdcr.first_neighbours(tensor(few)).tolist() == [0] * len(few)
        assert not bool(fdcr.farthest(tensor(few)).any())


def test_importance_and_discrepancies_by_hand() -> None:
    rows = tensor([[1, -2, 3], [0, 0, 0], [2, 2, 2]])
    ((block, important),) = fdcr.importance(rows, None)
    assert torch.equal(block, rows)
    near(important, [[0, 3 / 8, 1], [0, 0, 0], [0, 0, 0]])
    ((_, given),) = fdcr.importance(rows, tensor([[5, 6, 7], [1, 1, 2], [4, 2, 3]]))
    near(given, [[0, 0.5, 1], [0, 0, 1], [1, 0, 0.5]])
    shares = tensor([0.5, 0.25, 0.25])
    length = math.sqrt(0.75**2 + 3**2)  # of (0, −0.75, 3)
    near(fdcr.discrepancies(rows, None, shares), [length / 2] * 3)


def test_fdcr_by_hand() -> None:
    updates = tensor([[1, 0], [1.1, 0], [1, 0.1], [1.1, 0.1], [90, 1], [95, 1]])
    examples = tensor([10, 20, 30, 40, 5, 6])
    result = aggregate("fdcr", updates=updates, num_examples=examples)
    assert result.accepted.tolist() == [True] * 4 + [False] * 2
    near(result.weights, [0.1, 0.2, 0.3, 0.4, 0, 0])
    up = 2 / (1 + math.exp(-1))  # I is (1, 0) for each of them: 2 · sigmoid(0) = 1
    near(result.vector, [up * (0.1 + 0.22 + 0.3 + 0.44), 0.07])
    assert result.scores["fdcr.discrepancy"].argmax() == 5
    plain = aggregate("fdcr", updates=updates[:3], num_examples=examples[:3])  # one cluster: nothing happens
    near(plain.vector, (tensor([1, 2, 3]) / 6 @ updates[:3]).tolist())


def test_fdcr_leaves_running_statistics_as_they_are(colluders: Rounds) -> None:
    round = colluders()
    t, result = round.trainable, apply_pipeline([plugins.create("defense", "fdcr")], round)
    assert not bool(result.accepted[:3].any())
    near(result.vector[t:], (result.weights @ round.updates[:, t:]).tolist())
    assert not torch.allclose(result.vector[:t], result.weights @ round.updates[:, :t])


@pytest.mark.parametrize("size", [1, 4])
def test_fisher_information_at_the_server_by_hand(size: int) -> None:
    server = make_server(network(nn.Linear(3, 2)), 2, data=(data := examples(8, 3, 2)))
    updates = drawn(4, 8, 1.0)
    round = of_round(updates, server)
    stage = fdcr.Fdcr(fdcr.FdcrParameters(fisher="server_data", batch_size=size))
    wanted = []
    for row in round.global_vector + updates:
        inputs, labels = data
        error = torch.softmax(inputs @ row[:6].reshape(2, 3).T + row[6:], dim=1) - nn.functional.one_hot(labels, 2)
        gradients = torch.cat([(error[:, :, None] * inputs[:, None]).flatten(1), error], dim=1)  # (8, 8): p − y times x
        fisher = gradients.reshape(8 // size, size, 8).mean(dim=1).square().mean(dim=0)
        wanted.append((fisher - fisher.min()) / (fisher.max() - fisher.min()))
    found = stage.at_the_server(round)
    near(found, torch.stack(wanted).tolist())
    result = apply_pipeline([stage], round)
    near(result.scores["fdcr.discrepancy"], fdcr.discrepancies(updates, found, tensor([0.25] * 4)).tolist())


def test_fisher_information_needs_data(make_round: Rounds) -> None:
    stage = plugins.create("defense", "fdcr", fisher="server_data")
    with pytest.raises(RunError, match="needs data at the server; use fisher: update"):
        apply_pipeline([stage], make_round(server=None))
    apply_pipeline([plugins.create("defense", "fdcr")], make_round(server=None))
    without, some = (SimpleNamespace(server_data=SimpleNamespace(examples=count)) for count in (0, 10))
    problems = fdcr.Fdcr.problems(stage.parameters, without)
    assert [problem.path for problem in problems] == ["fisher"]
    assert "set server_data.examples, or use fisher: update" in problems[0].message
    assert not fdcr.Fdcr.problems(stage.parameters, some)
    assert not fdcr.Fdcr.problems(fdcr.FdcrParameters(), without)


# ------------------------------------------------------------------------------------------ rounds at the edge

SMALL: list[tuple[str, dict[str, Any]]] = [
    ("fltrust", {}),
    ("fltrust", {"scope": "all"}),
    ("flare", {}),
    ("flare", {"trust": "share", "sigma": 1.0}),
    ("deepsight", {"inputs": 20}),
    ("deepsight", {"inputs": 20, "min_cluster_size": 2, "min_samples": 1}),
    ("fdcr", {}),
    ("fdcr", {"fisher": "server_data"}),
]


@pytest.mark.parametrize(("name", "parameters"), SMALL)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_small_rounds_of_every_kind_have_a_result(
    make_round: Rounds, name: str, parameters: dict[str, Any], n: int
) -> None:
    rows = make_round(n=n).updates
    huge = rows.clone()
    huge[-1] *= 1e12
    several = [rows, rows[:1].expand(n, -1).clone(), torch.zeros_like(rows), huge, rows * 1e-12]
    for updates, dtype in itertools.product(several, (torch.float64, torch.float32)):
        round = make_round(updates, dtype=dtype)
        before = round.updates.clone()
        result: Aggregation = apply_pipeline([plugins.create("defense", name, **parameters)], round)
        assert bool(torch.isfinite(result.vector).all())
        assert result.vector.dtype == dtype
        assert result.weights.sum().item() == pytest.approx(float(result.accepted.any()), abs=1e-5)
        assert torch.equal(round.updates, before)
        for key, score in result.scores.items():
            assert bool(torch.isfinite(score).all()), key


# --------------------------------------------------------------------------------------- in a small federation


def federation(stage: dict[str, Any], clients: int, share: float, **attack: Any) -> Any:
    return build(
        {
            "task": {"data": "digits", "model": {"name": "cnn", "channels": 4, "hidden": 16}, "test_examples": 200},
            "federation": {"clients": clients, "clients_per_round": clients, "rounds": 3, "partition": "iid"},
            "training": {"lr": 0.1, "batch_size": 16},
            "attack": {
                "name": "data_poisoning",
                "trigger": {"name": "patch", "size": 3},
                "schedule": {"name": "pool", "fraction": share, "start": 2},
                **attack,
            },
            "defense": [stage],
            "server_data": {"examples": 60},
            "engine": {"name": "serial"},
            "output": {"report": False},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "clients", "share", "attack", "most"),
    [
        ({"name": "fltrust"}, 10, 0.2, {"poison_fraction": 1.0}, 0.1),
        ({"name": "flare", "trust": "share"}, 10, 0.2, {}, 0.15),
        ({"name": "deepsight", "inputs": 100}, 16, 0.32, {"poison_fraction": 1.0}, 0.1),
        ({"name": "fdcr"}, 10, 0.2, {"craft": ["scale"]}, 0.05),
    ],
    ids=["fltrust", "flare", "deepsight", "fdcr"],
)
def test_it_takes_weight_from_attackers(
    stage: dict[str, Any], clients: int, share: float, attack: dict[str, Any], most: float, tmp_path: Path
) -> None:
    played = run(federation(stage, clients, share, **attack), out=tmp_path / "run").clients
    attacked = played[played["round"] >= 2]
    malicious = attacked[attacked["malicious"]]
    assert len(malicious) == 2 * round(share * clients)
    assert malicious["weight"].sum() / 2 < most
    assert attacked[~attacked["malicious"]]["accepted"].mean() > 0.6
