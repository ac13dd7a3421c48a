"""Model replacement: boost the update until the server's mean becomes the attacker's model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.attack import Attack, AttackContext
from fedsim.errors import RunError
from fedsim.local import GradientHook, StepHook
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class ModelReplacementParameters(Parameters):
    scale: float | None = parameter(None, "boost γ; null: the number of clients in the round, n; 1: none", gt=0)
    step_lr: bool = parameter(True, "cut the learning rate tenfold at 1/5 and at 4/5 of the epochs")
    adapt_lr: bool = parameter(True, "cut the learning rate where the global model has the backdoor already")


@register("model_replacement")
class ModelReplacement(Attack):
    """Poisoned training, then the whole update boosted so that the mean becomes the attacker's model.

    The update sent is ``γ (X − G)``, G the global model, X the trained one (eq. 3 of the paper), running
    statistics included, as in the authors' code; a running variance can turn negative by it. A server that
    adds ``η/n · Σ updates`` is replaced exactly, the other updates being about zero, by γ = n/η. The default
    γ is that of η = 1; the released configurations say it as 100 = participants / η. Without boosting
    (``scale: 1``, ``adapt_lr: false``) this is the authors' *baseline*.

    From the authors' code:

    * ``step_lr``: in epoch e of E (from 1) the learning rate has been cut tenfold for each of the milestones
      E/5 and 4E/5 that is ≤ e: the schedule steps *before* an epoch. A milestone that is no whole number is
      never met, so E that is no multiple of five, or training counted in steps, has no cuts.
    * ``adapt_lr``: learning rate / 50 where the global model's backdoor accuracy exceeds 20 %, / 5000 above
      60 %.
    * Several attackers of one round share γ there: the one that trains sends γ/m, m times. Say γ/m here.

    Not followed: they stop early once the backdoor loss on test data is ≤ 1e-4.

    Cost: that of plain training.
    """

    paper = "Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020, arXiv 1807.00459"
    cost = "an honest round"
    Parameters = ModelReplacementParameters

    def on_gradient(self, context: AttackContext) -> GradientHook | None:
        """What is done to each gradient; None: nothing."""
        return None

    def on_step(self, context: AttackContext) -> StepHook | None:
        """What is done to the weights after each step; None: nothing."""
        return None

    def train(self, context: AttackContext) -> None:
        lr, epochs = self._start_lr(context), context.settings.epochs
        steps = self.parameters.step_lr and context.settings.steps is None and epochs % 5 == 0
        milestones = (epochs // 5, 4 * epochs // 5) if steps else ()
        self.fit_poisoned(
            context,
            on_gradient=self.on_gradient(context),
            on_step=self.on_step(context),
            lr_at=lambda epoch: lr / 10 ** sum(milestone <= epoch + 1 for milestone in milestones),
        )

    def _start_lr(self, context: AttackContext) -> float:
        if not self.parameters.adapt_lr:
            return context.settings.lr
        if context.backdoor_accuracy is None:
            raise RunError(
                f"{self.name}: adapt_lr needs the global model's backdoor accuracy, which this run does not "
                f"measure for its clients; set adapt_lr: false"
            )
        accuracy = context.backdoor_accuracy()
        return context.settings.lr / (5000 if accuracy > 0.6 else 50 if accuracy > 0.2 else 1)

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        scale = self.parameters.scale
        return update * (context.clients_per_round if scale is None else scale)
