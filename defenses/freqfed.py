"""FreqFed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defenses._clustering import hdbscan, largest_cluster
from defenses._layers import tensors
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import cosine_distances
from fedsim.plugins import Parameters, parameter, register

CHUNK = 2**22
"""Numbers transformed at a time."""


@dataclass(frozen=True)
class FreqfedParameters(Parameters):
    low: float = parameter(0.5, "frequencies (i, j) of an R × C matrix stay if i/R + j/C is at most this", gt=0, le=2)
    min_cluster_size: int | None = parameter(None, "smallest cluster of HDBSCAN; null: a majority, ⌊N/2⌋ + 1", ge=2)
    of: str = parameter(
        "weights", "what is transformed: the clients' whole weights or their updates", choices=("weights", "updates")
    )
    scope: str = parameter(
        "trainable", "what is looked at: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("freqfed")
class Freqfed(Defense):
    r"""Compare the low frequencies of the clients' weights; keep the largest cluster.

    Every tensor of client i's model, as a matrix W (R, C) of its first dimension against the rest, goes through the
    orthonormal two-dimensional cosine transform (DCT-II),

    .. math:: V_{ij} = c_i c_j \sum_{r, c} W_{rc} \cos\frac{\pi (2r + 1) i}{2R} \cos\frac{\pi (2c + 1) j}{2C}

    with c₀² = 1 / length and c² = 2 / length else. The low frequencies, i/R + j/C ≤ ``low``, of all
    tensors in a row are the client's feature. HDBSCAN groups the features by cosine distance, the
    largest cluster (of equal ones the first) is averaged by examples, the rest rejected. The score is the mean
    distance to the members of that cluster.

    No code of the authors is known. That the DCT is of the weights, that low frequencies are clustered
    by cosine distance and that the largest cluster wins stands in the abstract and descriptions; the triangle of
    frequencies (i + j ≤ half the length of a square matrix) is from memory. The settings of HDBSCAN are not known
    to us: as in FLAME, of the same group, a cluster must hold a majority, min_samples is 1 (2 as scikit-learn counts)
    and a single cluster is allowed. Where all is noise, nobody can be told apart and everybody stays.

    Without a layout the vector is one tensor. Cost: O(N·D·log D + N²·L) time for L features of a client (an
    eighth of a matrix, half a vector), 8·N·L bytes beyond the updates. At least 3 clients.
    """

    paper = "Fereidooni et al., FreqFed: A Frequency Analysis-Based Approach, NDSS 2024, arXiv 2312.04432"
    cost = "O(N D log D + N² L) time, 8 N L bytes for L low frequencies"
    Parameters = FreqfedParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return max(3, parameters.min_cluster_size or 0)

    def screen(self, round: RoundUpdates) -> Screening:
        distances = cosine_distances(self.features(round))
        accepted = largest_cluster(hdbscan(distances, self.parameters.min_cluster_size or round.count // 2 + 1))
        if not bool(accepted.any()):
            accepted = torch.ones_like(round.accepted)
        return Screening(accepted, scores={"score": distances[:, accepted].mean(dim=1)})

    def features(self, round: RoundUpdates) -> Tensor:
        """(N, L) float64: the low frequencies."""
        parts, end = [], round.updates.shape[1] if self.parameters.scope == "all" else round.trainable
        for entry in tensors(round):
            if entry.start >= end:
                continue
            stop = min(entry.stop, end)
            shape = (entry.shape[0], -1) if len(entry.shape) > 1 else (1, -1)
            rows = round.updates[:, entry.start : stop]
            base = round.global_vector[entry.start : stop].double()
            pieces = []
            for chunk in torch.split(rows, max(1, CHUNK // rows.shape[1])):
                wide = chunk.double() + base if self.parameters.of == "weights" else chunk.double()
                matrix = wide.reshape(len(chunk), *shape)
                spectrum = cosine_transform(cosine_transform(matrix).transpose(1, 2)).transpose(1, 2)
                height, width = spectrum.shape[1:]
                across = torch.arange(width, device=rows.device, dtype=torch.float64) / width
                down = torch.arange(height, device=rows.device, dtype=torch.float64) / height
                pieces.append(spectrum[:, down[:, None] + across <= self.parameters.low])
            parts.append(torch.cat(pieces))
        return torch.cat(parts, dim=1)


def cosine_transform(x: Tensor) -> Tensor:
    """The orthonormal DCT-II along the last dimension, by one complex FFT of the same length."""
    n = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    angle = torch.arange(n, dtype=x.dtype, device=x.device) * (math.pi / (2 * n))
    spectrum = torch.fft.fft(folded)
    result: Tensor = (spectrum.real * angle.cos() + spectrum.imag * angle.sin()) * math.sqrt(2 / n)
    result[..., 0] *= math.sqrt(0.5)
    return result
