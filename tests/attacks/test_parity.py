"""Numbers of other people's code, reproduced (float64, CPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import plugins
from fedsim.attack import Attack, AttackContext
from fedsim.batch import Batch
from fedsim.defense import Defense
from fedsim.direct import LocalAttack, aggregate, local_attack
from fedsim.layout import FlatModel
from tests.support.parity import assert_near

Reference = Callable[[str], dict[str, Any]]


def number(value: Any) -> Tensor:
    tensor = torch.tensor(value, dtype=torch.float64)
    first = value
    while isinstance(first, list):
        first = first[0]
    return tensor.long() if isinstance(first, int) else tensor


def to_batches(batches: Sequence[dict[str, Any]], labels: str = "labels") -> list[Batch]:
    return [Batch(number(batch["inputs"]), number(batch[labels])) for batch in batches]


def started(model: nn.Module, start: dict[str, Any]) -> nn.Module:
    """``model`` in float64 with the weights ``start``."""
    model = model.double()
    model.load_state_dict({name: number(value) for name, value in start.items()})
    return model


def named(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    return FlatModel(model).layout.unflatten(vector)


class Convolutions(nn.Module):
    """The two-convolution model of anticipate.json."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm1 = norm()
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.norm2 = norm()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


class NextWord(nn.Module):
    """The language model of anticipate.json."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 9)

    def forward(self, words: Tensor) -> Tensor:
        scores: Tensor = self.out(self.lstm(self.emb(words))[0])
        return scores.reshape(-1, 9)


class FlatLabels(nn.CrossEntropyLoss):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().forward(outputs, labels.reshape(-1))


ANTICIPATE: dict[str, Callable[[], nn.Module]] = {
    "groupnorm_conv": lambda: Convolutions(lambda: nn.GroupNorm(2, 4)),
    "batchnorm_conv": lambda: Convolutions(lambda: nn.BatchNorm2d(4)),
    "embedding_lstm_lm": NextWord,
}


def anticipate_trigger(target: int) -> Callable[[Batch, int], Batch]:
    def poison(batch: Batch, count: int) -> Batch:
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        if inputs.ndim == 4:
            inputs[:count, :, 0:2, 0:2] = 2.0
            labels[:count] = target
        elif inputs.is_floating_point():
            inputs[:count, 0:2] = 3.0
            labels[:count] = target
        else:
            inputs[:count, -2:] = torch.tensor([7, 3])
            labels[:count, -3:] = torch.tensor([7, 3, target])
        return Batch(inputs, labels)

    return poison


def run_anticipate(case: dict[str, Any], model: nn.Module, loss: nn.Module, **parameters: Any) -> LocalAttack:
    settings = case["settings"]
    return local_attack(
        "anticipate",
        started(model, case["start"]),
        to_batches(case["batches"]),
        trigger=anticipate_trigger(settings["target_label"]),
        poison_fraction=settings["poison_fraction"],
        loss=loss,
        lr=settings["lr"],
        lr_decay=settings["lr_decay_per_round"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        epochs=settings["attacker_local_epochs"],
        benign_epochs=settings["benign_local_epochs"],
        round=settings["round"] + 1,  # theirs counts from 0
        clients_per_round=settings["clients_per_round"],
        k=settings["k"],
        **parameters,
    )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", list(ANTICIPATE))
def test_anticipate(reference: Reference, name: str, checkpoint: bool) -> None:
    case = next(case for case in reference("anticipate")["cases"] if case["name"] == name)
    loss = FlatLabels() if name == "embedding_lstm_lm" else nn.CrossEntropyLoss()
    result = run_anticipate(case, ANTICIPATE[name](), loss, checkpoint=checkpoint)
    assert_near(result.state_dict, case["expected"], 1e-10)
    for buffer in case.get("buffer_names", []):
        assert torch.equal(result.state_dict[buffer], number(case["start"][buffer])), "sent exactly as received"


@pytest.mark.parametrize("index", [0, 1])
def test_anticipate_mlp(reference: Reference, index: int) -> None:
    case = reference("anticipate_mlp")["cases"][index]
    model = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))
    assert_near(run_anticipate(case, model, nn.CrossEntropyLoss()).state_dict, case["expected"], 1e-10)


class Given(Attack):
    """Sends a model that is given."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = vector

    def train(self, context: AttackContext) -> None:
        context.model.load(self.vector)


