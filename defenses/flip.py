"""FLIP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.batch import Batch
from fedsim.defense import Defense, HeldOut, HonestContext, Server
from fedsim.plugins import Parameters, parameter, register

Inverted = tuple[int, Tensor, Tensor]
"""Target, mask (1, H, W) and pattern (C, H, W), both in [0, 1]."""

_PATIENCE, _UP, _DOWN = 10, 1.5, 1.5**1.5
"""After so many steps of success (failure) in a row the price of the mask rises (falls) by such a factor."""


@dataclass(frozen=True)
class FlipParameters(Parameters):
    confidence: float = parameter(0.4, "τ: predictions of a lower probability are rejected in evaluation", ge=0, lt=1)
    triggers: int = parameter(2, "target classes a client inverts a trigger for each time", ge=1)
    every: int | None = parameter(None, "batches after which a client inverts anew; null: once a round", ge=1)
    portion: float = parameter(0.5, "share of a batch, without the target's examples, that is stamped", gt=0, le=1)
    examples: int = parameter(64, "own examples a trigger is inverted on", ge=1)
    steps: int = parameter(100, "Adam steps of an inversion", ge=1)
    lr: float = parameter(0.1, "learning rate of an inversion", gt=0)
    price: float = parameter(0.01, "first weight of the mask's size in the inversion's loss", gt=0)
    success: float = parameter(0.9, "share that must turn to the target for a trigger to count", gt=0, le=1)
    largest: float = parameter(0.125, "largest mask that is used, as a share of the image", gt=0, le=1)


@register("flip")
class Flip(Defense):
    r"""Honest clients invert triggers on their own data and unlearn them; unsure predictions are rejected.

    An honest client looks for what turns its examples x to a class t, as Neural Cleanse does,

    .. math:: \min_{m, p} \frac{1}{B} \sum_b \mathrm{CE}(f_w((1 - m) x_b + m p),\, t) + \lambda \lVert m \rVert_1,
              \qquad m, p \in [0, 1],

    and trains on batches part of which carries the found trigger, with the *true* labels. At inference a prediction
    whose probability is below τ is rejected: ``accuracy`` and ``asr`` are recorded with a rejected example counting
    as a miss, ``rejected`` and ``rejected_triggered`` are the shares of such examples. The global model itself, and
    main accuracy and ASR as always recorded, know no rejection. Malicious clients do not take part. No scores;
    the aggregation is the pipeline's mean.

    From our notes on the authors' code: clients invert triggers and train adversarially, the confidence cut, τ = 0.4
    under continuous attack. Read in that code besides: m and p through tanh, Adam (rate 0.1; 0.5, 0.9), λ from 10⁻³
    or 10⁻², times 1.5 after 10 steps with a success of 0.9 or more, over 1.5^1.5 after 10 below, the smallest
    successful mask is kept, half of a batch is stamped, and for pairs of classes no mask above an eighth of the image.
    *Our reading*: the code inverts at every batch with 50 to 500 steps, first for each class, then for pairs of
    classes picked by the size of earlier masks, restarting near the best mask, and lets Adam train the model. Here a
    client draws ``triggers`` target classes at random (the clients of a round cover them together; as many as there
    are classes is stronger and slower), inverts once a round on the model it received — or on its own every ``every``
    batches — for all other classes alike, stamps each batch with one of the triggers it found, and trains by the
    run's SGD. There are no official numbers that this could agree with.

    Where no trigger succeeds (a client with one class only, or too few steps) batches stay as they are.
    Draws come from the client's stream. Cost: ``triggers · steps`` forward and backward passes over ``examples``
    images a client and inversion, many times its training; O(image) memory.
    """

    paper = "Zhang et al., FLIP: A Provable Defense Framework for Backdoor Mitigation in FL, arXiv 2210.12873"
    cost = "clients: triggers × steps training passes over some examples, many times plain training"
    tasks = ("vision",)
    Parameters = FlipParameters

    def client_batch(self, batch: Batch, context: HonestContext) -> Batch:
        p, memory = self.parameters, context.memory
        seen = memory.get("seen", 0)
        if seen == 0 or (p.every is not None and seen % p.every == 0):
            memory["triggers"] = list(self._search(context))
        memory["seen"] = seen + 1
        if not memory["triggers"]:
            return batch
        drawn = int(torch.randint(len(memory["triggers"]), (), generator=context.generator))
        target, mask, pattern = memory["triggers"][drawn]
        others = torch.nonzero(batch.labels != target).squeeze(1)
        order = torch.randperm(len(others), generator=context.generator).to(others.device)
        rows = others[order[: round(p.portion * len(others))]]
        inputs = batch.inputs.clone()
        inputs[rows] = (1 - mask) * inputs[rows] + mask * pattern
        return batch._replace(inputs=inputs)

    def _search(self, context: HonestContext) -> Iterator[Inverted]:
        """The triggers that succeed, of those the client looks for."""
        inputs, labels = [], []
        for batch in context.batches():
            inputs.append(batch.inputs)
            labels.append(batch.labels)
            if sum(map(len, labels)) >= self.parameters.examples:
                break
        images, truth = torch.cat(inputs)[: self.parameters.examples], torch.cat(labels)[: self.parameters.examples]
        drawn = torch.randperm(context.classes, generator=context.generator)[: self.parameters.triggers]
        context.model.module.eval()
        for target in drawn.tolist():
            others = images[truth != target]
            found = self.invert(others, target, context) if len(others) > 0 else None
            if found is not None:
                yield target, *found
        context.model.module.train()

    def invert(self, images: Tensor, target: int, context: HonestContext) -> tuple[Tensor, Tensor] | None:
        """Mask (1, H, W) and pattern (C, H, W) that turn images (B, C, H, W) to the target; None if none was found."""
        p, best = self.parameters, None
        smallest, price, streak = p.largest * images[0, 0].numel(), p.price, 0
        drawn = [torch.rand(s, generator=context.generator) for s in ((1, *images.shape[2:]), images.shape[1:])]
        free = [torch.atanh((2 * d - 1) * (1 - 1e-6)).to(images).requires_grad_() for d in drawn]
        optimiser = torch.optim.Adam(free, lr=p.lr, betas=(0.5, 0.9))
        wanted = torch.full((len(images),), target, device=images.device)
        for _ in range(p.steps):
            mask, pattern = ((torch.tanh(f) + 1) / 2 for f in free)
            outputs = context.model.module((1 - mask) * images + mask * pattern)
            loss = context.loss(outputs, wanted) + price * mask.sum()
            succeeded = float((outputs.argmax(1) == wanted).double().mean()) >= p.success
            size = float(mask.detach().sum())
            if succeeded and size <= smallest:
                smallest, best = size, (mask.detach(), pattern.detach())
            for f, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
                f.grad = gradient  # of the trigger alone: the model's gradients stay as they are
            optimiser.step()
            streak = (max(streak, 0) + 1) if succeeded else (min(streak, 0) - 1)
            if abs(streak) >= _PATIENCE:
                price, streak = price * _UP if streak > 0 else price / _DOWN, 0
        return best

    def evaluate(self, vector: Tensor, held_out: HeldOut, server: Server) -> dict[str, float]:
        accuracy, rejected = self._sure(vector, held_out.clean(), server)
        found = {"accuracy": accuracy, "rejected": rejected}
        if held_out.triggered is not None:
            found["asr"], found["rejected_triggered"] = self._sure(vector, held_out.triggered(), server)
        return found

    def _sure(self, vector: Tensor, batches: Iterator[Batch], server: Server) -> tuple[float, float]:
        """(share predicted as labelled with enough confidence, share rejected); NaN without examples."""
        hits = rejected = total = 0
        for batch in batches:
            probability, predicted = server.outputs(vector, batch.inputs).softmax(1).max(1)
            sure = probability >= self.parameters.confidence
            hits += int((sure & (predicted == batch.labels)).sum())
            rejected += int((~sure).sum())
            total += len(batch.labels)
        return (hits / total, rejected / total) if total else (float("nan"), float("nan"))
