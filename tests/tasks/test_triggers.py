"""Image triggers: the contract each one keeps, parity with published code, and every refusal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedsim import plugins
from fedsim.batch import Batch, Examples
from fedsim.data import Data
from fedsim.errors import InputError, RunError
from fedsim.tasks.model import Normalise
from fedsim.trigger import Trigger, poison_count
from tests.support.places import reference_numbers, shared_file

CLASSES = 10


def reference(name: str) -> dict[str, Any]:
    return {case["name"]: case for case in reference_numbers(f"attacks/{name}")["cases"]}


def examples(count: int, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Examples:
    """Random images; labels 0 … 9 in turn."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return Examples(inputs, torch.arange(count) % CLASSES)


def batch_of(count: int, shape: tuple[int, int, int] = (3, 32, 32), dtype: torch.dtype = torch.float32) -> Batch:
    data = examples(count, shape, seed=5)
    return Batch(data.inputs.to(dtype) / 255, data.labels)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def data_of(train: Examples, test: Examples, classes: int = CLASSES) -> Data:
    return Data(train, test, classes, (), (), {"name": "made"}, "0")


TRAIN, TEST = examples(60), examples(40, seed=1)


def edge_file(path: Path, count: int = 12, **columns: Any) -> Path:
    """An edge-case file of CIFAR-sized images; a column given as None is left out."""
    images = examples(count, seed=2).inputs.permute(0, 2, 3, 1).numpy()
    table = {
        "image": [png(image) for image in images],
        "true_label": [0] * count,
        "target_label": [9] * count,
        "split": ["train"] * (count - 4) + ["test"] * 4,
        **columns,
    }
    pq.write_table(pa.table({name: column for name, column in table.items() if column is not None}), path)
    return path


def semantic_file(path: Path, indices: list[int] | None = None, feature: str = "green_cars") -> Path:
    """Names training images of class 1."""
    path.write_text(json.dumps({"about": "…", feature: [1, 11, 21, 31, 41, 51] if indices is None else indices}))
    return path


def options(name: str, folder: Path) -> list[dict[str, Any]]:
    """The parameters each registered image trigger is tested with."""
    known: dict[str, Any] = {
        "pixel_pattern": lambda: [{}, {"row": 0, "column": 0, "target": 1}],
        "patch": lambda: [{}, {"size": 5, "value": 0.25, "corner": "top_left", "margin": 2}, {"row": 4, "column": 9}],
        "dba": lambda: [{}, {"height": 2, "width": 10, "gap": 2, "row": 1, "column": 3, "target": 0}],
        "blended": lambda: [{}, {"alpha": 0.1, "alpha_test": 0.5}],
        "edge_case": lambda: [
            {"path": str(edge_file(folder / "edge.parquet"))},
            {"path": str(edge_file(folder / "nosplit.parquet", split=None)), "target": 4, "augment": True},
        ],
        "semantic": lambda: [
            {"path": str(semantic_file(folder / "features.json"))},
            {"path": str(semantic_file(folder / "features.json")), "copies": 3, "augment": False},
        ],
    }
    return known[name]() if name in known else [{}]


def prepared(name: str, train: Examples = TRAIN, test: Examples = TEST, **values: Any) -> Trigger:
    trigger: Trigger = plugins.create("trigger", name, **values)
    trigger.prepare(data_of(train, test))
    return trigger


NAMES = [name for name in plugins.names("trigger") if "vision" in plugins.get("trigger", name).tasks]


@pytest.fixture(params=NAMES)
def triggers(request, tmp_path) -> list[Trigger]:
    """One registered trigger, prepared in each of its variants."""
    return [prepared(request.param, **values) for values in options(request.param, tmp_path)]


# ------------------------------------------------------------------------------------------- contract


def parts_of(trigger: Trigger) -> list[int | None]:
    return [None, *range(trigger.parts)]


