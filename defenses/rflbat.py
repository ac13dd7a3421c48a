"""RFLBAT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._clustering import compact, count_clusters, kmeans, seed_of
from defenses._statistics import median
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import cosine_distances, norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class RflbatParameters(Parameters):
    eps1: float = parameter(10.0, "first cut: keep sums of distances below eps1 medians", ge=1)
    eps2: float = parameter(4.0, "second cut, inside the chosen cluster: below eps2 medians", ge=1)
    clusters: int | None = parameter(None, "k of k-means; null: chosen by the gap statistic", ge=1)
    max_clusters: int = parameter(9, "largest k the gap statistic tries", ge=1)
    references: int = parameter(10, "uniform reference sets of the gap statistic", ge=1)
    scope: str = parameter(
        "all", "what is looked at: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("rflbat")
class Rflbat(Defense):
    r"""Project the updates on two principal axes, cut outliers, keep the cluster of least alike updates.

    With zᵢ ∈ ℝ² the centred updates on their first two principal axes and sᵢ = Σⱼ ‖zᵢ − zⱼ‖₂:

    1. keep the clients with sᵢ < ε₁ · median(s);
    2. group their zᵢ by k-means, k from the gap statistic;
    3. keep the group with the lowest median, over its members, of the mean cosine of a member's whole update
       to its group's (itself included; alone in a group: 1) — colluders are taken to be more alike;
    4. in it keep sᵢ < ε₂ · median(s), s now summed inside the group.

    The rest is averaged by examples. No authors' code is known; steps and ε follow the port in the code of
    3DFed. That port's gap statistic measures all distances from the first member of a group, so its k is
    chance on most data: here it is the standard one (its k can be given as ``clusters``). The port
    returns a sum, scaled by its caller, and looks at the last layers only on big models; here the whole vector
    or ``scope``. Equality passes a cut, so that equal updates are kept. The scores are the sum of distances
    of step 1 and the mean cosine of step 3 (1 for clients cut before).

    Cost: O(N²·D) time, O(N²) memory beyond the updates; the axes come from a QR decomposition by blocks.
    """

    paper = "Wang et al., RFLBAT: A Robust Federated Learning Algorithm against Backdoor Attack, arXiv 2201.03772"
    cost = "O(N² D) time, O(N²) memory"
    Parameters = RflbatParameters

    def screen(self, round: RoundUpdates) -> Screening:
        p, rows = self.parameters, round.seen(self.parameters.scope)
        points = principal_plane(rows)
        total = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
        alive = torch.nonzero(total <= p.eps1 * median(total)).squeeze(1)
        labels = self.groups(points[alive], round).to(alive.device)
        cosine = 1 - cosine_distances(rows)[alive][:, alive]
        same = labels[:, None] == labels
        alike = (cosine * same).sum(dim=1) / same.sum(dim=1)
        chosen = alive[labels == min(set(labels.tolist()), key=lambda label: float(median(alike[labels == label])))]
        inner = torch.cdist(points[chosen], points[chosen], compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
        accepted = torch.zeros_like(round.accepted)
        accepted[chosen[inner <= p.eps2 * median(inner)]] = True
        alikeness = torch.ones_like(total)
        alikeness[alive] = alike
        return Screening(accepted, scores={"distance": total, "alikeness": alikeness})

    def groups(self, points: Tensor, round: RoundUpdates) -> Tensor:
        """The group (n,) of each of the points (n, 2)."""
        p, data = self.parameters, points.cpu().numpy()
        seed = seed_of(round.generator("rflbat"))
        k = p.clusters or count_clusters(data, most=p.max_clusters, references=p.references, seed=seed)
        labels, _ = kmeans(data, min(k, len(data)), seed=seed)
        return torch.from_numpy(labels).long()


def principal_plane(rows: Tensor) -> Tensor:
    """(N, 2) float64: the centred rows on their first two principal axes, each with its largest entry positive.

    Below rounding noise of the rows a coordinate is zero.
    """
    left, sizes, _ = torch.linalg.svd(compact(rows, center=True), full_matrices=False)
    sizes = torch.where(sizes > 1e-12 * norms(rows).amax(), sizes, torch.zeros_like(sizes))
    points = torch.zeros(rows.shape[0], 2, dtype=torch.float64, device=rows.device)
    count = min(2, sizes.shape[0])
    points[:, :count] = left[:, :count] * sizes[:count]
    largest = points.gather(0, points.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -points, points)
