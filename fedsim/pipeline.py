"""The defense pipeline: the stages of :mod:`fedsim.defense` run over the updates of one round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.defense import Defense, RoundUpdates, require
from fedsim.errors import RunError


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
            full = torch.full((total,), float("nan"), dtype=torch.float64, device=alive.device)
            full[alive] = value.to(full)
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
        vector, shares = combined.vector, combined.weights.to(alive.device)
        weights[alive] = shares.to(dtype)
        accepted[alive] = round.accepted & (shares > 0) if combiner.aggregates() else round.accepted
        for stage, prefix in zip(stages, prefixes(stages), strict=True):
            vector = stage.finish(vector, round)
            _check(prefix, "finish", vector, round.updates.shape[1:])
    return Aggregation(vector, weights, accepted, scores, round.global_vector)


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
