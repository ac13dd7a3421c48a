"""Snowball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defenses._autoencoder import Autoencoder
from defenses._clustering import compact, kmeans
from defenses._layers import tensors
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import squared_distances
from fedsim.errors import Problem, RunError
from fedsim.layout import Entry
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class SnowballParameters(Parameters):
    furthest: int = parameter(5, "ct: k-means of a client starts at itself and its ct furthest others", ge=1)
    keep: float = parameter(0.1, "share p of the clients kept: the ⌈p·N⌉ with most votes", gt=0, le=1)
    layers: list[str] = parameter(
        [], "parts of the names of the tensors that vote; none: the first and the last weight matrix"
    )
    select: float | None = parameter(
        None,
        "M: share of the clients that the second stage elects in the end (code: 0.5); null: no second stage",
        gt=0,
        le=1,
    )
    step: float = parameter(
        0.05, "share of the clients that one pass of the second stage adds, at least one", gt=0, le=1
    )
    start: int = parameter(1, "first round with a second stage (code: 25 to 100, by data set)", ge=1)
    hidden: int = parameter(256, "width of the autoencoder", ge=1)
    latent: int = parameter(64, "size of its code", ge=1)
    epochs: int = parameter(270, "its first training, passes over the differences", ge=1)
    tuning: int = parameter(30, "its training before every pass", ge=0)
    tolerance: float = parameter(0.0, "stop k-means when centres move less; 0: when labels settle; code: 1e-4", ge=0)


@register("snowball")
class Snowball(Defense):
    r"""Let clients vote, layer by layer, for those they cluster with; then let the elected elect others like them.

    *Bottom up.* In every voting layer client i groups all clients' differences Δⱼ − Δᵢ by k-means, started at its own
    (zero) and its ``furthest`` largest ones, and gets the Calinski–Harabasz score CHᵢ of that grouping. All
    in i's own cluster receive (CHᵢ − min CH) / (max CH − min CH) votes (1 where all CH are equal), i itself
    too. Votes are summed over the layers; the ⌈keep·N⌉ clients with most (of equal ones the first) are elected.

    *Top down* (``select``). A variational autoencoder learns the differences σ(Δᵢ − Δⱼ) of the elected, σ the logistic
    function, over the voting layers. A candidate's error is the mean of ‖x − x̂‖² over its differences x to the elected,
    both ways round, and over 10 draws of the code. The ⌈step·N⌉ candidates of least error are elected, the autoencoder
    learns on, and so forth until int(select·N) are. The elected are averaged by examples.

    **Without ``select``**, the default, only the first stage acts (the authors' ``snowball_minus``, which the numbers
    cover): few clients are kept, and **colluders who are closer to one another than honest clients win the vote**, as
    in the authors' code. The second stage follows that code in sizes, loss (squared error + Kullback–Leibler), its
    log-variance through a softplus, Adam at 10⁻³ and batches of 8; its draws are the round's stream ``snowball``.
    Two elected are the least it can learn from: where the votes elect one, it begins with the two of most votes, where
    the code fails.

    The code votes with two named layers of each of its models, the first convolution and a last linear
    layer, hence the default of ``layers``. It stops k-means at scikit-learn's tolerance (10⁻⁴ of the mean
    variance), long before labels settle when one row is huge: ``tolerance: 0.0001`` repeats that. Without a
    layout the vector is one layer.

    Scores: ``score``, minus the votes; with a second stage ``turn``, the pass a client was elected in, 0 by votes, the
    last + 1 never. Needs ``furthest`` + 2 clients. Cost: O(N²·d) time for the d entries of the voting layers, then N
    runs of k-means on (N, N) points per layer, on the CPU; O(N²) memory beyond the updates. The second stage: with S
    elected S²/8 steps on 2·d·hidden weights in an epoch, and 32·d·hidden bytes: name small ``layers``.
    """

    paper = "Qin et al., Resisting Backdoor Attacks in FL via Bidirectional Elections, arXiv 2309.16456"
    cost = "O(N² d) time for d entries of the voting layers, k-means on the CPU; with select an autoencoder"
    Parameters = SnowballParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return int(parameters.furthest) + 2

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n, furthest = experiment.federation.clients_per_round, parameters.furthest
        if n >= furthest + 2:
            return []
        advice = f"use at most {n - 2}" if n >= 3 else "use more clients"
        return [Problem("furthest", f"{furthest + 1} clusters of {n} clients a round say nothing; {advice}")]

    def voting_layers(self, round: RoundUpdates) -> list[Entry]:
        entries, wanted = tensors(round), self.parameters.layers
        if round.layout is None:
            return entries
        if wanted:
            found = [entry for entry in entries if any(part in entry.name for part in wanted)]
            if not found:
                names = ", ".join(entry.name for entry in entries)
                raise RunError(f"snowball: no tensor is called like {wanted}; the model has {names}")
            return found
        matrices = [entry for entry in entries if entry.trainable and len(entry.shape) >= 2] or entries
        return matrices if len(matrices) < 2 else [matrices[0], matrices[-1]]

    def screen(self, round: RoundUpdates) -> Screening:
        votes = torch.zeros(round.count, dtype=torch.float64)
        for layer in self.voting_layers(round):
            votes += self.votes(round.updates[:, layer.start : layer.stop])
        ranked = votes.argsort(descending=True, stable=True).tolist()
        elected, scores = ranked[: math.ceil(self.parameters.keep * round.count)], {"score": -votes}
        target = int((self.parameters.select or 0) * round.count)
        if target > len(elected) and target >= 2 and round.round >= self.parameters.start:
            passes = self.elect(round, ranked[: max(2, len(elected))], target)
            elected = [client for turn in passes for client in turn]
            scores["turn"] = torch.full_like(votes, len(passes))
            for number, turn in enumerate(passes):
                scores["turn"][turn] = number
        accepted = torch.zeros_like(round.accepted)
        accepted[elected] = True
        return Screening(accepted, scores={name: score.to(accepted.device) for name, score in scores.items()})

    def elect(self, round: RoundUpdates, first: list[int], target: int) -> list[list[int]]:
        """Rows elected in each pass, ``first`` and then by an autoencoder until there are ``target``."""
        p, source = self.parameters, round.generator("snowball")
        layers = self.voting_layers(round)
        rows = torch.cat([round.updates[:, layer.start : layer.stop].float() for layer in layers], dim=1)
        rows = rows.clamp(-1e30, 1e30)  # so that the differences are numbers
        model = Autoencoder(rows.shape[1], p.hidden, p.latent, source)
        passes, elected = [first], list(first)
        while len(elected) < target:
            model.learn(rows[elected], p.epochs if len(passes) == 1 else 0)
            model.learn(rows[elected], p.tuning)
            rest = [row for row in range(round.count) if row not in elected]
            error = torch.stack([model.error(rows[row] - rows[elected]) for row in rest])
            count = min(math.ceil(p.step * round.count), target - len(elected))
            passes.append([rest[at] for at in error.argsort(stable=True)[:count].tolist()])
            elected += passes[-1]
        return passes

    def votes(self, rows: Tensor) -> Tensor:
        """(N,) the votes of one layer, rows (N, d)."""
        from sklearn.metrics import calinski_harabasz_score  # scikit-learn takes seconds to import

        compacted = compact(rows)
        distances = squared_distances(compacted).cpu().numpy()
        points = compacted.cpu().numpy()
        # scikit-learn's tolerance is relative to the mean variance over the columns, of which there are fewer now
        tolerance = self.parameters.tolerance * points.shape[1] / rows.shape[1]
        n = len(points)
        quality, together = np.zeros(n), np.zeros((n, n), dtype=bool)
        for client in range(n):
            others = np.argsort(-distances[client], kind="stable")
            start = [client, *others[others != client][: self.parameters.furthest]]
            differences = points - points[client]
            labels, _ = kmeans(differences, len(start), init=differences[start], tol=tolerance)
            together[client] = labels == labels[client]
            if len(np.unique(labels)) > 1:
                quality[client] = calinski_harabasz_score(differences, labels)
        low, high = quality.min(), quality.max()
        worth = (quality - low) / (high - low) if high - low > 1e-9 * high else np.ones(n)
        return torch.from_numpy(worth @ together)
