"""RLR, robust learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from defenses.trimmed_mean import mean_of_ranks
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import columns
from fedsim.errors import Problem
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class RlrParameters(Parameters):
    theta: int | None = parameter(None, "threshold θ on |Σ signs|; 0: off; null: the share of the clients below", ge=0)
    share: float = parameter(0.4, "θ as a share of the clients, rounded up", ge=0, le=1)
    rule: str = parameter(
        "mean", "what is turned round: mean by examples, lower median, sign", choices=("mean", "median", "sign")
    )


@register("rlr")
class Rlr(Defense):
    r"""Turn the step round in every coordinate where too few clients agree on its sign.

    With A(Δ) the aggregate,

    .. math:: \Delta_k = \begin{cases} +A_k & |\sum_i \operatorname{sgn} \Delta_{ik}| \ge \theta \\
              -A_k & \text{otherwise} \end{cases}

    A zero entry has sign 0. A is the mean weighted by examples, the lower median of two middle values, or sgn
    Σᵢ sgn Δᵢ — then one step of size 1, so that the server's learning rate is the size. The last two are
    unweighted. Follows the authors' code; its threshold is 0 (off) by default and its scripts set 4 of 10
    clients and 8 of 20, hence the share 0.4 here.

    Only trainable coordinates are turned round: a running variance must not become negative. Running
    statistics are averaged (under ``median``: their median). The score ``against`` is the share of the trainable
    coordinates in which a client's sign is opposite to that of Σᵢ sgn Δᵢ. Cost: O(N·D) time (``median``:
    O(D·N·log N)), O(D) memory beyond the updates: coordinates are worked on in blocks.
    """

    paper = (
        "Ozdayi et al., Defending against Backdoors in Federated Learning with Robust Learning Rate, arXiv 2007.03767"
    )
    cost = "O(N D) time (rule median: O(D N log N)), O(D) memory"
    Parameters = RlrParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return max(1, parameters.theta or 0)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n = experiment.federation.clients_per_round
        if parameters.theta is None or parameters.theta <= n:
            return []
        message = f"{n} clients a round never reach |sum of signs| >= {parameters.theta}: every step would be reversed"
        return [Problem("theta", f"{message}; use at most {n}, or null")]

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        p, n, updates = self.parameters, round.count, round.updates
        threshold = math.ceil(p.share * n - 1e-9) if p.theta is None else p.theta
        weights = round.mean_weights() if p.rule == "mean" else torch.full_like(round.weights, 1 / n)
        if p.rule == "median":
            made = mean_of_ranks(updates, (n - 1) // 2, (n - 1) // 2)
            vector, weights = made.vector, made.weights
        else:
            vector = weights @ updates
        against = torch.zeros(n, dtype=torch.int64, device=updates.device)
        steps = vector[None, : round.trainable]
        for block, out in zip(columns(round.seen("trainable")), columns(steps), strict=True):
            signs = block.sign()
            total = signs.sum(dim=0)
            against += (signs * total < 0).sum(dim=1)
            if p.rule == "sign":
                out[0] = total.sign()
            out[0] = torch.where(total.abs() >= threshold, out[0], -out[0])
        return Aggregated(vector, weights, {"against": against.to(torch.float64) / max(1, round.trainable)})
