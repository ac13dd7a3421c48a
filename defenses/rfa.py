"""RFA, robust federated aggregation: the geometric median."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import distances_to_mean
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class RfaParameters(Parameters):
    nu: float = parameter(1e-5, "smoothing: distances below it count as it", gt=0)
    max_iterations: int = parameter(4, "Weiszfeld steps at most", ge=1)
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
    client. Whole weights give the same model, since the rule moves along with a shift — unlike byzfl's, which
    starts at the zero vector.

    The reported weights are the last βᵢ / Σβ, the score each client's distance to the result, and
    ``state["iterations"]`` the steps of the last round. Cost: O(steps · N·D) time, O(D) memory beyond the
    updates.
    """

    paper = "Pillutla et al., Robust Aggregation for Federated Learning, arXiv 1912.13445"
    Parameters = RfaParameters

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        p = self.parameters
        rows = round.seen(p.scope)
        alpha = round.mean_weights().double()
        weights, distances = alpha, distances_to_mean(rows, alpha)
        objective = alpha @ distances
        for iteration in range(1, p.max_iterations + 1):
            weights = alpha / distances.clamp(min=p.nu)
            weights = weights / weights.sum()
            distances = distances_to_mean(rows, weights)
            before, objective = objective, alpha @ distances
            self.state["iterations"] = iteration
            if abs(before - objective) < p.ftol * objective:
                break
        return Aggregated(weights.to(rows.dtype) @ round.updates, weights, {"distance": distances})
