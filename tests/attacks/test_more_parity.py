"""Chameleon and 3DFed: numbers of their authors' code, reproduced (float64, CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attacks._threedfed import (
    add_neuron_rows,
    decoy_coordinates,
    implant,
    neuron_rows,
    noise_masks,
    read_indicators,
    tune_alpha,
    tune_decoys,
)
from attacks.chameleon import damping_of, supervised_contrast
from fedsim.layout import Entry, Layout
from tests.support.parity import assert_near, tensor

Reference = Callable[[str], dict[str, Any]]


# ---------------------------------------------------------------------------------------------- Chameleon


@pytest.mark.parametrize("index", [0, 1, 2])
def test_chameleon_loss_and_gradient(reference: Reference, index: int) -> None:
    case = reference("chameleon")["cases"][index]
    settings, labels = case["settings"], torch.tensor(case["labels"])
    assert settings["temperature"] == settings["base_temperature"], "their ratio, a factor on the loss, is 1"
    raw = tensor(case["raw"]).requires_grad_()
    poisoned, factor = settings["first_rows_counted_as_poison"], settings["down_scale_weight"]
    loss = supervised_contrast(
        F.normalize(raw, dim=1),
        labels,
        settings["facilitator_label"],
        weight=settings["scale_weight"],
        temperature=settings["temperature"],
        damped=damping_of(labels, poisoned, 1, factor).to(torch.float64),
    )
    loss.backward()
    assert raw.grad is not None
    assert_near(loss.item(), case["expected"]["loss"], 1e-6)
    assert_near(raw.grad, case["expected"]["gradient_wrt_raw"], 1e-6)


# --------------------------------------------------------------------------------------------------- 3DFed

MASKED = [(0, 0), (0, 1), (1, 0)]
"""(case, group)."""


def layout_of(update: dict[str, Any]) -> Layout:
    entries, start = [], 0
    for name, value in update.items():
        entry = Entry(name, tuple(tensor(value).shape), start, True)
        entries.append(entry)
        start = entry.stop
    return Layout(tuple(entries))


def masks_of(case: dict[str, Any], group: int, *, zero_sum: bool) -> tuple[Tensor, Tensor, float]:
    """One group's neurons (K,), masks (G, K, P) and multiplier."""
    settings, given = case["settings"], case["groups"][group]
    neurons = torch.tensor(given["neurons"])
    name = settings["final_layer"]

    def rows(tensors: dict[str, Any]) -> Tensor:
        weight, bias = (tensor(tensors[f"{name}.{part}"]) for part in ("weight", "bias"))
        return torch.cat([weight, bias[:, None]], dim=1)[neurons]

    # their noise overwrites the global layer by adding the difference: what that rounds is the first sum's direction
    layer = rows(case["global_final_layer"])
    masks, multiplier = noise_masks(
        rows(case["backdoor_update"]),
        torch.stack([layer + (rows(noise) - layer) for noise in given["initial_noise_drawn"]]),
        settings["alpha_per_group"][group],
        coefficients=tuple(settings["coefficients"][key] for key in ("inverse_ups", "norm", "lagrange")),
        steps=settings["mask_iterations"],
        lr=settings["mask_lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        lagrange_step=settings["lagrange_step"],
        zero_sum=zero_sum,
    )
    return neurons, masks, multiplier


@pytest.mark.parametrize(("index", "group"), MASKED)
def test_threedfed_constraint(reference: Reference, index: int, group: int) -> None:
    case = reference("threedfed")["cases"][index]
    _, masks, multiplier = masks_of(case, group, zero_sum=False)
    given = case["groups"][group]
    assert_near(torch.linalg.vector_norm(masks.sum(dim=0)), given["final_constraint_norm"], 1e-9)
    assert_near(multiplier, given["final_multiplier"], 1e-9)


@pytest.mark.parametrize(("index", "group"), MASKED)
def test_threedfed_masks_that_sum_to_zero(reference: Reference, index: int, group: int) -> None:
    """What we send unless the code's masks are asked for: the same kind of masks, but they cancel."""
    case = reference("threedfed")["cases"][index]
    _, masks, _ = masks_of(case, group, zero_sum=True)
    assert float(masks.sum(dim=0).abs().max()) < 1e-14
    assert float(masks.abs().max()) > 0.1


@pytest.mark.parametrize("index", [0, 1])
def test_threedfed_submitted_updates(reference: Reference, index: int) -> None:
    case = reference("threedfed")["cases"][index]
    settings, expected = case["settings"], case["expected"]
    layout = layout_of(case["backdoor_update"])
    entries = {entry.name: entry for entry in layout.entries}
    weight, bias = (entries[f"{settings['final_layer']}.{part}"] for part in ("weight", "bias"))
    base = layout.flatten({name: tensor(value) for name, value in case["backdoor_update"].items()})
    quiet = entries[settings["indicator_layer"]]
    sent = {}
    for mask_number, client in enumerate(case["adversary_order_mask_to_client"]):
        group, member = divmod(mask_number, settings["group_size"])
        neurons, masks, _ = masks_of(case, group, zero_sum=False)
        row = base.clone()
        add_neuron_rows(row, weight, bias, neurons, masks[member])
        where = torch.zeros(quiet.shape)
        where[tuple(case["indicator_positions"][client])] = 1
        position = quiet.start + int(where.argmax())
        value = implant(row, position, least=1e-2 if settings["task"] == "MNIST" else 1e-3)
        assert_near(value, expected["indicator_values"][client], 1e-12)
        sent[client] = layout.unflatten(row)
    for client, tensors in enumerate(expected["submitted_updates"]):
        for name, value in tensors.items():
            assert_near(sent[client][name], value, 1e-9)
    groups = range(len(case["groups"]))
    total = torch.stack([torch.zeros(weight.shape[0], weight.shape[1] + 1, dtype=torch.float64) for _ in groups])
    for group in groups:
        neurons, masks, _ = masks_of(case, group, zero_sum=False)
        total[group, neurons] = masks.sum(dim=0)
    assert_near(torch.linalg.vector_norm(total.sum(dim=0)), expected["norm_of_sum_of_masks"], 1e-9)
    assert torch.equal(neuron_rows(base, weight, bias)[:, -1], base[bias.start : bias.stop])


@pytest.mark.parametrize("index", range(5))
def test_threedfed_reading(reference: Reference, index: int) -> None:
    case = reference("threedfed")["indicator_reading"][index]
    threshold = 1e-4 if case["task"] == "MNIST" else 1e-5
    accept, weak_dp = read_indicators(case["feedback_ratios"], threshold)
    assert accept == case["accept"]
    assert weak_dp is case["weak_dp_detected"]


@pytest.mark.parametrize("index", range(5))
def test_threedfed_tuning(reference: Reference, index: int) -> None:
    case = reference("threedfed")["adaptive_tuning"][index]
    adversaries, size = case["adversaries"], case["group_size"]
    drawn: list[list[float]] = []

    def midpoint(low: float, high: float) -> float:
        drawn.append([low, high])
        return (low + high) / 2

    decoys = tune_decoys(case["accept"], adversaries, case["decoys_before"], case["weak_dp"])
    alpha = tune_alpha(
        case["accept"],
        [size] * (adversaries // size),
        case["alpha_before"],
        case["weak_dp"],
        midpoint,
        low=0.2,  # the file's; its released configurations have 0
    )
    assert_near(alpha, case["alpha_after"], 1e-9)
    assert decoys == case["decoys_after"]
    assert_near(tensor(drawn), tensor(case["uniform_draw_intervals"]), 1e-9) if drawn else None
    assert len(drawn) == len(case["uniform_draw_intervals"])


def test_threedfed_decoy_coordinates(reference: Reference) -> None:
    """The three smallest; the authors' code keeps positions of others, by an error in its indices."""
    case = reference("threedfed")["decoy_parameter_choice"]
    backdoor, benign = tensor(case["backdoor"]), tensor(case["benign"])
    found = decoy_coordinates(backdoor.flatten(), benign.flatten(), case["k"])
    pairs = [list(divmod(position, backdoor.shape[1])) for position in found.tolist()]
    assert sorted(pairs) == sorted(case["true_three_smallest"])
    assert sorted(pairs) != sorted(case["official_indices"])
