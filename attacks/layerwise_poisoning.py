"""Layer-wise poisoning: only the layers that carry the backdoor are poisoned, the rest is trained honestly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks._local import honest_model, trigger_of
from fedsim.attack import Attack, AttackContext
from fedsim.layout import Layout
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class LayerwisePoisoningParameters(Parameters):
    tau: float = parameter(0.95, "τ, share of the malicious model's backdoor rate to be reached", gt=0, le=1)
    scale: float = parameter(1.0, "λ, the malicious share in the critical layers; above 1: a boost", gt=0)
    unit: str = parameter(
        "tensor", "what a layer is: each tensor, or weight and bias together", choices=("tensor", "module")
    )
    start: str = parameter(
        "benign",
        "where malicious training starts: the benign local model, or the global one",
        choices=("benign", "global"),
    )
    examples: int = parameter(256, "own examples, at most, on which a model's backdoor rate is measured", ge=1)


Layers = dict[str, list[slice]]
"""Layer → its places in the vector."""


def layers_of(layout: Layout, unit: str) -> Layers:
    """The trainable tensors by layer, in the model's order."""
    layers: Layers = {}
    for entry in layout.entries:
        if entry.trainable:
            name = entry.name if unit == "tensor" else entry.name.rpartition(".")[0]
            layers.setdefault(name, []).append(slice(entry.start, entry.stop))
    return layers


def substitute(into: Tensor, source: Tensor, places: Sequence[slice]) -> Tensor:
    """A copy of the vector ``into`` (D,) with the places taken from ``source`` (D,)."""
    result = into.clone()
    for place in places:
        result[place] = source[place]
    return result


def rank(layers: Layers, benign: Tensor, malicious: Tensor, rate: Callable[[Tensor], float]) -> list[str]:
    """Forward substitution: the layers by how much of the backdoor is lost without them, most first.

    The loss of layer l is ``rate(malicious) − rate(malicious with l from benign)``; ties in the model's order.
    """
    left = {name: rate(substitute(malicious, benign, places)) for name, places in layers.items()}
    return sorted(layers, key=lambda name: left[name])


def critical(
    ranked: Sequence[str],
    layers: Layers,
    benign: Tensor,
    malicious: Tensor,
    rate: Callable[[Tensor], float],
    tau: float,
) -> list[str]:
    """Backward substitution: the fewest first layers that, put into ``benign``, reach τ · rate(malicious)."""
    wanted, taken, current, reached = tau * rate(malicious), list[str](), benign, 0.0
    for name in ranked:
        if reached >= wanted:
            break
        current = substitute(current, malicious, layers[name])
        reached = rate(current)
        taken.append(name)
    return taken


@register("layerwise_poisoning")
class LayerwisePoisoning(Attack):
    """Poison only the backdoor-critical layers; all other weights are those of an honest local model.

    From the global model G the client trains a benign model B as everybody does, and from B a malicious one M on
    poisoned batches. ``rate`` is the backdoor's success on the client's own triggered examples.

    1. Forward substitution (:func:`rank`): put each layer of B into M, one at a time. The more the rate drops, the
       more critical the layer.
    2. Backward substitution (:func:`critical`): put layers of M into B in that order until the rate is at least
       τ · rate(M), one at least. Those are the critical layers.
    3. Sent is, in critical layers, ``λ (M − G) + max(0, 1 − λ) (B − G)``, elsewhere ``B − G``, running statistics
       included.

    Steps, τ = 0.95 and the equation of λ are from memory of the paper, checked against the authors' code, which calls
    each tensor a layer (``unit: tensor``) and starts M from B to find the critical layers. Not followed: it then sends
    layers of another malicious model, trained from G (``start: global`` starts the one M there); it trains B to 93 %
    accuracy first; it measures on a held-out part of the client's data; its ``max(0, 1 − λ)`` term takes the mean of
    several benign models; and it drops layers or lowers λ until a simulation of the defense accepts the update. If M
    has no backdoor at all, no layer is critical and B is sent.

    The trigger must say what success is, so it is needed.

    Raises
    ------
    RunError: no trigger.

    Cost: two trainings, and up to 2 L + 1 forward passes over ``examples`` for L layers.
    """

    paper = (
        "Zhuang et al., Backdoor Federated Learning by Poisoning Backdoor-Critical Layers, ICLR 2024, arXiv 2308.04466"
    )
    cost = "two trainings, 2 L forward passes over a few examples for L layers"
    tasks = ("vision", "sentiment", "next_word")
    Parameters = LayerwisePoisoningParameters

    def train(self, context: AttackContext) -> None:
        p, model, start = self.parameters, context.model, context.global_vector
        rate = self._rate(context)
        benign = honest_model(context)
        model.load(benign if p.start == "benign" else start)
        self.fit_poisoned(context)
        malicious = model.vector.clone()
        layers = layers_of(model.layout, p.unit)
        taken = critical(rank(layers, benign, malicious, rate), layers, benign, malicious, rate, p.tau)
        mixed = start + p.scale * (malicious - start) + max(0.0, 1 - p.scale) * (benign - start)
        model.load(substitute(benign, mixed, [place for name in taken for place in layers[name]]))
        context.metrics["critical_layers"] = float(len(taken))

    def _rate(self, context: AttackContext) -> Callable[[Tensor], float]:
        """The backdoor's success in [0, 1] of a model (D,), on the client's own triggered examples."""
        trigger = trigger_of(context, "layerwise_poisoning measures the backdoor on its own examples")
        module = context.model.module
        shown, missing = [], self.parameters.examples
        for batch in context.batches():
            usable = torch.nonzero(trigger.usable(batch.labels)).squeeze(1)[:missing]
            if len(usable) > 0:
                own = batch._replace(inputs=batch.inputs[usable], labels=batch.labels[usable], carried=None)
                shown.append(trigger.poison(own, len(usable), part=context.part, generator=context.generator))
            missing -= len(usable)
            if missing <= 0:
                break

        @torch.no_grad()
        def rate(vector: Tensor) -> float:
            context.model.load(vector)
            module.eval()
            found = [trigger.succeeded(module(batch.inputs), batch.labels) for batch in shown]
            module.train()
            total = sum(int(n) for _, n in found)
            return sum(int(hits) for hits, _ in found) / total if total else 0.0

        return rate
