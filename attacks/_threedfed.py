"""The parts of 3DFed: noise masks, indicators, adaptive tuning, decoys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsim.layout import Entry, Layout

ACCEPTED, CLIPPED, REJECTED = "acr"


# ------------------------------------------------------------------------------------------------- layers


def final_layer(layout: Layout) -> tuple[Entry, Entry | None]:
    """Weight (C, F) and bias (C,) of the last linear layer: the model's last matrix.

    Raises
    ------
    ValueError: the model has none.
    """
    matrices = [entry for entry in layout.entries if entry.trainable and len(entry.shape) == 2]
    if not matrices:
        raise ValueError("the network has no linear layer")
    weight = matrices[-1]
    bias = weight.name.removesuffix("weight") + "bias"
    return weight, next((e for e in layout.entries if e.trainable and e.name == bias), None)


def indicator_layer(layout: Layout) -> Entry:
    """The tensor for the indicators: the last convolution's; without one, the last weight before the final layer's.

    A network of one layer has them there.
    """
    head, _ = final_layer(layout)
    weights = [e for e in layout.entries if e.trainable and len(e.shape) >= 2 and e != head]
    convolutions = [e for e in weights if len(e.shape) >= 3]
    return (convolutions or weights or [head])[-1]


def neuron_rows(vector: Tensor, weight: Entry, bias: Entry | None) -> Tensor:
    """(C, P) the final layer's neurons out of a vector (D,): weights, then the bias where there is one; a copy."""
    rows = vector[weight.start : weight.stop].view(weight.shape)
    return rows.clone() if bias is None else torch.cat([rows, vector[bias.start : bias.stop, None]], dim=1)


def add_neuron_rows(vector: Tensor, weight: Entry, bias: Entry | None, neurons: Tensor, rows: Tensor) -> None:
    """Add ``rows`` (K, P) to the final layer's ``neurons`` (K,) in a vector (D,), in place."""
    inputs = weight.shape[1]
    vector[weight.start : weight.stop].view(weight.shape)[neurons] += rows[:, :inputs]
    if bias is not None:
        vector[bias.start : bias.stop][neurons] += rows[:, inputs]


# -------------------------------------------------------------------------------------------- noise masks


def noise_masks(
    update: Tensor,
    noise: Tensor,
    alpha: float,
    *,
    coefficients: tuple[float, float, float],
    steps: int = 30,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    lagrange_step: float = 0.1,
    zero_sum: bool = True,
) -> tuple[Tensor, float]:
    """One group's masks (G, K, P) on K neurons of P weights each, and the last Lagrange multiplier.

    ``steps`` of SGD on every mask mᵢ, from ``noise`` centred over the group, on

        [ α Σⱼ c₁ / UPᵢⱼ + (1 − α) c₂ ‖mᵢ‖ + μ c₃ ‖Σₖ mₖ‖ ] / (1 + μ),  UPᵢⱼ = ‖uⱼ + mᵢⱼ‖₁,

    where u is the backdoor update, norms are L2, and μ starts at 1 and grows by ``lagrange_step · ‖Σ mₖ‖`` a step.
    All gradients of a step are taken at the same point. ``zero_sum``: at the end the masks are centred, so that
    they sum to zero. Without it they are the authors' code's, which lets the gradients of the sum accumulate (mask i
    feels it i + 1 times) and leaves the sum as it comes.

    update: u (K, P). noise: (G, K, P). coefficients: c₁, c₂, c₃.
    """
    group = noise.shape[0]
    masks = noise - (noise / group).sum(dim=0)
    velocity, multiplier = torch.zeros_like(masks), 1.0
    times = torch.ones(group) if zero_sum else torch.arange(1.0, group + 1)
    times = times.to(masks)[:, None, None]
    for step in range(steps):
        shown, total = update + masks, masks.sum(dim=0)
        energy = shown.abs().sum(dim=2, keepdim=True).clamp_min(1e-12)
        loud = -coefficients[0] * shown.sign() / energy.square()
        small = coefficients[1] * masks / _length(masks.flatten(1))[:, :, None]
        even = coefficients[2] * total / _length(total.flatten()[None])
        slope = (alpha * loud + (1 - alpha) * small + multiplier * times * even) / (1 + multiplier)
        slope = slope + weight_decay * masks
        velocity = slope if step == 0 else momentum * velocity + slope
        masks = masks - lr * velocity
        multiplier += lagrange_step * float(torch.linalg.vector_norm(masks.sum(dim=0)))
    return (masks - masks.mean(dim=0) if zero_sum else masks), multiplier


