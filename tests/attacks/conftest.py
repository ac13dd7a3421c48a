"""Small models, data and an attack's surroundings, for the tests of the attacks."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import streams
from fedsim.attack import AttackContext, LocalSettings
from fedsim.batch import Batch
from fedsim.layout import FlatModel
from fedsim.training import fit
from fedsim.trigger import StampTrigger

SHARED = Path(os.environ.get("FEDSIM_SHARED", Path(__file__).parents[2].parent / "shared"))
CLASSES, TARGET = 4, 0


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Any]]:
    """Loads a file of reference numbers; skips the test where there are none."""

    def load(name: str) -> dict[str, Any]:
        path = SHARED / "reference" / "attacks" / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"no reference numbers at {path}; set FEDSIM_SHARED to the folder that holds reference/")
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded

    return load


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


@pytest.fixture(scope="session")
def scene() -> Callable[..., dict[str, Any]]:
    """A federation in miniature: a model that knows its main task, an attacker's data and the data of others.

    The result has ``model``, ``batches``, ``benign_batches`` and ``trigger`` as :func:`fedsim.direct.local_attack`
    takes them; a fresh copy each call.
    """
    ready: dict[tuple[str, torch.dtype], nn.Module] = {}

    def make(kind: str = "groupnorm", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        if (kind, dtype) not in ready:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                module = MODELS[kind]().to(dtype)
                train = _batches(kind, 8, dtype, "pretraining")
                settings = LocalSettings(lr=0.05, momentum=0.9, epochs=20)
                fit(FlatModel(module), lambda: iter(train), nn.CrossEntropyLoss(), settings)
            ready[kind, dtype] = module.requires_grad_()
        return {
            "model": copy.deepcopy(ready[kind, dtype]),
            "batches": _batches(kind, 4, dtype, "attacker"),
            "benign_batches": _batches(kind, 6, dtype, "others"),
            "trigger": Corner(),
        }

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