def test_poison_changes_the_first_examples_and_nothing_else(triggers):
    for trigger in triggers:
        for part in parts_of(trigger):
            for count in (0, 1, 3, 8):
                batch = batch_of(8)
                before = Batch(batch.inputs.clone(), batch.labels.clone())
                poisoned = trigger.poison(batch, count, part=part, generator=stream())
                assert torch.equal(batch.inputs, before.inputs)
                assert torch.equal(batch.labels, before.labels)
                assert poisoned.labels[:count].tolist() == [trigger.target] * count
                assert torch.equal(poisoned.labels[count:], before.labels[count:])
                assert torch.equal(poisoned.inputs[count:], before.inputs[count:])
                changed = (poisoned.inputs != before.inputs).flatten(1).any(1)
                assert changed.tolist() == [True] * count + [False] * (8 - count)
                assert poisoned.inputs.shape == before.inputs.shape
                assert poisoned.inputs.dtype == torch.float32
                assert poisoned.labels.dtype == torch.int64
                assert 0 <= float(poisoned.inputs.min()) <= float(poisoned.inputs.max()) <= 1


def test_poison_takes_a_count_larger_than_the_batch_as_all_of_it(triggers):
    for trigger in triggers:
        assert trigger.poison(batch_of(3), 5, generator=stream()).labels.tolist() == [trigger.target] * 3


def test_poison_follows_the_generator_alone(triggers):
    for trigger in triggers:
        state = torch.get_rng_state()
        first, again = (trigger.poison(batch_of(8), 5, generator=stream(3)) for _ in range(2))
        assert torch.equal(first.inputs, again.inputs)
        assert torch.equal(state, torch.get_rng_state())
        trigger.stamp(batch_of(8).inputs)
        assert torch.equal(state, torch.get_rng_state())


def test_stamp_leaves_its_argument_and_stays_in_range(triggers):
    for trigger in triggers:
        for part in parts_of(trigger):
            inputs = batch_of(6).inputs
            before = inputs.clone()
            stamped = trigger.stamp(inputs, part)
            assert torch.equal(inputs, before)
            assert stamped.shape == inputs.shape
            assert stamped.dtype == inputs.dtype
            assert 0 <= float(stamped.min()) <= float(stamped.max()) <= 1
            assert torch.equal(stamped, trigger.stamp(inputs, part))
            assert trigger.stamp(inputs[:0], part).shape == (0, 3, 32, 32)


def test_other_precision_and_memory_format_are_kept(triggers):
    for trigger in triggers:
        wide = batch_of(4, dtype=torch.float64)
        assert trigger.poison(wide, 2, generator=stream()).inputs.dtype == torch.float64
        assert trigger.stamp(wide.inputs).dtype == torch.float64
        last = Batch(wide.inputs.contiguous(memory_format=torch.channels_last), wide.labels)
        poisoned = trigger.poison(last, 2, generator=stream())
        assert poisoned.inputs.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(poisoned.inputs, trigger.poison(wide, 2, generator=stream()).inputs)


def test_held_out_is_raw_and_has_no_example_of_the_target(triggers):
    for trigger in triggers:
        held = trigger.held_out(TEST)
        assert len(held) > 0
        assert held.inputs.dtype == torch.uint8
        assert held.inputs.shape == (len(held), 3, 32, 32)
        assert held.labels.dtype == torch.int64
        assert trigger.target not in held.labels.tolist()


def test_held_out_of_a_pattern_is_the_rest_of_the_test_set(triggers):
    for trigger in triggers:
        if trigger.name in ("edge_case", "semantic"):
            continue
        held, rest = trigger.held_out(TEST), TEST.labels != trigger.target
        assert torch.equal(held.inputs, TEST.inputs[rest])
        assert torch.equal(held.labels, TEST.labels[rest])


def test_a_target_that_is_no_class_is_refused(triggers):
    for trigger in triggers:
        with pytest.raises(InputError, match=rf"target {trigger.target}, .*0–{trigger.target - 1}|no image") as error:
            trigger.prepare(data_of(TRAIN, TEST, trigger.target))
        assert trigger.name in str(error.value)


def test_paper_and_documented_parameters(triggers):
    for trigger in triggers:
        assert trigger.paper
        assert all(f.metadata["doc"] for f in type(trigger.parameters).__dataclass_fields__.values())


def images_drawn(trigger: Trigger, rounds: int = 60) -> set[bytes]:
    seen = set()
    for seed in range(rounds):
        inputs = trigger.poison(batch_of(8), 8, generator=stream(seed)).inputs
        seen |= {(image * 255).round().to(torch.uint8).numpy().tobytes() for image in inputs}
    return seen


