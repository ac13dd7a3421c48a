"""An attack of your own: plain poisoning whose update is never longer than an honest one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attack import Attack, AttackContext
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class QuietPoisoningParameters(Parameters):
    slack: float = parameter(1.0, "longest update allowed, in lengths of an honest one", gt=0)


@register("quiet_poisoning")
class QuietPoisoning(Attack):
    """Data poisoning that trains once more, honestly, and shrinks its update to that length."""

    paper = "an example, not published"
    Parameters = QuietPoisoningParameters

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        context.model.load(context.global_vector)
        context.fit(context.model, context.batches, context.loss, context.benign)
        honest = torch.linalg.vector_norm(context.model.vector - context.global_vector)
        context.metrics["honest_norm"] = float(honest)
        longest = self.parameters.slack * honest / torch.linalg.vector_norm(update)
        return update * longest.clamp(max=1.0)
