"""FLDetector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defenses._clustering import count_clusters, kmeans, seed_of
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import columns
from fedsim.errors import Problem
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class FldetectorParameters(Parameters):
    window: int = parameter(10, "N: rounds in the L-BFGS memory, and distances in a score", ge=1)
    warm_up: int = parameter(50, "rounds before the first one that is scored; at least window + 1 pass anyway", ge=0)
    max_clusters: int = parameter(7, "largest number of clusters the gap statistic tries", ge=2)
    references: int = parameter(10, "uniform reference sets of the gap statistic", ge=1)
    removal: str = parameter(
        "for_good",
        "flagged clients leave for good and detection ends, sit out the round, or are only scored",
        choices=("for_good", "this_round", "never"),
    )
    weighted: bool = parameter(False, "weigh clients by their examples; false: all the same, as the official code")
    scope: str = parameter(
        "trainable", "what is predicted: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("fldetector")
class Fldetector(Defense):
    r"""Predict every client's update from its last one and flag those that keep surprising.

    With w the global model, ḡ the mean update, Ĥ the L-BFGS Hessian (Byrd, Nocedal and Schnabel's compact form)
    of the last N differences of w and of ḡ, client i's update of round t is predicted and missed by

    .. math:: \hat g_i^t = g_i^{t-1} + \hat H^t (w_t - w_{t-1}), \qquad
              d_i^t = \lVert \hat g_i^t - g_i^t \rVert_2 \Big/ \sum_j \lVert \hat g_j^t - g_j^t \rVert_2

    The score is the mean of a client's last N distances. When the gap statistic sees more than one cluster in
    the scores, 2-means splits the clients and the cluster of the higher mean is flagged. As in the official
    code the clients are averaged unweighted (``weighted``), and so is ḡ, over those who stay.

    ``removal: for_good``, the paper's: the flagged never return, and detection ends; the paper then trains
    anew, which is left to the user. The official code averages the references before the logarithm of the gap
    statistic; here it is the standard one. Updates stand for gradients: the rule does not notice a common
    factor, not even −lr. A singular L-BFGS system is solved by least squares.

    **It needs clients that come back**: a distance takes the client's update of the round just before, so a
    client that was absent then gets none, and scores 0, untested, until it has one. Scoring starts after
    ``warm_up`` rounds and at the earliest in round window + 2, and every scored round is tested. The authors' code
    starts after 50 rounds on MNIST, where its attack begins too, and after 20 on CIFAR-10, where it also waits for ten
    distances: a run shorter than that flags nobody, and its config is refused; ``warm_up`` is the parameter to turn.

    It also needs many: the authors have 100 clients in every round, 28 of them malicious. With 20 clients, ten a round
    and two malicious from round 8 to 20 (``window: 5, warm_up: 0``, handwritten digits, one seed), the two had the
    highest scores in 8 of 12 rounds, and yet the gap statistic never saw two clusters; with nobody malicious it
    flagged three to five honest clients in 3 of 24 rounds. ``removal: never`` records the scores alone.

    Cost: O(window·N·D) time. The state holds (N + 2·window + 2)·D numbers, in the updates' precision.
    """

    paper = "Zhang et al., FLDetector: Defending FL Against Model Poisoning Attacks, KDD 2022, arXiv 2207.09209"
    cost = "O(window · N D) time, (N + 2 · window + 2) D numbers of state"
    Parameters = FldetectorParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        first, rounds = max(parameters.warm_up, parameters.window + 1) + 1, experiment.federation.rounds
        if first <= rounds:
            return []
        key = "warm_up" if parameters.warm_up > parameters.window + 1 else "window"
        message = (
            f"scores nobody before round {first}, and federation.rounds is {rounds}; lower it, or play more rounds"
        )
        return [Problem(key, message)]

    def screen(self, round: RoundUpdates) -> Screening:
        p, state = self.parameters, self.state
        history: dict[str, list[float]] = state.setdefault("distances", {})
        removed: list[int] = state.setdefault("removed", [])
        if not removed:
            self.measure(round, history)
        keys = [str(client) for client in round.clients]
        means = [sum(history[key]) / len(history[key]) if history.get(key) else 0.0 for key in keys]
        scores = torch.tensor(means, dtype=torch.float64)
        tested = state["scored"] and not removed and p.removal != "never"
        flagged = self.flagged(scores, [row for row, key in enumerate(keys) if key in history], round) if tested else []
        if flagged and p.removal == "for_good":
            removed.extend(round.clients[row] for row in flagged)
            for name in ("vector", "mean", "updates", "steps", "changes"):
                state.pop(name, None)
        gone = {round.clients[row] for row in flagged} | set(removed)
        accepted = torch.tensor([client not in gone for client in round.clients], device=round.updates.device)
        weights = round.weights if p.weighted else torch.ones_like(round.weights)
        if not removed:
            self.remember(round, torch.where(accepted, weights, 0))
        return Screening(accepted, weights, {"score": scores.to(round.updates.device)})

    def measure(self, round: RoundUpdates, history: dict[str, list[float]]) -> None:
        """Append this round's distances to the history; sets ``state["scored"]``."""
        p, state, rows = self.parameters, self.state, round.seen(self.parameters.scope)
        state["scored"] = False
        if state.get("rounds", 0) < p.warm_up or len(state.get("steps", ())) < p.window:
            return
        last = {client: row for row, client in enumerate(state["clients"])}
        here = [row for row, client in enumerate(round.clients) if client in last]
        if not here:
            return
        before = [last[round.clients[row]] for row in here]
        base = round.global_vector[: rows.shape[1]]
        sigma, of_steps, of_changes = hessian_product(state["steps"], state["changes"], state["vector"], base)
        squares = torch.zeros(len(here), dtype=torch.float64, device=rows.device)
        start = 0
        for block in columns(rows):
            part = slice(start, start + block.shape[1])
            predicted = state["updates"][before, part].double()
            predicted += sigma * (base[part].double() - state["vector"][part].double())
            predicted += of_steps @ state["steps"][:, part].double() + of_changes @ state["changes"][:, part].double()
            squares += (block[here].double() - predicted).square().sum(dim=1)
            start = part.stop
        distances = squares.sqrt()
        total = float(distances.sum())
        for row, distance in zip(here, distances.tolist(), strict=True):
            key = str(round.clients[row])
            history[key] = [*history.get(key, []), distance / total if total > 0 else 0.0][-p.window :]
        state["scored"] = True

    def flagged(self, scores: Tensor, known: list[int], round: RoundUpdates) -> list[int]:
        """The rows of the suspicious cluster among the ``known`` ones; none if their scores form one cluster."""
        p, seed = self.parameters, seed_of(round.generator("fldetector"))
        points = scores[known]
        if count_clusters(points[:, None].numpy(), most=p.max_clusters, references=p.references, seed=seed) < 2:
            return []
        labels = torch.from_numpy(kmeans(points[:, None].numpy(), 2, seed=seed)[0])
        worse = int(points[labels == 1].mean() > points[labels == 0].mean())
        return [row for row, label in zip(known, labels.tolist(), strict=True) if label == worse]

    def remember(self, round: RoundUpdates, weights: Tensor) -> None:
        """Keep what the next round needs: clones, for the memory of the updates is used again."""
        state, rows = self.state, round.seen(self.parameters.scope)
        base = round.global_vector[: rows.shape[1]]
        mean = (weights / weights.sum()) @ rows if bool(weights.sum() > 0) else torch.zeros_like(base)
        if "vector" in state:
            for name, step in (("steps", base - state["vector"]), ("changes", mean - state["mean"])):
                kept = [state[name][max(0, len(state[name]) + 1 - self.parameters.window) :]] if name in state else []
                state[name] = torch.cat([*kept, step[None]])
        state.pop("updates", None)  # before its successor is made: it is as large as the updates
        state["vector"], state["mean"], state["updates"] = base.clone(), mean, rows.clone()
        state["clients"] = list(round.clients)
        state["rounds"] = state.get("rounds", 0) + 1


def hessian_product(steps: Tensor, changes: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors σ, a (m,), b (m,) float64 with Ĥv = σv + aS + bY for v = stop − start.

    steps: S (m, T), oldest first. changes: Y (m, T). Ĥ = σI − [σSᵀ Yᵀ] M⁻¹ [σSᵀ Yᵀ]ᵀ with σ = ⟨s, y⟩ / ⟨s, s⟩
    of the newest pair and M = [[σSSᵀ, L], [Lᵀ, −D]], D and L the diagonal and what is below it of SYᵀ. Rows
    and columns of M are scaled alike, which leaves Ĥv unchanged. A model that did not move gives Ĥ = 0.
    """
    m = steps.shape[0]
    ss, sy, sv, yv = (torch.zeros(m, k, dtype=torch.float64, device=steps.device) for k in (m, m, 1, 1))
    yy = torch.zeros(m, dtype=torch.float64, device=steps.device)
    for s, y, v0, v1 in zip(columns(steps), columns(changes), columns(start[None]), columns(stop[None]), strict=True):
        s, y, v = s.double(), y.double(), v1.double() - v0.double()
        ss, sy, sv, yv, yy = ss + s @ s.T, sy + s @ y.T, sv + s @ v.T, yv + y @ v.T, yy + y.square().sum(dim=1)
    sigma = torch.where(ss[-1, -1] > 0, sy[-1, -1] / ss[-1, -1], torch.zeros_like(ss[-1, -1]))
    if not bool(sigma != 0):
        return sigma, torch.zeros_like(yy), torch.zeros_like(yy)
    lower = torch.tril(sy, diagonal=-1)
    matrix = torch.cat([torch.cat([sigma * ss, lower], dim=1), torch.cat([lower.T, -sy.diagonal().diag()], dim=1)])
    size = torch.cat([(sigma.abs() * ss.diagonal()).sqrt(), (yy / sigma.abs()).sqrt()])
    scale = torch.where(size > 0, 1 / size, torch.zeros_like(size))[:, None]
    right = scale * torch.cat([sigma * sv, yv])
    solved = torch.linalg.lstsq((scale * matrix * scale.T).cpu(), right.cpu(), driver="gelsd").solution
    factors = (scale * solved.to(steps.device)).squeeze(1)
    return sigma, -sigma * factors[:m], -factors[m:]