def keys(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("name", ["edge_case", "semantic"])
def test_sets_of_examples_train_on_other_images_than_they_measure(name, tmp_path):
    values = options(name, tmp_path)[0]
    trigger = prepared(name, **{**values, "augment": False})
    drawn = images_drawn(trigger)
    held = keys(trigger.held_out(TEST).inputs)
    assert drawn
    assert not drawn & held
    whole = 12 if name == "edge_case" else 6
    assert len(drawn) + len(held) == whole
    other = trigger.poison(batch_of(8), 8, generator=stream(1)).inputs
    assert not torch.equal(other, trigger.poison(batch_of(8), 8, generator=stream(2)).inputs)
    assert torch.equal(trigger.stamp(other), other)


# ---------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("case", ["cifar10", "unnormalised_cifar"])
def test_pixel_pattern_writes_the_reference_pixels(case):
    expected = reference("backdoors101_pattern")[case]
    trigger, inputs = prepared("pixel_pattern"), batch_of(5, dtype=torch.float64).inputs
    normalise = Normalise(3, tuple(expected["mean"]), tuple(expected["std"])).double()
    clean, stamped = normalise(inputs), normalise(trigger.stamp(inputs))
    touched = torch.zeros(32, 32, dtype=torch.bool)
    for pixel in expected["pixels"]:
        touched[pixel["row"], pixel["col"]] = True
        for channel, value in enumerate(pixel["normalised"]):
            found = stamped[:, channel, pixel["row"], pixel["col"]]
            assert torch.allclose(found, torch.full_like(found, value), rtol=0, atol=1e-6)
    assert int(touched.sum()) == 9
    assert torch.equal(stamped[:, :, ~touched], clean[:, :, ~touched])


def test_poisoned_counts_of_the_reference():
    for case in reference("backdoors101_pattern").values():
        for key, count in case["poisoned_count_in_training"].items():
            _, size, _, fraction = key.split("_")
            assert poison_count(float(fraction), int(size)) == count


def cells(trigger: Trigger, shape: tuple[int, int, int], part: int | None = None) -> set[tuple[int, int]]:
    """Where a trigger changes a mid-grey image, the same in every channel."""
    grey = torch.full((1, *shape), 0.4)
    changed = trigger.stamp(grey, part)[0] != 0.4
    assert (changed == changed[0]).all()
    return {(int(row), int(column)) for row, column in changed[0].nonzero()}


@pytest.mark.parametrize(
    ("case", "values"),
    [("dba_cifar", {}), ("dba_mnist", {"width": 4, "gap": 2}), ("fcba_cifar_subsets", {})],
)
def test_dba_draws_the_reference_coordinates(case, values):
    expected = reference("dba_fcba_triggers")[case]
    shape = tuple(expected.get("image_shape_chw", (3, 32, 32)))
    trigger = prepared("dba", train=examples(3, shape), **values)
    local = expected.get("local_pattern_coordinates_row_col") or expected["part_coordinates_row_col"]
    assert trigger.parts == len(local) == 4
    for part, coordinates in local.items():
        assert cells(trigger, shape, int(part)) == set(map(tuple, coordinates))
    union = {tuple(cell) for coordinates in local.values() for cell in coordinates}
    assert cells(trigger, shape) == union
    if "global_pattern_coordinates_row_col" in expected:
        assert union == set(map(tuple, expected["global_pattern_coordinates_row_col"]))
        assert expected["value_written"] == 1
        stamped = trigger.stamp(torch.zeros(1, *shape))
        assert set(stamped.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("case", ["dba_cifar", "dba_mnist"])
def test_dba_poisons_the_reference_batch(case):
    expected = reference("dba_fcba_triggers")[case]
    shape = tuple(expected["image_shape_chw"])
    trigger = prepared("dba", train=examples(3, shape), **({} if case == "dba_cifar" else {"width": 4, "gap": 2}))
    clean = Batch(torch.rand((8, *shape), generator=stream()) * 0.9, torch.arange(8))
    assert trigger.target == expected["settings"]["poison_label_swap"]
    for key, part in (("train_with_pattern_1", 1), ("test_global", None)):
        wanted = expected["batch_of_8_labels_0_to_7"][key]
        poisoned = trigger.poison(clean, wanted["poisoned_count"], part=part, generator=stream())
        assert poisoned.labels.tolist() == wanted["labels"]
        changed = (poisoned.inputs != clean.inputs).flatten(1).any(1)
        assert changed.nonzero().squeeze(1).tolist() == wanted["poisoned_rows"]


def test_dba_draws_the_official_bars_of_tiny_imagenet():
    trigger = prepared("dba", train=examples(3, (3, 64, 64)), height=2, width=10, gap=2)
    rows, columns = (range(2), range(4, 6)), (range(10), range(12, 22))
    for part, (tall, wide) in enumerate((tall, wide) for tall in rows for wide in columns):
        assert cells(trigger, (3, 64, 64), part) == {(row, column) for row in tall for column in wide}


# --------------------------------------------------------------------------------------------- patterns


def square(top: int, left: int, size: int) -> set[tuple[int, int]]:
    return {(top + i, left + j) for i in range(size) for j in range(size)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, square(29, 29, 3)),
        ({"corner": "top_left"}, square(0, 0, 3)),
        ({"corner": "top_right", "size": 2}, square(0, 30, 2)),
        ({"corner": "bottom_left", "size": 4, "margin": 1}, square(27, 1, 4)),
        ({"row": 5}, square(5, 29, 3)),
        ({"row": 5, "column": 0, "size": 1}, square(5, 0, 1)),
        ({"size": 32}, square(0, 0, 32)),
    ],
)
def test_patch_lies_where_it_is_told(values, expected):
    trigger = prepared("patch", **values)
    assert cells(trigger, (3, 32, 32)) == expected
    assert cells(prepared("patch", value=0.0, **values), (3, 32, 32)) == expected
    assert float(prepared("patch", value=0.7, **values).stamp(torch.zeros(1, 3, 32, 32)).max()) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("name", "values", "shape", "message"),
    [
        ("pixel_pattern", {}, (1, 8, 8), "rows 3–7 and columns 23–25, the images are 8×8: use row in 0–3 .* 0–5"),
        ("pixel_pattern", {"row": 28}, (3, 32, 32), "use row in 0–27 and column in 0–29"),
        ("pixel_pattern", {"column": 30}, (3, 32, 32), "use row in 0–27 and column in 0–29"),
        ("pixel_pattern", {}, (1, 4, 32), "at least 5×3"),
        ("patch", {"size": 33}, (3, 32, 32), "at least 33×33; make it smaller"),
        ("patch", {"size": 3, "margin": 30}, (3, 32, 32), "use row in 0–29"),
        ("patch", {"row": 30}, (3, 32, 32), "use row in 0–29"),
        ("dba", {}, (1, 8, 8), "at least 5×15"),
        ("dba", {"row": 28}, (3, 32, 32), "rows 28–32 .* use row in 0–27 and column in 0–17"),
    ],
)  # fmt: skip
def test_a_trigger_outside_the_image_is_refused(name, values, shape, message):
    trigger = plugins.create("trigger", name, target=0, **values)
    data = examples(3, shape)
    with pytest.raises(InputError, match=message):
        trigger.prepare(data_of(data, data))
    with pytest.raises(InputError, match=message):
        trigger.stamp(torch.zeros(2, *shape))


