"""FDCR."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import columns
from fedsim.errors import Problem, RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class FdcrParameters(Parameters):
    fisher: str = parameter(
        "update",
        "the Fisher information is that of the client's own update (its square), or of its model on server_data",
        choices=("update", "server_data"),
    )
    batch_size: int = parameter(1, "examples to a gradient that is squared, with fisher: server_data", ge=1)


@register("fdcr")
class Fdcr(Defense):
    r"""Weigh updates by how much each weight matters to the client; drop the cluster farthest from the mean.

    With Fᵢ (T,) the diagonal of client i's Fisher information and wⱼ the clients' shares by examples,

    .. math:: I_i = \frac{F_i - \min F_i}{\max F_i - \min F_i}, \qquad
              d_i = \Big\lVert I_i \odot \Delta_i - \sum_j w_j I_j \odot \Delta_j \Big\rVert_2

    FINCH clusters the discrepancies dᵢ: everybody is linked to the nearest other (to all of equally near ones),
    and what is connected is a cluster of its first partition. The cluster of the largest mean is rejected,
    the others' updates are multiplied by 2 · sigmoid(Iᵢ), from 1 to 1.46, and averaged by examples. With one
    cluster nobody is rejected and nothing rescaled. The smallest cluster is a pair: up to 3 clients always
    are one cluster, a lone attacker takes an honest client along, and with several clusters one goes, attack or not.

    **Where F comes from.** In the paper clients measure it on their own data and send it: an attacker can send
    anything, and a reply here is one model. ``update`` (default) takes Fᵢ = Δᵢ², the square of the mean gradient on
    the client's data, all that an update says of it. ``server_data`` takes the mean squared gradient of client
    i's model on the server's data and their labels, which is the Fisher information of other data than the client's.

    The authors publish no code. Follows a reproduction, which divides by the learning rate (a common factor) and adds
    10⁻⁶ to every difference: not repeated. Its main class puts noise in place of the Fisher information of
    clients it knows to be malicious: not repeated either. An update that weighs all weights alike, such as zero,
    has I = 0. Running statistics are averaged by the same shares, not rescaled. The score is d.

    Cost: O(N·D) time and some blocks of columns; ``server_data``: a gradient per example and client, and one
    copy of the updates.
    """

    paper = "Huang et al., Parameter Disparities Dissection for Backdoor Defense in Heterogeneous FL, NeurIPS 2024"
    cost = "O(N D) time; with fisher: server_data a gradient per example and client, one copy of the updates"
    Parameters = FdcrParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        block = getattr(experiment, "server_data", None)
        if parameters.fisher == "server_data" and block is not None and block.examples == 0:
            return [Problem("fisher", "server_data has no examples; set server_data.examples, or use fisher: update")]
        return []

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        rows, shares = round.seen("trainable"), round.mean_weights().to(torch.float64)
        fisher = None if self.parameters.fisher == "update" else self.at_the_server(round)
        distance = discrepancies(rows, fisher, shares)
        kept = ~farthest(distance)
        weights = torch.where(kept, shares, torch.zeros_like(shares))
        if not bool(weights.sum() > 0):  # those who remain have no weight: nothing is left to average
            return Aggregated(torch.zeros_like(round.global_vector), weights.to(rows.dtype), {"discrepancy": distance})
        weights = weights / weights.sum()
        rescale = not bool(kept.all())
        parts = [
            weights @ (2 * torch.sigmoid(important) * block if rescale else block)
            for block, important in importance(rows, fisher)
        ]
        rest = [weights @ block.to(torch.float64) for block in columns(round.updates[:, round.trainable :])]
        vector = torch.cat(parts + rest).to(rows.dtype)
        return Aggregated(vector, weights.to(rows.dtype), {"discrepancy": distance})

    def at_the_server(self, round: RoundUpdates) -> Tensor:
        """(N, T) importance of every client's weights, from gradients on the server's data.

        Raises
        ------
        RunError: there are no data, or no network.
        """
        server = round.server
        if server is None or server.data is None:
            raise RunError("the defense 'fdcr' with fisher: server_data needs data at the server; use fisher: update")
        result = torch.empty_like(round.seen("trainable"))
        parts = torch.split(torch.arange(len(server.data.labels), device=result.device), self.parameters.batch_size)
        model = server.model
        with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no backward in evaluation mode
            for update, out in zip(round.updates, result, strict=True):
                model.load(round.global_vector + update)
                model.module.eval()
                total = torch.zeros_like(out, dtype=torch.float64)
                for part in parts:
                    model.gradient.zero_()
                    server.loss(model.module(server.data.inputs[part]), server.data.labels[part]).backward()
                    total += model.gradient.nan_to_num().to(torch.float64).square()
                low, high = torch.aminmax(total)
                out.copy_((total - low) / (high - low) if bool(high > low) else torch.zeros_like(total))
        model.gradient.zero_()
        return result


def importance(rows: Tensor, fisher: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks (N, at most ``BLOCK``) float64 of the updates and of I, left to right.

    rows: (N, T) updates. fisher: (N, T) F; None: the squared updates.
    """
    source = rows if fisher is None else fisher

    def values(block: Tensor) -> Tensor:
        wide = block.to(torch.float64)
        return wide.square() if fisher is None else wide

    low = torch.stack([values(block).amin(dim=1) for block in columns(source)]).amin(dim=0)[:, None]
    high = torch.stack([values(block).amax(dim=1) for block in columns(source)]).amax(dim=0)[:, None]
    span = torch.where(high > low, high - low, torch.ones_like(low))
    for block, part in zip(columns(rows), columns(source), strict=True):
        yield block.to(torch.float64), (values(part) - low) / span


def discrepancies(rows: Tensor, fisher: Tensor | None, shares: Tensor, *, offset: float = 0.0) -> Tensor:
    """(N,) float64: d. shares: w (N,) float64. offset: a number added to every difference, as in public code."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for block, important in importance(rows, fisher):
        weighed = important * block
        total += (weighed - shares @ weighed + offset).square().sum(dim=1)
    return total.sqrt()


def farthest(values: Tensor) -> Tensor:
    """(N,) bool: the members of the first-neighbour cluster of largest mean; nobody if there is but one cluster."""
    labels = first_neighbours(values)
    count = int(labels.max()) + 1
    if count == 1:
        return torch.zeros_like(labels, dtype=torch.bool)
    means = torch.stack([values[labels == label].mean() for label in range(count)])
    return labels == means.argmax()


def first_neighbours(values: Tensor) -> Tensor:
    """(N,) labels: the first partition of FINCH (Sarfraz et al., CVPR 2019) of numbers (N,)."""
    from scipy.sparse.csgraph import connected_components

    gaps = (values[:, None] - values).abs().fill_diagonal_(torch.inf)
    links = (gaps <= gaps.amin(dim=1, keepdim=True)).cpu().numpy()
    labels = connected_components(links, directed=False)[1]
    return torch.as_tensor(labels, dtype=torch.int64, device=values.device)
