"""FLTrust."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._statistics import cosines
from fedsim.defense import Aggregated, Defense, RoundUpdates, Server, require
from fedsim.distances import columns, norms
from fedsim.errors import RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class FltrustParameters(Parameters):
    scope: str = parameter(
        "trainable",
        "what is compared and rescaled: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("fltrust")
class Fltrust(Defense):
    r"""Trust clients as far as they agree with an update that the server trains on data of its own.

    The server trains the global model on ``server_data`` (the root data) as honest clients do, which gives Δ₀. With

    .. math:: s_i = \max(0, \cos(\Delta_i, \Delta_0)), \qquad
              \Delta = \frac{1}{\sum_j s_j} \sum_i s_i \frac{\lVert \Delta_0 \rVert}{\lVert \Delta_i \rVert} \Delta_i

    every update gets the server's length, short ones too. Numbers of examples play no part. If nobody is trusted,
    or Δ₀ is zero, the model stays; a zero update is not trusted. The paper takes 100 clean examples.

    The ports of the official (MXNet) code agree on the rule and differ in which part of the vector it sees.
    By default that is the trainable part; running statistics are averaged by trust, not rescaled (that can make
    a variance negative). 10⁻⁹ in denominators of one port is not repeated.

    The score is 1 − cos(Δᵢ, Δ₀), in [0, 2]; 1 and more is rejected. Shuffling: the server's stream ``fltrust``.
    Cost: one client's training; O(N·D) time and a few blocks of columns.
    """

    paper = "Cao et al., FLTrust: Byzantine-robust FL via Trust Bootstrapping, NDSS 2021, arXiv 2012.13995"
    cost = "one client's training, O(N D) time"
    Parameters = FltrustParameters
    needs_network = True
    needs_data = True

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        rows = round.seen(self.parameters.scope)
        root = root_update(round.global_vector, require(self, round.server))[: rows.shape[1]]
        cosine = cosines(rows, root)
        shares, factors = trust(cosine, norms(rows), norms(root[None]))
        rest = round.updates[:, rows.shape[1] :]
        vector = torch.cat([combine(factors, rows), combine(shares, rest)])
        return Aggregated(vector, shares.to(vector.dtype), {"distance": 1 - cosine})


def root_update(vector: Tensor, server: Server) -> Tensor:
    """Δ₀ (D,): what honest training on the server's data makes of the model ``vector`` (D,).

    Raises
    ------
    RunError: that training diverges.
    """
    assert server.epoch is not None
    server.model.load(vector)
    batches = server.epoch(server.settings.batch_size, server.generator("fltrust"))
    server.fit(server.model, batches, server.loss, server.settings)
    update = server.model.vector - vector
    if not bool(torch.isfinite(update).all()):
        raise RunError("the defense 'fltrust': training on the server's data diverges; lower training.lr")
    return update


def trust(cosine: Tensor, length: Tensor, root_length: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) shares that sum to 1, or are all 0, and (N,) factors of the updates: share · ‖Δ₀‖ / ‖Δᵢ‖.

    cosine: (N,) of every update with Δ₀. length: (N,) of the updates. root_length: (1,) of Δ₀.
    """
    score = cosine.clamp(min=0)
    shares = score / score.sum() if bool(score.sum() > 0) else torch.zeros_like(score)
    return shares, torch.where(length > 0, shares * root_length / length, torch.zeros_like(shares))


def combine(factors: Tensor, rows: Tensor) -> Tensor:
    """(D,) Σ factorᵢ · xᵢ in the rows' precision, summed in float64. rows: (N, D)."""
    return torch.cat([(factors @ block.to(torch.float64)).to(rows.dtype) for block in columns(rows)])
