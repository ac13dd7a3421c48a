"""Multi-Krum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from defenses.krum import Krum, KrumParameters
from fedsim.defense import RoundUpdates, Screening
from fedsim.errors import Problem
from fedsim.plugins import parameter, register


@dataclass(frozen=True)
class MultiKrumParameters(KrumParameters):
    m: int | None = parameter(None, "clients to keep; null: n − f (around_winner: n − f − 1)", ge=1)
    select: str = parameter(
        "lowest",
        "keep the m lowest scores, or the winner of Krum and its m − 1 nearest",
        choices=("lowest", "around_winner"),
    )
    weighted: bool = parameter(True, "weigh the kept clients by their examples; false: all the same")


@register("multi_krum")
class MultiKrum(Krum):
    r"""Average the m updates with the lowest Krum scores.

    Scores are Krum's, s(i) = Σ_{j∈Nᵢ} ‖Δᵢ − Δⱼ‖² over the n − f − 2 nearest others, computed once; the m
    lowest are kept (of equal scores the first clients) and averaged by examples. The iterative variant — pick
    one, remove it, score again — is a different rule.

    m: default n − f, as in the code of *Attack of the Tails* and byzfl; flwr asks for it. f: as in Krum.
    ``weighted``: flwr and *Attack of the Tails* weigh by examples, byzfl does not. (The copy in the code of
    Multi-metrics keeps 9 rows whatever n is; not repeated.)

    ``select: around_winner`` is what the official server of Anticipate does: the winner of Krum and the m − 1
    clients nearest to it, by default its own n − f − 2 neighbours. With ``distance: plain``, ``weighted:
    false`` and f = ⌊n/2⌋ it is that server's rule.

    Cost: O(N²·D) time, O(N²) memory beyond the updates.
    """

    paper = "Blanchard et al., Byzantine-Tolerant Machine Learning, NeurIPS 2017, arXiv 1703.02757"
    cost = "O(N² D) time, O(N²) memory"
    Parameters = MultiKrumParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return max(super().required_clients(parameters), parameters.m or 0)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n = experiment.federation.clients_per_round
        found = super().problems(parameters, experiment)
        if parameters.m is not None and parameters.m > n:
            found.append(Problem("m", f"cannot keep {parameters.m} of {n} clients a round; use at most {n}, or null"))
        return found

    def screen(self, round: RoundUpdates) -> Screening:
        scores, distances = self.measure(round)
        spare = round.count - self.tolerated(round.count)
        if self.parameters.select == "lowest":
            order, m = scores.argsort(stable=True), self.parameters.m or spare
        else:
            order, m = distances[scores.argmin()].argsort(stable=True), self.parameters.m or spare - 1
        accepted = torch.zeros_like(round.accepted)
        accepted[order[:m]] = True
        weights = None if self.parameters.weighted else torch.ones_like(round.weights)
        return Screening(accepted, weights, {"score": scores})
