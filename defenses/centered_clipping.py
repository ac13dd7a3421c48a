"""Centered clipping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._statistics import clip_scale, median
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class CenteredClippingParameters(Parameters):
    tau: float | None = parameter(
        None, "radius τ: how far from the centre an update may pull; null: the median of all distances to it", gt=0
    )
    inner_steps: int = parameter(1, "steps L towards the result in a round", ge=1)
    momentum: float = parameter(0.0, "β: average each client's updates over the rounds; 0: not", ge=0, lt=1)


@register("centered_clipping")
class CenteredClipping(Defense):
    r"""Move the previous aggregate by the mean of the clients' differences to it, each clipped to a ball.

    From the previous round's output v (zero at first), ``inner_steps`` times,

    .. math:: v \leftarrow v + \frac{1}{n} \sum_{i=1}^{n} (\Delta_i - v)
              \min\left(1, \frac{\tau}{\lVert \Delta_i - v \rVert_2}\right)

    **τ has the unit of an update.** The authors give it for the gradients of single batches: in their code workers
    send mᵢ ← β mᵢ + gᵢ, and τ is 10 without momentum and 10 / (1 − β) with it. The update of a client that trained for
    many steps at some learning rate has another length, so no such number carries over (at 10 hardly an update of
    a small network is clipped, and a boosted backdoor stays), and the default is ours: ``tau: null`` takes the median
    of the distances ‖Δᵢ − v‖ anew in every step, the lower of two middle ones. Half of the clients are then clipped,
    and the rule does not depend on the updates' unit.

    As in byzfl and FLPoison, whose results are those with a given τ, rows are updates by default. ``momentum`` keeps
    mᵢ ← β mᵢ + (1 − β) Δᵢ for the clients, starting from the first update, at the price of a vector for
    every client met; mᵢ is as long as an update, so τ stays what it is. Unlike in these codes an update that equals
    the centre is no division by zero. Unweighted: examples play no part.

    Looks at the trainable part only. A centre kept from an earlier round could make a running variance
    negative, so running statistics are averaged with the reported weights, the clipping factors over their
    sum. The score is the distance to the centre of the last step. ``state``: ``centre`` and, with momentum,
    ``momentum`` by client.

    Cost: O(inner_steps · N·D) time; O(D) memory beyond the updates, with momentum a copy of them more.
    """

    paper = "Karimireddy et al., Learning from History for Byzantine Robust Optimization, arXiv 2012.10333"
    cost = "O(steps · N D) time, O(D) memory (momentum: a vector for every client met)"
    Parameters = CenteredClippingParameters

    def rows(self, round: RoundUpdates) -> Tensor:
        """(N, T) what the clients send: their updates, or the momentum kept for them."""
        rows, beta = round.seen("trainable"), self.parameters.momentum
        if beta == 0:
            return rows
        kept = self.state.setdefault("momentum", {})
        for client, row in zip(map(str, round.clients), rows, strict=True):
            kept[client] = beta * kept[client].to(row) + (1 - beta) * row if client in kept else row.clone()
        return torch.stack([kept[str(client)] for client in round.clients])

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        rows, tau = self.rows(round), self.parameters.tau
        centre = self.state.get("centre", torch.zeros_like(rows[0])).to(rows)
        for _ in range(self.parameters.inner_steps):
            distance = norms(rows, -centre)
            scale = clip_scale(distance, median(distance, lower=True) if tau is None else tau)
            share = (scale / round.count).to(rows.dtype)
            centre = centre + (share @ rows - share.sum() * centre)
        self.state["centre"] = centre.clone()
        weights = scale / scale.sum()
        statistics = weights.to(rows.dtype) @ round.updates[:, round.trainable :]
        return Aggregated(torch.cat([centre, statistics]), weights, {"distance": distance})
