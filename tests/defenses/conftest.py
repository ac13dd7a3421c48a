"""What the defense tests share: rounds to defend, and where the reference numbers lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.defense import RoundUpdates
from fedsim.direct import make_server
from fedsim.layout import Layout
from tests.support.places import reference_numbers

with warnings.catch_warnings():  # Flower imports typer, which touches a deprecated name of click
    warnings.simplefilter("ignore", DeprecationWarning)
    import flwr.serverapp.strategy  # noqa: F401

CLASSES = 3


def small_network() -> nn.Module:
    """The network behind the rounds."""
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


LAYOUT = Layout.of(small_network())


@pytest.fixture(scope="session")
def reference() -> Callable[[str], list[dict[str, Any]]]:
    """Cases of a reference file by its name, such as ``defenses/krum``; skips the test where there are none."""
    return lambda name: list(reference_numbers(name)["cases"])


@pytest.fixture(scope="session")
def make_round() -> Callable[..., RoundUpdates]:
    """A function building a round, by default one of 12 clients of a small model with running statistics."""

    def make(
        updates: Tensor | None = None,
        *,
        n: int = 12,
        dtype: torch.dtype = torch.float64,
        number: int = 1,
        seed: int = 0,
        **changes: Any,
    ) -> RoundUpdates:
        source = torch.Generator().manual_seed(100 + number)
        drawn = 0.1 * torch.randn(n, LAYOUT.size, generator=source, dtype=torch.float64)
        base = torch.randn(LAYOUT.size, generator=source, dtype=torch.float64)
        base[-4:] = 1 + base[-4:].abs()  # running variances
        held = torch.randn(24, 6, generator=source).to(dtype), torch.randint(0, CLASSES, (24,), generator=source)
        examples = torch.randint(20, 100, (n,), generator=source)
        if updates is None:
            updates = drawn
        rows = updates.shape[0]
        values: dict[str, Any] = {
            "updates": updates.to(dtype),
            "num_examples": examples[:rows].to(dtype),
            "global_vector": base.to(dtype),
            "weights": examples[:rows].to(dtype),
            "accepted": torch.ones(rows, dtype=torch.bool),
            "trainable": LAYOUT.trainable,
            "clients": tuple(range(3, 3 + 2 * rows, 2)),
            "round": number,
            "seed": seed,
            "layout": LAYOUT,
            "server": make_server(small_network().to(dtype), CLASSES, data=held, round=number, seed=seed),
        }
        return RoundUpdates(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def colluders(make_round: Callable[..., RoundUpdates]) -> Callable[..., RoundUpdates]:
    """A function building a round whose first three clients push one way, fifty times too hard."""

    def make(**options: Any) -> RoundUpdates:
        round = make_round(**options)
        updates = round.updates.clone()
        updates[:3] = 50 * updates[:1] + updates[:3]
        return make_round(updates, **{key: value for key, value in options.items() if key != "n"})

    return make
