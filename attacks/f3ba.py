"""F3BA: flip the signs of the weights that matter least, so that the network answers to the trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate

from attacks._learnt import SquareParameters, SquareTrigger
from attacks._local import trigger_of
from fedsim import plugins, streams
from fedsim.attack import Attack, AttackContext
from fedsim.errors import Problem, RunError
from fedsim.plugins import Parameters, parameter, register
from fedsim.trigger import StampTrigger, Trigger


@dataclass(frozen=True)
class F3BATriggerParameters(SquareParameters):
    target: int = parameter(8, "class the backdoor maps to", ge=0)
    size: int = parameter(3, "side of the square", ge=1, le=4096)
    row: int = parameter(3, "its top row", ge=0)
    column: int = parameter(23, "its left column", ge=0)
    pattern_seed: int = parameter(111, "seed of its random pixels before anything is learnt", ge=0)
    step: float = parameter(0.1, "length of a gradient step, on the pixels as the first convolution sees them", gt=0)
    passes: int = parameter(2, "passes over the colluder's data each malicious round; 0: stay as it is", ge=0)
    conv_rate: float = parameter(0.02, "share of the first convolution's weights that are flipped", ge=0, le=1)


@register("f3ba")
class F3BATrigger(SquareTrigger):
    """A learnt square that excites the first convolution, in the state in which ``f3ba`` sends it out.

    Gradient ascent on ``‖a(x ⊕ δ) − a(x)‖²``, where a (H, W) is the mean of the first convolution's activations
    (ReLU) over channels and the batch. Meanwhile that convolution's candidate weights are flipped as the attack
    flips them, by the trigger the round began with; before the attack's second round there are no candidates.
    δ lives as the convolution sees it, normalised, and is clipped to what black and white become there. (The code
    rounds these bounds to two decimals.)

    Made for the attack of that name, with the same ``conv_rate`` and a ``factor`` of 1; with any other it is flipless.

    Cost: ``passes`` over the client's data.
    """

    paper = "Fang, Chen: On the Vulnerability of Backdoor Defenses for Federated Learning (F3BA), AAAI 2023"
    Parameters = F3BATriggerParameters
    cost = "a round: passes over the client's data through one convolution"

    def initial(self, channels: int) -> Tensor:
        size = self.parameters.size
        generator = streams.generator(self.parameters.pattern_seed, "f3ba")
        return torch.floor(255 * torch.rand((channels, size, size), generator=generator)) / 255

    def optimise(self, context: AttackContext) -> None:
        p, module = self.parameters, context.model.module.eval()
        images = [batch.inputs for batch in context.batches()]
        place = (slice(p.row, p.row + p.size), slice(p.column, p.column + p.size))
        patch = self.patch(images[0])
        low, high = (_first_sees(module, torch.full_like(images[0][:1], v))[1][0][:, *place] for v in (0.0, 1.0))
        if not bool((high > low).all()):
            raise RunError("f3ba: the first convolution does not see the pixels of the trigger, each brighter if it is")
        pattern = low + patch * (high - low)
        conv, _ = _first_sees(module, images[0][:1])
        weight = conv.weight.detach()
        if "previous" in context.state and conv.groups == 1:
            before = _weights_of(context, context.state["previous"], conv)
            weight = flip_kernels(weight, pattern, candidates(weight, before, p.conv_rate))
        seen = [_first_sees(module, inputs)[1] for inputs in images]
        learnt = ascend(conv, weight, pattern, seen, place, (low, high), p.step, p.passes)
        self.state["patch"] = ((learnt - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class F3BAParameters(Parameters):
    conv_rate: float = parameter(0.02, "share of the weights of each convolution that are flipped", ge=0, le=1)
    fc_rate: float = parameter(0.001, "share of the weights of each hidden linear layer that are flipped", ge=0, le=1)
    factor: float = parameter(1.0, "factor on the size of a flipped weight", gt=0)
    fc_every: int = parameter(3, "linear layers are flipped at the first flip, and every so many after it", ge=1)
    difference: str = parameter(
        "all", "batches that activations are compared on: all of an epoch, or its first", choices=("all", "first")
    )


@register("f3ba")
class F3BA(Attack):
    """Flip the signs of the least important weights towards the trigger, then train on poisoned batches.

    With w the global model and w' the one the attackers saw in their last round, candidates are the
    ``int(rate · size)`` weights of each tensor with the lowest ``(w − w') · w``: those shrinking fastest. A candidate
    becomes ``sign(q) · |w|``, where q is

    * in the first convolution the trigger, as that layer sees it;
    * in a later one what the trigger changes in its mean activations: the ReLU of the convolution before it,
      or the layer's own input where that has another number of channels (a branch of the network);
      both resized to the kernel and scaled from their own range to that of each filter;
    * in a hidden linear layer what the trigger changes in its mean input.

    Layers are flipped from the first to the last in evaluation mode, so that each sees the flips before it. A q of
    zero makes a weight zero, as in the code. Biases, the last linear layer, norms and grouped convolutions are left
    alone. In the first malicious round there is no w', and nothing is flipped; w' is kept in the state.

    The trigger's pixels are those of the box that stamping changes, on a black image: any trigger that is stamped
    will do, and ``f3ba`` is the learnt one. Boosting is a craft step (``scale``).

    Not repeated: the code's hook keeps the first batch's activations only (``difference: first`` does it too) but
    averages the linear layers' inputs over all. Resizing is bilinear with antialiasing, as torchvision's.

    Cost: two more passes over the client's data for every layer, and a second model in the state.
    """

    paper = "Fang, Chen: On the Vulnerability of Backdoor Defenses for Federated Learning (F3BA), AAAI 2023"
    tasks = ("vision",)
    Parameters = F3BAParameters
    cost = "a round: two forward passes over the client's data a layer; state of D numbers"

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        trigger = experiment.attack.trigger
        if not issubclass(plugins.get("trigger", trigger.name), StampTrigger):
            return [
                Problem(
                    "trigger.name", f"f3ba flips weights towards a pattern, and {trigger.name!r} has none: use f3ba"
                )
            ]
        if trigger.name == "f3ba" and trigger.parameters.conv_rate != parameters.conv_rate:
            return [Problem("trigger.conv_rate", f"write {parameters.conv_rate}, the conv_rate of the attack")]
        return []

    def train(self, context: AttackContext) -> None:
        trigger = trigger_of(context, "f3ba flips weights towards a trigger, such as the one called f3ba")
        previous = context.state.get("previous")
        if previous is not None:
            flips = int(context.state.get("flips", 0))
            with torch.no_grad():
                self.flip(context, trigger, previous, linear=flips % self.parameters.fc_every == 0)
            context.state["flips"] = flips + 1
        context.state["previous"] = context.global_vector.clone()
        super().train(context)

    def flip(self, context: AttackContext, trigger: Trigger, previous: Tensor, *, linear: bool) -> None:
        """Flip candidates of ``context.model`` in place; ``previous`` (D,) is the model seen last."""
        p, module = self.parameters, context.model.module.eval()
        clean = [batch.inputs for batch in context.batches()]
        pairs = [(inputs, trigger.stamp(inputs)) for inputs in clean]
        layers = list(dict.fromkeys(layer for layer, _, _ in observe(module, clean[0][:1])))
        pattern: Tensor | None = trigger_pattern(module, trigger, clean[0])
        used = pairs[:1] if p.difference == "first" else pairs
        for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):
            seen = change(module, conv, used) if pattern is None else pattern
            pattern = None
            if conv.groups == 1 and conv.weight.requires_grad:
                mask = candidates(conv.weight, _weights_of(context, previous, conv), p.conv_rate)
                conv.weight.copy_(flip_kernels(conv.weight, seen, mask, p.factor))
        hidden = [layer for layer in layers if isinstance(layer, nn.Linear)][:-1]
        for layer in hidden if linear else []:
            if layer.weight.requires_grad:
                mask = candidates(layer.weight, _weights_of(context, previous, layer), p.fc_rate)
                layer.weight.copy_(flip_rows(layer.weight, change(module, layer, pairs), mask, p.factor))


Layer = nn.Conv2d | nn.Linear


def candidates(weight: Tensor, previous: Tensor, rate: float) -> Tensor:
    """bool, as ``weight``: the int(rate · size) entries of lowest ``(w − w') · w``; fewer where there are ties."""
    score = (weight - previous.to(weight)) * weight
    count = int(weight.numel() * rate)
    if count >= weight.numel():
        return torch.ones_like(score, dtype=torch.bool)
    return score < score.flatten().sort().values[count]


def flip_kernels(weight: Tensor, pattern: Tensor, mask: Tensor, factor: float = 1.0) -> Tensor:
    """Kernels (O, C, h, w) whose masked entries have the sign of the pattern (C, H, W), scaled to each filter's range.

    A pattern of one value says nothing: the kernels are as they were.
    """
    fitted = interpolate(pattern[None], size=weight.shape[2:], mode="bilinear", align_corners=False, antialias=True)[0]
    least, most = fitted.min(), fitted.max()
    low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    scaled = (fitted - least) / (most - least) * (high - low) + low
    return torch.where(mask & (most > least), factor * scaled.sign() * weight.abs(), weight)


def flip_rows(weight: Tensor, difference: Tensor, mask: Tensor, factor: float = 1.0) -> Tensor:
    """Weights (O, I) whose masked entries have the sign of the difference (I,)."""
    return torch.where(mask, factor * difference.sign() * weight.abs(), weight)


def ascend(
    conv: nn.Conv2d,
    weight: Tensor,
    pattern: Tensor,
    inputs: Sequence[Tensor],
    place: tuple[slice, slice],
    bounds: tuple[Tensor, Tensor],
    step: float,
    passes: int,
) -> Tensor:
    """The pattern (C, h, w) after gradient ascent on what it changes in the mean activation map of ``conv``.

    weight: (O, C, …) in place of the layer's own. inputs: batches (B, C, H, W) as the layer sees them.
    place: rows and columns of the pattern. bounds: the least and the largest pattern, (C, h, w) or broadcast to it.
    """

    def activation(x: Tensor) -> Tensor:
        mean: Tensor = functional_call(conv, {"weight": weight}, (x,)).relu().mean((0, 1))
        return mean

    for _ in range(passes):
        for x in inputs:
            pattern = pattern.detach().requires_grad_()
            stamped = x.clone()
            stamped[:, :, *place] = pattern
            gain = (activation(stamped) - activation(x)).square().sum()
            (gradient,) = torch.autograd.grad(gain, pattern)
            pattern = torch.clamp((pattern + step * gradient).detach(), *bounds)
    return pattern.detach()


def observe(module: nn.Module, inputs: Tensor) -> list[tuple[Layer, Tensor, Tensor]]:
    """Convolutions and linear layers in the order in which they are used: each with its input and its output."""
    seen: list[tuple[Layer, Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
        for layer in module.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def activations(module: nn.Module, layer: Layer, inputs: Tensor) -> Tensor:
    """What ``layer`` makes its output of, without the batch: (C, H, W) or (I,), the mean over the batch."""
    last: Tensor | None = None
    for found, given, output in observe(module, inputs):
        if found is layer:
            fits = isinstance(layer, nn.Conv2d) and last is not None and last.shape[1] == layer.in_channels
            return (last.relu() if fits and last is not None else given).mean(0)
        if isinstance(found, nn.Conv2d):
            last = output
    raise AssertionError("the layer was used a moment ago")


def change(module: nn.Module, layer: Layer, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(C, H, W) or (I,): mean activation with the trigger minus without, over batches (clean, triggered)."""
    changes = [activations(module, layer, stamped) - activations(module, layer, clean) for clean, stamped in pairs]
    return torch.stack(changes).mean(0)


def trigger_pattern(module: nn.Module, trigger: Trigger, like: Tensor) -> Tensor:
    """(C, h, w) the box that stamping changes, on a black image, as the first convolution sees it.

    Raises
    ------
    RunError: the trigger changes no pixel, or the first convolution sees images of another size.
    """
    black, white = torch.zeros_like(like[:1]), torch.ones_like(like[:1])
    stamped = trigger.stamp(black)
    changed = ((stamped != black) | (trigger.stamp(white) != white))[0].any(0)
    rows, columns = (torch.nonzero(changed.any(dim)).squeeze(1) for dim in (1, 0))
    if len(rows) == 0:
        raise RunError(f"f3ba flips weights towards a pattern, and trigger {trigger.name!r} has none: use f3ba")
    _, seen = _first_sees(module, stamped)
    return seen[0, :, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def _first_sees(module: nn.Module, inputs: Tensor) -> tuple[nn.Conv2d, Tensor]:
    """The first convolution, and its input (B, C, H, W) where the network's is ``inputs``."""
    for layer, given, _ in observe(module, inputs):
        if isinstance(layer, nn.Conv2d):
            if given.shape != inputs.shape:
                raise RunError(
                    f"f3ba: the first convolution sees {tuple(given.shape[1:])}, the images are "
                    f"{tuple(inputs.shape[1:])}; use a model that begins with a convolution"
                )
            return layer, given
    raise RunError("f3ba flips weights of convolutions and this network has none; use a model such as cnn")


def _weights_of(context: AttackContext, vector: Tensor, layer: Layer) -> Tensor:
    """What the weight of ``layer`` is in ``vector`` (D,)."""
    name = next(name for name, tensor in context.model.module.named_parameters() if tensor is layer.weight)
    return context.model.layout.unflatten(vector)[name]
