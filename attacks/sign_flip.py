"""Sign flip: an honest update sent with the opposite sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attacks._deviation import Colluding, mean_of
from fedsim.attack import AttackContext, CoordinationKnowledge, Knowledge
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class SignFlipParameters(Parameters):
    of: str = parameter(
        "own", "what is flipped: the attacker's own update, or the benign mean", choices=("own", "mean")
    )
    factor: float = parameter(1.0, "what it is multiplied by besides −1", gt=0)


@register("sign_flip")
class SignFlip(Colluding):
    """Honest training, then the update is sent with the opposite sign.

    Each attacker sends −γ times its *own* update, which needs neither knowledge nor partners: the paper's σ is
    −γ (LASA's port has γ = 1, the default). ``of: mean`` is byzfl's: all send −γ times the
    mean of the benign updates, which is ``ipm`` with ε = γ. Not followed: blades, which climbs the loss at every
    step of local training.

    The own update is flipped on the client, before the craft steps; the mean replaces what they made. Running
    statistics are flipped like any weight; a running variance can turn negative by it. Cost: honest training.
    """

    paper = "Li, Xu, Chen, Giannakis, Ling: RSA, AAAI 2019, arXiv 1811.03761"
    cost = "an honest round (of: mean: at the server O(N D) time besides)"
    Parameters = SignFlipParameters

    @classmethod
    def knowledge(cls, parameters: Any) -> frozenset[Knowledge]:
        return cls.knows if parameters.of == "mean" else frozenset({Knowledge.OWN_DATA})

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        return -self.parameters.factor * update if self.parameters.of == "own" else update

    def coordinate(self, updates: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        return super().coordinate(updates, knowledge) if self.parameters.of == "mean" else updates

    def make(self, honest: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        return mean_of(honest).mul(-self.parameters.factor)
