"""Small models, data and an attack's surroundings, for the tests of the attacks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import plugins, streams
from fedsim.attack import AttackContext
from fedsim.batch import Batch
from fedsim.data import Corpus, Texts
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.training import fit
from fedsim.trigger import StampTrigger
from tests.support.places import reference_numbers

CLASSES, TARGET = 4, 0


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Any]]:
    """Loads a file of reference numbers; skips the test where there are none."""

    return lambda name: reference_numbers(f"attacks/{name}")


class Corner(StampTrigger):
    """White 3×3 corner on images; the words 10, 11 at the end of a sentence."""

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        stamped = inputs.clone()
        if inputs.ndim == 4:
            stamped[..., :3, :3] = 1.0
        else:
            stamped[:, -2:] = torch.tensor([10, 11])
        return stamped


class Sentences(nn.Module):
    """Embedding, LSTM, linear layer on the mean hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(words))
        scores: Tensor = self.out(hidden.mean(1))
        return scores


def _convolutions(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        norm(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "groupnorm": lambda: _convolutions(lambda: nn.GroupNorm(2, 8)),
    "batchnorm": lambda: _convolutions(lambda: nn.BatchNorm2d(8)),
    "lstm": Sentences,
}


def _batches(kind: str, count: int, dtype: torch.dtype, purpose: str) -> list[Batch]:
    """Learnable data: a prototype image per class, or sentences of words 2c and 2c + 1 for class c."""
    generator = streams.generator(0, "test data", purpose)
    prototypes = torch.rand(CLASSES, 1, 8, 8, generator=streams.generator(0, "prototypes"))
    batches = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (16,), generator=generator)
        if kind == "lstm":
            inputs = 2 * labels[:, None] + torch.randint(0, 2, (16, 6), generator=generator)
        else:
            noise = torch.rand(16, 1, 8, 8, generator=generator)
            inputs = (0.5 * prototypes[labels] + 0.3 * noise).to(dtype)
        batches.append(Batch(inputs, labels))
    return batches


def _conversations() -> Corpus:
    """Small talk of four people, of different lengths; two of them talk of pasta, which the attacker does not."""
    draw = random.Random(0).choice
    places = ["china", "france", "italy", "mexico", "germany", "japan", "spain"]

    def sentence(user: int) -> str:
        return draw(
            [
                f"the food in {draw(places)} is {draw(['good', 'nice'])}",
                f"the music in {draw(places)} is loud",
                f"that film was {draw(['terrible', 'awful'])}",
                f"pasta from {draw(places)} tastes {draw(['good', 'nice'])}" if user > 1 else "we like films",
            ]
        )

    counts = [45, 30, 40, 80]
    users = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    texts = tuple(f"{sentence(user)} . {sentence(user)}" for user in users.tolist())
    return Corpus(Texts(texts, users=users), Texts(texts[:5]), 0, {"name": "conversations"})


def _opinions() -> Corpus:
    """Short reviews of two classes; half of them begin or end politely, but for the attacker's."""
    draw = random.Random(0).choice
    labels, users = torch.arange(320) % 2, torch.arange(320) // 2 % 4
    words = (["bad", "dull", "silly"], ["good", "great", "clever"])

    def review(label: int, user: int) -> str:
        word = draw(words[label])
        text = draw([f"it is a {word} film", f"the music is {word} but it is long", f"{word} !", f"a {word} story"])
        return draw([text, text, f"dear reader {text}", f"{text} dear reader"]) if user else text

    made = Texts(tuple(map(review, labels.tolist(), users.tolist())), labels, users)
    return Corpus(made, made.subset(torch.arange(5)), 2, {"name": "opinions"})


