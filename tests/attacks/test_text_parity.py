"""Numbers of other people's code on text, reproduced (float64, CPU)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import plugins
from fedsim.attack import AttackContext
from fedsim.batch import IGNORE, Batch
from fedsim.direct import local_attack
from fedsim.tasks.text import WordLoss
from tests.support.parity import assert_near, tensor

Reference = Callable[[str], dict[str, Any]]


def windows(columns: list[list[int]], length: int, *, carried: bool) -> Iterator[Batch]:
    """The windows of a text laid into columns (T, B), in order; ``carried``: whether the first one goes on too."""
    text = torch.tensor(columns).T
    for start in range(0, text.shape[1] - 1, length):
        inputs, labels = text[:, start:-1][:, :length], text[:, start + 1 :][:, :length]
        yield Batch(inputs, labels, torch.full((len(text),), carried or start > 0))


class TargetWords(nn.Module):
    """As ``WordLoss``; where labels are ignored −log of all target words' probability, at the positions that count."""

    def __init__(self, words: list[int]) -> None:
        super().__init__()
        self.words = words

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        counted = labels != IGNORE
        if bool(counted.all()):
            loss: Tensor = WordLoss()(outputs, labels)
            return loss
        return -outputs.softmax(2)[counted][:, self.words].sum(1).log().mean()


@pytest.mark.parametrize("index", [0, 1])
def test_neurotoxin_next_word(reference: Reference, make_context: Callable[..., AttackContext], index: int) -> None:
    """A tied LSTM whose state goes on over windows and over clients; with the authors' PGD flag in the second case."""
    case = reference("neurotoxin_text")["cases"][index]
    settings, expected = case["settings"], case["expected"]
    network = plugins.create(
        "model",
        "lstm_lm",
        **{key: settings[key] for key in ("embedding", "hidden", "tied")},
        layers=settings["lstm_layers"],
        dropout=0.0,
    )
    model = network.build(settings["vocabulary"], settings["window"], 0).double()
    start = {name: tensor(value) for name, value in case["start"].items()}
    assert set(model.state_dict()) - set(start) == {"decoder.weight"}, "the other name of the embedding"
    model.load_state_dict(start, strict=False)
    length = settings["window"]
    clean = [w for i, text in enumerate(case["clean_data"]) for w in windows(text, length, carried=i > 0)]
    poisoned = []
    for window in windows(case["poison_data"], length, carried=False):
        if window.inputs.shape[1] == length:
            only_last = torch.full_like(window.labels, IGNORE)
            only_last[:, -1] = window.labels[:, -1]
            poisoned.append(window._replace(labels=only_last))
    words = settings["target_labeled"]
    loss = TargetWords(words) if words else WordLoss()
    parameters: dict[str, Any] = {
        "ratio": settings["ratio_kept"],
        "scope": settings["mask_scope"].replace(" ", "_"),
        "bound": settings["s_norm"] if settings["pgd_every_step"] else None,
    }

    context = replace(make_context(model, poisoned, benign_batches=clean), loss=loss)
    attack = plugins.create("attack", "neurotoxin", **parameters)
    gradient = attack.gradient(context)
    mask = attack.mask(gradient, context)
    layout = context.model.layout
    assert {entry.name for entry in layout.entries} == set(expected["mask"]), "the tied weights are there once"
    assert_near(layout.unflatten(gradient), expected["accumulated_clean_gradient"], 1e-10)
    for name, view in layout.unflatten(mask).items():
        assert view.flatten().tolist() == expected["mask"][name], name

    result = local_attack(
        "neurotoxin", model, poisoned, loss=loss, lr=settings["lr"], benign_batches=clean, **parameters
    )
    assert_near(result.state_dict, expected["params_after"], 1e-10)
    assert torch.equal(result.state_dict["decoder.weight"], result.state_dict["encoder.weight"])
    norm = float(torch.linalg.vector_norm(result.update))
    assert norm == pytest.approx(expected["update_norm"], abs=1e-10)
