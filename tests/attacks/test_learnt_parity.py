"""The learnt triggers, and the flips of F3BA, against numbers of the authors' code (normalised pixels, as there)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import a3fl, f3ba, iba
from fedsim import plugins
from fedsim.attack import AttackContext
from fedsim.batch import Batch
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.trigger import StampTrigger
from tests.support.parity import assert_near, tensor

Reference = Callable[[str], dict[str, Any]]
Contexts = Callable[..., AttackContext]
EXACT = 1e-9


def tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor(value) for name, value in values.items()}


def batches(case: dict[str, Any]) -> list[Batch]:
    return [Batch(tensor(b["inputs"]), torch.tensor(b["labels"])) for b in case["batches"]]


# ------------------------------------------------------------------------------------------------- A3FL


def a3fl_network(start: dict[str, Any]) -> nn.Module:
    layers = OrderedDict(
        conv1=nn.Conv2d(2, 3, 3, bias=False),
        tanh1=nn.Tanh(),
        conv2=nn.Conv2d(3, 3, 3, bias=False),
        tanh2=nn.Tanh(),
        flat=nn.Flatten(),
        fc=nn.Linear(12, 4),
    )
    network = nn.Sequential(layers).double()
    network.load_state_dict(tensors(start))
    return network


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("leak", [True, False])
def test_a3fl(
    case: int, leak: bool, reference: Reference, make_context: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = reference("a3fl")["cases"][case]
    settings, expected = given["settings"], given["expected"]
    trigger = plugins.create(
        "trigger",
        "a3fl",
        target=settings["target_class"],
        size=2,
        row=2,
        column=2,
        value=settings["initial_trigger"],
        iterations=settings["outer_iterations"],
        lr=settings["trigger_lr"],
        weight=settings["noise_loss_lambda"],
        refresh=settings["adv_refresh_every_K"],
        unlearn_epochs=settings["adv_epochs"],
        leak=leak,
    )
    cosines: list[float] = []
    similarity = a3fl.similarity

    def noted(*arguments: Any) -> float:
        cosines.append(similarity(*arguments))
        return cosines[-1]

    monkeypatch.setattr(a3fl, "similarity", noted)
    context = make_context(a3fl_network(given["start"]), batches(given))
    patch, total = trigger.search(context, trigger.initial(2).double(), *settings["clamp"])

    assert_near(patch, expected["final_trigger_inside_square" if leak else "final_trigger_without_leak_own"], EXACT)
    assert torch.equal(context.model.vector, context.global_vector)
    if leak:
        theirs = expected["adversarial_model_weights_cosine_per_refresh_own"]
        assert len(cosines) == len(theirs)
        for mine, (mean,) in zip(cosines, theirs, strict=True):
            assert_near(mine, mean, EXACT)
        for name, place in context.model.layout.slices().items():
            wanted = tensor(expected["accumulated_parameter_gradients"][name])
            assert_near(total[place].view_as(wanted), wanted, EXACT)


def test_every_case_is_looked_at(reference: Reference) -> None:
    assert [len(reference(name)["cases"]) for name in ("a3fl", "iba", "f3ba")] == [2, 2, 2]


def test_a3fl_leak_is_seen_in_these_numbers(reference: Reference) -> None:
    """Otherwise the test above could not tell the two apart."""
    expected = reference("a3fl")["cases"][1]["expected"]
    assert expected["final_trigger_inside_square"] != expected["final_trigger_without_leak_own"]


# -------------------------------------------------------------------------------------------------- IBA


@pytest.mark.parametrize("case", [0, 1])
def test_iba(case: int, reference: Reference, make_context: Contexts) -> None:
    given = reference("iba")["cases"][case]
    settings, expected = given["settings"], given["expected"]
    layers = OrderedDict(
        c=nn.Conv2d(2, 3, 3), tanh=nn.Tanh(), pool=nn.MaxPool2d(2), flat=nn.Flatten(), f=nn.Linear(12, 4)
    )
    network = nn.Sequential(layers).double()
    network.load_state_dict(tensors(given["classifier_start"]))
    context = make_context(network, batches(given))
    target, eps, (low, high) = settings["target_label"], settings["eps"], settings["clip_range"]

    weights = {name: value.requires_grad_() for name, value in tensors(given["generator_start"]).items()}
    assert {name: (w.shape[0], w.shape[1]) for name, w in weights.items() if w.ndim == 4} == {
        f"{name}.weight": shape for name, shape in iba.shapes("conv", 2, 3).items()
    }
    adam = torch.optim.Adam(weights.values(), lr=0.001)
    losses = iba.generator_pass(weights, adam, context, target, eps, low, high)
    assert_near(losses, expected["generator_losses"], EXACT)
    for name, value in expected["generator_after_one_pass"].items():
        assert_near(weights[name].detach(), value, EXACT)
    assert torch.equal(context.model.vector, context.global_vector)

    # the code's int(2 · portion) images of each batch of 5: one is a fifth
    portion = 1.0 if settings["attack_portion"] == 1.0 else 0.2
    sgd = context.model.sgd(0.05, 0.9, 1e-4)
    losses = iba.classifier_pass(
        tensors(given["target_generator"]),
        sgd,
        context,
        target,
        eps,
        settings["attack_alpha"],
        portion,
        low,
        high,
    )
    assert_near(losses, expected["classifier_losses"], EXACT)
    named = context.model.layout.unflatten(context.model.vector)
    for name, value in expected["classifier_after_one_pass_using_target_generator"].items():
        assert_near(named[name], value, EXACT)


def test_iba_eps_decays_as_theirs(reference: Reference) -> None:
    for row in reference("iba")["eps_schedule"]:
        assert iba.decayed(row["init"], row["rate"], row["t"]) == pytest.approx(row["value"], rel=1e-12)


# ------------------------------------------------------------------------------------------------- F3BA


class Pasted(StampTrigger):
    """The reference's patch, in the pixels that its network sees."""

    def __init__(self, pattern: Tensor, rows: list[int], columns: list[int]) -> None:
        super().__init__()
        self.pattern = pattern
        self.place = (slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1))

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        stamped = inputs.clone()
        stamped[:, :, *self.place] = self.pattern
        return stamped


