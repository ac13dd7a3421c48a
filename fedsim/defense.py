"""The defense interface: what the server does with the updates of one round.

A defense is a pipeline of stages. Each stage is a few hooks with identity defaults:

* ``screen(round)`` — weigh or reject clients, and say what it thought of each (a score),
* ``transform(round)`` — change the updates (clip, add noise to each),
* ``aggregate(round)`` — combine the updates (at most one stage of a pipeline; default: the weighted mean),
* ``finish(vector, round)`` — touch the aggregate (add noise).

The stages run in order: ``screen`` and ``transform`` of each, then the aggregation, then every ``finish``. A
stage never meets a client that an earlier one rejected.

Three hooks act elsewhere:

* ``broadcast(vector, server)`` — the model that is sent out at the beginning of a round,
* ``client_batch``, ``client_gradient``, ``client_update`` — what honest clients do for the defense,
* ``evaluate(vector, held_out, server)`` — what else is measured of the global model (certificates).

A method that needs more than the updates finds it in ``round.server``: a network to load models into, local
training, and the data the config's ``server_data`` block sets aside for the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim import streams
from fedsim.batch import Batch
from fedsim.errors import RunError
from fedsim.layout import Entry, FlatModel, Layout
from fedsim.local import Fit, LocalSettings, State
from fedsim.plugins import Plugin


@dataclass
class Server:
    """What the server has besides the updates.

    model: a network to load any model (D,) into; whoever uses it loads first.
    loss: module mapping (outputs, labels) to a scalar, as the clients'. fit: plain local training.
    settings: how honest clients train in this round.
    random_inputs: (count, CPU generator) → random inputs (count, …): pixels uniform in [0, 1], or random words.
    data: all examples set aside for the server as one batch, in a fixed order; None where there are none.
    epoch: (batch size, CPU generator) → what ``fit`` takes: freshly shuffled epochs of ``data``; None likewise.
    classes: number of classes, or of words. round: from 1. rounds: of the run, where that is known.
    seed: of the run, for :meth:`generator`.
    """

    model: FlatModel
    loss: nn.Module
    fit: Fit
    settings: LocalSettings
    classes: int
    random_inputs: Callable[[int, torch.Generator], Tensor]
    data: Batch | None = None
    epoch: Callable[[int, torch.Generator], Callable[[], Iterator[Batch]]] | None = None
    round: int = 1
    rounds: int | None = None
    seed: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """The round's random stream for ``purpose``, on the CPU: the same draws on any device."""
        return streams.generator(self.seed, "server", purpose, self.round)

    def outputs(self, vector: Tensor, inputs: Tensor, *, batch_size: int = 256) -> Tensor:
        """Logits (B, C) of the model ``vector`` (D,), in evaluation mode; next word: (B, T, words)."""
        return self._forward(vector, inputs, batch_size, None)

    def features(self, vector: Tensor, inputs: Tensor, *, batch_size: int = 256) -> Tensor:
        """What enters the last linear layer, (B, F); next word: (B, T, F)."""
        return self._forward(vector, inputs, batch_size, self.head_module()[1])

    def _forward(self, vector: Tensor, inputs: Tensor, batch_size: int, layer: nn.Module | None) -> Tensor:
        self.model.load(vector)
        self.model.module.eval()
        kept: list[Tensor] = []
        hook = None if layer is None else layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        try:
            with torch.no_grad():
                outputs = [self.model.module(part) for part in torch.split(inputs, batch_size)]
        finally:
            if hook is not None:
                hook.remove()
        return torch.cat(outputs if layer is None else kept)

    def head_module(self) -> tuple[str, nn.Linear]:
        """Name and module of the last linear layer.

        Raises
        ------
        RunError: the network has none.
        """
        found = [(name, m) for name, m in self.model.module.named_modules() if isinstance(m, nn.Linear)]
        if not found:
            raise RunError("the defense looks at the last linear layer, and the network has none")
        return found[-1]

    def head(self) -> tuple[Entry, Entry | None]:
        """Where weight (C, F) and bias (C,) of the last linear layer lie in the vector.

        A weight tied to an embedding lies where the embedding does.
        """
        name, module = self.head_module()
        entries = {entry.name: entry for entry in self.model.layout.entries}
        first = {id(p): n for n, p in reversed(list(self.model.module.named_parameters(remove_duplicate=False)))}
        return entries[first[id(module.weight)]], entries.get(f"{name}.bias" if name else "bias")


@dataclass
class HonestContext:
    """One honest client in one round, as a defense's client side meets it.

    model: being trained, in place. global_vector: (D,) as received, not to be modified.
    batches: one freshly shuffled epoch of its data, each call. settings: how it trains.
    generator: the client's random stream for this round. memory: for the defense's own use within this round.
    """

    model: FlatModel
    global_vector: Tensor
    batches: Callable[[], Iterator[Batch]]
    loss: nn.Module
    settings: LocalSettings
    classes: int
    generator: torch.Generator
    round: int = 1
    client: int = 0
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """Held-out data, for what a defense measures besides; both make their batches anew each call.

    clean: test examples with their labels. triggered: triggered ones labelled with the target; None without a backdoor.
    """

    clean: Callable[[], Iterator[Batch]]
    triggered: Callable[[], Iterator[Batch]] | None = None


