"""Local training: what an honest client does, and the frame a malicious one works in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fedsim.attack import Attack, AttackContext, CraftStep
from fedsim.batch import Batch, State, outputs_of
from fedsim.errors import RunError
from fedsim.layout import FlatModel
from fedsim.local import GradientHook, LocalSettings, StepHook, StepInfo


def learning_rate(lr: float, decay: float, round: int) -> float:
    """lr · γ^(round − 1): the first round uses the base rate."""
    return float(lr * decay ** (round - 1))


def fit(
    model: FlatModel,
    batches: Callable[[], Iterator[Batch]],
    loss: nn.Module,
    settings: LocalSettings,
    *,
    transform: Callable[[Batch], Batch] | None = None,
    on_gradient: GradientHook | None = None,
    on_step: StepHook | None = None,
    lr_at: Callable[[int], float] | None = None,
) -> float:
    """Train ``model`` in place by SGD and return the mean loss of the last epoch.

    One optimiser step is one operation on the flat weights (T,); the arithmetic is ``torch.optim.SGD``'s:
    ``g ← g + wd·w; v ← m·v + g; w ← w − lr·v``.

    batches: makes one epoch of batches. transform: applied to every batch (poisoning). on_gradient: changes the
    gradient before weight decay and momentum. on_step: changes the weights after a step (projection).
    lr_at: learning rate of each epoch (from 0) instead of ``settings.lr``.

    Raises
    ------
    RunError: there is no batch to train on.
    """
    module = model.module
    module.train()
    optimiser = model.sgd(settings.lr, settings.momentum, settings.weight_decay)
    autocast: contextlib.AbstractContextManager[object] = (
        torch.autocast(model.device.type, dtype=torch.bfloat16) if settings.amp else contextlib.nullcontext()
    )
    total = torch.zeros((), device=model.device)
    step = epoch = 0
    seen: int | Tensor = 0
    while (epoch < settings.epochs) if settings.steps is None else (step < settings.steps):
        if lr_at is not None:
            optimiser.param_groups[0]["lr"] = lr_at(epoch)
        total.zero_()
        seen = 0
        state: State | None = None
        any_batch = False
        for index, (batch, last) in enumerate(_with_last(batches())):
            if settings.steps is not None and step >= settings.steps:
                break
            batch = batch if transform is None else transform(batch)
            if settings.channels_last and batch.inputs.ndim == 4:
                batch = batch._replace(inputs=batch.inputs.contiguous(memory_format=torch.channels_last))
            model.gradient.zero_()
            with autocast:
                outputs, state = outputs_of(module, batch, state)
                value = loss(outputs, batch.labels)
            value.backward()
            if on_gradient is not None:
                on_gradient(model.gradient, model.weights)
            optimiser.step()
            if on_step is not None:
                on_step(model.weights, StepInfo(epoch, index, last))
            size = batch.targets
            total += value.detach() * size
            seen = seen + size
            step += 1
            any_batch = True
        if not any_batch:
            raise RunError("there is no batch to train on: the client has no examples")
        epoch += 1
    return float(total) / max(int(seen), 1)


def _with_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last of its epoch."""
    previous: Batch | None = None
    for batch in batches:
        if previous is not None:
            yield previous, False
        previous = batch
    if previous is not None:
        yield previous, True


def malicious_update(attack: Attack, context: AttackContext, craft: Sequence[CraftStep] = ()) -> Tensor:
    """The update (D,) a malicious client sends: trained, crafted by the attack, then by the craft steps.

    Raises
    ------
    RunError: a hook returned an update of the wrong shape.
    """
    context.model.load(context.global_vector)
    attack.train(context)
    update = context.model.vector - context.global_vector
    update = attack.craft(update, context)
    for step in craft:
        update = step.apply(update, context)
    if update.shape != context.global_vector.shape:
        raise RunError(
            f"attack {attack.name!r} made an update of shape {tuple(update.shape)}, "
            f"not {tuple(context.global_vector.shape)}"
        )
    return update
