"""Local differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.defense import Defense, HonestContext
from fedsim.distances import norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class LocalDpParameters(Parameters):
    bound: float = parameter(2.0, "largest L2 norm S of the trainable part of an update", gt=0)
    sigma: float = parameter(0.001, "noise multiplier σ: each coordinate gets noise of deviation σ·S", ge=0)


@register("local_dp")
class LocalDp(Defense):
    r"""Honest clients clip their update and add Gaussian noise before they send it.

    .. math:: \tilde\Delta_i = \Delta_i \min\left(1, \frac{S}{\lVert \Delta_i \rVert_2}\right) + N(0, (\sigma S)^2 I)

    on the trainable part (T,) alone: a noisy running variance could fall below zero, so running statistics are
    sent as they are, neither clipped nor noised (and with batch norm nothing is private of them). Draws come
    from the client's stream of the round. Malicious clients do not obey, as in the study the method is from.

    Two updates of norm S differ by at most 2S, so a round is (ε, δ)-private for one client's whole data set with
    ε = 2 √(2 ln(1.25/δ)) / σ, where that is at most 1: a real guarantee needs σ ≥ 9.7 at δ = 10⁻⁵, which the
    noise of D coordinates makes useless for a large model. The default is noise against backdoors, not privacy.

    Naseri et al. study local privacy as a defense against backdoors; clip-and-noise of what a client sends, before
    the aggregation, is Wei et al.'s (arXiv 1911.00222), who clip whole weights where we clip the update.

    Cost: O(D) time and memory a client and round. No scores.
    """

    paper = "Naseri et al., Local and Central Differential Privacy for Robustness and Privacy in FL, arXiv 2009.03561"
    cost = "clients: O(D) time and memory a round"
    Parameters = LocalDpParameters

    def client_update(self, update: Tensor, context: HonestContext) -> Tensor:
        trainable, bound = context.model.layout.trainable, self.parameters.bound
        scale = (bound / norms(update[None, :trainable])).clamp(max=1.0).to(update.dtype)
        noise = torch.randn(trainable, generator=context.generator, dtype=torch.float64).to(update)
        sent = update.clone()
        sent[:trainable] = update[:trainable] * scale + self.parameters.sigma * bound * noise
        return sent
