"""One method, outside any experiment: for plugin authors, notebooks and the parity tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import plugins, streams
from fedsim.attack import Attack, AttackContext, CraftStep
from fedsim.batch import Batch, Examples
from fedsim.defense import Defense, RoundUpdates, Server
from fedsim.layout import FlatModel, Layout
from fedsim.local import LocalSettings
from fedsim.pipeline import Aggregation, apply_pipeline
from fedsim.tasks.text import WordLoss
from fedsim.training import fit, learning_rate, malicious_update
from fedsim.trigger import Trigger


def aggregate(
    defense: str | Defense,
    *,
    updates: Tensor,
    num_examples: Tensor | Sequence[int] | None = None,
    global_vector: Tensor | None = None,
    trainable: int | None = None,
    clients: Sequence[int] | None = None,
    round: int = 1,
    seed: int = 0,
    layout: Layout | None = None,
    server: Server | None = None,
    **parameters: Any,
) -> Aggregation:
    """Run one defense on one matrix of updates.

    Parameters
    ----------
    defense: a registered name, or a stage made before (which keeps its state from call to call).
    updates: (N, D) client minus global. With ``global_vector`` zero these are whole weights.
    num_examples: (N,) examples per client, the weights of the mean; default: all equal.
    global_vector: (D,) the global model the clients started from; default: zeros.
    trainable: length of the trainable part of the vector; default: all of it.
    layout: of the model behind the vectors, for methods that look at layers; default: the server's, if given.
    server: a network and data at the server, for methods that need them; see :func:`make_server`.
    parameters: the defense's own.

    Returns
    -------
    Aggregation, whose ``vector`` (D,) is the aggregated *update* and ``model`` the new global model.

    Raises
    ------
    PluginError: unknown defense or parameter. ValueError: shapes that do not fit or values that are not finite.
    RunError: fewer clients than the method needs.
    """
    if updates.ndim != 2 or not updates.is_floating_point():
        raise ValueError(f"updates must be a floating-point matrix (N, D), not {tuple(updates.shape)}")
    if updates.numel() > 0 and not all(bool(torch.isfinite(end)) for end in torch.aminmax(updates)):
        raise ValueError("updates must be finite")
    n, d = updates.shape
    examples = torch.ones(n) if num_examples is None else torch.as_tensor(num_examples)
    if tuple(examples.shape) != (n,):
        raise ValueError(f"num_examples must have shape ({n},), not {tuple(examples.shape)}")
    base = torch.zeros_like(updates[0]) if global_vector is None else global_vector
    if tuple(base.shape) != (d,):
        raise ValueError(f"global_vector must have shape ({d},), not {tuple(base.shape)}")
    examples = examples.to(device=updates.device, dtype=updates.dtype)
    stage = plugins.create("defense", defense, **parameters) if isinstance(defense, str) else defense
    return apply_pipeline(
        [stage],
        RoundUpdates(
            updates=updates,
            num_examples=examples,
            global_vector=base.to(updates),
            weights=examples.clone(),
            accepted=torch.ones(n, dtype=torch.bool, device=updates.device),
            trainable=d if trainable is None else trainable,
            clients=tuple(clients) if clients is not None else tuple(range(n)),
            round=round,
            seed=seed,
            layout=server.model.layout if layout is None and server is not None else layout,
            server=server,
        ),
    )


def make_server(
    model: nn.Module,
    classes: int,
    *,
    data: Batch | tuple[Tensor, Tensor] | None = None,
    shape: Sequence[int] = (),
    loss: nn.Module | None = None,
    settings: LocalSettings | None = None,
    round: int = 1,
    seed: int = 0,
) -> Server:
    """A server for :func:`aggregate` and for a defense's ``broadcast`` and ``evaluate``.

    Parameters
    ----------
    model: the network; it is copied, and stays on its device.
    data: (inputs, labels) at the server, float images (B, …) or words int64 (B, T), on the device of the model.
    shape: of one random input with values in [0, 1); default: that of ``data``. loss: default: cross-entropy.
    settings: how honest clients train in this round; default: SGD with lr 0.1.
    """
    flat = _copied(model)
    held = None if data is None else Batch(*data)
    like = tuple(shape) if shape or held is None else tuple(held.inputs.shape[1:])

    def epoch(size: int, generator: torch.Generator) -> Callable[[], Iterator[Batch]]:
        assert held is not None

        def batches() -> Iterator[Batch]:
            for rows in torch.split(torch.randperm(len(held.labels), generator=generator), size):
                yield Batch(held.inputs[rows], held.labels[rows])

        return batches

    return Server(
        model=flat,
        loss=nn.CrossEntropyLoss() if loss is None else loss,
        fit=fit,
        settings=LocalSettings(lr=0.1) if settings is None else settings,
        classes=classes,
        random_inputs=lambda count, generator: torch.rand((count, *like), generator=generator).to(flat.vector),
        data=held,
        epoch=None if held is None else epoch,
        round=round,
        seed=seed,
    )


@dataclass(frozen=True)
class LocalAttack:
    """What one malicious client's training made.

    update: (D,) what it would send, crafted. vector: (D,) the model it stands for, global plus update.
    state_dict: the same by name, tied weights under each of theirs. metrics: what the attack recorded.
    state: what it keeps for its next round.
    """

    update: Tensor
    vector: Tensor
    state_dict: dict[str, Tensor]
    metrics: dict[str, float]
    state: dict[str, Any]


def local_attack(
    attack: str | Attack,
    model: nn.Module,
    batches: Sequence[Batch | tuple[Tensor, Tensor]],
    *,
    trigger: Trigger | Callable[[Batch, int], Batch] | None = None,
    poison_fraction: float = 0.5,
    loss: nn.Module | None = None,
    lr: float = 0.1,
    lr_decay: float = 1.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    epochs: int = 1,
    benign_epochs: int = 1,
    round: int = 1,
    clients_per_round: int = 10,
    num_examples: int | None = None,
    total_examples: int | None = None,
    benign_batches: Sequence[Batch | tuple[Tensor, Tensor]] = (),
    last_aggregate: Tensor | None = None,
    backdoor_accuracy: float = 0.0,
    craft: Sequence[str | CraftStep] = (),
    state: dict[str, Any] | None = None,
    seed: int = 0,
    **parameters: Any,
) -> LocalAttack:
    """Train one malicious client on a fixed list of batches.

    Parameters
    ----------
    attack: a registered name, or an instance.
    model: the global model; it is copied, not changed. Whatever else is given lies on its device.
    batches: clean batches (inputs, labels), or (inputs, labels, carried), of one epoch, in this order every epoch.
    trigger: a trigger (prepared), or a function (batch, count) → batch that poisons the first ``count`` examples.
    loss: module mapping (outputs, labels) to a scalar; default: cross-entropy, per word for labels (B, T).
    lr, lr_decay, round: the learning rate is ``lr · lr_decay^(round − 1)``; rounds count from 1.
    epochs: of the attacker; benign_epochs: of everybody else (used by attacks that simulate them).
    num_examples: of this client, default: the rows of its batches; total_examples: of all clients of the round.
    benign_batches: clean data of benign clients, for attacks that know it.
    last_aggregate: (D,) the server's last aggregated update, for attacks that know it.
    backdoor_accuracy: of the global model, in [0, 1], for attacks that adapt to it.
    craft: craft steps, by name or instance. state: what the attack kept from an earlier round.
    parameters: the attack's own.

    Raises
    ------
    PluginError: unknown attack or parameter. RunError: no batches, or an update of the wrong shape.
    """
    method: Attack = plugins.create("attack", attack, **parameters) if isinstance(attack, str) else attack
    flat = _copied(model)
    start = flat.vector.clone()
    epoch = [Batch(*batch) for batch in batches]
    others = [Batch(*batch) for batch in benign_batches]
    benign = LocalSettings(
        lr=learning_rate(lr, lr_decay, round),
        epochs=benign_epochs,
        momentum=momentum,
        weight_decay=weight_decay,
        lr_decay=lr_decay,
    )
    words = any(batch.labels.ndim == 2 for batch in epoch)
    own = sum(len(batch.labels) for batch in epoch) if num_examples is None else num_examples
    context = AttackContext(
        model=flat,
        global_vector=start,
        batches=lambda: iter(epoch),
        loss=loss if loss is not None else WordLoss() if words else nn.CrossEntropyLoss(),
        settings=replace(benign, epochs=epochs),
        benign=benign,
        fit=fit,
        trigger=trigger if isinstance(trigger, Trigger) or trigger is None else _FunctionTrigger(trigger),
        poison_fraction=poison_fraction,
        generator=streams.generator(seed, "local_attack", round),
        round=round,
        clients_per_round=clients_per_round,
        num_examples=own,
        total_examples=own * clients_per_round if total_examples is None else total_examples,
        state={} if state is None else dict(state),
        benign_batches=(lambda count: iter(others)) if others else None,
        last_aggregate=last_aggregate,
        backdoor_accuracy=lambda: backdoor_accuracy,
    )
    steps = [plugins.create("craft", step) if isinstance(step, str) else step for step in craft]
    update = malicious_update(method, context, steps)
    vector = start + update
    flat.load(vector)
    named = {name: tensor.detach().clone() for name, tensor in flat.module.state_dict().items()}
    return LocalAttack(update, vector, named, context.metrics, context.state)


def _copied(model: nn.Module) -> FlatModel:
    """A copy of the model, on its device."""
    return FlatModel(copy.deepcopy(model), device=next(model.parameters()).device)


class _FunctionTrigger(Trigger):
    """A trigger given as a function, for :func:`local_attack`; it has no held-out set."""

    def __init__(self, function: Callable[[Batch, int], Batch]) -> None:
        super().__init__()
        self.function = function

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        return self.function(batch, count)

    def held_out(self, test: Examples) -> Examples:
        raise NotImplementedError("a trigger given as a function has no held-out set")