def f3ba_network(start: dict[str, Any]) -> nn.Module:
    layers = OrderedDict(
        conv1=nn.Conv2d(2, 3, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(3, 4, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flat=nn.Flatten(),
        fc1=nn.Linear(16, 8),
        relu3=nn.ReLU(),
        fc2=nn.Linear(8, 10),
    )
    network = nn.Sequential(layers).double()
    network.load_state_dict(tensors(start))
    return network


def indices(mask: Tensor) -> list[int]:
    found: list[int] = mask.flatten().nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize("case", [0, 1])
def test_f3ba_flips(case: int, reference: Reference, make_context: Contexts) -> None:
    given = reference("f3ba")["cases"][case]
    settings, expected = given["settings"], given["expected"]
    network = f3ba_network(given["model_start"])
    before, previous = tensors(given["model_start"]), tensors(given["previous_global"])
    for name, wanted in expected["candidate_flat_indices"].items():
        rate = settings["conv_rate"] if "conv" in name else settings["fc_rate"]
        assert indices(f3ba.candidates(before[name], previous[name], rate)) == wanted, name

    pattern = tensor(expected["pattern_after_optimisation"] or given["pattern"])
    trigger = Pasted(pattern, settings["trigger_rows"], settings["trigger_cols"])
    attack = plugins.create(
        "attack",
        "f3ba",
        conv_rate=settings["conv_rate"],
        fc_rate=settings["fc_rate"],
        factor=settings["flip_factor"],
        difference="first",
    )
    context = make_context(network, batches(given))
    layout = context.model.layout
    with torch.no_grad():
        attack.flip(context, trigger, layout.flatten(previous), linear=True)
    after = layout.unflatten(context.model.vector)
    for name, value in {**expected["after_conv_flip"], **expected["after_fc_flip"]}.items():
        assert_near(after[name], value, EXACT)
    for name in ("conv1.bias", "conv2.bias", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert torch.equal(after[name], before[name])
    changed = {name: int((after[name].sign() != before[name].sign()).sum()) for name in before}
    assert {name: changed[name] for name in expected["sign_changes_per_tensor"]} == expected["sign_changes_per_tensor"]

    pairs = [(batch.inputs, trigger.stamp(batch.inputs)) for batch in batches(given)]
    assert_near(
        f3ba.change(context.model.module, context.model.module.fc1, pairs),
        given["expected"]["feature_difference"],
        EXACT,
    )


def test_f3ba_trigger_climbs_as_theirs(reference: Reference) -> None:
    given = reference("f3ba")["cases"][1]
    settings = given["settings"]
    conv = f3ba_network(given["model_start"]).conv1
    assert isinstance(conv, nn.Conv2d)
    pattern, before = tensor(given["pattern"]), tensor(given["previous_global"]["conv1.weight"])
    flipped = f3ba.flip_kernels(
        conv.weight.detach(), pattern, f3ba.candidates(conv.weight, before, settings["conv_rate"])
    )
    (top, bottom), (left, right) = settings["trigger_rows"], settings["trigger_cols"]
    bounds = [
        tensor([round((v - m) / s, 2) for m, s in zip(settings["means"], settings["stds"], strict=True)]).view(2, 1, 1)
        for v in (0, 1)
    ]
    learnt = f3ba.ascend(
        conv,
        flipped,
        pattern,
        [batch.inputs for batch in batches(given)],
        (slice(top, bottom + 1), slice(left, right + 1)),
        (bounds[0], bounds[1]),
        step=0.1,
        passes=2,
    )
    assert_near(learnt, given["expected"]["pattern_after_optimisation"], EXACT)


def test_f3ba_trigger_is_the_same_in_pixels(reference: Reference, make_context: Contexts) -> None:
    """On a network that normalises by itself, from pixels to pixels: the published step, in between."""
    given = reference("f3ba")["cases"][1]
    settings = given["settings"]
    mean, std = (tensor(settings[key]).view(1, 2, 1, 1) for key in ("means", "stds"))

    class Normalise(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return (pixels - mean) / std

    network = nn.Sequential(Normalise(), *f3ba_network(given["model_start"]))
    inner = FlatModel(f3ba_network(given["previous_global"])).vector
    pixels = [batch._replace(inputs=batch.inputs * std + mean) for batch in batches(given)]
    trigger = plugins.create("trigger", "f3ba", row=2, column=3, conv_rate=settings["conv_rate"], step=0.1, passes=2)
    trigger.state["patch"] = tensor(given["pattern"]) * std[0] + mean[0]
    context = make_context(network, pixels, settings=LocalSettings(lr=0.1), state={"previous": inner})
    trigger.optimise(context)
    wanted = tensor(given["expected"]["pattern_after_optimisation"]) * std[0] + mean[0]
    # they round the bounds to two decimals, which is at most .005 of a deviation
    assert float((trigger.state["patch"] - wanted.clamp(0, 1)).abs().max()) < 0.005
