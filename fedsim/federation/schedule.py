"""Who takes part in which round, and who of them is malicious: fixed before the run starts.

The whole plan is a function of the config and the seed. Drop-out, stragglers and partial participation are part
of it, not accidents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedsim.config import Config
from fedsim.errors import Problem
from fedsim.plugins import Parameters, Plugin, get, parameter, register
from fedsim.streams import numpy_generator


@dataclass(frozen=True)
class RoundPlan:
    """One round. All client lists are ascending.

    replying: clients whose reply is used. dropped: never reply. stragglers: reply too late.
    malicious: client → running number of the attacker (which part of a distributed trigger it stamps).
    """

    round: int
    replying: tuple[int, ...]
    dropped: tuple[int, ...]
    stragglers: tuple[int, ...]
    malicious: dict[int, int]


class Schedule(Plugin):
    """When malicious clients take part."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def attackers(self, rounds: int, clients: int, seed: int) -> Attackers:
        """Who attacks when."""


@dataclass(frozen=True)
class Attackers:
    """rounds: attack rounds (empty where ``population`` decides). count: malicious clients in each.

    identities: fixed ids that take the places of the first sampled clients in an attack round; None: whoever was
    sampled first is malicious that round. population: a compromised share of the clients, malicious whenever one
    is sampled.
    """

    rounds: frozenset[int]
    count: int = 1
    identities: tuple[int, ...] | None = None
    population: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AttackersParameters(Parameters):
    attackers: int = parameter(1, "malicious clients in an attack round", ge=1)
    fixed: bool = parameter(
        False, "false: whoever is sampled first is malicious that round; true: the same clients every time"
    )


class RoundSchedule(Schedule):
    """Base of the schedules that name rounds."""

    @abstractmethod
    def attack_rounds(self, rounds: int, seed: int) -> Sequence[int]:
        """The rounds, from 1, in which malicious clients take part."""

    def attackers(self, rounds: int, clients: int, seed: int) -> Attackers:
        p = self.parameters
        identities = None
        if p.fixed:
            drawn = numpy_generator(seed, "attackers").permutation(clients)[: p.attackers]
            identities = tuple(int(client) for client in drawn)
        return Attackers(frozenset(self.attack_rounds(rounds, seed)), p.attackers, identities)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n, found = experiment.federation.clients_per_round, _window_problems(parameters, experiment)
        if parameters.attackers > n:
            found.append(
                Problem("attackers", f"{parameters.attackers} do not fit in a round of {n} (clients_per_round)")
            )
        return found


@dataclass(frozen=True)
class WindowParameters(AttackersParameters):
    start: int = parameter(1, "first round of the window", ge=1)
    stop: int | None = parameter(None, "last round of the window, included; null: the last of the run", ge=1)


@dataclass(frozen=True)
class SingleShotParameters(AttackersParameters):
    rounds: list[int] = parameter([1], "the attack rounds, from 1", ge=1)


@register("single_shot")
class SingleShot(RoundSchedule):
    """Attack in the listed rounds and never again."""

    paper = "Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020; DBA, ICLR 2020"
    Parameters = SingleShotParameters

    def attack_rounds(self, rounds: int, seed: int) -> Sequence[int]:
        return list(self.parameters.rounds)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        found = super().problems(parameters, experiment)
        late = [r for r in parameters.rounds if r > experiment.federation.rounds]
        if late:
            found.append(Problem("rounds", f"{late} lie beyond the last round, {experiment.federation.rounds}"))
        if not parameters.rounds:
            found.append(Problem("rounds", "list at least one round"))
        return found


@dataclass(frozen=True)
class FixedFrequencyParameters(WindowParameters):
    every: int = parameter(10, "rounds from one attack to the next", ge=1)


@register("fixed_frequency")
class FixedFrequency(RoundSchedule):
    """Attack every few rounds of a window: start, start + every, …"""

    paper = "Wang et al., Attack of the Tails, NeurIPS 2020"
    Parameters = FixedFrequencyParameters

    def attack_rounds(self, rounds: int, seed: int) -> Sequence[int]:
        p = self.parameters
        return range(p.start, (p.stop or rounds) + 1, p.every)


@dataclass(frozen=True)
class RandomRoundsParameters(WindowParameters):
    count: int = parameter(100, "number of attack rounds", ge=1)


@register("random_rounds")
class RandomRounds(RoundSchedule):
    """Attack in a random draw of rounds of a window (Anticipate's: 100 of the first 500)."""

    paper = "Wen et al., Thinking Two Moves Ahead, arXiv 2210.09305"
    Parameters = RandomRoundsParameters

    def attack_rounds(self, rounds: int, seed: int) -> Sequence[int]:
        p = self.parameters
        window = np.arange(p.start, (p.stop or rounds) + 1)
        drawn = numpy_generator(seed, "schedule").permutation(window)[: p.count]
        return [int(r) for r in np.sort(drawn)]

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        found = super().problems(parameters, experiment)
        length = (parameters.stop or experiment.federation.rounds) - parameters.start + 1
        if not found and parameters.count > length:
            found.append(Problem("count", f"{parameters.count} rounds cannot be drawn from a window of {length}"))
        return found


