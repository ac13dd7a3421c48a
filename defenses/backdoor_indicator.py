"""BackdoorIndicator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.batch import Batch
from fedsim.defense import Defense, HeldOut, RoundUpdates, Screening, Server, require
from fedsim.errors import Problem, RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class BackdoorIndicatorParameters(Parameters):
    threshold: float = parameter(0.95, "accuracy on one label's examples from which a client is rejected", gt=0, le=1)
    start: int = parameter(1, "first round with an indicator task; before it everybody is accepted", ge=1)
    epochs: int = parameter(200, "passes over the server's data in an injection", ge=1)
    batch_size: int = parameter(64, "most examples in a batch of the injection", ge=1)
    lr: float = parameter(0.005, "learning rate of the injection", gt=0)
    milestones: list[int] = parameter([10, 20, 30, 160], "passes after which the learning rate falls", ge=1)
    decay: float = parameter(0.8, "factor on the learning rate at each milestone", gt=0, le=1)
    momentum: float = parameter(0.9, "SGD momentum of the injection", ge=0, lt=1)
    weight_decay: float = parameter(0.0005, "weight decay of the injection", ge=0)
    mu: float = parameter(0.4, "weight μ of the distance to the model before", ge=0)
    proximal: str = parameter(
        "squared", "μ/2 times the squared distance, or the plain one as in the code", choices=("squared", "plain")
    )
    reset_statistics: bool = parameter(True, "send the running statistics from before the injection")


@register("backdoor_indicator")
class BackdoorIndicator(Defense):
    r"""Teach the global model random labels of foreign data; reject clients that still know them.

    A backdoor is a task on inputs far from the honest data. One with the target of another keeps that other alive:
    honest training forgets the indicator task, training on a backdoor with the same label does not. At the start
    of a round the server trains the global model w₀ on out-of-distribution data (x, y) with random labels,

    .. math:: \min_w \frac{1}{B} \sum_b \mathrm{CE}(f_w(x_b), y_b) + \frac{\mu}{2} \lVert w - w_0 \rVert_2^2

    by SGD in training mode, and sends the result — with the running statistics of w₀ (``reset_statistics``), since
    those of foreign data would spoil honest training. A client model is then measured with the statistics from after
    the injection in place of its own. Its score is the accuracy on the examples of one label, the largest over the
    labels that have examples, in [0, 1]; from ``threshold`` on it is rejected. Where nobody is left the round's
    updates are dropped.

    The labels are drawn once for the run, balanced over the classes; they, and the statistics after the injection,
    are kept in ``state``. Batches are the same in every pass, of sizes that differ by one at most. A frozen parameter
    counts as a running statistic. The accuracy of the injected model on the whole task is recorded as ``injected``:
    where it is low, the task was not learnt and the scores mean little (raise ``epochs`` or ``lr``). The authors
    begin on a trained model (``start`` 1100) and use 800 images of CIFAR-100 under CIFAR-10.

    The authors' code adds the plain distance, whose gradient is of length μ/2 however near w is (none at w₀ itself):
    ``proximal: plain``. It divides by zero where a label has no example; here such a label does not count.
    The aggregation is the pipeline's mean.

    Cost: ``epochs`` passes of training over the server's data a round (more than all clients' training by default),
    N passes of evaluation; O(D) memory.
    """

    paper = "Li and Dai, BackdoorIndicator: Leveraging OOD Data for Proactive Backdoor Detection, arXiv 2405.20862"
    cost = "server: epochs passes of training over its data, N of evaluation; O(D) memory"
    tasks = ("vision",)
    needs_network = True
    needs_data = True
    Parameters = BackdoorIndicatorParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        if experiment.server_data.source in ("other", "noise"):
            return []
        return [Problem("", "needs data from outside the task; set server_data.source to other or noise")]

    def broadcast(self, vector: Tensor, server: Server) -> Tensor:
        p, data, trainable = self.parameters, require(self, server).data, server.model.layout.trainable
        if server.round < p.start:
            return vector
        assert data is not None
        if "labels" not in self.state:
            shuffled = torch.randperm(len(data.labels), generator=server.generator("indicator labels"))
            self.state["labels"] = shuffled % server.classes
        task = Batch(data.inputs, self.state["labels"].to(vector.device))
        pieces = math.ceil(len(task.labels) / p.batch_size)
        batches = [Batch(*part) for part in zip(*(tensor.tensor_split(pieces) for tensor in task[:2]), strict=True)]

        def pull(gradient: Tensor, weights: Tensor) -> None:
            apart = weights - vector[:trainable]
            length = torch.linalg.vector_norm(apart)
            if p.proximal == "squared":
                gradient.add_(apart, alpha=p.mu)
            elif length > 0:
                gradient.add_(apart / length, alpha=p.mu / 2)

        server.model.load(vector)
        server.fit(
            server.model,
            lambda: iter(batches),
            server.loss,
            replace(
                server.settings, lr=p.lr, epochs=p.epochs, steps=None, momentum=p.momentum, weight_decay=p.weight_decay
            ),
            on_gradient=pull,
            lr_at=lambda epoch: float(p.lr * p.decay ** sum(epoch >= passed for passed in p.milestones)),
        )
        sent = server.model.vector.clone()
        right = server.outputs(sent, task.inputs).argmax(1) == task.labels
        self.state["injected"], self.state["round"] = float(right.double().mean()), server.round
        self.state["statistics"] = sent[trainable:].clone()
        if p.reset_statistics:
            sent[trainable:] = vector[trainable:]
        return sent

    def screen(self, round: RoundUpdates) -> Screening:
        server = require(self, round.server)
        if round.round < self.parameters.start:
            return Screening()
        if self.state.get("round") != round.round:
            raise RunError(
                f"round {round.round}: backdoor_indicator has injected no task; call broadcast(model, server) first, "
                f"and give the model it returns as global_vector"
            )
        assert server.data is not None
        labels = self.state["labels"].to(round.updates.device)
        there = labels.bincount(minlength=server.classes).double()
        known = []
        for update in round.updates:
            vector = round.global_vector + update
            vector[round.trainable :] = self.state["statistics"]
            right = server.outputs(vector, server.data.inputs).argmax(1) == labels
            by_label = labels[right].bincount(minlength=server.classes) / there
            known.append(by_label[there > 0].max())
        score = torch.stack(known)
        return Screening(score < self.parameters.threshold, scores={"known": score})

    def evaluate(self, vector: Tensor, held_out: HeldOut, server: Server) -> dict[str, float]:
        return {"injected": self.state["injected"]} if self.state.get("round") == server.round else {}
