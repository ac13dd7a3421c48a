"""Training on a loss of three terms, and the gradients of terms that look at the weights alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedsim.attack import AttackContext
from fedsim.batch import Batch
from fedsim.local import GradientHook


def fit_terms(
    context: AttackContext,
    batches: Callable[[], Iterator[Batch]],
    loss: nn.Module,
    poison: Callable[[Batch], Batch],
    shares: tuple[float, float],
    pull: GradientHook,
    *,
    frozen_statistics: bool = False,
) -> None:
    """Train ``context.model`` in place on ``a L(batch) + b L(poisoned batch) + a third term``, as the attacker trains.

    batches: of the first term, with its ``loss``; the second has the run's. shares: (a, b).
    pull: adds the gradient of the third term to the gradient (T,) it is given.
    frozen_statistics: train in evaluation mode (no dropout, running statistics used and left as they are).
    """
    module = context.model.module
    present: list[Batch] = []

    def remember(batch: Batch) -> Batch:
        present[:] = [poison(batch)]
        if frozen_statistics:
            module.eval()
        return batch

    def add_terms(gradient: Tensor, weights: Tensor) -> None:
        first = gradient.clone()
        gradient.zero_()
        if present[0].labels.shape[0] > 0:
            torch.autograd.backward(batch_loss(context, present[0]))  # adds to the same gradient
        gradient.mul_(shares[1]).add_(first, alpha=shares[0])
        pull(gradient, weights)

    context.fit(context.model, batches, loss, context.settings, transform=remember, on_gradient=add_terms)
    module.train()


def batch_loss(context: AttackContext, batch: Batch) -> Tensor:
    """The run's loss on a batch, each row from its beginning, under the attacker's precision and memory format."""
    settings, inputs = context.settings, batch.inputs
    if settings.channels_last and inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast(context.model.device.type, dtype=torch.bfloat16) if settings.amp else contextlib.nullcontext():
        value: Tensor = context.loss(context.model.module(inputs), batch.labels)
    return value


def distance_slope(difference: Tensor) -> Tensor:
    """(T,) the gradient of ``‖d‖₂`` at d (T,): ``d / ‖d‖``; zero at zero."""
    unit: Tensor = difference / torch.linalg.vector_norm(difference).clamp_min(1e-30)
    return unit


def cosine_slope(weights: Tensor, others: Sequence[Tensor]) -> Tensor:
    """(T,) the gradient in w (T,) of the mean cosine of w with each of the others (T,), at least one.

    ``∂ cos(w, v) / ∂w = (v̂ − cos(w, v) ŵ) / ‖w‖`` with ŵ, v̂ the unit vectors; zero where w or v is.
    """
    length: Tensor = torch.linalg.vector_norm(weights)
    unit, total = distance_slope(weights), torch.zeros_like(weights)
    for other in others:
        direction = distance_slope(other)
        total += direction - torch.dot(unit, direction) * unit
    slope = total / (len(others) * length.clamp_min(1e-30))
    return torch.where(length > 0, slope, 0.0)
