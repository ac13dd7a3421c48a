"""FLARE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.defense import Defense, RoundUpdates, Screening, require
from fedsim.errors import RunError
from fedsim.plugins import Parameters, parameter, register

CHUNK = 2**22
"""Numbers of a kernel matrix worked on at a time."""

BROKEN = 2.0
"""Distance to a client whose features are not finite: the largest that two clients can have."""


@dataclass(frozen=True)
class FlareParameters(Parameters):
    neighbours: float = parameter(0.5, "each client votes for this share of the clients, the nearest", gt=0, le=1)
    sigma: float | None = parameter(
        None, "width of the Gaussian kernel; null: √(F/2) for F features, the default of the original code", gt=0
    )
    trust: str = parameter(
        "exponential",
        "a client's weight: grows exponentially with its votes, or is its share of them",
        choices=("exponential", "share"),
    )
    temperature: float = parameter(1.0, "τ of the exponential, in units of the mean number of votes", gt=0)
    samples: int = parameter(100, "feature vectors a client is judged by, spread evenly over the server's data", ge=2)


@register("flare")
class Flare(Defense):
    r"""Trust the clients whose models see the server's data as most others do.

    A client's features are what enters the last linear layer of its model on ``server_data``, m vectors
    x (F,). Two clients differ by the squared maximum mean discrepancy of their features, unbiased,

    .. math:: M_{ij} = \frac{\sum_{a \ne b} k(x_a, x_b) + k(y_a, y_b)}{m (m - 1)}
              - \frac{2}{m^2} \sum_{a, b} k(x_a, y_b), \qquad k(x, y) = e^{-\lVert x - y \rVert^2 / 2 \sigma^2}

    Each client votes for the round(neighbours · N) others nearest to it (of equally near ones, for a part
    of each). With vᵢ votes it weighs exp(vᵢ / (τ v̄)), v̄ the mean, or with ``trust: share`` vᵢ, normalised.
    Nobody is rejected outright, and numbers of examples play no part.

    Follows the authors' code (ning-wang1/flare_poisoning_detection): the exponential with τ = 1, the unbiased estimate
    and the width are its own. That code votes for one client fewer, takes a negative M for zero, so that the order of
    the clients decides between the nearest, and sees 200 test examples of one class: not repeated. Votes and
    numbers are checked against BackFed's port (``trust: share``, ``sigma: 1``), which keeps the diagonal; that adds
    2/(m − 1) to every distance and changes no vote: not repeated.
    For next-word models every position is an example.

    **The published trust softens, it does not exclude.** With τ = 1 and half the clients as neighbours the best client
    weighs at most e² times the worst: two of ten clients whom nobody votes for keep 3 % each, and a boosted update can
    make up for that. ``temperature: 0.2`` leaves them 0.02 %, ``trust: share`` nothing.

    Features that are not finite are as far from everybody as can be. One client keeps all the weight. In a network
    of a single linear layer the features are the inputs: all weigh the same. Scores:
    ``mmd``, the mean distance to the others, and ``votes``, with a minus. Cost: O(N·m) forward passes,
    O(N²·m²·F) time, O(N·m·F) memory.
    """

    paper = "Wang et al., FLARE: Defending FL against Model Poisoning via Latent Space Representations, AsiaCCS 2022"
    cost = "O(N m) forward passes and O(N² m² F) time for m examples and F features"
    Parameters = FlareParameters
    needs_network = True
    needs_data = True

    def screen(self, round: RoundUpdates) -> Screening:
        p = self.parameters
        distances = discrepancies(self.features(round), p.sigma)
        votes = count_votes(distances, neighbours(round.count, p.neighbours))
        mean = distances.sum(dim=1) / max(round.count - 1, 1)
        return Screening(weights=weigh(votes, p.trust, p.temperature), scores={"mmd": mean, "votes": -votes})

    def features(self, round: RoundUpdates) -> Tensor:
        """(N, m, F) float64.

        Raises
        ------
        RunError: a single example, on which no two clients can be compared.
        """
        server = require(self, round.server)
        assert server.data is not None
        inputs = spread(server.data.inputs, self.parameters.samples)
        found = []
        for update in round.updates:
            seen = server.features(round.global_vector + update, inputs)
            found.append(spread(seen.reshape(-1, seen.shape[-1]), self.parameters.samples).to(torch.float64))
        if len(found[0]) < 2:
            raise RunError("the defense 'flare' compares distributions; set server_data.examples to at least 2")
        return torch.stack(found)


def neighbours(n: int, share: float) -> int:
    """How many of n clients each votes for; halves are rounded to the even number."""
    return min(max(round(share * n), 1), n - 1)


def spread(x: Tensor, count: int) -> Tensor:
    """At most ``count`` rows of x, evenly spread, the first and last among them."""
    if len(x) <= count:
        return x
    return x[torch.linspace(0, len(x) - 1, count, dtype=torch.float64).round().long().to(x.device)]


def discrepancies(features: Tensor, sigma: float | None = None) -> Tensor:
    """(N, N) M, with a zero diagonal. features: (N, m, F) float64. sigma: default √(F/2)."""
    n, m, width = features.shape
    broken = ~torch.isfinite(features).all(dim=2).all(dim=1)
    features = torch.where(broken[:, None, None], torch.zeros_like(features), features)
    scale = 1 / (math.sqrt(width) if sigma is None else math.sqrt(2) * sigma)
    sums = torch.zeros(n, n, dtype=torch.float64, device=features.device)
    for i in range(n):  # distances from differences: next to huge features products lose all digits
        others = features[i:].reshape(-1, width) * scale
        for part in torch.split(features[i] * scale, max(1, CHUNK // len(others))):
            far = torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist")
            sums[i, i:] += (-far.square()).exp().sum(dim=0).reshape(n - i, m).sum(dim=1)
    sums = sums + sums.triu(1).T
    within = (sums.diagonal() - m) / (m * (m - 1))
    result = within[:, None] + within - 2 * sums / m**2
    result[broken] = result[:, broken] = BROKEN
    return result.fill_diagonal_(0)


def count_votes(distances: Tensor, count: int) -> Tensor:
    """(N,) votes when each row votes for the ``count`` nearest others; ties at the border share what is left."""
    if count < 1:
        return torch.zeros_like(distances[0])
    others = distances.clone().fill_diagonal_(torch.inf)
    border = others.kthvalue(count, dim=1, keepdim=True).values
    tied = (others - border).abs() <= 1e-12
    inside = (others < border) & ~tied
    left = (count - inside.sum(dim=1, keepdim=True)).to(distances.dtype) / tied.sum(dim=1, keepdim=True)
    return (inside + tied * left).sum(dim=0)


def weigh(votes: Tensor, trust: str, temperature: float) -> Tensor:
    """(N,) weights that sum to 1."""
    mean = votes.mean()
    if not bool(mean > 0):
        return torch.full_like(votes, 1 / len(votes))
    return votes / votes.sum() if trust == "share" else torch.softmax(votes / (temperature * mean), dim=0)