@register("continuous")
class Continuous(RoundSchedule):
    """Attack in every round of a window."""

    Parameters = WindowParameters

    def attack_rounds(self, rounds: int, seed: int) -> Sequence[int]:
        return range(self.parameters.start, (self.parameters.stop or rounds) + 1)


@dataclass(frozen=True)
class PoolParameters(Parameters):
    fraction: float = parameter(0.1, "compromised share of the population (at least one client)", gt=0, le=1)
    start: int = parameter(1, "first round in which compromised clients attack", ge=1)
    stop: int | None = parameter(None, "last such round, included; null: the last of the run", ge=1)


@register("pool")
class Pool(Schedule):
    """A compromised share of the population attacks whenever one of them is sampled."""

    Parameters = PoolParameters

    def attackers(self, rounds: int, clients: int, seed: int) -> Attackers:
        p = self.parameters
        size = max(1, round(p.fraction * clients))
        drawn = np.sort(numpy_generator(seed, "attackers").permutation(clients)[:size])
        window = frozenset(range(p.start, (p.stop or rounds) + 1))
        return Attackers(window, population=tuple(int(client) for client in drawn))

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return _window_problems(parameters, experiment)


def _window_problems(parameters: Any, experiment: Any) -> list[Problem]:
    """What is wrong with a schedule's ``start`` and ``stop``, where it has them."""
    found, rounds = [], experiment.federation.rounds
    start, stop = getattr(parameters, "start", 1), getattr(parameters, "stop", None)
    if stop is not None and stop > rounds:
        found.append(Problem("stop", f"{stop} lies beyond the last round; federation.rounds is {rounds}"))
    if start > (stop or rounds):
        found.append(Problem("start", f"{start} lies behind the window's end, {stop or rounds}"))
    return found


def plan(config: Config) -> list[RoundPlan]:
    """The plan of every round of a run.

    The clients sampled, dropped and late in a round do not depend on the adversary, so that a run and its clean
    twin, or two attacks, meet the same clients. An attacker that was given a place always replies.
    """
    f, seed = config.federation, config.seed
    attackers = Attackers(frozenset())
    if config.attack is not None and config.attack.name != "none":
        schedule: Schedule = config.attack.schedule.create()
        attackers = schedule.attackers(f.rounds, f.clients, seed)
    submissions = 0
    result = []
    for number in range(1, f.rounds + 1):
        rng = numpy_generator(seed, "sample", number)
        sampled = [int(client) for client in rng.permutation(f.clients)[: f.clients_per_round]]
        lost = dict(zip(sampled, rng.random(len(sampled)), strict=True))
        late = dict(zip(sampled, rng.random(len(sampled)), strict=True))
        malicious: dict[int, int] = {}
        if number in attackers.rounds:
            if attackers.population is not None:
                numbers = {client: i for i, client in enumerate(attackers.population)}
                malicious = {client: numbers[client] for client in sampled if client in numbers}
            else:
                if attackers.identities is not None:
                    sampled = _with(sampled, attackers.identities)
                first = list(attackers.identities or sampled[: attackers.count])
                malicious = {client: submissions + i for i, client in enumerate(first)}
        placed = malicious if attackers.population is None else {}
        dropped = {c for c in sampled if c not in placed and lost.get(c, 1.0) < f.dropout}
        slow = {c for c in sampled if c not in placed and c not in dropped and late.get(c, 1.0) < f.stragglers}
        malicious = {c: i for c, i in sorted(malicious.items()) if c not in dropped | slow}
        submissions += len(malicious)
        replying = tuple(sorted(set(sampled) - dropped - slow))
        result.append(RoundPlan(number, replying, tuple(sorted(dropped)), tuple(sorted(slow)), malicious))
    return result


def _with(sampled: list[int], identities: tuple[int, ...]) -> list[int]:
    """The sample with the fixed attackers in it, in the places of the first sampled clients."""
    others = [client for client in sampled if client not in identities]
    return [*identities, *others][: len(sampled)]


def plan_problems(config: Config, rounds: Sequence[RoundPlan]) -> list[Problem]:
    """Rounds in which drop-out leaves fewer clients than a stage of the defense needs."""
    if not rounds:
        return []
    least = min(rounds, key=lambda r: len(r.replying))
    found = []
    for i, stage in enumerate(config.defense):
        cls: Any = get("defense", stage.name)
        need = cls.required_clients(stage.parameters)
        if len(least.replying) < need:
            found.append(
                Problem(
                    f"defense.{i}.name",
                    f"{stage.name!r} needs at least {need} clients, but in round {least.round} drop-out and stragglers "
                    f"leave {len(least.replying)}; lower federation.dropout or raise federation.clients_per_round",
                )
            )
    return found
