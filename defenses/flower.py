"""Aggregators of Flower."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.errors import PluginError, Problem, RunError
from fedsim.plugins import Parameters, parameter, register

WORKS: dict[str, tuple[str, ...]] = {
    "Bulyan": (),
    "FedAdagrad": ("m_t", "v_t"),
    "FedAdam": ("m_t", "v_t"),
    "FedAvg": (),
    "FedAvgM": ("momentum_vector",),
    "FedMedian": (),
    "FedTrimmedAvg": (),
    "FedYogi": ("m_t", "v_t"),
    "Krum": (),
    "MultiKrum": (),
}
"""Strategy → what it keeps from round to round; each is as long as the model."""

REFUSED = {
    "FedProx": "its server side is FedAvg, the rest is a term in the clients' loss; use FedAvg",
    "FedXgbBagging": "it combines decision trees, not vectors",
    "FedXgbCyclic": "it combines decision trees, not vectors",
    "QFedAvg": "it needs every client's training loss, which the server does not hold here",
    "Result": "it is no strategy",
    "Strategy": "it is the abstract base of all",
}


@dataclass(frozen=True)
class FlowerParameters(Parameters):
    strategy: str = parameter(doc="class name in flwr.serverapp.strategy, such as FedMedian")
    arguments: dict[str, Any] = parameter({}, "the strategy's own constructor arguments, such as beta: 0.2")


@register("flower")
class Flower(Defense):
    r"""Any aggregation rule of Flower as a stage: builds real replies and calls ``aggregate_train``.

    The strategies that work are Bulyan, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg,
    FedYogi, Krum and MultiKrum. The strategy receives what it would receive from Flower clients: whole
    weights w₀ + Δᵢ in the model's own precision, one array per tensor of the model, and ``num-examples`` (the
    weights that earlier stages left). What it answers, minus w₀, is the aggregated update. Like in any Flower
    app, running statistics are arrays like the others. Arguments about sampling, record keys and callables
    have no meaning here and are refused.

    Momenta are kept in ``state`` and laid into a fresh strategy every round; the current model is always the
    round's own w₀, so that a stage after this one or a server learning rate cannot make the two drift apart.

    The reported weights are Flower's own: each reply carries its one-hot row as a metric, so the aggregated
    metric is the share of each reply that the strategy averaged. That is exact for mean and Krum rules; rules
    that work coordinate by coordinate (FedMedian, FedTrimmedAvg, Bulyan's second step) average metrics by
    examples over all candidates. Cost: on the CPU, two further copies of the updates.
    """

    paper = "Beutel et al., Flower: A Friendly Federated Learning Research Framework, arXiv 2007.14390"
    cost = "the strategy's, on the CPU; two copies of the updates"
    Parameters = FlowerParameters

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        found = _refusals(self.parameters)
        if found:
            raise PluginError("defense 'flower': " + "; ".join(str(problem) for problem in found))

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        f = parameters.arguments.get("num_malicious_nodes", 0)
        m = parameters.arguments.get("num_nodes_to_select", 1)
        if type(f) is not int or type(m) is not int:
            return 1  # a problem of its own
        return {"Krum": f + 3, "MultiKrum": max(f + 3, m), "Bulyan": 4 * f + 3}.get(parameters.strategy, 1)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return _refusals(parameters)

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        name = self.parameters.strategy
        strategy = _strategies()[name](**self.parameters.arguments)
        start = _arrays(round.global_vector, round)
        self._restore(strategy, start, round)
        with _calm():
            try:
                arrays, metrics = strategy.aggregate_train(round.round, list(_replies(round)))
            except Exception as error:  # whatever a strategy raises, it is this round that failed
                raise RunError(f"round {round.round}: Flower's {name} failed: {error}") from error
        if arrays is None or metrics is None:
            raise RunError(f"round {round.round}: Flower's {name} aggregated nothing from {round.count} updates")
        for kept in WORKS[name]:
            value = getattr(strategy, kept)
            if value is not None:
                self.state[kept] = _vector(list(value.values()) if isinstance(value, dict) else value)
        model = _vector([arrays[key].numpy() for key in start]).to(round.updates.device)
        vector = (model.double() - round.global_vector.double()).to(round.updates.dtype)
        weights = torch.tensor(metrics["share"], dtype=torch.float64, device=round.updates.device)
        return Aggregated(vector, weights)

    def _restore(self, strategy: Any, start: dict[str, Any], round: RoundUpdates) -> None:
        """Lay the round's model and the momenta of the rounds before into a new strategy."""
        from flwr.app import Array, ArrayRecord

        name = self.parameters.strategy
        if name == "FedAvgM":
            strategy.current_arrays = ArrayRecord({key: Array(value) for key, value in start.items()})
        elif WORKS[name]:
            strategy.current_arrays = start
        for kept in WORKS[name]:
            if kept in self.state:
                pieces = _arrays(self.state[kept], round)
                setattr(strategy, kept, list(pieces.values()) if name == "FedAvgM" else pieces)


def _strategies() -> dict[str, Any]:
    import flwr.serverapp.strategy as module

    return {name: getattr(module, name) for name in module.__all__}


def _refusals(parameters: Any) -> list[Problem]:
    """What is wrong with the strategy's name and arguments, in any experiment."""
    name, known = parameters.strategy, _strategies()
    if name not in WORKS or name not in known:
        why = REFUSED.get(name, "it wraps another strategy" if name in known else "Flower has no such strategy")
        return [Problem("strategy", f"{name!r} cannot be used: {why} (what works: {', '.join(sorted(WORKS))})")]
    common = set(inspect.signature(known["FedAvg"].__init__).parameters)
    signature = inspect.signature(known[name].__init__).parameters
    usable = {key: p for key, p in signature.items() if key not in common and key != "selection_rule"}
    found = []
    for key, value in parameters.arguments.items():
        if key not in usable:
            message = f"{name} takes no such argument here; it takes: {', '.join(usable) or 'none'}"
            found.append(Problem(f"arguments.{key}", message))
            continue
        whole = isinstance(usable[key].default, int)
        least = 1 if key == "num_nodes_to_select" else 0
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value >= least:
            kind = "a whole number" if whole else "a number"
            found.append(Problem(f"arguments.{key}", f"{value!r} is not allowed; use {kind} >= {least}"))
    if not found:
        try:
            known[name](**parameters.arguments)
        except (TypeError, ValueError) as error:
            found.append(Problem("arguments", f"{name} refuses them: {error}"))
    return found


def _arrays(vector: Tensor, round: RoundUpdates) -> dict[str, Any]:
    """One NumPy array per tensor of the model, or a single one if the layout is unknown."""
    pieces = {"vector": vector} if round.layout is None else round.layout.unflatten(vector)
    return {name: np.array(piece.detach().cpu().numpy()) for name, piece in pieces.items()}


def _vector(arrays: list[Any]) -> Tensor:
    return torch.cat([torch.from_numpy(np.array(array)).reshape(-1) for array in arrays])


def _replies(round: RoundUpdates) -> Iterator[Any]:
    """Each client's reply, as its Flower message would arrive."""
    from flwr.app import Array, ArrayRecord, Message, MessageType, Metadata, MetricRecord, RecordDict

    for row, (client, examples) in enumerate(zip(round.clients, round.weights.tolist(), strict=True)):
        local = _arrays(round.global_vector + round.updates[row], round)
        one_hot = [float(other == row) for other in range(round.count)]
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array) for name, array in local.items()}),
                "metrics": MetricRecord({"num-examples": examples, "share": one_hot}),
            }
        )
        metadata = Metadata(
            run_id=0,
            message_id="",
            src_node_id=client,
            dst_node_id=0,
            reply_to_message_id="",
            group_id=str(round.round),
            created_at=0.0,
            ttl=3600.0,
            message_type=MessageType.TRAIN,
        )
        # metadata in full: a message built without it reads the identity of a running Flower task
        yield Message(metadata=metadata, content=content)  # type: ignore[call-overload]


@contextmanager
def _calm() -> Iterator[None]:
    """Keep Flower from announcing every aggregation, and its garbage collections cheap.

    Some strategies collect garbage after every single array; with everything older set aside that takes no time.
    """
    logger, freeze = logging.getLogger("flwr"), gc.get_freeze_count() == 0
    level = logger.level
    logger.setLevel(logging.WARNING)
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        logger.setLevel(level)
        if freeze:
            gc.unfreeze()