class Norm(nn.Module):
    """The tensors of anticipate_server.json's mean cases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.bn = nn.BatchNorm1d(3)


@pytest.mark.parametrize("name", ["scale_10_clip_.5_mean", "no_clip_scale_10_mean"])
def test_anticipate_server(reference: Reference, name: str) -> None:
    case = next(case for case in reference("anticipate_server")["cases"] if case["name"] == name)
    settings = case["settings"]
    model = Norm().double()
    start = {key: number(value) for key, value in case["global_start"].items()}
    model.load_state_dict({**model.state_dict(), **start})
    layout, base = FlatModel(model).layout, FlatModel(model).vector
    rows = [layout.flatten({key: number(v) for key, v in raw.items()}) for raw in case["raw_updates"]]
    for row in range(settings["attackers_first"]):
        scale = plugins.create("craft", "scale", factor=settings["attacker_scale"])
        empty = [Batch(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))]
        rows[row] = local_attack(Given(base + rows[row]), model, empty, craft=[scale]).update
    clip = settings["clip_norm"]
    defense = Defense() if clip is None else plugins.create("defense", "norm_clipping", bound=clip)
    result = aggregate(defense, updates=torch.stack(rows), global_vector=base)
    assert_near(layout.unflatten(base + result.vector), case["expected"]["global_after"], 1e-12)


class Neurotoxin(nn.Module):
    """The model of neurotoxin.json."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.fc1 = nn.Linear(12, 6)
        self.fc2 = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.tanh(self.conv(x)), 2).flatten(1)
        scores: Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return scores


