"""SparseFed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from defenses._statistics import clip_scale
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class SparseFedParameters(Parameters):
    k: int | None = parameter(None, "coordinates the server changes a round; null: the share below", ge=1)
    share: float = parameter(0.01, "k as a share of the trainable coordinates", gt=0, le=1)
    momentum: float = parameter(0.9, "server momentum ρ", ge=0, lt=1)
    bound: float | None = parameter(2.0, "largest L2 norm an update may have; null: any", gt=0)


@register("sparsefed")
class SparseFed(Defense):
    r"""Clip the updates, then change only the k coordinates with the largest accumulated mean.

    With g the unweighted mean of the updates, each clipped to the L2 norm ``bound``, momentum V and error E
    (both zero at first),

    .. math:: V \leftarrow \rho V + g, \qquad E \leftarrow E + V, \qquad \Delta = \operatorname{top}_k(E)

    where topₖ keeps the k entries of largest magnitude; E and V then become zero on the coordinates that were
    changed, and the rest waits in E for a later round. The server's learning rate multiplies Δ afterwards, as
    in the authors' code, which this follows. (The LASA port forgets momentum and error in every call and does
    not clip: ``momentum: 0`` and ``bound: null``, in the first round.) k, ρ and the bound are settings of the
    experiment in the paper; the defaults are ours. With ρ the steps add up to 1 / (1 − ρ) times the mean.

    Norm, momentum, error and topₖ look at the trainable part; running statistics are averaged every round, with
    each client's clipping factor. The reported weights are 1/n, the score is the norm. ``state``: ``momentum``
    and ``error``. Cost: O(N·D) time, O(D) memory beyond the updates.
    """

    paper = "Panda et al., SparseFed: Mitigating Model Poisoning Attacks with Sparsification, arXiv 2112.06274"
    cost = "O(N D) time, O(D) memory"
    Parameters = SparseFedParameters

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        p, updates, size = self.parameters, round.updates, round.trainable
        length = norms(round.seen("trainable"))
        scale = torch.ones_like(length) if p.bound is None else clip_scale(length, p.bound)
        vector = (scale / round.count).to(updates.dtype) @ updates
        momentum = p.momentum * self.state["momentum"].to(vector) if "momentum" in self.state else 0
        momentum = momentum + vector[:size]
        error = self.state["error"].to(vector) + momentum if "error" in self.state else momentum.clone()
        top = error.abs().topk(min(size, p.k or max(1, int(p.share * size)))).indices
        vector[:size] = 0
        vector[top] = error[top]
        momentum[top] = error[top] = 0
        self.state["momentum"], self.state["error"] = momentum, error
        return Aggregated(vector, torch.full_like(length, 1 / round.count), {"norm": length})
