"""Inner product manipulation: all colluders send the mean of the benign updates turned round."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks._deviation import Colluding, mean_of
from fedsim.attack import CoordinationKnowledge
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class IPMParameters(Parameters):
    factor: float = parameter(1.0, "length ε of what is sent, in lengths of the benign mean", gt=0)


@register("ipm")
class IPM(Colluding):
    """All colluders send −ε times the mean of the benign updates, so that the aggregate points against it.

    ``−ε / (n − m) · Σᵢ xᵢ`` over the n − m benign updates. A plain mean turns round when
    ``ε > (n − m) / m``; a small ε stays close to the benign updates and is for Krum's kind. The paper tries many
    ε; the default is that of blades, byzfl's is 2. In a round without benign clients the mean is that of the
    colluders' own honest updates. The mean is unweighted, whatever the server's is.

    Running statistics take part like any weight; a running variance can turn negative by it. Cost: honest
    training; at the server O(N D).
    """

    paper = "Xie, Koyejo, Gupta: Fall of Empires, UAI 2019, arXiv 1903.03936"
    cost = "an honest round; at the server O(N D) time"
    Parameters = IPMParameters

    def make(self, honest: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        return mean_of(honest).mul(-self.parameters.factor)
