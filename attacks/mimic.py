"""Mimic: all colluders send what one benign client sends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks._deviation import Colluding
from fedsim.attack import CoordinationKnowledge
from fedsim.distances import columns
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class MimicParameters(Parameters):
    choose: str = parameter(
        "variance",
        "who is copied: the furthest along the direction of largest variance, or the first of the round",
        choices=("variance", "first"),
    )


@register("mimic")
class Mimic(Colluding):
    """All colluders copy one benign client's update, which gives that client's data more weight than its own.

    No outlier is sent, so a defense finds nothing; where data differ, the others are under-represented. As in
    the paper, z is the direction of largest variance, ``argmax zᵀ Σᵢ (xᵢ − μ)(xᵢ − μ)ᵀ z`` over unit vectors, and
    copied is the client with the largest ``|⟨z, xᵢ⟩|``; the authors' code leaves the absolute value out.

    Not followed: the paper accumulates z over its first rounds and keeps to one client afterwards. Here the
    clients differ from round to round and colluders keep nothing at the server's door: z and the client are
    this round's. ``first`` copies the first benign client of the round, the same one in every round if all take
    part. Among clients alike in every way the first is copied; in a round without benign ones, a colluder.

    Cost: honest training; at the server O(M² D) for M benign updates, through the M × M matrix of inner products.
    """

    paper = "Karimireddy, He, Jaggi: Byzantine-Robust Learning … via Bucketing, ICLR 2022, arXiv 2006.09365"
    cost = "an honest round; at the server O(M² D) time for M benign updates"
    Parameters = MimicParameters

    def make(self, honest: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        return honest[0 if self.parameters.choose == "first" else self._furthest(honest)]

    @staticmethod
    def _furthest(honest: Tensor) -> int:
        """argmaxᵢ |⟨z, xᵢ⟩|; z = Σⱼ uⱼ (xⱼ − μ) up to length, u the first eigenvector of the centred Gram matrix."""
        gram = torch.zeros((len(honest), len(honest)), dtype=torch.float64, device=honest.device)
        onto = torch.zeros_like(gram)
        for block in columns(honest):
            wide = block.to(torch.float64)
            centred = wide - wide.mean(dim=0)
            gram += centred @ centred.T
            onto += wide @ centred.T
        first = torch.linalg.eigh(gram.cpu()).eigenvectors[:, -1]
        return int((onto.cpu() @ first).abs().argmax())
