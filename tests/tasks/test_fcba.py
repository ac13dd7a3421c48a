"""FCBA's trigger: one attacker for every combination of DBA's bars."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fedsim import plugins
from fedsim.batch import Batch, Examples
from fedsim.data import Data
from fedsim.trigger import Trigger
from tests.support.places import reference_numbers


def prepared(name: str = "fcba", size: int = 32, **values: Any) -> Trigger:
    examples = Examples(torch.zeros(4, 3, size, size, dtype=torch.uint8), torch.arange(4))
    trigger: Trigger = plugins.create("trigger", name, **values)
    trigger.prepare(Data(examples, examples, 10, (), (), {"name": "made"}, "0"))
    return trigger


def cells(trigger: Trigger, part: int | None = None, size: int = 32) -> set[tuple[int, int]]:
    """Where a trigger changes a mid-grey image, the same in every channel."""
    changed = trigger.stamp(torch.full((1, 3, size, size), 0.4), part)[0] != 0.4
    assert bool((changed == changed[0]).all())
    return {(int(row), int(column)) for row, column in changed[0].nonzero()}


@pytest.fixture
def expected() -> dict[str, Any]:
    cases = reference_numbers("attacks/dba_fcba_triggers")["cases"]
    found: dict[str, Any] = {case["name"]: case for case in cases}["fcba_cifar_subsets"]
    return found


def test_every_attacker_draws_the_parts_of_the_reference(expected: dict[str, Any]) -> None:
    trigger, pixels = prepared(), expected["part_coordinates_row_col"]
    assert trigger.parts == len(expected["attacker_index_to_parts"]) == 14
    for attacker, parts in expected["attacker_index_to_parts"].items():
        wanted = {tuple(cell) for part in parts for cell in pixels[str(part)]}
        assert cells(trigger, int(attacker)) == wanted
    assert cells(trigger) == {tuple(cell) for part in pixels.values() for cell in part}
    assert trigger.target == expected["settings"]["poison_label_swap"]
    assert set(trigger.stamp(torch.zeros(1, 3, 32, 32)).unique().tolist()) == {0.0, 1.0}


def test_the_combinations_are_all_but_none_and_all() -> None:
    """Worked out from DBA, elsewhere in the image and of another shape."""
    where: dict[str, Any] = {"height": 2, "width": 3, "gap": 1, "row": 5, "column": 7, "value": 0.9}
    trigger, dba = prepared(size=20, **where), prepared("dba", size=20, **where)
    bars = [cells(dba, part, 20) for part in range(4)]
    assert [len(bar) for bar in bars] == [6, 6, 6, 6]
    wanted = {frozenset().union(*chosen) for k in (1, 2, 3) for chosen in itertools.combinations(bars, k)}
    drawn = [frozenset(cells(trigger, part, 20)) for part in range(trigger.parts)]
    assert len(wanted) == len(drawn) == 14
    assert set(drawn) == wanted
    assert cells(trigger, None, 20) == cells(dba, None, 20)


def test_attackers_poison_with_their_part_and_the_test_with_all() -> None:
    trigger = prepared()
    batch = Batch(torch.full((4, 3, 32, 32), 0.4), torch.tensor([0, 1, 2, 5]))
    poisoned = trigger.poison(batch, 2, part=10, generator=torch.Generator())
    assert poisoned.labels.tolist() == [3, 3, 2, 5]
    assert torch.equal(poisoned.inputs[:2], trigger.stamp(batch.inputs[:2], 10))
    assert torch.equal(poisoned.inputs[2:], batch.inputs[2:])
    tested = trigger.test(batch)
    assert torch.equal(tested.inputs, trigger.stamp(batch.inputs))
    assert tested.labels.tolist() == [3] * 4
    with pytest.raises(ValueError, match="parts 0–13, not 14"):
        trigger.stamp(batch.inputs, 14)