@pytest.mark.parametrize("row", [0, 27])
@pytest.mark.parametrize("column", [0, 29])
def test_the_extreme_positions_that_the_message_names_fit(row, column):
    trigger = prepared("pixel_pattern", row=row, column=column)
    assert len(cells(trigger, (3, 32, 32))) == 9


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="parts 0–3, not 4"):
        prepared("dba").stamp(batch_of(2).inputs, 4)
    with pytest.raises(ValueError, match="parts 0–0, not 1"):
        prepared("patch").stamp(batch_of(2).inputs, 1)


def test_blended_mixes_with_one_weight_in_training_and_one_in_testing():
    trigger, batch = prepared("blended", alpha=0.1, alpha_test=0.5), batch_of(6)
    pattern = prepared("blended", alpha=1.0).stamp(batch.inputs)[0]
    assert float(pattern.std()) == pytest.approx(12**-0.5, abs=0.02)  # uniform in [0, 1]
    torch.testing.assert_close(trigger.stamp(batch.inputs), 0.5 * batch.inputs + 0.5 * pattern)
    poisoned = trigger.poison(batch, 2, generator=stream()).inputs
    torch.testing.assert_close(poisoned[:2], 0.9 * batch.inputs[:2] + 0.1 * pattern)
    other = prepared("blended", alpha=1.0, pattern_seed=1).stamp(batch.inputs)[0]
    assert not torch.equal(other, pattern)


