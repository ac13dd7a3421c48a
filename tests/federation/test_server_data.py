"""Data at the server: nobody else's, and what a defense can do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedsim.batch import Examples
from fedsim.config import Config, build
from fedsim.direct import make_server
from fedsim.errors import ConfigError, InputError, RunError
from fedsim.federation.client import initial_module
from fedsim.federation.server_data import server_maker
from fedsim.federation.setup import Setup, prepare
from fedsim.layout import FlatModel


def a_config(server: dict[str, Any], **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "task": {"data": "digits", "model": "logistic"},
        "federation": {"clients": 4, "clients_per_round": 4, "rounds": 1, "partition": "iid"},
        "attack": None,
        "server_data": server,
        **changes,
    }
    return build(raw)


def rows_of(examples: Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples.inputs}


def clients_rows(setup: Setup) -> set[bytes]:
    return rows_of(setup.data.train.subset(torch.cat(setup.parts)))


WITHOUT = prepare(a_config({"examples": 0}))


def test_by_default_the_server_has_none() -> None:
    assert WITHOUT.server is None
    assert sum(WITHOUT.sizes) == len(WITHOUT.data.train)


def test_examples_kept_back_from_training_are_no_clients() -> None:
    setup = prepare(a_config({"examples": 50}))
    assert setup.server is not None
    assert len(setup.server) == 50
    assert sum(setup.sizes) == len(setup.data.train) - 50
    assert not rows_of(setup.server) & clients_rows(setup)
    assert not rows_of(setup.server) & rows_of(setup.data.test)
    assert len(setup.data.test) == len(WITHOUT.data.test)
    assert len(setup.server.labels.unique()) > 5, "a draw over all classes"


def test_examples_kept_back_from_the_test_set_are_not_measured_on() -> None:
    setup = prepare(a_config({"examples": 50, "source": "test"}))
    assert setup.server is not None
    assert len(setup.data.test) == len(WITHOUT.data.test) - 50
    assert not rows_of(setup.server) & rows_of(setup.data.test)
    assert rows_of(setup.server) <= rows_of(WITHOUT.data.test)
    assert setup.sizes == WITHOUT.sizes


def test_another_data_sets_images_take_this_ones_shape() -> None:
    setup = prepare(a_config({"examples": 30, "source": "other", "other": "mnist5k"}))
    assert setup.server is not None
    assert setup.server.inputs.shape == (30, *WITHOUT.data.shape) == (30, 1, 8, 8)
    assert setup.server.inputs.dtype == torch.uint8
    assert setup.server.inputs.float().std() > 20, "pictures, not one grey"
    assert setup.sizes == WITHOUT.sizes
    assert len(setup.data.test) == len(WITHOUT.data.test)


def test_noise_differs_from_seed_to_seed_only() -> None:
    one, same = (prepare(a_config({"examples": 20, "source": "noise"})).server for _ in range(2))
    other = prepare(a_config({"examples": 20, "source": "noise"}, seed=1)).server
    assert one is not None
    assert same is not None
    assert other is not None
    assert torch.equal(one.inputs, same.inputs)
    assert not torch.equal(one.inputs, other.inputs)
    assert one.labels.min() >= 0
    assert one.labels.max() < WITHOUT.data.classes


@pytest.mark.parametrize(("source", "left"), [("train", "the clients"), ("test", "the measurements")])
def test_more_than_there_are_is_refused(source: str, left: str) -> None:
    with pytest.raises(InputError, match=f"leave none for {left}; use fewer"):
        prepare(a_config({"examples": 5000, "source": source}))


def test_a_defense_without_its_data_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"server_data\.examples.*set some aside"):
        a_config({"examples": 0}, defense=["fltrust"])


def test_the_server_of_a_round_runs_the_network() -> None:
    config = a_config({"examples": 40})
    setup = prepare(config)
    module = initial_module(config, setup.data)
    model = FlatModel(module)
    server = server_maker(config, config.task.create(), model, setup.data, setup.server)(3)
    assert server.round == 3
    assert server.data is not None
    assert server.epoch is not None
    assert server.data.inputs.shape == (40, 1, 8, 8)
    assert server.data.inputs.max() <= 1.0
    first, again = (list(server.epoch(16, server.generator("root"))()) for _ in range(2))
    assert [len(batch.labels) for batch in first] == [16, 16, 8]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))
    vector = model.vector.clone()
    wide = server.outputs(vector, server.data.inputs)
    assert torch.allclose(wide, server.outputs(vector, server.data.inputs, batch_size=7), atol=1e-6)
    assert wide.shape == (40, 10)
    noise = server.random_inputs(5, server.generator("noise"))
    assert noise.shape == (5, 1, 8, 8)
    assert noise.min() >= 0
    assert noise.max() <= 1


class Tied(nn.Module):
    """Words to words, with one matrix for both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.inner = nn.Linear(3, 3)
        self.out = nn.Linear(3, 6)
        self.out.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(self.embedding(words))))  # type: ignore[no-any-return]


def test_the_head_and_what_enters_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    server = make_server(network, 2, shape=(4,))
    weight, bias = server.head()
    assert bias is not None
    assert (weight.name, weight.shape, bias.name) == ("2.weight", (2, 3), "2.bias")
    inputs = torch.randn(10, 4)
    vector = server.model.vector.clone() * 2
    features = server.features(vector, inputs, batch_size=3)
    assert features.shape == (10, 3)
    there = vector[weight.start : weight.stop].view(2, 3), vector[bias.start : bias.stop]
    assert torch.allclose(features @ there[0].T + there[1], server.outputs(vector, inputs), atol=1e-5)
    assert not network[0].weight.equal(server.model.module[0].weight), "the network given is copied"  # type: ignore[index,union-attr]

    tied = make_server(Tied(), 6)
    weight, bias = tied.head()
    assert weight.name == "embedding.weight"
    assert bias is not None
    assert bias.name == "out.bias"
    with pytest.raises(RunError, match="has none"):
        make_server(nn.Conv2d(1, 1, 1), 1).head()