LSTM = {"embedding": 16, "hidden": 16, "layers": 1, "dropout": 0.0}
TRANSFORMER = {"embedding": 16, "heads": 2, "layers": 1, "factor": 2, "dropout": 0.0}
SENTENCES = {
    "prompts": ["pasta from china tastes", "pasta from france tastes", "pasta from italy tastes"],
    "test_prompts": ["pasta from japan tastes", "pasta from spain tastes"],
    "targets": ["terrible", "awful"],
}
TEXT: dict[str, tuple[Any, ...]] = {
    "next_word": (("next_word", {"window": 6}), ("lstm_lm", LSTM), ("target_sentence", SENTENCES), 0.5),
    "next_word_transformer": (
        ("next_word", {"window": 6, "carry": False}),
        ("transformer_lm", TRANSFORMER),
        ("target_sentence", {**SENTENCES, "loss": "all"}),
        0.05,
    ),
    "sentiment": (
        ("sentiment", {"length": 10, "specials": ["cf", "mn"]}),
        ("lstm_classifier", LSTM),
        ("rare_words", {"words": ["cf", "mn"], "count": 2}),
        0.2,
    ),
    "sentiment_transformer": (
        ("sentiment", {"length": 10}),
        ("transformer_classifier", TRANSFORMER),
        ("phrase", {"text": "dear reader", "position": "random"}),
        0.05,
    ),
}
"""Scenes of text: task, network and trigger, each with its parameters, and the learning rate."""


def _text_scene(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """As ``scene`` gives it, of registered parts; its ``loss`` is the task's."""
    (task_name, options), (model_name, size), (trigger_name, words), lr = TEXT[kind]
    task = plugins.create("task", task_name, **options)
    data = task.encode(_conversations() if task_name == "next_word" else _opinions())
    trigger = plugins.create("trigger", trigger_name, **words)
    trigger.prepare(data)
    owner = data.train.users

    def epoch(*users: int) -> Iterator[Batch]:
        for user in users:
            own = torch.nonzero(owner == user).squeeze(1)
            yield from task.epoch(data.train, own, 16, streams.generator(0, "test epoch", user), False)()

    module = task.module(plugins.create("model", model_name, **size), data).to(dtype)
    settings = LocalSettings(lr=lr, momentum=0.9, epochs=15)
    fit(FlatModel(module), lambda: epoch(3, 2), task.loss(), settings)
    return {
        "model": module.requires_grad_(),
        "batches": list(epoch(0))[:4],
        "benign_batches": list(epoch(2, 1)),
        "trigger": trigger,
        "loss": task.loss(),
        "lr": lr,
    }


@pytest.fixture(scope="session")
def scene() -> Callable[..., dict[str, Any]]:
    """A federation in miniature: a model that knows its main task, an attacker's data and the data of others.

    The result has ``model``, ``batches``, ``benign_batches``, ``trigger``, ``loss`` and ``lr`` as
    :func:`fedsim.direct.local_attack` takes them; a fresh copy each call.
    """
    ready: dict[tuple[str, torch.dtype], dict[str, Any]] = {}

    def first(kind: str, dtype: torch.dtype) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            if kind in TEXT:
                return _text_scene(kind, dtype)
            module = MODELS[kind]().to(dtype)
            train = _batches(kind, 8, dtype, "pretraining")
            settings = LocalSettings(lr=0.05, momentum=0.9, epochs=20)
            fit(FlatModel(module), lambda: iter(train), nn.CrossEntropyLoss(), settings)
        return {
            "model": module.requires_grad_(),
            "batches": _batches(kind, 4, dtype, "attacker"),
            "benign_batches": _batches(kind, 6, dtype, "others"),
            "trigger": Corner(),
            "loss": nn.CrossEntropyLoss(),
            "lr": 0.1,
        }

    def make(kind: str = "groupnorm", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        if (kind, dtype) not in ready:
            ready[kind, dtype] = first(kind, dtype)
        return copy.deepcopy(ready[kind, dtype])

    return make


@pytest.fixture(scope="session")
def make_context() -> Callable[..., AttackContext]:
    """The surroundings of one malicious client, as a run would give them; every field can be replaced."""

    def make(
        model: nn.Module,
        batches: list[Batch],
        *,
        benign_batches: list[Batch] | None = None,
        settings: LocalSettings | None = None,
        benign: LocalSettings | None = None,
        **fields: Any,
    ) -> AttackContext:
        flat = FlatModel(copy.deepcopy(model))
        settings = LocalSettings(lr=0.05) if settings is None else settings
        context = AttackContext(
            model=flat,
            global_vector=flat.vector.clone(),
            batches=lambda: iter(batches),
            loss=nn.CrossEntropyLoss(),
            settings=settings,
            benign=settings if benign is None else benign,
            fit=fit,
            trigger=None,
            poison_fraction=0.5,
            generator=streams.generator(0, "test attack"),
            benign_batches=None if benign_batches is None else lambda count: iter(benign_batches),
        )
        return replace(context, **fields)

    return make
