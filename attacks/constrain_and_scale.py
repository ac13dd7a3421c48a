"""Constrain-and-scale: model replacement whose training keeps the model near the global one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks._projection import held_near, project_l2
from attacks.model_replacement import ModelReplacement, ModelReplacementParameters
from fedsim.attack import AttackContext
from fedsim.local import GradientHook, StepHook
from fedsim.plugins import parameter, register


@dataclass(frozen=True)
class ConstrainAndScaleParameters(ModelReplacementParameters):
    alpha: float = parameter(0.7, "α, the share of the classification loss; 1: no constraint", ge=0, le=1)
    grad_clip: float | None = parameter(None, "clip each gradient to this L2 norm; null: do not", gt=0)
    bound: float | None = parameter(
        None,
        "keep within this L2 distance of the global model, each step and again after scaling; null: do not",
        gt=0,
    )


@register("constrain_and_scale")
class ConstrainAndScale(ModelReplacement):
    """Model replacement with an anomaly term in the loss: the model must stay near the global one.

    ``L = α · L_class + (1 − α) · ‖w − G‖₂`` (eq. 4 of the paper with the distance as its anomaly term), over
    the trainable parameters; then boosted as in model replacement. As in the authors' code the norm is not
    squared: the pull has constant strength 1 − α, and none (the subgradient 0) at w = G, hence none in the
    first step.

    ``grad_clip`` and ``bound`` are the code's mode against a clipping server (``diff_privacy``): gradients,
    the anomaly term's included, are scaled to at most that norm; the weights are projected after every step
    and, with the boost on them, once more, which undoes it as far as the ball demands. Running statistics are
    boosted but not bounded.

    The default α is ours: the released configurations have 1, where nothing is left but model replacement.

    Cost: that of plain training.
    """

    paper = "Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020, arXiv 1807.00459, section 4.3"
    cost = "an honest round"
    Parameters = ConstrainAndScaleParameters

    def on_gradient(self, context: AttackContext) -> GradientHook | None:
        p, centre = self.parameters, context.global_weights

        def constrain(gradient: Tensor, weights: Tensor) -> None:
            difference = weights - centre
            # where the norm is 0 so is the difference, and the floor only keeps 0/0 away
            pull = (1 - p.alpha) / torch.linalg.vector_norm(difference).clamp_min(1e-30)
            gradient.mul_(p.alpha).add_(difference * pull)
            if p.grad_clip is not None:
                gradient.mul_((p.grad_clip / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp_max(1.0))

        return constrain

    def on_step(self, context: AttackContext) -> StepHook | None:
        return held_near(context.global_weights, self.parameters.bound)

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        update = super().craft(update, context)
        if self.parameters.bound is not None:
            weights = update[: context.model.layout.trainable]
            project_l2(weights, torch.zeros_like(weights), self.parameters.bound)
        return update
