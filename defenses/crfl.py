"""CRFL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.batch import Batch
from fedsim.defense import Defense, HeldOut, RoundUpdates, Server
from fedsim.distances import norms
from fedsim.errors import Problem
from fedsim.plugins import Parameters, parameter, register

_LEAST = 1e-8
"""Bounds of shares stay this far from 0 and 1."""


@dataclass(frozen=True)
class CrflParameters(Parameters):
    rho: float = parameter(15.0, "largest L2 norm ρ of the trainable part of the global model", gt=0)
    rho_start: float | None = parameter(None, "ρ begins here instead: min(rho, rho_start + rho_growth · round)", gt=0)
    rho_growth: float = parameter(0.1, "what ρ grows by each round, where rho_start is given", ge=0)
    sigma: float = parameter(0.01, "standard deviation σ of the noise on the model, in training and in the votes", gt=0)
    copies: int = parameter(100, "noisy copies M of the model that vote; the paper uses 1000", ge=1)
    alpha: float = parameter(0.001, "probability α that a bound on a share is wrong", gt=0, lt=1)
    examples: int = parameter(200, "held-out examples voted on, and as many triggered ones", ge=1)
    every: int = parameter(10, "rounds between votes; the last round always votes", ge=1)
    radii: list[float] = parameter([0.0, 0.01, 0.1, 1.0], "radii at which certified accuracy is recorded", ge=0)
    attackers: int = parameter(1, "R of the certificate: malicious clients of the attack round", ge=1)
    attack_round: int = parameter(1, "t_adv of the certificate: the round of the attack", ge=1)
    boost: float = parameter(1.0, "γ of the certificate: factor on a malicious update", gt=0)
    poisoned: float = parameter(0.5, "q/n of the certificate: poisoned share of a malicious client's batch", gt=0, le=1)
    steps: int = parameter(30, "τ of the certificate: local steps of a malicious client", ge=1)
    lipschitz: float | None = parameter(
        None, "L of the certificate; null: as for logistic regression, and no certificate for other networks", gt=0
    )


def shares(votes: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(winner, its share, the share of the second), each (B,), of votes int64 (M, B). The lower class wins a tie."""
    counts = torch.zeros(votes.shape[1], classes, dtype=torch.float64, device=votes.device)
    counts.scatter_add_(1, votes.T, torch.ones_like(votes.T, dtype=torch.float64))
    first, winner = counts.max(1).values, counts.argmax(1)
    second = counts.scatter(1, winner[:, None], 0.0).max(1).values
    return winner, first / len(votes), second / len(votes)


