"""SignGuard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._clustering import largest_cluster, mean_shift
from defenses._statistics import clip_scale, cosines, similarities
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import norms, squared_distances
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class SignGuardParameters(Parameters):
    lower: float = parameter(0.1, "smallest norm that passes, in units of the median norm", ge=0, lt=1)
    upper: float = parameter(3.0, "largest norm that passes, in units of the median norm", gt=1)
    fraction: float = parameter(0.1, "share of the coordinates whose signs are counted", gt=0, le=1)
    coordinates: str = parameter(
        "random", "which: drawn one by one, or one contiguous window as in the code", choices=("random", "window")
    )
    similarity: str = parameter(
        "none",
        "further feature: none (SignGuard), cosine (SignGuard-Sim), distance (SignGuard-Dist)",
        choices=("none", "cosine", "distance"),
    )
    scope: str = parameter(
        "trainable", "what is measured: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("signguard")
class SignGuard(Defense):
    r"""Keep the updates of ordinary length whose share of positive, zero and negative signs is most common.

    A client passes if (1) lower · M < ‖Δᵢ‖ < upper · M, M the median norm, and (2) it belongs to the largest
    cluster that mean shift finds in the features: the shares of positive, zero and negative entries on a tenth
    of the coordinates, each divided by its largest value over the clients (+ 10⁻⁸). Of equally large clusters
    the first counts. The updates that pass are clipped to the (lower) median norm of all clients and averaged
    unweighted. If the two filters have nobody in common the model stays.

    ``similarity: cosine`` adds min(max(cᵢ, 0), c̄) / (5 c̄ + 10⁻⁸), c̄ the lower median of the cᵢ = cos(Δᵢ, previous
    aggregate); ``distance`` adds 0.2 if ‖Δᵢ − previous aggregate‖ is 1.1 times its lower median or more. With no
    previous aggregate cᵢ is the lower median of client i's cosines with all clients (its own counts as 0), the
    distance the sum over its ⌊n/2⌋ − 1 nearest. (The code of Sim does without the aggregate for three rounds;
    here only for the first.) Where c̄ ≤ 0 the code's clamp turns upside down: the feature is then 0 for all.

    The paper draws coordinates at random, which is the default; the authors' code, otherwise followed, takes a
    window. Mean shift: bandwidth from all clients (the code: from 50 at random), grid seeds, far points in no
    cluster. A median norm of zero lets zero updates pass. The factor of clipping applies to running statistics,
    too. Scores: the norm, and ``sign``, the distance of a client's features to the mean of the largest cluster.
    The draw comes from the round's stream ``signguard``; ``state["previous"]`` is the previous aggregate.

    Cost: O(N·D) time (``similarity`` O(N²·D) in the first round); the drawn columns (N, fraction · D) and one
    copy of the updates in memory.
    """

    paper = "Xu et al., Byzantine-robust FL through Collaborative Malicious Gradient Filtering, arXiv 2109.05872"
    cost = "O(N D) time, one copy of the updates"
    Parameters = SignGuardParameters

    def draw(self, total: int, source: torch.Generator) -> Tensor:
        """The coordinates, of ``total``, whose signs are counted."""
        count = max(1, int(self.parameters.fraction * total))
        if self.parameters.coordinates == "random":
            return torch.randperm(total, generator=source, device=source.device)[:count]
        start = torch.randint(0, total - count + 1, (1,), generator=source, device=source.device)
        return start + torch.arange(count, device=source.device)

    def features(self, round: RoundUpdates) -> Tensor:
        """(N, 3 or 4) float64: what clients are clustered by."""
        rows = round.seen(self.parameters.scope)
        drawn = rows[:, self.draw(rows.shape[1], round.generator("signguard"))]
        shares = torch.stack([(drawn > 0).sum(dim=1), (drawn == 0).sum(dim=1), (drawn < 0).sum(dim=1)], dim=1)
        shares = shares.to(torch.float64) / drawn.shape[1]
        shares = shares / (shares.amax(dim=0) + 1e-8)
        previous = self.state.get("previous")
        if self.parameters.similarity == "cosine":
            cosine = similarities(rows).median(dim=1).values if previous is None else cosines(rows, previous.to(rows))
            middle = cosine.median()
            near = cosine.clamp(min=0).minimum(middle) / (5 * middle + 1e-8)
            return torch.cat([shares, torch.where(middle > 0, near, torch.zeros_like(near))[:, None]], dim=1)
        if self.parameters.similarity == "distance":
            if previous is None:
                nearest = squared_distances(rows).sqrt().sort(dim=1).values
                distance = nearest[:, : max(1, round.count // 2)].sum(dim=1)
            else:
                distance = norms(rows, -previous.to(rows))
            middle = distance.median()
            far = (distance >= 1.1 * middle) & (distance > 0)
            return torch.cat([shares, 0.2 * far.to(torch.float64)[:, None]], dim=1)
        return shares

    def screen(self, round: RoundUpdates) -> Screening:
        p = self.parameters
        length = norms(round.seen(p.scope))
        middle = length.quantile(0.5)
        ordinary = (length > p.lower * middle) & (length < p.upper * middle) | (length == middle)
        features = self.features(round)
        common = largest_cluster(mean_shift(features))
        sign = (features - features[common].mean(dim=0)).norm(dim=1)
        return Screening(ordinary & common, torch.ones_like(round.weights), {"norm": length, "sign": sign})

    def transform(self, round: RoundUpdates) -> Tensor:
        length = norms(round.seen(self.parameters.scope))
        bound = length.median()  # torch takes the lower of two middle values
        return round.updates * clip_scale(length, bound).to(round.updates.dtype)[:, None]

    def finish(self, vector: Tensor, round: RoundUpdates) -> Tensor:
        if self.parameters.similarity != "none":
            self.state["previous"] = vector[: round.seen(self.parameters.scope).shape[1]].clone()
        return vector
