"""FLAME."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._clustering import hdbscan, largest_cluster
from defenses._statistics import clip_scale
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import cosine_distances, norms, squared_distances
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class FlameParameters(Parameters):
    noise: float = parameter(0.001, "λ: standard deviation of the noise over the clipping bound", ge=0)
    as_points: bool = parameter(False, "cluster the rows of the distance matrix as points, as zhmzm's port does")
    scope: str = parameter(
        "trainable",
        "what is clustered and measured: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("flame")
class Flame(Defense):
    r"""Keep the one dense cluster of model directions, clip to the median norm, average, add noise.

    HDBSCAN (at least ⌊n/2⌋ + 1 clients to a cluster, min_samples 1, one cluster allowed) on the cosine
    distances of whole client models w₀ + Δᵢ finds one cluster; clients outside it are rejected. Then

    .. math:: S = \operatorname{median}_{i \le n} \lVert \Delta_i \rVert_2, \qquad
              \Delta = \frac{1}{L} \sum_{l=1}^{L} \Delta_l \min\left(1, \frac{S}{\lVert \Delta_l \rVert_2}\right)
              + N(0, (\lambda S)^2 I)

    with S over ALL clients, the rejected too, and the mean unweighted over the L accepted ones. λ = 0.001 as in
    the paper's experiments on images.

    No official code exists. Follows the paper, and of the two ports what agrees with it: zhmzm's clips the i-th
    accepted client by the norm of client i (not repeated) and clusters the rows of the distance matrix as points
    (``as_points: true``); 3DFed's clusters the last layer only and returns a sum, so that rejecting shrinks
    the step (not repeated). HDBSCAN is scikit-learn's, with min_samples 2: it counts the point itself.

    The clipping factor applies to running statistics, too; noise goes on the trainable part only, from the
    round's stream ``flame``. Scores: ``cosine``, the median distance to the clients, and the ``norm``.
    ``state["bound"]`` is S. Cost: O(N²·D) time, one copy of the updates and O(N²) in memory.
    """

    paper = "Nguyen et al., FLAME: Taming Backdoors in Federated Learning, arXiv 2101.02281"
    cost = "O(N² D) time, one copy of the updates"
    Parameters = FlameParameters

    def screen(self, round: RoundUpdates) -> Screening:
        rows = round.seen(self.parameters.scope)
        cosine = cosine_distances(rows, round.global_vector[: rows.shape[1]])
        distances = squared_distances(cosine).sqrt() if self.parameters.as_points else cosine
        accepted = largest_cluster(hdbscan(distances, round.count // 2 + 1))
        scores = {"cosine": cosine.quantile(0.5, dim=1), "norm": norms(rows)}
        return Screening(accepted, torch.ones_like(round.weights), scores)

    def transform(self, round: RoundUpdates) -> Tensor:
        length = norms(round.seen(self.parameters.scope))
        bound = length.quantile(0.5)
        self.state["bound"] = float(bound)
        return round.updates * clip_scale(length, bound).to(round.updates.dtype)[:, None]

    def finish(self, vector: Tensor, round: RoundUpdates) -> Tensor:
        sigma = self.parameters.noise * self.state.get("bound", 0.0)
        if sigma == 0:
            return vector
        source = round.generator("flame")
        noise = torch.randn(round.trainable, generator=source, dtype=torch.float64, device=vector.device)
        noisy = vector.clone()
        noisy[: round.trainable] += (sigma * noise).to(vector.dtype)
        return noisy
