"""Bucketing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedsim import plugins
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.errors import PluginError, Problem
from fedsim.pipeline import apply_pipeline
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class BucketingParameters(Parameters):
    s: int = parameter(2, "clients in a bucket; 1: the rule alone", ge=1)
    rule: str = parameter("coordinate_median", "the defense that gets the buckets' means as its clients")
    arguments: dict[str, Any] = parameter({}, "the parameters of that defense, such as f: 1")


@register("bucketing")
class Bucketing(Defense):
    r"""Average random buckets of s clients, then give the means to a robust rule.

    With π a random permutation of the n clients, drawn every round from the stream ``bucketing``, the means

    .. math:: y_b = \frac{1}{|B_b|} \sum_{k \in B_b} \Delta_{\pi(k)}, \qquad
              B_b = \{s(b - 1) + 1, \dots, \min(sb, n)\}

    of the ⌈n / s⌉ buckets replace the updates. They differ s times less in variance than the clients do, at the
    price of up to s times the share of malicious inputs: with f attackers the rule must bear f bad
    buckets of n / s, so s must stay below δ_max · n / f (2 in the paper's experiments).

    The means are unweighted, the last bucket may be smaller; examples of a bucket, and weights that earlier
    stages left, are summed for rules that use them. ``rule`` is any defense, run as a pipeline of its own: its
    state is kept, and as its clients it sees the buckets 0, 1, …, so that a rule that remembers
    clients makes no sense here. Shares and scores of a bucket go to its clients, the share divided equally.

    Whole vector. Cost: O(N²·D / s) time, a matrix of ⌈N / s⌉ × D beyond the updates, and what the rule needs.
    """

    paper = "Karimireddy et al., Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, arXiv 2006.09365"
    cost = "O(N D) time and a matrix of N/s × D, then what the rule needs"
    Parameters = BucketingParameters

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self.rule = _rule(self.parameters)

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        rule = _rule(parameters)
        return (rule.required_clients(rule.parameters) - 1) * int(parameters.s) + 1

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        try:
            need = cls.required_clients(parameters)
        except PluginError as error:
            return [Problem("rule", str(error))]
        n = experiment.federation.clients_per_round
        if n >= need:
            return []
        buckets = math.ceil(n / parameters.s)
        return [Problem("s", f"{n} clients a round make {buckets} buckets, too few for {parameters.rule!r}; use less")]

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        n, s, device = round.count, self.parameters.s, round.updates.device
        count = math.ceil(n / s)
        order = torch.randperm(n, generator=round.generator("bucketing"), device=device)
        bucket = torch.empty_like(order)
        bucket[order] = torch.arange(n, device=device) // s
        members = (torch.arange(count, device=device)[:, None] == bucket).to(round.updates.dtype)
        size = members.sum(dim=1)
        self.rule.state = self.state.setdefault("rule", {})
        result = apply_pipeline(
            [self.rule],
            replace(
                round,
                updates=(members / size[:, None]) @ round.updates,
                num_examples=members @ round.num_examples.to(members.dtype),
                weights=members @ round.weights.to(members.dtype),
                accepted=torch.ones(count, dtype=torch.bool, device=device),
                clients=tuple(range(count)),
            ),
        )
        self.state["rule"] = self.rule.state
        scores = {name.split(".", 1)[1]: score[bucket] for name, score in result.scores.items()}
        return Aggregated(result.vector, (result.weights / size)[bucket], scores)


def _rule(parameters: Any) -> Defense:
    rule: Defense = plugins.create("defense", parameters.rule, **parameters.arguments)
    return rule
