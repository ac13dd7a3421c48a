"""Multi-metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import cosine_distances, cosine_distances_to_base, manhattan_distances, norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class MultiMetricsParameters(Parameters):
    keep: float = parameter(0.3, "share p of the clients kept: the int(p·K) lowest scores, at least 1", gt=0, le=1)
    variant: str = parameter(
        "code", "as the official code computes it, or as the paper writes it", choices=("code", "paper")
    )
    scope: str = parameter(
        "trainable", "what is measured: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("multi_metrics")
class MultiMetrics(Defense):
    r"""Score clients by whitened Manhattan, Euclidean and cosine features; keep the lowest.

    Each client i gets three features x'(i) ∈ ℝ³, each a sum over the other clients; with Σ the covariance of
    the features over the clients of the round its score is x'ᵀ Σ⁻¹ x' — a Mahalanobis length of the features
    themselves, not of their distance to the mean, so that the highest score need not be an attacker's. The
    int(p·K) clients with the lowest scores are averaged by examples. With w₀ the global model and wᵢ = w₀ + Δᵢ:

    ============= =============================================== =====================================
    feature       ``variant: code`` (official)                    ``variant: paper``
    ============= =============================================== =====================================
    cosine        Σⱼ (1 − cos(wᵢ, wⱼ))²                           Σⱼ \|cos(w₀, wᵢ) − cos(w₀, wⱼ)\|
    Manhattan     Σⱼ ‖wᵢ − wⱼ‖₁                                   Σⱼ \|‖wᵢ − w₀‖₁ − ‖wⱼ − w₀‖₁\|
    length        Σⱼ \|‖wᵢ‖₂ − ‖wⱼ‖₂\|                            Σⱼ \|‖wᵢ − w₀‖₂ − ‖wⱼ − w₀‖₂\|
    score         x'ᵀ Σ⁻¹ x'                                      √(x'ᵀ Σ⁻¹ x')
    ============= =============================================== =====================================

    The default follows the code, which made the published tables: it uses whole weights, and w₀ nowhere. (The
    project's page says "higher scores" are kept; the code keeps the lowest, and so do both variants here.) As
    in the code, ``scope: trainable`` looks at parameters only; running statistics are averaged over the kept
    clients, where the code would take those of its first client.

    The official code inverts Σ outright and fails on equal updates. Here features are scaled to unit variance
    (the score does not notice) and a pseudo-inverse drops directions in which the clients do not differ — a
    constant feature, two proportional ones — for these cannot tell clients apart; otherwise it is the
    inverse.

    Cost: ``code`` O(N²·D) time and O(N²) memory beyond the updates, ``paper`` O(N·D) and O(N). At least 4
    clients: fewer make Σ singular always.
    """

    paper = "Huang et al., Multi-metrics adaptively identifies backdoors in Federated Learning, arXiv 2303.06601"
    cost = "O(N² D) time, O(N²) memory (variant paper: O(N D), O(N))"
    Parameters = MultiMetricsParameters
    min_clients = 4

    def screen(self, round: RoundUpdates) -> Screening:
        updates = round.seen(self.parameters.scope)
        base = round.global_vector[: updates.shape[1]]
        if self.parameters.variant == "code":
            cosine = cosine_distances(updates, base).square().sum(dim=1)
            manhattan = manhattan_distances(updates).sum(dim=1)
            length = total_differences(norms(updates, base))
        else:
            cosine = total_differences(cosine_distances_to_base(updates, base))
            manhattan = total_differences(norms(updates, p=1))
            length = total_differences(norms(updates))
        score = squared_length(torch.stack([cosine, manhattan, length], dim=1))
        if self.parameters.variant == "paper":
            score = score.sqrt()
        accepted = torch.zeros_like(round.accepted)
        accepted[score.argsort(stable=True)[: max(1, int(self.parameters.keep * round.count))]] = True
        scores = {"score": score, "cosine": cosine, "manhattan": manhattan, "length": length}
        return Screening(accepted, scores=scores)


def total_differences(x: Tensor) -> Tensor:
    """(N,) Σⱼ |xᵢ − xⱼ| of x (N,)."""
    return (x[:, None] - x).abs().sum(dim=1)


def squared_length(features: Tensor, tolerance: float = 1e-12) -> Tensor:
    """(N,) tᵀ Σ⁺ t for the rows t of features (N, F), Σ their covariance; always finite, never negative.

    A feature that varies by less than ``tolerance`` of its size, and a direction whose share of the variance
    is below ``tolerance``, are rounding noise and are left out.
    """
    spread = features.std(dim=0)
    varies = spread > tolerance * features.abs().amax(dim=0)
    if not bool(varies.any()):
        return torch.zeros_like(features[:, 0])
    scaled = features[:, varies] / spread[varies]
    covariance = torch.cov(scaled.T).reshape(scaled.shape[1], -1)
    inverse = torch.linalg.pinv(covariance, rtol=tolerance, hermitian=True)
    length: Tensor = ((scaled @ inverse) * scaled).sum(dim=1)
    return length.clamp(min=0.0)
