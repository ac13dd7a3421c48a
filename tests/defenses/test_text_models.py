"""Defenses on rounds of language models: tied weights once, and embeddings of which each client moves a few rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim import plugins
from fedsim.batch import Batch
from fedsim.defense import Defense, RoundUpdates, Server
from fedsim.direct import make_server
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.pipeline import apply_pipeline
from fedsim.tasks.text import WordLoss
from fedsim.training import fit
from tests.support.defenses import REQUIRED

CLIENTS, LENGTH = 10, 6
SIZE = {"embedding": 16, "hidden": 16, "layers": 1, "dropout": 0.0}
WORDS = {"tied": 120, "classifier": 2000}
Rounds = Callable[[str], RoundUpdates]


def network(kind: str) -> FlatModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "tied":
            return FlatModel(plugins.create("model", "lstm_lm", **SIZE, tied=True).build(WORDS[kind], LENGTH, 0))
        return FlatModel(plugins.create("model", "lstm_classifier", **SIZE).build(WORDS[kind], 2, LENGTH, 0))


def server(kind: str, words: Tensor, labels: Tensor) -> Server:
    """The server has the network, and the last client's texts."""
    classes, loss = (WORDS[kind], WordLoss()) if kind == "tied" else (2, None)
    made = make_server(network(kind).module, classes, data=(words, labels), loss=loss)
    made.random_inputs = lambda count, source: torch.randint(0, WORDS[kind], (count, LENGTH), generator=source)
    return made


@pytest.fixture(scope="module")
def text_round() -> Rounds:
    """A round in which every client has trained on words of its own, beside some that all use; two are boosted."""
    ready: dict[str, RoundUpdates] = {}

    def make(kind: str) -> RoundUpdates:
        if kind in ready:
            return ready[kind]
        model, source = network(kind), torch.Generator().manual_seed(1)
        base, rows = model.vector.clone(), []
        for client in range(CLIENTS):
            own = torch.cat([torch.arange(3, 13), torch.arange(20 + 8 * client, 28 + 8 * client)])
            text = own[torch.randint(0, len(own), (16, LENGTH + 1), generator=source)]
            labels = text[:, 1:] if kind == "tied" else text[:, 0] % 2
            loss = WordLoss() if kind == "tied" else nn.CrossEntropyLoss()
            batches = [Batch(text[:, :-1], labels)] * 3
            model.load(base)
            fit(model, lambda batches=batches: iter(batches), loss, LocalSettings(lr=0.5, momentum=0.9))  # type: ignore[misc]
            rows.append((model.vector - base) * (20 if client < 2 else 1))
        ready[kind] = RoundUpdates(
            updates=torch.stack(rows),
            num_examples=torch.arange(10.0, 10 + CLIENTS),
            global_vector=base,
            weights=torch.arange(10.0, 10 + CLIENTS),
            accepted=torch.ones(CLIENTS, dtype=torch.bool),
            trainable=model.layout.trainable,
            clients=tuple(range(CLIENTS)),
            layout=model.layout,
            server=server(kind, text[:, :-1], labels),
        )
        return ready[kind]

    return make


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("name", plugins.names("defense"))
def test_a_round_of_text_models(name: str, kind: str, text_round: Rounds) -> None:
    """Every choice: shapes, finite, inputs untouched, both scopes alike (all is trainable), nobody's words stay."""
    cls: Any = plugins.get("defense", name)
    if cls.tasks and not {"next_word" if kind == "tied" else "sentiment"} & set(cls.tasks):
        pytest.skip("it is for other tasks")
    round = text_round(kind)
    size = round.global_vector.shape[0]
    assert round.trainable == size
    assert round.updates.shape == (CLIENTS, size)
    tensors = ("updates", "num_examples", "weights", "accepted", "global_vector")
    before = {key: getattr(round, key).clone() for key in tensors}

    def run(**parameters: Any) -> Tensor:
        stage: Defense = plugins.create("defense", name, **REQUIRED.get(name, {}), **parameters)
        assert round.server is not None
        sent = stage.broadcast(round.global_vector, round.server)
        result = apply_pipeline([stage], replace(round, global_vector=sent))
        assert result.vector.shape == (size,)
        assert result.vector.dtype == round.updates.dtype
        assert bool(torch.isfinite(result.vector).all())
        assert bool((result.vector != 0).any())
        assert result.weights.shape == result.accepted.shape == (CLIENTS,)
        assert float(result.weights.sum()) == pytest.approx(1, abs=1e-5)
        for score in result.scores.values():
            assert score.shape == (CLIENTS,)
            assert bool(torch.isfinite(score).all())
        return result.vector

    vector = run()
    for field in fields(cls.Parameters):
        found = [run(**{field.name: value}) for value in field.metadata.get("choices", ())]
        if field.name == "scope":
            assert all(torch.equal(found[0], other) for other in found[1:])
    for key in tensors:
        assert torch.equal(getattr(round, key), before[key]), key
    if kind == "classifier" and cls.finish is Defense.finish:  # a stage that adds noise adds it everywhere
        still = (round.updates == 0).all(0)
        assert int(still.sum()) > 0.8 * size
        assert torch.allclose(vector[still], torch.zeros(()), rtol=0, atol=1e-6)

    model = network(kind)
    model.load(round.global_vector + vector)
    outputs = model.module(torch.arange(2 * LENGTH).view(2, LENGTH))
    assert bool(torch.isfinite(outputs).all())


def test_tied_weights_travel_once() -> None:
    tied, model = network("tied"), network("tied").module
    names = [entry.name for entry in tied.layout.entries]
    assert names.count("encoder.weight") == 1
    assert "decoder.weight" not in names
    assert tied.layout.size == sum(p.numel() for p in model.parameters())
    assert tied.layout.size == WORDS["tied"] * 16 + 2 * 4 * 16 * (16 + 1) + WORDS["tied"]
    tied.load(torch.arange(float(tied.layout.size)))
    assert tied.module.decoder.weight is tied.module.encoder.weight  # type: ignore[union-attr]


class Storages(TorchDispatchMode):
    """Notes the storages of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen |= {t.untyped_storage().data_ptr() for t in (result,) if isinstance(t, Tensor)}
        return result


@pytest.mark.parametrize("kind", WORDS)
def test_no_copy_of_an_embedding_is_kept_or_made(kind: str) -> None:
    """All tensors lie in the vector and all gradients in another; loading a model writes there and nowhere else."""
    model = network(kind)
    vector, gradient = (t.untyped_storage().data_ptr() for t in (model.vector, model.gradient))
    parameters = list(model.module.parameters())

    def check() -> None:
        for entry, parameter in zip(model.layout.entries, parameters, strict=True):
            assert parameter.data_ptr() == model.vector[entry.start :].data_ptr(), entry.name
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == model.gradient[entry.start :].data_ptr(), entry.name

    check()
    other = torch.randn_like(model.vector)
    with Storages() as storages:
        model.load(other)
    assert storages.seen == {vector}
    assert torch.equal(model.vector, other)
    check()
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    model.module(tokens).sum().backward()
    model.sgd(0.1).step()
    check()
    assert {p.untyped_storage().data_ptr() for p in parameters} == {vector}
    assert gradient == model.gradient.untyped_storage().data_ptr()
    assert bool((model.vector != other).any())
