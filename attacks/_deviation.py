"""Colluders that train honestly and then all send one vector, made of honest updates."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.attack import Attack, AttackContext, CoordinationKnowledge, Knowledge
from fedsim.batch import Batch
from fedsim.distances import columns, squared_distances
from fedsim.errors import Problem
from fedsim.plugins import Parameters, parameter


class Colluding(Attack):
    """Honest training; at the server's door every colluder's update is replaced by what ``make`` returns.

    It is made of the updates of the round's benign clients, all with the same weight. Where the attack does not
    see them (parameter ``sees``), or where the round has none, it is made of the colluders' own honest updates.
    Craft steps act before that, on the colluders' own updates: where those are replaced by what others sent, a config
    with craft steps is refused.
    """

    knows = frozenset({Knowledge.OWN_DATA, Knowledge.BENIGN_UPDATES})
    backdoor = False

    @classmethod
    def knowledge(cls, parameters: Any) -> frozenset[Knowledge]:
        blind = getattr(parameters, "sees", "benign") == "colluders"
        return cls.knows - {Knowledge.BENIGN_UPDATES} if blind else cls.knows

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        if Knowledge.BENIGN_UPDATES not in cls.knowledge(parameters) or not experiment.attack.craft:
            return []
        return [Problem("craft", f"of no effect: {cls.name} replaces what these steps make; write attack.craft: []")]

    def poison(self, batch: Batch, context: AttackContext) -> Batch:
        return batch

    def coordinate(self, updates: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        malicious = knowledge.malicious
        others = knowledge.benign_visible and not bool(malicious.all())
        made = self.make(updates[~malicious if others else malicious], knowledge)
        result = updates.clone()
        result[malicious] = made.to(updates.dtype)
        return result

    @abstractmethod
    def make(self, honest: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        """The vector (D,) that all send, made of honest updates (M, D), M ≥ 1."""


def mean_of(rows: Tensor) -> Tensor:
    """(D,) float64: the mean of the rows (M, D)."""
    return torch.cat([block.to(torch.float64).mean(dim=0) for block in columns(rows)])


def mean_and_std(rows: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """(D,) and (D,) float64: mean and standard deviation of the rows (M, D); that of one row is zero."""
    squares = []
    for block in columns(rows):
        wide = block.to(torch.float64)
        squares.append((wide - wide.mean(dim=0)).square().sum(dim=0))
    return mean_of(rows), (torch.cat(squares) / max(rows.shape[0] - ddof, 1)).sqrt()


@dataclass(frozen=True)
class DeviationParameters(Parameters):
    sees: str = parameter("benign", "whose honest updates the colluders see", choices=("benign", "colluders"))
    deviation: str = parameter(
        "std",
        "direction p: standard deviation (ddof 1), unit vector or sign of the mean",
        choices=("std", "unit", "sign"),
    )
    start: float = parameter(10.0, "first λ tried; the largest one found is below twice that", gt=0, le=1e6)
    tolerance: float = parameter(1e-5, "the search stops when the last good λ and the next are this near", ge=1e-9)


class Deviating(Colluding):
    """The mean of honest updates, moved by −λ p as far as the distances to them allow.

    ``‖μ − λp − xᵢ‖² = ‖μ − xᵢ‖² − 2λ ⟨μ − xᵢ, p⟩ + λ² ‖p‖²``, so after one pass over the updates a step of the
    search for λ costs M numbers.
    """

    Parameters = DeviationParameters

    @abstractmethod
    def measure(self, squared: Tensor) -> Tensor:
        """What is bounded, (…): of squared distances (…, M) from a vector to each honest update."""

    def bound(self, measures: Tensor) -> Tensor:
        """The bound, made of the measures (M,) of the honest updates themselves; by default the largest."""
        return measures.max()

    def make(self, honest: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        mean, std = mean_and_std(honest, ddof=1)
        match self.parameters.deviation:
            case "std":
                direction = std
            case "unit":
                direction = mean / torch.linalg.vector_norm(mean).clamp_min(1e-300)
            case _:
                direction = mean.sign()
        return mean - self._search(honest, mean, direction) * direction

    def _search(self, honest: Tensor, mean: Tensor, direction: Tensor) -> float:
        """The last λ that kept the bound: start, then up by half a step if it does, down by half a step if not."""
        near = torch.zeros(honest.shape[0], dtype=torch.float64, device=honest.device)
        along = torch.zeros_like(near)
        for block, centre, way in zip(columns(honest), columns(mean[None]), columns(direction[None]), strict=True):
            gap = centre - block
            near += gap.square().sum(dim=1)
            along += (gap * way).sum(dim=1)
        near, along, length = near.cpu(), along.cpu(), float(direction.square().sum())
        bound = self.bound(self.measure(squared_distances(honest).cpu()))
        good, trial, step = 0.0, float(self.parameters.start), self.parameters.start / 2
        while abs(good - trial) > self.parameters.tolerance:
            fits = bool(self.measure(near - 2 * trial * along + trial**2 * length) <= bound)
            good, trial, step = (trial, trial + step, step / 2) if fits else (good, trial - step, step / 2)
        return good
