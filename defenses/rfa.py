"""RFA, robust federated aggregation: the geometric median."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._layers import tensors
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import distances_to_mean
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class RfaParameters(Parameters):
    nu: float = parameter(1e-5, "smoothing: distances below it count as it", gt=0)
    max_iterations: int = parameter(4, "Weiszfeld steps at most", ge=1)
    weighted: bool = parameter(True, "weigh clients by their examples; false: all the same")
    start: str = parameter("mean", "where the steps start: the mean, or zero, no update", choices=("mean", "zero"))
    blocks: str = parameter(
        "vector", "one median of the whole vector, or one of every tensor", choices=("vector", "tensors")
    )
    ftol: float = parameter(1e-6, "stop when the objective changes by less than this share of it; 0: never", ge=0)
    scope: str = parameter(
        "all",
        "what distances are measured on: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("rfa")
class Rfa(Defense):
    r"""Approximate the geometric median of the updates by a few smoothed Weiszfeld steps.

    The objective is g(v) = Σᵢ αᵢ ‖v − Δᵢ‖₂ with αᵢ client i's share of the examples. From the mean v = Σᵢ αᵢ
    Δᵢ,

    .. math:: \beta_i = \frac{\alpha_i}{\max(\nu, \lVert v - \Delta_i \rVert_2)}, \qquad
              v \leftarrow \frac{\sum_i \beta_i \Delta_i}{\sum_i \beta_i}

    until ``max_iterations`` or |g_before − g| < ftol · g (the step that meets it counts). ν = 10⁻⁵, 4 steps
    and ftol = 10⁻⁶ are the defaults of the authors' code, which this follows; 500 steps, as the code of
    Multi-metrics runs it, come near convergence, and the two can differ strongly when the median lies on a
    client. A step divides the pull of a huge update by the number of the others at best: of ten equal clients one
    still moves the result by 1.7 · 10⁻⁵ of its length after four steps. Whole weights give the same model,
    since the rule moves along with a shift — unlike byzfl's, which starts at the zero vector.

    Variants. byzfl's is ``weighted: false, start: zero, nu: 0.1, max_iterations: 3, ftol: 0``. ``blocks: tensors``
    takes the median of each of the model's tensors by itself: a client that is far off in one layer keeps its say in
    the others, and the point is no longer the median of the whole (nobody's published rule, but what per-layer
    aggregation makes of this one). Without a layout the vector is one tensor.

    The reported weights are the last βᵢ / Σβ — with ``tensors`` the share of all coordinates looked at, by which what
    ``scope`` leaves out is averaged — the score each client's distance to the result, and ``state["iterations"]``
    the (most) steps of the last round. Cost: O(steps · N·D) time, O(D) memory beyond the updates.
    """

    paper = "Pillutla et al., Robust Aggregation for Federated Learning, arXiv 1912.13445"
    cost = "O(steps · N D) time, O(D) memory"
    Parameters = RfaParameters

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        p, seen = self.parameters, round.seen(self.parameters.scope).shape[1]
        alpha = round.mean_weights() if p.weighted else torch.full_like(round.weights, 1 / round.count)
        alpha = alpha.double()
        blocks = [(0, seen)]
        if p.blocks == "tensors":
            blocks = [(entry.start, entry.stop) for entry in tensors(round) if entry.stop <= seen] or blocks
        vector = torch.empty_like(round.updates[0])
        share, squared = torch.zeros_like(alpha), torch.zeros_like(alpha)
        self.state["iterations"] = 0
        for start, stop in blocks:
            rows = round.updates[:, start:stop]
            weights, distances = self.weiszfeld(rows, alpha)
            vector[start:stop] = weights.to(rows.dtype) @ rows
            share += weights * (stop - start) / seen
            squared += distances.square()
        vector[seen:] = share.to(vector.dtype) @ round.updates[:, seen:]
        return Aggregated(vector, share, {"distance": squared.sqrt()})

    def weiszfeld(self, rows: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) the weights of the median in the rows (N, D) with shares α (N,), and (N,) the distances to it."""
        p, weights = self.parameters, alpha
        distances = distances_to_mean(rows, alpha if p.start == "mean" else torch.zeros_like(alpha))
        objective = alpha @ distances
        for iteration in range(1, p.max_iterations + 1):
            weights = alpha / distances.clamp(min=p.nu)
            weights = weights / weights.sum()
            distances = distances_to_mean(rows, weights)
            before, objective = objective, alpha @ distances
            self.state["iterations"] = max(iteration, self.state["iterations"])
            if abs(before - objective) < p.ftol * objective:
                break
        return weights, distances
