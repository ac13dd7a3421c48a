"""Projected gradient descent: poisoned training that never leaves a ball around the global model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks._local import honest_model, undoing_the_mean
from attacks._projection import project_l2
from fedsim.attack import Attack, AttackContext
from fedsim.local import StepInfo
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class PGDParameters(Parameters):
    eps: float = parameter(2.0, "radius of the ball around the global model", gt=0)
    eps_decay: float = parameter(1.0, "factor on the radius per round: eps · decay^(round − 1)", gt=0, le=1)
    norm: str = parameter("l2", "shape of the ball", choices=("l2", "linf"))
    frequency: int = parameter(10, "l2: project after batches 0, m, 2m, … and the last of each epoch", ge=1)
    linf_step: float = parameter(0.001, "linf: learning rate, in place of the attacker's own", gt=0)
    prox: float = parameter(0.0, "weight c of the proximal term c · ‖w − ŵ‖²; 0: none", ge=0)
    replacement: bool = parameter(False, "boost the projected update by (examples of the round) / (own examples)")


@register("pgd")
class PGD(Attack):
    """Poisoned training with projection onto a ball around the global model, against norm-based defenses.

    After an optimiser step, ``w ← w_g + Π_eps(w − w_g)`` over the trainable parameters. The L2 projection
    acts every ``frequency`` batches (hence always on the first), on the last batch of every epoch, and at the end;
    momentum is neither reset nor projected. Running statistics are left as they are.

    Followed from the authors' code where the paper is silent:

    * ``linf`` is plain gradient descent with a fixed step, no momentum and no weight decay, clamped after
      every step whatever the frequency.
    * ``prox`` adds the squared distance to an estimate ŵ of the next global model: the global one trained on
      the attacker's clean data as everybody else trains.
    * ``replacement`` multiplies the trainable part *after* the last projection, so that what is sent lies
      outside the ball.
    * Their radius decays with the learning rate under Krum, Multi-Krum and Multi-metrics only; ``eps_decay``
      states it.

    Cost: that of plain training; with ``prox`` one benign training more.
    """

    paper = "Wang et al., Attack of the Tails, NeurIPS 2020; code: ksreenivasan/OOD_Federated_Learning"
    cost = "an honest round (with prox two)"
    Parameters = PGDParameters

    def train(self, context: AttackContext) -> None:
        p, centre = self.parameters, context.global_weights
        radius = p.eps * p.eps_decay ** (context.round - 1)
        linf = p.norm == "linf"
        target = honest_model(context)[: len(centre)] if p.prox else None

        def pull(gradient: Tensor, weights: Tensor) -> None:
            if target is not None:
                gradient.add_(weights - target, alpha=2 * p.prox)

        def project(weights: Tensor, where: StepInfo) -> None:
            if linf:
                weights.copy_(weights.clamp(centre - radius, centre + radius))
            elif where.batch % p.frequency == 0 or where.last_batch:
                project_l2(weights, centre, radius)

        plain = {"lr": p.linf_step, "momentum": 0.0, "weight_decay": 0.0} if linf else {}
        self.fit_poisoned(context, context.with_settings(**plain), on_gradient=pull, on_step=project)
        if context.settings.steps is not None and not linf:
            project_l2(context.model.weights, centre, radius)  # the last step may be in the middle of an epoch

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        if not self.parameters.replacement:
            return update
        result = update.clone()
        result[: context.model.layout.trainable] *= undoing_the_mean(context, self.name)
        return result