@pytest.mark.parametrize("channels", [1, 3])
def test_blended_takes_an_image_file(channels, tmp_path):
    colour = np.zeros((64, 64, 3), np.uint8)
    colour[:, :32] = (255, 0, 0)
    Image.fromarray(colour).save(tmp_path / "half.png")
    data = examples(3, (channels, 16, 16))
    trigger = prepared("blended", train=data, alpha=1.0, image=str(tmp_path / "half.png"))
    stamped = trigger.stamp(torch.rand(2, channels, 16, 16))[0]
    expected = [1.0, 0.0, 0.0] if channels == 3 else [0.298]  # ITU-R 601 luma of red
    for channel, value in enumerate(expected):
        assert stamped[channel, 8, 2].item() == pytest.approx(value, abs=0.01)
        assert stamped[channel, 8, 13].item() == 0


def test_blended_refusals(tmp_path):
    with pytest.raises(RunError, match="not prepared"):
        plugins.create("trigger", "blended").stamp(batch_of(2).inputs)
    (tmp_path / "no.png").write_bytes(b"no image")
    for path in (tmp_path / "no.png", tmp_path / "missing.png"):
        with pytest.raises(InputError, match="cannot be read as an image"):
            prepared("blended", image=str(path))
    with pytest.raises(InputError, match="1 or 3 channels, not 2"):
        prepared("blended", train=examples(3, (2, 8, 8)), image=str(tmp_path / "no.png"))
    cls = plugins.get("trigger", "blended")
    problems = cls.problems(cls.Parameters(image=str(tmp_path / "missing.png")), None)
    assert [p.path for p in problems] == ["image"]
    assert not cls.problems(cls.Parameters(), None)


# ------------------------------------------------------------------------------------------ edge cases


def test_edge_case_takes_split_labels_and_target_from_the_file(tmp_path):
    labels = [0] * 8 + [0, 3, 3, 9]  # the last one's true label is the target: nothing to measure
    path = edge_file(tmp_path / "edge.parquet", true_label=labels)
    trigger = prepared("edge_case", path=str(path))
    images = examples(12, seed=2).inputs
    assert trigger.target == 9
    assert images_drawn(trigger) == keys(images[:8])
    held = trigger.held_out(TEST)
    assert torch.equal(held.inputs, images[8:11])
    assert held.labels.tolist() == [0, 3, 3]
    assert prepared("edge_case", path=str(path), target=3).held_out(TEST).labels.tolist() == [0, 9]


def test_edge_case_drops_training_images_that_are_measured(tmp_path):
    images = examples(12, seed=2).inputs.permute(0, 2, 3, 1).numpy()
    images[3] = images[10]
    path = edge_file(tmp_path / "edge.parquet", image=[png(image) for image in images])
    trigger = prepared("edge_case", path=str(path))
    assert len(images_drawn(trigger)) == 7
    assert len(trigger.held_out(TEST)) == 4


def test_edge_case_without_a_split_holds_out_a_seeded_share(tmp_path):
    path = str(edge_file(tmp_path / "edge.parquet", split=None))
    held = [keys(prepared("edge_case", path=path, **v).held_out(TEST).inputs) for v in (
        {}, {}, {"split_seed": 1}, {"held_out_share": 0.5}
    )]  # fmt: skip
    assert [len(h) for h in held] == [3, 3, 3, 6]
    assert held[0] == held[1] != held[2]


def test_edge_case_draws_without_replacement_then_over_again(tmp_path):
    trigger = prepared("edge_case", path=str(edge_file(tmp_path / "edge.parquet")))
    once = trigger.poison(batch_of(8), 8, generator=stream()).inputs
    assert len(keys(once)) == 8
    twice = trigger.poison(batch_of(16), 16, generator=stream()).inputs
    assert all(sum(torch.equal(image, other) for other in twice) == 2 for image in twice)


