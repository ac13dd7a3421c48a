"""FedProx."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.defense import Defense, HonestContext
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class FedproxParameters(Parameters):
    mu: float = parameter(0.01, "weight μ of the proximal term; the paper tries 0.001, 0.01, 0.1 and 1", ge=0)


@register("fedprox")
class Fedprox(Defense):
    r"""Honest clients stay near the global model: a proximal term in their loss.

    .. math:: \min_w F_i(w) + \frac{\mu}{2} \lVert w - w_0 \rVert_2^2

    with w₀ the global model as received: μ (w − w₀) is added to every gradient (T,) of an honest client, before
    weight decay and momentum. Trainable parameters only; running statistics have no gradient. Malicious clients
    train as they like. At the server nothing happens: the aggregation is the pipeline's, and there are no scores.
    The paper's other half, that slow clients send partial work, is the schedule's and not done here.

    Cost: O(D) time a client and step, no memory.
    """

    paper = "Li et al., Federated Optimization in Heterogeneous Networks, arXiv 1812.06127"
    cost = "clients: O(D) time a step"
    Parameters = FedproxParameters

    def client_gradient(self, gradient: Tensor, weights: Tensor, context: HonestContext) -> None:
        gradient.add_(weights - context.global_vector[: len(weights)], alpha=self.parameters.mu)
