"""The attack interface: what a malicious client does.

An attack is a few hooks with identity defaults, each doing one thing:

* ``poison(batch, context)`` — the data it trains on,
* ``train(context)`` — how it trains (default: as everybody, on poisoned batches),
* ``craft(update, context)`` — what it does to its update before sending it,
* ``coordinate(updates, knowledge)`` — what colluders do together (default: nothing).

The trigger, the schedule and further craft steps are chosen independently in the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.batch import Batch
from fedsim.layout import FlatModel, Layout
from fedsim.local import Fit, GradientHook, LocalSettings, State, StepHook
from fedsim.plugins import Parameters, Plugin, parameter, register
from fedsim.trigger import Trigger, poison_count


class Knowledge(StrEnum):
    """What an attack is allowed to see, besides the global model it is sent."""

    OWN_DATA = "own data"
    BENIGN_DATA = "data of benign clients"
    LAST_AGGREGATE = "the last aggregated update"
    BENIGN_UPDATES = "updates of benign clients"
    DEFENSE = "the defense"


@dataclass
class AttackContext:
    """Everything one malicious client has in one round.

    model: the client's model, loaded with the global one; train it in place.
    global_vector: (D,) the global model, not to be modified.
    batches: one freshly shuffled epoch of the client's own clean data, each call.
    loss: module mapping (outputs, labels) to a scalar.
    settings: how the attacker trains; benign: how everybody else trains in this round.
    round: from 1. clients_per_round: n, as many as take part. num_examples: of this client.
    total_examples: of all that take part this round.
    attacker: running number of the attacker, from 0 (a distributed trigger's part is chosen by it); it runs on over the
        rounds, also where the attackers are fixed, and belongs to a client only in a ``pool``.
    state: what the attack kept from its last malicious round, tensors on the CPU; write into it, or clear it.
    generator: the client's random stream for this round.
    benign_batches: clean batches of ``count`` sampled benign clients (needs Knowledge.BENIGN_DATA).
    last_aggregate: (D,) the update the server applied last, or None (needs Knowledge.LAST_AGGREGATE).
    backdoor_accuracy: success rate in [0, 1] of the backdoor in the global model, as the attacker measures it.
    metrics: numbers to be recorded with the client's reply.
    """

    model: FlatModel
    global_vector: Tensor
    batches: Callable[[], Iterator[Batch]]
    loss: nn.Module
    settings: LocalSettings
    benign: LocalSettings
    fit: Fit
    trigger: Trigger | None
    poison_fraction: float
    generator: torch.Generator
    round: int = 1
    clients_per_round: int = 10
    num_examples: int = 0
    total_examples: int = 0
    attacker: int = 0
    state: State = field(default_factory=dict)
    benign_batches: Callable[[int], Iterator[Batch]] | None = None
    last_aggregate: Tensor | None = None
    backdoor_accuracy: Callable[[], float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def global_weights(self) -> Tensor:
        """(T,) the trainable part of the global model, not to be modified."""
        return self.global_vector[: self.model.layout.trainable]

    @property
    def part(self) -> int | None:
        """The part of a distributed trigger this attacker stamps; None where the trigger is whole."""
        if self.trigger is None or self.trigger.parts == 1:
            return None
        return self.attacker % self.trigger.parts

    def with_settings(self, **changes: Any) -> LocalSettings:
        """The attacker's settings with some replaced."""
        return replace(self.settings, **changes)


@dataclass(frozen=True)
class CoordinationKnowledge:
    """What colluders see when they coordinate, at the server's door, in one round.

    malicious: (N,) bool. global_vector: (D,). generator: the round's stream. benign_visible: whether the attack
    declared Knowledge.BENIGN_UPDATES; if not, the benign rows it is given are NaN.
    clients: ids behind the rows. attackers: of the malicious rows, in their order, the running number of the attacker.
    layout: of the model. last_aggregate: (D,) the update the server applied last (needs Knowledge.LAST_AGGREGATE).
    state: what the attack keeps, the malicious clients' merged; write into it, they get it in their next round.
    """

    round: int
    malicious: Tensor
    global_vector: Tensor
    num_examples: Tensor
    generator: torch.Generator
    benign_visible: bool
    clients: tuple[int, ...] = ()
    attackers: tuple[int, ...] = ()
    layout: Layout | None = None
    last_aggregate: Tensor | None = None
    state: State = field(default_factory=dict)


class Attack(Plugin):
    """What a malicious client does; see the module for the hooks.

    knows: all the attack may see, whatever its parameters. backdoor: whether it plants a backdoor; false: it
    only harms the model.
    """

    kind: ClassVar[str] = "attack"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.OWN_DATA})
    backdoor: ClassVar[bool] = True

    @classmethod
    def knowledge(cls, parameters: Any) -> frozenset[Knowledge]:
        """What the attack sees with these parameters: a part of ``knows``, by default all of it."""
        return cls.knows

    def poison(self, batch: Batch, context: AttackContext) -> Batch:
        """The batch the attacker trains on: by default the first ``round(fraction · B)`` examples triggered."""
        if context.trigger is None:
            return batch
        count = poison_count(context.poison_fraction, batch.labels.shape[0])
        return context.trigger.poison(batch, count, part=context.part, generator=context.generator)

    def train(self, context: AttackContext) -> None:
        """Train ``context.model`` in place: by default plain local training on poisoned batches."""
        self.fit_poisoned(context)

    def fit_poisoned(
        self,
        context: AttackContext,
        settings: LocalSettings | None = None,
        *,
        on_gradient: GradientHook | None = None,
        on_step: StepHook | None = None,
        lr_at: Callable[[int], float] | None = None,
    ) -> None:
        """``context.fit`` of ``context.model`` on batches that ``poison`` has seen, as the attacker trains.

        settings: instead of the attacker's own. The rest: as ``context.fit`` takes it (:class:`fedsim.local.Fit`).
        """
        context.fit(
            context.model,
            context.batches,
            context.loss,
            context.settings if settings is None else settings,
            transform=lambda batch: self.poison(batch, context),
            on_gradient=on_gradient,
            on_step=on_step,
            lr_at=lr_at,
        )

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        """The update (D,) to send, made from the trained one; by default as it is."""
        return update

    def coordinate(self, updates: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        """Replace the malicious rows of ``updates`` (N, D); by default they are sent as they are.

        Returns a tensor of the same shape; rows of benign clients are ignored.
        """
        return updates

    def merge(self, states: Sequence[State]) -> State:
        """One state of those a round's malicious clients end with (≥ 1, by attacker number); by default the last."""
        return states[-1]


class CraftStep(Plugin):
    """A step after training that any attack can be combined with (``attack.craft`` in the config)."""

    kind: ClassVar[str] = "craft"

    def apply(self, update: Tensor, context: AttackContext) -> Tensor:
        """The crafted update (D,); the given one is not modified."""
        raise NotImplementedError


@dataclass(frozen=True)
class ScaleParameters(Parameters):
    factor: float | None = parameter(None, "boost γ; null: the number of clients in the round, n", gt=0)


@register("scale")
class Scale(CraftStep):
    """Boost: multiply the update by γ (by default n, which undoes the server's mean)."""

    paper = "Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020; Anticipate's fl_weight_scale"
    Parameters = ScaleParameters

    def apply(self, update: Tensor, context: AttackContext) -> Tensor:
        factor = self.parameters.factor
        return update * (context.clients_per_round if factor is None else factor)


@dataclass(frozen=True)
class ProjectParameters(Parameters):
    bound: float = parameter(1.0, "radius of the L2 ball around the global model", gt=0)
    scope: str = parameter("all", "what is measured and scaled", choices=("all", "trainable"))


@register("project")
class Project(CraftStep):
    """Norm-bound evasion: shrink the update into an L2 ball, so that the server's clip never touches it."""

    paper = "Sun et al., Can You Really Backdoor Federated Learning?, arXiv 1911.07963"
    Parameters = ProjectParameters

    def apply(self, update: Tensor, context: AttackContext) -> Tensor:
        seen = update if self.parameters.scope == "all" else update[: context.model.layout.trainable]
        scale = min(1.0, self.parameters.bound / max(float(torch.linalg.vector_norm(seen)), 1e-30))
        result = update.clone()
        result[: seen.shape[0]] *= scale
        return result