def test_edge_case_takes_raw_bytes(tmp_path):
    images = examples(8, (1, 28, 28), seed=2).inputs
    table = {
        "image": pa.array([image.numpy().tobytes() for image in images], pa.binary(784)),
        "true_label": [7] * 8,
        "target_label": [1] * 8,
    }
    pq.write_table(pa.table(table), tmp_path / "raw.parquet")
    data = examples(3, (1, 28, 28))
    trigger = prepared("edge_case", train=data, path=str(tmp_path / "raw.parquet"))
    assert keys(trigger.held_out(data).inputs) < keys(images)
    with pytest.raises(InputError, match=r"\(1, 28, 28\), the data's \(3, 32, 32\)"):
        prepared("edge_case", path=str(tmp_path / "raw.parquet"))
    square = examples(3, (4, 14, 14))
    assert prepared("edge_case", train=square, path=str(tmp_path / "raw.parquet")).held_out(square).inputs.shape == (
        2, 4, 14, 14,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "values", "message"),
    [
        ({"image": None}, {}, "no column 'image'; it has: true_label, target_label, split"),
        ({"true_label": None}, {}, "no column 'true_label'"),
        ({"target_label": None}, {}, "no column 'target_label'"),
        ({"true_label": ["0"] * 12}, {}, "'true_label' must hold whole numbers"),
        ({"target_label": [None] + [9] * 11}, {}, "'target_label' must hold whole numbers"),
        ({"target_label": [8] + [9] * 11}, {}, r"target_label holds \[8, 9\]; name one as target"),
        ({"split": ["val"] + ["test"] * 11}, {}, r"split holds \['val'\]; use train and test only"),
        ({"split": ["train"] * 12}, {}, "no image to measure on"),
        ({"split": ["test"] * 12}, {}, "no image to train on"),
        ({}, {"target": 0}, "no image to measure on .*use another target"),
        ({}, {"target": 10}, "target 10, but there are 10 classes"),
        ({"image": [b"no image"] * 12}, {}, "row 0: the image cannot be decoded"),
    ],
)
def test_edge_case_refuses_files_it_cannot_use(columns, values, message, tmp_path):
    path = edge_file(tmp_path / "edge.parquet", **columns)
    with pytest.raises(InputError, match=message):
        prepared("edge_case", path=str(path), **values)


def test_edge_case_target_given_needs_no_target_column(tmp_path):
    path = edge_file(tmp_path / "edge.parquet", target_label=None)
    trigger = plugins.create("trigger", "edge_case", path=str(path), target=5)
    assert trigger.target == 5
    trigger.prepare(data_of(TRAIN, TEST))
    assert trigger.target == 5


@pytest.mark.parametrize("name", ["edge_case", "semantic"])
def test_sets_refuse_a_missing_or_unreadable_file_and_use_before_prepare(name, tmp_path):
    cls, path = plugins.get("trigger", name), str(tmp_path / "missing")
    assert [p.path for p in cls.problems(cls.Parameters(path=path), None)] == ["path"]
    with pytest.raises(InputError, match=r"path: no such file: .*missing'; give the "):
        prepared(name, path=path)
    (tmp_path / "missing").write_bytes(b"\x00\x01 neither")
    assert not cls.problems(cls.Parameters(path=path), None)
    with pytest.raises(InputError, match="cannot be read as"):
        prepared(name, path=path)
    trigger = plugins.create("trigger", name, path=path)
    with pytest.raises(RunError, match="prepare"):
        trigger.held_out(TEST)
    with pytest.raises(RunError, match="prepare"):
        trigger.poison(batch_of(2), 1, generator=stream())


def test_augmented_draws_are_shifted_or_mirrored_copies(tmp_path):
    path = str(edge_file(tmp_path / "edge.parquet"))
    plain = prepared("edge_case", path=path).poison(batch_of(8), 8, generator=stream(4)).inputs
    moved = prepared("edge_case", path=path, augment=True).poison(batch_of(8), 8, generator=stream(4)).inputs
    assert not torch.equal(plain, moved)
    for image, copy in zip(plain, moved, strict=True):
        middle = copy[:, 8:24, 8:24]
        places = [
            torch.equal(side[:, r : r + 16, c : c + 16], middle)
            for side in (image, image.flip(2))
            for r in range(4, 13)
            for c in range(4, 13)
        ]
        assert sum(places) == 1


def test_southwest_is_disjoint_once_the_photograph_in_both_splits_is_gone():
    trigger = prepared("edge_case", path=str(shared_file("data", "edge_southwest.parquet")))
    held = trigger.held_out(TEST)
    assert trigger.target == 9
    assert len(held) == 196
    assert set(held.labels.tolist()) == {0}
    drawn = trigger.poison(batch_of(780), 780, generator=stream()).inputs
    drawn = keys((drawn * 255).round().to(torch.uint8))
    assert len(drawn) == 780
    assert not drawn & keys(held.inputs)


