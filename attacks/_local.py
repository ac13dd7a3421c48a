"""What several attacks ask of a client: its trigger, its honest model, a gradient at one point, its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedsim.attack import AttackContext
from fedsim.batch import Batch
from fedsim.errors import RunError
from fedsim.trigger import Trigger


def trigger_of(context: AttackContext, why: str) -> Trigger:
    """The trigger; ``why`` says by name what the attack needs it for.

    Raises
    ------
    RunError: there is none.
    """
    if context.trigger is None:
        raise RunError(f"{why}: give it a trigger")
    return context.trigger


def honest_model(context: AttackContext) -> Tensor:
    """(D,) the global model trained on the client's clean data as everybody trains; ``context.model`` is put back."""
    context.fit(context.model, context.batches, context.loss, context.benign)
    honest = context.model.vector.clone()
    context.model.load(context.global_vector)
    return honest


def sum_of_gradients(
    context: AttackContext,
    batches: Callable[[], Iterator[Batch]],
    *,
    absolute: bool = False,
    transform: Callable[[Batch], Batch] | None = None,
) -> Tensor:
    """(T,) over one pass, the gradients of each batch's mean loss, at the model as it is; it is left so.

    absolute: add up their absolute values.
    """
    model = context.model
    before, total = model.vector.clone(), torch.zeros_like(model.gradient)

    def add(gradient: Tensor, weights: Tensor) -> None:
        total.add_(gradient.abs() if absolute else gradient)

    still = context.with_settings(lr=0.0, epochs=1, steps=None)
    context.fit(model, batches, context.loss, still, transform=transform, on_gradient=add)
    model.load(before)  # running statistics have moved
    return total


def undoing_the_mean(context: AttackContext, name: str) -> float:
    """(examples of the round) / (own examples), which undoes the server's mean by examples.

    Raises
    ------
    RunError: the client has no examples.
    """
    if context.num_examples < 1:
        raise RunError(f"{name}: replacement divides by the attacker's number of examples, which is 0")
    return context.total_examples / context.num_examples
