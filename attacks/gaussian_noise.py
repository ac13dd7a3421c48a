"""Gaussian noise: random numbers instead of an update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attack import Attack, AttackContext
from fedsim.batch import Batch
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class GaussianNoiseParameters(Parameters):
    std: float = parameter(200.0, "standard deviation σ of each number", gt=0)
    add: bool = parameter(False, "add the noise to the honest update instead of sending it alone")


@register("gaussian_noise")
class GaussianNoise(Attack):
    """Each attacker sends noise drawn from N(0, σ²), a fresh draw for every weight, client and round.

    σ = 200 is the paper's; it wrecks a mean in one round and no robust rule overlooks it. With ``add`` the noise
    comes on top of the honest update; a σ of the size of an update's entries then makes a quiet attacker.

    Only trainable weights are noise: running statistics, which the paper's gradients do not hold, are sent as
    honestly trained, since a running variance of noise would make the model useless however small its share.

    Cost: honest training, which without ``add`` serves the running statistics only.
    """

    paper = "Blanchard, El Mhamdi, Guerraoui, Stainer: Krum, NeurIPS 2017, arXiv 1703.02757"
    cost = "an honest round"
    Parameters = GaussianNoiseParameters
    backdoor = False

    def poison(self, batch: Batch, context: AttackContext) -> Batch:
        return batch

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        p, draws = self.parameters, context.generator
        result = update.clone()
        weights = result[: context.model.layout.trainable]
        noise = torch.randn(weights.shape, generator=draws, dtype=update.dtype, device=draws.device).to(update.device)
        weights.copy_(noise * p.std + (weights if p.add else 0))
        return result