def test_ardis_sevens():
    data = examples(3, (1, 28, 28))
    trigger = prepared("edge_case", train=data, path=str(shared_file("data", "edge_ardis7.parquet")))
    held = trigger.held_out(data)
    assert (trigger.target, len(held), set(held.labels.tolist())) == (1, 25, {7})


# --------------------------------------------------------------------------------------------- semantic


def test_semantic_excludes_all_its_images_and_holds_some_out(tmp_path):
    path = str(semantic_file(tmp_path / "f.json"))
    trigger = prepared("semantic", path=path, augment=False)
    assert trigger.target == 2
    assert trigger.excluded(TRAIN).tolist() == [1, 11, 21, 31, 41, 51]
    assert trigger.excluded(TRAIN).dtype == torch.int64
    held = trigger.held_out(TEST)
    assert len(held) == 2
    assert held.labels.tolist() == [1, 1]
    own = TRAIN.inputs[[1, 11, 21, 31, 41, 51]]
    assert images_drawn(trigger) | keys(held.inputs) == keys(own)
    other = [keys(prepared("semantic", path=path, split_seed=s).held_out(TEST).inputs) for s in range(6)]
    assert len({frozenset(h) for h in other}) > 1


def test_semantic_holds_out_the_images_named(tmp_path):
    path = str(semantic_file(tmp_path / "f.json"))
    trigger = prepared("semantic", path=path, held_out_indices=[31, 11, 31], augment=False)
    assert torch.equal(trigger.held_out(TEST).inputs, TRAIN.inputs[[11, 31]])
    assert images_drawn(trigger) == keys(TRAIN.inputs[[1, 21, 41, 51]])


def test_semantic_copies_are_the_images_and_then_random_views(tmp_path):
    path = str(semantic_file(tmp_path / "f.json"))
    one, many, again = (prepared("semantic", path=path, copies=c).held_out(TEST) for c in (1, 5, 5))
    assert len(many) == 5 * len(one)
    assert torch.equal(many.inputs[: len(one)], one.inputs)
    assert torch.equal(many.inputs, again.inputs)
    assert len(keys(many.inputs)) > 5
    assert set(many.labels.tolist()) == {1}


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        ([1, 60], {}, "names training image 60, the training set has 60"),
        ([1, 12], {}, "of several classes"),
        ([], {}, "a list of training indices under 'green_cars'"),
        (["1"], {}, "a list of training indices"),
        ([-1], {}, "a list of training indices"),
        ([1, 11], {"feature": "striped_wall"}, "under 'striped_wall'"),
        ([1, 11], {"held_out_indices": [1, 21]}, r"held_out_indices: \[21\] are not among"),
        ([1, 11], {"held_out_indices": [1, 11]}, "no image to train on"),
        ([1, 11], {"held_out_indices": []}, "no image to measure on"),
        ([1, 11, 21, 31], {"target": 1}, "no image to measure on .*use another target"),
    ],
)
def test_semantic_refusals(indices, values, message, tmp_path):
    path = semantic_file(tmp_path / "f.json", indices)
    with pytest.raises(InputError, match=message):
        prepared("semantic", path=str(path), **values)


def test_semantic_needs_the_whole_training_set(tmp_path):
    cls = plugins.get("trigger", "semantic")
    parameters = cls.Parameters(path=str(semantic_file(tmp_path / "f.json")))
    for limit, expected in ((None, []), (5000, ["name"])):
        experiment = SimpleNamespace(task=SimpleNamespace(train_examples=limit))
        assert [p.path for p in cls.problems(parameters, experiment)] == expected


@pytest.mark.parametrize(
    ("feature", "total", "held"), [("racing_stripes", 22, 6), ("green_cars", 30, 8), ("striped_wall", 12, 3)]
)
def test_semantic_with_the_published_indices(feature, total, held):
    path = shared_file("data", "cifar10_semantic_backdoor_indices.json")
    listed = json.loads(path.read_text())[feature]
    labels = torch.zeros(50_000, dtype=torch.int64)
    labels[listed] = 1
    train = Examples(examples(50_000, (1, 4, 4)).inputs, labels)
    trigger = prepared("semantic", train=train, path=str(path), feature=feature, augment=False)
    assert trigger.excluded(train).tolist() == sorted(listed)
    assert len(listed) == total
    assert len(trigger.held_out(TEST)) == held
