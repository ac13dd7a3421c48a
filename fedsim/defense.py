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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
    of ``round.updates`` is used again in the next round.

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


@dataclass(frozen=True)
class Aggregation:
    """What a pipeline made of one round.

    vector: (D,) the aggregated update; the new global model is ``global_vector + η · vector``.
    weights: (N,) share of each client, summing to 1 (0 if the round was rejected whole).
    accepted: (N,) bool. scores: ``stage.score`` → (N,).
    """

    vector: Tensor
    weights: Tensor
    accepted: Tensor
    scores: dict[str, Tensor]
    global_vector: Tensor

    @property
    def model(self) -> Tensor:
        """(D,) the new global model for a server learning rate of 1."""
        return self.global_vector + self.vector


class TooFewClients(RunError):
    """A stage is left fewer updates than it can work on."""


def apply_pipeline(stages: Sequence[Defense], round: RoundUpdates) -> Aggregation:
    """Run the stages over one round.

    A stage sees only the clients that no earlier stage rejected; scores of rejected clients are NaN from then
    on. If every client is rejected the aggregated update is zero: the global model stays.

    Raises
    ------
    TooFewClients: fewer clients are left than a stage needs.
    RunError: a stage returned a tensor of the wrong shape or not finite.
    """
    total, dtype = round.count, round.updates.dtype
    alive = torch.arange(total, device=round.updates.device)  # rows of the full round behind the current rows
    scores: dict[str, Tensor] = {}
    combiner, combiner_prefix = Defense(), ""

    def keep_scores(prefix: str, named: dict[str, Tensor]) -> None:
        for name, value in named.items():
            _check(prefix, f"score {name!r}", value, (round.count,), finite=False)
            full = torch.full((total,), float("nan"), dtype=torch.float64, device=value.device)
            full[alive] = value.to(torch.float64)
            scores[f"{prefix}.{name}"] = full

    for stage, prefix in zip(stages, prefixes(stages), strict=True):
        if stage.aggregates():
            combiner, combiner_prefix = stage, prefix
        alive, round = _drop_rejected(alive, round)
        if round.count == 0 and total > 0:
            break  # everybody is rejected: the model stays
        need = stage.required_clients(stage.parameters)
        if round.count < need:
            raise TooFewClients(
                f"round {round.round}: the defense {stage.name!r} needs at least {need} clients, {round.count} "
                f"are left; raise federation.clients_per_round, or lower the drop-out or an earlier stage's zeal"
            )
        if stage.needs_network or stage.needs_data:
            require(stage, round.server)
        screening = stage.screen(round)
        keep_scores(prefix, screening.scores)
        if screening.weights is not None:
            _check(prefix, "weights", screening.weights, (round.count,))
            round = replace(round, weights=screening.weights.to(dtype))
        if screening.accepted is not None:
            _check(prefix, "accepted", screening.accepted, (round.count,))
            round = replace(round, accepted=round.accepted & screening.accepted)
        updates = stage.transform(round)
        if updates is not round.updates:
            _check(prefix, "transform", updates, round.updates.shape)
        round = replace(round, updates=updates)
    weights = torch.zeros(total, dtype=dtype, device=round.updates.device)
    accepted = torch.zeros(total, dtype=torch.bool, device=round.updates.device)
    vector = torch.zeros_like(round.global_vector)
    if combiner.aggregates():
        alive, round = _drop_rejected(alive, round)
    if bool(round.accepted.any()):
        combined = combiner.aggregate(round)
        name = combiner_prefix or "fedavg"
        _check(name, "aggregate", combined.vector, round.updates.shape[1:])
        _check(name, "weights", combined.weights, (round.count,))
        keep_scores(name, combined.scores)
        vector = combined.vector
        weights[alive] = combined.weights.to(dtype)
        accepted[alive] = round.accepted & (combined.weights > 0) if combiner.aggregates() else round.accepted
        for stage, prefix in zip(stages, prefixes(stages), strict=True):
            vector = stage.finish(vector, round)
            _check(prefix, "finish", vector, round.updates.shape[1:])
    return Aggregation(vector, weights, accepted, scores, round.global_vector)


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


def _drop_rejected(alive: Tensor, round: RoundUpdates) -> tuple[Tensor, RoundUpdates]:
    if bool(round.accepted.all()):
        return alive, round
    rows = torch.nonzero(round.accepted).squeeze(1)
    kept = replace(
        round,
        updates=round.updates[rows],
        num_examples=round.num_examples[rows],
        weights=round.weights[rows],
        accepted=round.accepted[rows],
        clients=tuple(round.clients[int(row)] for row in rows),
    )
    return alive[rows], kept


def prefixes(stages: Sequence[Defense]) -> list[str]:
    """What each stage's scores are called by: its name, numbered where it stands more than once."""
    names = [stage.name for stage in stages]
    return [n if names.count(n) == 1 else f"{n}{names[: i + 1].count(n)}" for i, n in enumerate(names)]


def _check(stage: str, what: str, value: Tensor, shape: Sequence[int], *, finite: bool = True) -> None:
    if tuple(value.shape) != tuple(shape):
        raise RunError(f"defense {stage!r}: {what} has shape {tuple(value.shape)}, not {tuple(shape)}")
    if finite and value.numel() > 0 and not all(bool(torch.isfinite(end)) for end in torch.aminmax(value)):
        raise RunError(f"defense {stage!r}: {what} is not finite")
