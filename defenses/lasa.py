"""LASA, layer-adaptive sparsified model aggregation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._layers import tensors, wide_columns
from defenses._statistics import clip_scale, deviations, median
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import norms
from fedsim.layout import Entry
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class LasaParameters(Parameters):
    sparsity: float = parameter(0.3, "share of a client's matrix entries set to zero before it is judged", ge=0, lt=1)
    lambda_n: float = parameter(1.0, "largest deviation of a layer's norm, in standard deviations", gt=0)
    lambda_s: float = parameter(1.0, "largest deviation of a layer's sign purity, in standard deviations", gt=0)
    variant: str = parameter(
        "paper", "average the clipped updates, or as the official code the sparsified ones", choices=("paper", "code")
    )


@register("lasa")
class Lasa(Defense):
    r"""Sparsify the updates; layer by layer average the clients of ordinary norm and sign purity.

    Every update is clipped to the median norm. In a copy the share ``sparsity`` of smallest magnitudes is set to
    zero, pooled over the client's matrices (tensors of 2 or more dimensions; the others stay whole). For
    every tensor l the copy x gives

    .. math:: n_i = \lVert x_i^l \rVert_2, \qquad
              \rho_i = \tfrac12 \Bigl(1 + \frac{\sum_k \operatorname{sign} x_{ik}^l}{\sum_k |\operatorname{sign}
              x_{ik}^l|}\Bigr)

    and a client stays in layer l if |n − median| / σ < λₙ and |ρ − median| / σ < λₛ, σ with divisor N; if
    nobody does, all do. The layer is the unweighted mean over those who stay. (The code's factor 1 − sparsity in
    ρ changes no deviation and is left out; with every entry zero ρ = ½, where the code has NaN.)

    ``variant: paper`` averages the clipped updates and clips to the mean of the two middle norms when N is
    even. ``variant: code`` averages the sparsified copies (in the code both share their memory), keeps one
    entry fewer than asked and clips to the lower middle norm. What the paper says is from memory.

    Looks at the whole vector, each running statistic a layer of its own; without a layout the vector is one
    matrix. Weights are each client's share of all coordinates; the score is the mean over the layers of
    max(deviation of n / λₙ, of ρ / λₛ). Cost: O(N·D) time, a few copies of one row beyond the updates.
    """

    paper = "Xu et al., Achieving Byzantine-Resilient Federated Learning via LASA, WACV 2025, arXiv 2409.01435"
    cost = "O(N D) time, a few copies of one row"
    Parameters = LasaParameters

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        p, rows, layers = self.parameters, round.updates, tensors(round)
        code = p.variant == "code"
        length = norms(rows)
        scale = clip_scale(length, median(length, lower=code))[:, None]
        threshold = self.thresholds(rows, [layer for layer in layers if len(layer.shape) >= 2])[:, None]
        vector = torch.empty_like(rows[0])
        share, score = torch.zeros_like(length), torch.zeros_like(length)
        for layer in layers:
            cut = threshold if len(layer.shape) >= 2 else torch.full_like(threshold, -1.0)
            squares, signs, count = (torch.zeros_like(length) for _ in range(3))
            for block in wide_columns(rows, layer):
                sparse = block * (block.abs() > cut)
                squares += (sparse * scale).square().sum(dim=1)
                signs += sparse.sign().sum(dim=1)
                count += sparse.sign().abs().sum(dim=1)
            size = deviations(squares.sqrt()) / p.lambda_n
            purity = deviations(0.5 * (1 + signs / count.clamp(min=1))) / p.lambda_s
            stays = ((size < 1) & (purity < 1)).double()
            stays = stays if bool(stays.any()) else torch.ones_like(stays)
            weights = stays / stays.sum()
            start = layer.start
            for block in wide_columns(rows, layer):
                averaged = block * (block.abs() > cut) if code else block
                vector[start : start + block.shape[1]] = (weights @ (averaged * scale)).to(vector.dtype)
                start += block.shape[1]
            share += weights * layer.size / rows.shape[1]
            score += torch.maximum(size, purity) / len(layers)
        return Aggregated(vector, share, {"score": score})

    def thresholds(self, rows: Tensor, matrices: list[Entry]) -> Tensor:
        """(N,) float64: entries of a client's matrices stay when their magnitude is above its threshold."""
        total = sum(layer.size for layer in matrices)
        # (1 − sparsity) · total entries stay: the threshold is the next magnitude below them
        kept = int(total * (1 - self.parameters.sparsity)) - (self.parameters.variant == "code")
        if kept >= total or total == 0:
            return torch.full((len(rows),), -1.0, dtype=torch.float64, device=rows.device)
        found = []
        for row in rows:
            sizes = torch.cat([row[layer.start : layer.stop] for layer in matrices]).abs()
            found.append(sizes.kthvalue(total - max(kept, 0)).values)
        return torch.stack(found).to(torch.float64)