@dataclass(frozen=True)
class RoundUpdates:
    """What the server holds of one round; rows are clients in ascending order.

    updates: (N, D) client minus global. num_examples: (N,) as the clients say. global_vector: (D,).
    weights: (N,) non-negative, the share each client has by now (before normalisation); starts as num_examples.
    accepted: (N,) bool. trainable: T, ``updates[:, :T]`` are trainable parameters, the rest running statistics.
    clients: the ids behind the rows. round: from 1. seed: of the run, for :meth:`generator`.
    server: the network and data at the server; None where only numbers are at hand.
    """

    updates: Tensor
    num_examples: Tensor
    global_vector: Tensor
    weights: Tensor
    accepted: Tensor
    trainable: int
    clients: tuple[int, ...]
    round: int = 1
    seed: int = 0
    layout: Layout | None = None
    server: Server | None = None

    @property
    def count(self) -> int:
        """N."""
        return int(self.updates.shape[0])

    def seen(self, scope: str) -> Tensor:
        """The part of the updates a method looks at: ``all`` (N, D) or ``trainable`` (N, T), as a view."""
        return self.updates if scope == "all" else self.updates[:, : self.trainable]

    def generator(self, purpose: str) -> torch.Generator:
        """The round's random stream for ``purpose``, on the updates' device."""
        return streams.generator(self.seed, "defense", purpose, self.round, device=self.updates.device)

    def mean_weights(self) -> Tensor:
        """(N,) the weights of accepted clients, normalised to sum 1; all zero if nobody is accepted."""
        kept = torch.where(self.accepted, self.weights, torch.zeros_like(self.weights))
        total = kept.sum()
        return kept / total if total > 0 else torch.zeros_like(kept)


@dataclass(frozen=True)
class Screening:
    """What a stage thought of the clients.

    accepted: (N,) bool or None (everybody). weights: (N,) new weights or None (unchanged).
    scores: name → (N,), larger is more suspicious (AUROC is computed that way).
    """

    accepted: Tensor | None = None
    weights: Tensor | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregated:
    """What an aggregating stage made.

    vector: (D,) the aggregated update. weights: (N,) share of each client in it, summing to 1.
    """

    vector: Tensor
    weights: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict)


class Defense(Plugin):
    """One stage of the server's pipeline; see the module for the hooks.

    ``state`` is everything a stage keeps from round to round: tensors, numbers, strings, lists of these, and
    mappings with keys of text. It is checkpointed; a stage keeps nothing elsewhere, and keeps clones: the memory
    of ``round.updates`` is used again in the next round. In a resumed run, too, its tensors lie on the
    device of the updates.

    min_clients: the least number of updates the method can work on.
    needs_network: whether it runs the network at the server. needs_data: whether it needs ``server_data``.
    """

    kind: ClassVar[str] = "defense"
    min_clients: ClassVar[int] = 1
    needs_network: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self.state: State = {}

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        """The least number of clients a round needs with these parameters."""
        return cls.min_clients

    @classmethod
    def aggregates(cls) -> bool:
        """Whether the stage brings its own aggregation rule."""
        return cls.aggregate is not Defense.aggregate

    def screen(self, round: RoundUpdates) -> Screening:
        """Weigh or reject clients; sees the updates as they came from the stage before."""
        return Screening()

    def transform(self, round: RoundUpdates) -> Tensor:
        """The updates (N, D) after this stage; ``round.accepted`` already holds its own verdict.

        Return ``round.updates`` itself to leave them alone; never change it in place.
        """
        return round.updates

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        """Combine the accepted updates: by default their weighted mean (FedAvg)."""
        weights = round.mean_weights()
        return Aggregated(weights @ round.updates, weights)

    def finish(self, vector: Tensor, round: RoundUpdates) -> Tensor:
        """The aggregated update (D,) after this stage."""
        return vector

    def broadcast(self, vector: Tensor, server: Server) -> Tensor:
        """The model (D,) to send out in place of the global one; the round's updates are relative to it."""
        return vector

    def client_batch(self, batch: Batch, context: HonestContext) -> Batch:
        """The batch an honest client trains on; keeps nothing but ``context.memory``."""
        return batch

    def client_gradient(self, gradient: Tensor, weights: Tensor, context: HonestContext) -> None:
        """Change an honest client's gradient (T,) in place, before weight decay and momentum."""

    def client_update(self, update: Tensor, context: HonestContext) -> Tensor:
        """The update (D,) an honest client sends."""
        return update

    @classmethod
    def client_side(cls) -> bool:
        """Whether honest clients do something for it."""
        hooks = ("client_batch", "client_gradient", "client_update")
        return any(getattr(cls, hook) is not getattr(Defense, hook) for hook in hooks)

    def evaluate(self, vector: Tensor, held_out: HeldOut, server: Server) -> dict[str, float]:
        """Numbers to record of the global model (D,) besides the usual ones, by name; called when it is evaluated."""
        return {}


def require(stage: Defense, server: Server | None) -> Server:
    """The server, if it has what the stage needs.

    Raises
    ------
    RunError: there is no network, or no data of the server's.
    """
    if server is None:
        raise RunError(f"the defense {stage.name!r} runs the network at the server, and there is none (give server=)")
    if stage.needs_data and server.data is None:
        raise RunError(
            f"the defense {stage.name!r} needs data at the server; set some aside: server_data: {{examples: 100}}"
        )
    return server
