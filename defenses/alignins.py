"""AlignIns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._statistics import clip_scale, cosines, deviations, median
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import columns, norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class AligninsParameters(Parameters):
    top: float = parameter(0.3, "share of a client's largest coordinates whose signs are compared", gt=0, le=1)
    lambda_s: float = parameter(1.0, "largest deviation of the sign alignment, in standard deviations", gt=0)
    lambda_c: float = parameter(1.0, "largest deviation of the cosine, in standard deviations", gt=0)
    lower: bool = parameter(False, "clip to the lower middle norm of an even number, as the official code")
    scope: str = parameter(
        "all", "what is measured and clipped: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("alignins")
class Alignins(Defense):
    r"""Keep the clients whose update points as the others' do, by cosine and by sign; clip and average.

    Temporal direction alignment TDA(i) = cos(Δᵢ, w₀) with w₀ the global model. Masked principal sign
    alignment MPSA(i): among the ⌊top · D⌋ coordinates of largest \|Δᵢ\| the share whose sign is the principal
    one, sign(Σⱼ sign Δⱼ) — 0 in a tie, which only a zero entry matches. A client stays if

    .. math:: \frac{|x_i - \operatorname{median}(x)|}{\sigma(x)} < \lambda

    for both, σ with divisor N. Those who stay are clipped to the median of their norms and averaged by
    examples. If nobody stays the model does. (A measure on which nobody differs has deviation 0; the official code
    divides by zero there and rejects everyone. A zero update has TDA 0.)

    Follows the authors' code, which looks at running statistics too (``scope: all``); it clips to the lower
    of two middle norms (``lower``). The score is max(deviation of TDA / λ_c, of MPSA / λ_s); 1 and more is rejected.

    Of fewer than 3 clients all stay: of two, both are exactly one standard deviation from the median. Cost:
    O(N·D·log D) time, one copy of the updates and a few of one row.
    """

    paper = "Xu et al., Detecting Backdoor Attacks in FL via Direction Alignment Inspection, arXiv 2503.07978"
    cost = "O(N D log D) time, one copy of the updates"
    Parameters = AligninsParameters

    def screen(self, round: RoundUpdates) -> Screening:
        p, rows = self.parameters, round.seen(self.parameters.scope)
        tda = cosines(rows, round.global_vector[: rows.shape[1]])
        mpsa = self.sign_alignment(rows)
        deviation = torch.maximum(deviations(tda) / p.lambda_c, deviations(mpsa) / p.lambda_s)
        return Screening(deviation < 1, scores={"score": deviation, "tda": -tda, "mpsa": -mpsa})

    def sign_alignment(self, rows: Tensor) -> Tensor:
        """(N,) float64: MPSA."""
        principal = torch.empty_like(rows[0])
        for block, out in zip(columns(rows), columns(principal[None]), strict=True):
            out[0] = block.sign().sum(dim=0).sign()
        count = max(1, int(self.parameters.top * rows.shape[1]))
        shares = []
        for row in rows:
            largest = row.abs().topk(count, sorted=False).indices
            shares.append((row[largest].sign() == principal[largest]).double().mean())
        return torch.stack(shares)

    def transform(self, round: RoundUpdates) -> Tensor:
        if not bool(round.accepted.any()):
            return round.updates
        length = norms(round.seen(self.parameters.scope))
        bound = median(length[round.accepted], lower=self.parameters.lower)
        clipped = round.updates.clone()
        seen = clipped if self.parameters.scope == "all" else clipped[:, : round.trainable]
        seen *= clip_scale(length, bound).to(seen.dtype)[:, None]
        return clipped
