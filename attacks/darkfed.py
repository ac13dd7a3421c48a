"""DarkFed: a backdoor planted without any data of the task, on shadow inputs the global model labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks._local import trigger_of
from attacks._terms import cosine_slope, fit_terms
from fedsim import plugins
from fedsim.attack import Attack, AttackContext
from fedsim.batch import Batch
from fedsim.data import Data
from fedsim.errors import PluginError, Problem, RunError
from fedsim.plugins import Parameters, parameter, register
from fedsim.trigger import poison_count

COARSENESS = (1, 2, 4, 8)
"""How much coarser than the image the grids of smooth shadow inputs are, a quarter of the images each."""


@dataclass(frozen=True)
class DarkFedParameters(Parameters):
    shadow: str = parameter(
        "smooth",
        "random inputs: smooth images of any brightness and contrast; uniform pixels; or N(0.5, 1) ones cut to [0, 1]",
        choices=("smooth", "uniform", "normal"),
    )
    images: dict[str, Any] = parameter(
        {}, "instead: a data set of images, as under task.data, such as {name: digits}; {}: random inputs"
    )
    labels: str = parameter(
        "soft",
        "what the global model's label is: its class probabilities, or its outputs (squared error)",
        choices=("soft", "outputs"),
    )
    examples: int = parameter(1024, "shadow inputs, drawn anew each round", ge=1)
    clean: float = parameter(0.3, "share of the loss on the global model's labels", ge=0)
    backdoor: float = parameter(0.3, "share of the backdoor's loss", ge=0)
    cosine: float = parameter(0.4, "share of the cosine term; the authors' code has 400", ge=0)


@register("darkfed")
class DarkFed(Attack):
    """A fake client without data: shadow inputs, labelled by the global model, stand in for the task's.

    With G the global model, f its network and x the shadow inputs, trained is

        ``a L(f_w(x), f_G(x)) + b L(f_w(x with trigger), target) + c (1 − cos(w, G))``,  (a, b, c) = (.3, .3, .4),

    cos over the trainable weights: keep what the model does, add the backdoor, stay aligned with the model. The first L
    is cross-entropy with the global model's class probabilities (``labels``), the second the run's loss. The trigger is
    on the first ``round(poison_fraction · B)`` of a batch. Nothing of the client's own examples is used but the shape
    of one input: ``Knowledge`` says own data because that is what a client has.

    Random inputs are labelled with few classes, or one, where all look alike (``uniform`` and ``normal``, the latter
    the authors' data-free variant; on digits up to nine in ten are an 8, and with that target there is little to
    learn). The default draws normal noise on a grid 1, 2, 4 or 8 times coarser than the image, interpolates, and gives
    each image a mean in [−1, 1] and a deviation in [0, 1.5] of its own before cutting to [0, 1]: dark, bright and
    patterned ones, of all classes. ``images`` takes another data set's (channels averaged, resized); the authors take
    GTSRB's.

    From the authors' code (hustweiwan/DarkFed): the shares; labels that are the model's outputs, not classes; training
    in evaluation mode, so that running statistics of shadow inputs do not replace the task's: they are sent as
    received. Its cosine term has a factor of 1000, but its gradient is cut off, so it does nothing; here it has one,
    and with 1000 there is no backdoor: the factor is 1. Squared error of outputs, the code's, diverges in some networks
    at the learning rates of honest clients (theirs is 0.005): cross-entropy is ours. Not here: in the loop they run,
    shares are 1, 1 and .5, with the distance ‖w − G‖ and squared cosines between the last layers of colluders and a
    forecast of the next model instead of the term above; the backdoor's target are outputs of 10 and −1; and the 40 %
    least similar shadow images are taken.

    Raises
    ------
    RunError: inputs that are no images, no trigger, or ``images`` of text or too few of them.

    Cost: plain training on ``examples``, every batch twice, and one pass of G over them.
    """

    paper = "Li et al., DarkFed: A Data-Free Backdoor Attack in Federated Learning, IJCAI 2024, arXiv 2405.03299"
    cost = "training on its shadow inputs, each twice"
    tasks = ("vision",)
    Parameters = DarkFedParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        try:
            if parameters.images:
                _dataset(parameters.images)
        except PluginError as error:
            return [Problem("images", str(error))]
        return []

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._images: Tensor | None = None

    def train(self, context: AttackContext) -> None:
        trigger = trigger_of(context, "darkfed stamps its shadow inputs with the trigger")
        p, centre = self.parameters, context.global_weights
        inputs = self._shadow(context)
        outputs = self._outputs(inputs, context)
        soft = p.labels == "soft"

        def shuffled() -> Iterator[Batch]:
            mixed = torch.randperm(len(inputs), generator=context.generator).to(inputs.device)
            for rows in torch.split(mixed, context.settings.batch_size):
                yield Batch(inputs[rows], outputs[rows].softmax(dim=1) if soft else outputs[rows])

        def triggered(batch: Batch) -> Batch:
            """The first of a batch of shadow inputs, with the trigger and the target label."""
            count = poison_count(context.poison_fraction, len(batch.inputs))
            first = Batch(batch.inputs[:count], batch.labels[:count].argmax(dim=1))
            return trigger.poison(first, count, part=context.part, generator=context.generator)

        def pull(gradient: Tensor, weights: Tensor) -> None:
            gradient.sub_(cosine_slope(weights, [centre]), alpha=p.cosine)

        fit_terms(
            context,
            shuffled,
            nn.CrossEntropyLoss() if soft else nn.MSELoss(),
            triggered,
            (p.clean, p.backdoor),
            pull,
            frozen_statistics=True,
        )

    def _shadow(self, context: AttackContext) -> Tensor:
        """Shadow inputs (examples, C, H, W) in the type and on the device of the model."""
        p = self.parameters
        like = next(context.batches()).inputs
        if like.ndim != 4 or not like.is_floating_point():
            raise RunError("darkfed makes shadow images; the inputs of this task are none")
        shape, generator = (p.examples, *like.shape[1:]), context.generator
        if p.images:
            if self._images is None:
                self._images = _load(p.images)
            drawn = _other(self._images, shape, generator)
        elif p.shadow == "smooth":
            drawn = _smooth(shape, generator)
        elif p.shadow == "uniform":
            drawn = torch.rand(shape, generator=generator)
        else:
            drawn = torch.randn(shape, generator=generator).add_(0.5).clamp_(0, 1)
        return drawn.to(like)

    @staticmethod
    @torch.no_grad()
    def _outputs(inputs: Tensor, context: AttackContext) -> Tensor:
        """(N, classes) what the global model says of the inputs."""
        module = context.model.module
        module.eval()
        outputs: list[Tensor] = [module(part) for part in torch.split(inputs, 256)]
        module.train()
        return torch.cat(outputs)


def _dataset(spec: Mapping[str, Any]) -> Any:
    """The data set that ``images`` names.

    Raises
    ------
    PluginError: there is none of that name or with these parameters.
    """
    rest = dict(spec)
    if not isinstance(rest.get("name"), str):
        raise PluginError(f"images: name a data set, such as {{name: digits}}, not {dict(spec)}")
    return plugins.create("dataset", rest.pop("name"), **rest)


def _load(spec: Mapping[str, Any]) -> Tensor:
    """Its training images, uint8 (M, C, H, W)."""
    raw = _dataset(spec).load()
    if not isinstance(raw, Data):
        raise RunError(f"darkfed: the data set {spec['name']!r} is text; name one of images")
    return raw.train.inputs


def _other(images: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Some of the images, drawn without replacement, in that shape (N, C, H, W), pixels in [0, 1]."""
    if len(images) < shape[0]:
        raise RunError(f"darkfed: that data set has {len(images)} images; use fewer examples than {shape[0]}")
    images = images[torch.randperm(len(images), generator=generator)[: shape[0]]].float() / 255
    if images.shape[1] != shape[1]:
        images = images.mean(1, keepdim=True).expand(-1, shape[1], -1, -1)
    if tuple(images.shape[2:]) != tuple(shape[2:]):
        images = F.interpolate(images, tuple(shape[2:]), mode="bilinear", antialias=True)
    return images.clamp(0, 1)


def _smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random images (N, C, H, W) in [0, 1]: coarse and fine noise, each with its own brightness and contrast."""
    count, channels, height, width = shape
    each = -(-count // len(COARSENESS))
    noise = []
    for factor in COARSENESS:
        grid = (each, channels, -(-height // factor), -(-width // factor))
        coarse = torch.randn(grid, generator=generator)
        noise.append(F.interpolate(coarse, (height, width), mode="bilinear"))
    mixed = torch.cat(noise)[torch.randperm(each * len(COARSENESS), generator=generator)[:count]]
    mean = torch.rand((count, 1, 1, 1), generator=generator) * 2 - 1
    deviation = torch.rand((count, 1, 1, 1), generator=generator) * 1.5
    return (mean + deviation * mixed).clamp(0, 1)