def bounds(first: Tensor, second: Tensor, copies: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Hoeffding's lower bound on the winner's share and upper bound on the second's, each wrong at most α."""
    slack = math.sqrt(math.log(1 / alpha) / (2 * copies))
    return (first - slack).clamp(_LEAST, 1 - _LEAST), (second + slack).clamp(_LEAST, 1 - _LEAST)


def radius(lower: Tensor, upper: Tensor, sigma: float, lipschitz: float, pull: float, attackers: int) -> Tensor:
    """(B,) certified radius; NaN where the bounds do not separate the classes, for then nothing is certified.

    pull: p γ τ η q/n of one attacker, all alike, times the root of the contraction.
    """
    apart = (lower.sqrt() - upper.sqrt()).square()
    squared = -torch.log1p(-apart) * sigma**2 / (2 * attackers**2 * lipschitz**2 * pull**2)
    return torch.where(lower > upper, squared.sqrt(), torch.nan)


def evenly(batches: Callable[[], Iterator[Batch]], count: int) -> Batch:
    """``count`` of the examples, evenly spaced over all of them (all if there are fewer): the same each time."""
    total = sum(len(batch.labels) for batch in batches())
    wanted = torch.arange(min(count, total)) * total // max(min(count, total), 1)
    kept, start = [], 0
    for batch in batches():
        rows = wanted[(wanted >= start) & (wanted < start + len(batch.labels))] - start
        kept.append(Batch(*(tensor[rows.to(tensor.device)] for tensor in batch[:2])))
        start += len(batch.labels)
    return Batch(torch.cat([b.inputs for b in kept]), torch.cat([b.labels for b in kept]))


@register("crfl")
class Crfl(Defense):
    r"""Clip the global model, add noise to it, and let noisy copies of it vote with a certificate.

    After each round t the aggregated model w (its trainable part, not the update) is clipped; it gets noise before it
    is sent into the next, so what is evaluated and kept is clipped and without noise, as in Algorithm 1 and the code:

    .. math:: w \leftarrow w \min\left(1, \frac{\rho_t}{\lVert w \rVert_2 + 10^{-6}}\right), \qquad
              w \leftarrow w + N(0, \sigma^2 I)

    ρ = 15 and σ = 0.01 as on MNIST, where the code lets ρ grow from 2 by 0.1 a round (``rho_start: 2``). ρ must fit
    the model: the recorded ``norm`` says how long it is. Running statistics stay as they are (the code noises all).

    In evaluation, every ``every`` rounds, M copies w + N(0, σ² I) vote on held-out examples. Recorded of the voted
    classes: ``accuracy``, ``asr``, and ``undecided``, the share of clean examples for which Hoeffding's bounds
    p_A ≥ p̂_A − s, p_B ≤ p̂_B + s, s = √(ln(1/α) / 2M), leave p_A ≤ p_B possible. For the others (Theorem 1)

    .. math:: r^2 = \frac{-\ln(1 - (\sqrt{p_A} - \sqrt{p_B})^2)\, \sigma^2}
                {2 R L^2 \sum_{i=1}^{R} (p_i \gamma \tau \eta\, q/n)^2
                 \prod_{t=t_{adv}+1}^{T} (2\Phi(\rho_t/\sigma) - 1)}

    is the length of backdoor perturbation, of what enters the linear layer, up to which the vote would be the same
    without the attack: ``radius`` is its mean, with 0 for an undecided example, and ``certified_<r>`` the share of
    examples voted right with a radius of at least r. R, γ, τ, q/n and t_adv are *assumed* of the adversary, by
    parameter; η is the run's learning rate in round t_adv, p_i the largest share a client has in the last aggregate.

    The theorem is about plain SGD and an L with ‖∇ℓ(w; z) − ∇ℓ(w; z')‖ ≤ L ‖z − z'‖; for logistic regression on
    inputs of at most length 1, L = √(2 + 2ρ + ρ²) at t_adv. Inputs of length B scaled to 1 and weights by B are the
    same model: L = √(2 + 2Bρ + B²ρ²), B the largest length (with the bias's 1; not below 1) among the examples voted
    on. For other networks, or with momentum, radii are not recorded, unless ``lipschitz`` says L.

    Not repeated of the code: it certifies where p_A's bound is below p_B's (the difference is squared), calls
    p_A = 1 a radius of 100000, and fixes ρ at 3 in L, the schedule of ρ, and 60000 examples.

    No scores. Cost: O(D) a round; M passes over the voted examples and O(D) memory every ``every`` rounds.
    """

    paper = "Xie et al., CRFL: Certifiably Robust Federated Learning against Backdoor Attacks, arXiv 2106.08283"
    cost = "O(D) a round; copies passes over the voted examples every few rounds"
    tasks = ("vision", "sentiment")
    Parameters = CrflParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        found = []
        if experiment.federation.server_lr != 1:
            found.append(Problem("", "clips the new global model; set federation.server_lr to 1"))
        if parameters.lipschitz is not None and experiment.training.momentum > 0:
            message = "the certificate is for plain SGD; set training.momentum to 0, or this to null"
            found.append(Problem("lipschitz", message))
        return found

    def bound(self, round: int) -> float:
        """ρ of a round."""
        p = self.parameters
        return float(p.rho if p.rho_start is None else min(p.rho, p.rho_start + p.rho_growth * round))

    def finish(self, vector: Tensor, round: RoundUpdates) -> Tensor:
        self.state["share"] = float(round.mean_weights().max())
        kept, bound = round.trainable, self.bound(round.round)
        before = round.global_vector[:kept]
        model = before + vector[:kept]
        length = float(norms(model[None]))
        if length <= bound:
            return vector
        clipped = vector.clone()
        clipped[:kept] = model * (bound / (length + 1e-6)) - before
        return clipped

    def broadcast(self, vector: Tensor, server: Server) -> Tensor:
        if server.round == 1:
            return vector
        return self._noised(vector, server, server.generator("crfl"))

    def _noised(self, vector: Tensor, server: Server, source: torch.Generator) -> Tensor:
        trainable = server.model.layout.trainable
        noise = torch.randn(trainable, generator=source, dtype=torch.float64)
        noisy = vector.clone()
        noisy[:trainable] += (self.parameters.sigma * noise).to(vector)
        return noisy

    def evaluate(self, vector: Tensor, held_out: HeldOut, server: Server) -> dict[str, float]:
        p = self.parameters
        found = {"norm": float(norms(vector[None, : server.model.layout.trainable]))}
        if server.round % p.every and server.round != server.rounds:
            return found
        clean = evenly(held_out.clean, p.examples)
        triggered = None if held_out.triggered is None else evenly(held_out.triggered, p.examples)
        inputs = clean.inputs if triggered is None else torch.cat([clean.inputs, triggered.inputs])
        source = server.generator("crfl votes")
        votes = torch.stack(
            [server.outputs(self._noised(vector, server, source), inputs).argmax(1) for _ in range(p.copies)]
        )
        winner, first, second = shares(votes, server.classes)
        count = len(clean.labels)
        right = winner[:count] == clean.labels
        found["accuracy"] = float(right.double().mean())
        if triggered is not None and len(triggered.labels) > 0:
            found["asr"] = float((winner[count:] == triggered.labels).double().mean())
        lower, upper = bounds(first[:count], second[:count], p.copies, p.alpha)
        found["undecided"] = float((lower <= upper).double().mean())
        lipschitz = self.lipschitz(vector, clean.inputs, server)
        if lipschitz is not None:
            certified = radius(lower, upper, p.sigma, lipschitz, self.pull(server), p.attackers)
            found["radius"] = float(certified.nan_to_num(nan=0.0).mean())
            for r in p.radii:
                found[f"certified_{r:g}"] = float((right & (certified >= r)).double().mean())
        return found

    def lipschitz(self, vector: Tensor, inputs: Tensor, server: Server) -> float | None:
        """L, or None where the theorem says nothing."""
        p = self.parameters
        if server.settings.momentum > 0 or server.round < p.attack_round or "share" not in self.state:
            return None
        if p.lipschitz is not None:
            return float(p.lipschitz)
        if not any(isinstance(module, torch.nn.Linear) for module in server.model.module.modules()):
            return None
        weight, bias = server.head()
        if weight.size + (0 if bias is None else bias.size) != server.model.layout.trainable:
            return None
        squared = server.features(vector, inputs).double().square().sum(1).max() + (bias is not None)
        reach = max(1.0, math.sqrt(float(squared))) * self.bound(p.attack_round)
        return math.sqrt(2 + 2 * reach + reach**2)

    def pull(self, server: Server) -> float:
        """What one attacker's perturbation of length 1 can move the model by, over L, with the later rounds' part."""
        p, s = self.parameters, server.settings
        lr = s.lr * s.lr_decay ** (p.attack_round - server.round)
        # 2Φ(x) − 1 = erf(x / √2)
        later = range(p.attack_round + 1, server.round + 1)
        contraction = math.prod(math.erf(self.bound(t) / p.sigma / math.sqrt(2)) for t in later)
        return float(self.state["share"] * p.boost * p.steps * lr * p.poisoned * math.sqrt(contraction))