@pytest.mark.parametrize("index", [0, 1, 2])
def test_neurotoxin(reference: Reference, make_context: Callable[..., AttackContext], index: int) -> None:
    case = reference("neurotoxin")["cases"][index]
    settings, expected = case["settings"], case["expected"]
    model = started(Neurotoxin(), case["start"])
    benign = [batch for client in case["clean_data"] for batch in to_batches(client)]
    mixed = []  # a poisoned batch and a clean one of another client, whose class 7 is relabelled too
    for poisoned, clean in zip(case["poison_batches"], case["mixed_in_clean_batches"], strict=True):
        labels = number(clean["labels_before"])
        labels[labels == settings["relabelled_clean_class"]] = settings["poison_label"]
        own = torch.full((len(poisoned["labels_before"]),), settings["poison_label"])
        inputs = torch.cat([number(poisoned["inputs"]), number(clean["inputs"])])
        mixed.append(Batch(inputs, torch.cat([own, labels])))
    scope = "global" if settings["mask_scope"].startswith("global") else "per_tensor"
    parameters = {"ratio": settings["ratio_kept"], "scope": scope}

    attack = plugins.create("attack", "neurotoxin", **parameters)
    context = make_context(model, mixed, benign_batches=benign)
    gradient = attack.gradient(context)
    mask = attack.mask(gradient, context)
    layout = context.model.layout
    assert_near(layout.unflatten(gradient), expected["accumulated_clean_gradient"], 1e-10)
    for name, view in layout.unflatten(mask).items():
        assert torch.equal(view.reshape(-1), number(expected["mask"][name])), name
        assert view.sum() == expected["kept_per_tensor"][name]

    result = local_attack(
        "neurotoxin",
        model,
        mixed,
        lr=settings["poison_lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        epochs=settings["poison_epochs"],
        benign_batches=benign,
        **parameters,
    )
    assert_near(result.state_dict, expected["params_after_poison_training"], 1e-10)
    moved = float(result.update[mask == 0].abs().max())
    assert moved == pytest.approx(expected["largest_movement_of_masked_out_coordinate"], abs=1e-10)
    norm = float(torch.linalg.vector_norm(result.update))
    assert norm == pytest.approx(expected["update_norm_before_clip"], abs=1e-10)
    clipped = aggregate("norm_clipping", updates=result.update[None], bound=settings["s_norm"]).vector
    start = FlatModel(model).vector
    assert_near(named(model, start + clipped), expected["params_after_server_clip"], 1e-10)


class TwoLayers(nn.Module):
    """The model of model_replacement.json."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return scores


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("plain_scale_100", "model_replacement"),
        ("plain_scale_100", "constrain_and_scale"),
        ("constrain_and_scale_alpha_.7_two_adversaries", "constrain_and_scale"),
        ("clipped_each_step_and_after_scaling", "constrain_and_scale"),
        ("baseline_no_scaling", "model_replacement"),
    ],
)
def test_model_replacement(reference: Reference, name: str, attack: str) -> None:
    case = next(case for case in reference("model_replacement")["cases"] if case["name"] == name)
    settings, expected = case["settings"], case["expected"]
    adversaries = settings["number_of_adversaries"]
    model = started(TwoLayers(), case["start"])
    parameters: dict[str, Any] = {"step_lr": settings["poison_step_lr"], "adapt_lr": not settings["baseline"]}
    if attack == "constrain_and_scale":
        parameters["alpha"] = settings["alpha_loss"]
        if settings["diff_privacy_clip"]:
            parameters |= {"grad_clip": settings["grad_clip"], "bound": settings["s_norm"]}

    def run(scale: float) -> LocalAttack:
        return local_attack(
            attack,
            model,
            to_batches(case["batches"]),
            lr=settings["poison_lr"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
            epochs=settings["poison_epochs"],
            backdoor_accuracy=settings["backdoor_accuracy_before_percent"] / 100,
            scale=scale,
            **parameters,
        )

    start = FlatModel(model).vector
    # one attacker submits for all of them: boosted by scale / m and sent m times; the baseline sends its model m times
    sent = run(adversaries if settings["baseline"] else settings["scale_weights"])
    assert_near(run(1.0).state_dict, expected["params_before_scaling"], 1e-9)
    assert_near(sent.state_dict, expected["submitted_model"], 1e-9)
    assert_near(named(model, sent.update), expected["update_added_to_accumulator"], 1e-9)
    after = start + sent.update * settings["eta"] / settings["number_of_total_participants"]
    assert_near(named(model, after), expected["global_after_server_with_only_this_update"], 1e-9)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pgd(reference: Reference, index: int) -> None:
    case = reference("pgd")["cases"][index]
    settings, expected = case["settings"], case["expected"]
    model = started(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), case["start"])

    def run(replacement: bool) -> LocalAttack:
        return local_attack(
            "pgd",
            model,
            to_batches(case["batches"]),
            lr=settings["lr"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
            epochs=settings["epochs"],
            num_examples=settings["poisoned_dataset_size"],
            total_examples=settings["samples_in_round"],
            norm=settings["projection"].replace("_", ""),
            eps=settings["eps"],
            frequency=settings["project_frequency"],
            replacement=replacement,
        )

    trained = run(False)
    assert_near(trained.state_dict, expected["params_after_training"], 1e-10)
    distance = float(torch.linalg.vector_norm(trained.update))
    assert distance == pytest.approx(expected["distance_to_global"], abs=1e-10)
    submitted = run(settings["model_replacement"])
    assert_near(submitted.state_dict, expected["params_submitted"], 1e-10)


class Tensors(nn.Module):
    """A model of given parameters and buffers."""

    def __init__(self, weights: Tensor, buffer: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weights)
        self.register_buffer("running_mean", buffer)


def test_single_shot_scale_100(reference: Reference) -> None:
    cases = reference("dba_fcba_triggers")["cases"]
    case = next(case for case in cases if case["name"] == "dba_scale_100_single_shot")
    before, local = case["global_before"], case["attacker_local_before_scaling"]
    model = Tensors(number(before["w"]), number(before["running_mean"]))
    start = FlatModel(model).vector
    scale = plugins.create("craft", "scale", factor=case["scale"])
    empty = [Batch(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))]
    given = Given(FlatModel(model).layout.flatten({key: number(value) for key, value in local.items()}))
    sent = local_attack(given, model, empty, craft=[scale])
    assert_near(sent.state_dict, case["submitted"], 1e-12)
    updates = torch.zeros(case["no_models"], start.shape[0], dtype=torch.float64)
    updates[0] = sent.update
    after = start + case["eta"] * aggregate(Defense(), updates=updates).vector
    assert_near(named(model, after), case["expected_global_after"], 1e-12)
