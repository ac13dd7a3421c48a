"""Label flipping: honest training on wrong labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.attack import Attack, AttackContext
from fedsim.batch import Batch
from fedsim.errors import Problem, RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class LabelFlipParameters(Parameters):
    flip: str = parameter("all", "all: y becomes C − 1 − y; pair: source becomes target", choices=("all", "pair"))
    source: int = parameter(0, "pair: the class that is relabelled", ge=0)
    target: int = parameter(2, "pair: the class it is given", ge=0)
    classes: int | None = parameter(None, "number of classes C; null: as many as the model has outputs", ge=2)


@register("label_flip")
class LabelFlip(Attack):
    """Plain local training on the attacker's own examples with flipped labels, all of them, and no trigger.

    ``all``: y becomes C − 1 − y (Fang et al.); with an odd number of classes the middle one stays.
    ``pair``: examples of ``source`` are labelled ``target`` and no other changes (Tolpegin et al.; airplane → bird,
    the default, is one of their pairs on CIFAR-10). ``poison_fraction`` speaks of triggers and has no effect.

    Unless ``classes`` says it, C is read off the model: the width of its outputs on one example of the batch.

    Cost: that of plain training, and one forward pass of one example.
    """

    paper = "Tolpegin et al., ESORICS 2020, arXiv 2007.08432; Fang et al., USENIX Security 2020, arXiv 1911.11815"
    cost = "an honest round"
    tasks = ("vision", "sentiment")
    Parameters = LabelFlipParameters
    backdoor = False

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._classes: int | None = self.parameters.classes

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        if parameters.flip == "all" or parameters.source != parameters.target:
            return []
        return [Problem("target", f"is the source, {parameters.source}, so that nothing is flipped; use another")]

    def poison(self, batch: Batch, context: AttackContext) -> Batch:
        p = self.parameters
        if self._classes is None:
            self._classes = self._width(batch, context)
        if p.flip == "pair":
            if max(p.source, p.target) >= self._classes:
                raise RunError(f"label_flip: source {p.source} or target {p.target} is none of {self._classes} classes")
            return batch._replace(labels=batch.labels.masked_fill(batch.labels == p.source, p.target))
        if self.parameters.classes is not None and int(batch.labels.max()) >= self._classes:
            raise RunError(f"label_flip: there are labels above classes − 1 = {self._classes - 1}; leave classes null")
        return batch._replace(labels=self._classes - 1 - batch.labels)

    @staticmethod
    @torch.no_grad()
    def _width(batch: Batch, context: AttackContext) -> int:
        """How many scores the model gives an example; it is left as it was."""
        module = context.model.module
        was = module.training
        module.eval()
        scores: Tensor = module(batch.inputs[:1])
        module.train(was)
        if scores.ndim != 2 or scores.shape[1] < 2:
            raise RunError(f"label_flip: outputs of shape {tuple(scores.shape)} tell no number of classes; set classes")
        return scores.shape[1]