def _length(rows: Tensor) -> Tensor:
    """(N, 1) the L2 norms of the rows (N, D), so floored that zero divided by it is zero."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return length.clamp_min(1e-30)


def groups_of(count: int, size: int) -> list[int]:
    """The sizes of the groups ``count`` colluders fall into; nobody is left alone unless there is only one."""
    sizes = [min(size, count - first) for first in range(0, count, size)]
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


# --------------------------------------------------------------------------------------------- indicators


def quiet_coordinates(activity: Tensor, curvature: Tensor, count: int, pool: int = 10) -> Tensor:
    """int64 (count,) where indicators go: of the ``pool · count`` least active, those of least |curvature|.

    activity: (S,) |backdoor update| + |benign update|. curvature: (S,). Ties go to the less active, then the first.
    """
    candidates = activity.argsort(stable=True)[: pool * count]
    return candidates[curvature[candidates].abs().argsort(stable=True)][:count]


def implant(update: Tensor, position: int, *, factor: float = 1e5, least: float) -> float:
    """Make ``update`` (D,) in place carry an indicator, and return its value: the update there times ``factor``.

    It is at least ``least`` in size, with the update's sign, positive for zero.
    """
    value = float(update[position]) * factor
    if abs(value) < least:
        value = -least if value < 0 else least
    update[position] = value
    return float(update[position])


def read_indicators(feedback: Sequence[float], threshold: float) -> tuple[list[str], bool]:
    """What became of each indicator, and whether the server adds noise (weak DP).

    feedback: change of the global model there, divided by the indicator. ``r``ejected up to ``threshold``,
    ``c``lipped up to 0.8 of the largest, else ``a``ccepted. A value above 1 or below −threshold can only be noise:
    reading stops there, and the list ends.
    """
    accept: list[str] = []
    for ratio in feedback:
        if ratio > 1 or ratio < -threshold:
            return accept, True
        accept.append(REJECTED if ratio <= threshold else CLIPPED if ratio <= 0.8 * max(feedback) else ACCEPTED)
    return accept, False


def tune_decoys(accept: Sequence[str], adversaries: int, decoys: int, weak_dp: bool) -> int:
    """The number of decoys: fewer by those accepted; one more where no adversary and no decoy got through.

    accept: the adversaries' indicators, then the decoys'.
    """
    if weak_dp:
        return decoys
    mine, theirs = accept[:adversaries], accept[adversaries:]
    left = max(decoys - list(theirs).count(ACCEPTED), 0)
    through = ACCEPTED in mine or CLIPPED in mine or ACCEPTED in theirs
    return left if through else left + 1


def tune_alpha(
    accept: Sequence[str],
    sizes: Sequence[int],
    alpha: Sequence[float],
    weak_dp: bool,
    draw: Callable[[float, float], float],
    *,
    low: float = 0.0,
) -> list[float]:
    """α of each group, from what became of the last ones. A group is accepted if four fifths of it are.

    All accepted: between the two smallest α; some: up to 0.1 above the smallest accepted; none: anew in
    [``low``, 1]. A single group keeps its α as long as it is accepted. With weak DP: 0.1. Result in [0.01, 0.99],
    as drawn where inside.

    accept: of the adversaries, group after group. sizes: of the groups. draw: (a, b) → a number uniform between.
    """
    if weak_dp:
        return [0.1] * len(alpha)
    passed, first = [], 0
    for size, value in zip(sizes, alpha, strict=True):
        if list(accept[first : first + size]).count(ACCEPTED) >= 0.8 * size:
            passed.append(value)
        first += size
    passed.sort()
    if len(sizes) == 1 and passed:
        tuned = list(alpha)
    elif passed:
        high = passed[1] if len(passed) == len(sizes) else passed[0] + 0.1
        tuned = [draw(passed[0], high) for _ in alpha]
    else:
        tuned = [draw(low, 1.0) for _ in alpha]
    return [0.99 if a >= 1 else 0.01 if a <= 0 else a for a in tuned]


# ------------------------------------------------------------------------------------------------- decoys


def decoy_coordinates(backdoor: Tensor, benign: Tensor, count: int) -> Tensor:
    """int64 (count,) where decoys stand out: two flat updates (S,) differ least."""
    return torch.topk((backdoor - benign).abs(), min(count, backdoor.shape[0]), largest=False, sorted=True).indices


def decoy_slope(difference: Tensor) -> Tensor:
    """Gradient of the decoy's term in its coordinate, of its distance to the benign model's: away, up to 10.

    From no distance at all it goes upwards; in the authors' code the gradient is 0 there, and the decoy stays.
    """
    size = torch.where(difference.abs() > 10, 1e-10, -10.0)
    return torch.where(difference < 0, -size, size)
