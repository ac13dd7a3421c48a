"""Federated averaging: no defense at all."""

from __future__ import annotations

from fedsim.defense import Defense
from fedsim.plugins import register


@register("fedavg")
class FedAvg(Defense):
    r"""The mean of the updates by examples, Σᵢ nᵢ Δᵢ / Σᵢ nᵢ: no defense, written out.

    Every pipeline without an aggregation rule ends with this mean, so the stage changes nothing: it is there
    for a benchmark's table to name its baseline. nᵢ are the examples that clients report, or all equal where
    the federation weighs uniformly. Whole weights give the same model.

    Takes the whole vector: running statistics are averaged like weights. Cost: O(N·D) time, no copy.
    """

    paper = "McMahan et al., Communication-Efficient Learning of Deep Networks, arXiv 1602.05629"
    cost = "O(N D) time, no copy"
