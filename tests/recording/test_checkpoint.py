"""Checkpoints: they come back bit for bit, or are known to be damaged; nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fedsim.errors import InputError, RunError
from fedsim.recording import checkpoint
from fedsim.recording.checkpoint import Checkpoint

HASH = "the config's hash"


def a_state(round: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(round)
    return {
        "global_vector": torch.randn(50, generator=generator),
        "last_aggregate": None if round == 1 else torch.randn(50, generator=generator),
        "attack": {
            "mask": torch.arange(3),
            "nested": {"deep": [1, 2.5, None, True, {"t": torch.zeros(2, 2).double()}]},
        },
        "defense": [{}, {"history": [torch.ones(2).bool(), "text", float("inf")], "a.b": torch.tensor(7)}],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with the checkpoints of rounds 10 and 20."""
    for round in (10, 20):
        checkpoint.save(tmp_path / "checkpoints", Checkpoint(round, a_state(round)), HASH)
    return tmp_path / "checkpoints"


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for round in (1, 2):
        checkpoint.save(tmp_path / "c", Checkpoint(round, a_state(round)), HASH)
        found, damaged = checkpoint.load(tmp_path / "c", HASH)
        assert found is not None
        assert found.round == round
        assert same(found.state, a_state(round))
        assert damaged == []


def test_awkward_tensors_come_back(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {
        "view": base[:4],
        "overlapping": base[2:6],
        "whole": base,
        "same": base,
        "transposed": base.view(3, 4).T,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "grad": torch.ones(2, requires_grad=True),
    }
    checkpoint.save(tmp_path / "c", Checkpoint(1, state), HASH)
    found, _ = checkpoint.load(tmp_path / "c", HASH)
    assert found is not None
    assert all(torch.equal(found.state[key], state[key]) for key in state)
    assert not found.state["grad"].requires_grad


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "nowhere", HASH) == (None, [])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for round in (9, 10, 100, 1000):
        checkpoint.save(tmp_path, Checkpoint(round, a_state(round)), HASH)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-000100.json",
        "round-000100.safetensors",
        "round-001000.json",
        "round-001000.safetensors",
    ]


def test_a_checkpoint_can_be_written_again(saved: Path) -> None:
    checkpoint.save(saved, Checkpoint(20, a_state(3)), HASH)
    found, _ = checkpoint.load(saved, HASH)
    assert found is not None
    assert same(found.state, a_state(3))


def test_a_state_that_would_not_come_back_is_refused_before_anything_is_written(saved: Path) -> None:
    with pytest.raises(TypeError, match="not function"):
        checkpoint.save(saved, Checkpoint(30, {"defense": [{"f": lambda: 1}]}), HASH)
    assert not list(saved.glob("*30*"))


# ------------------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def change(**values: Any) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return do


def drop(key: str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        described = json.loads(path.read_text())
        del described[key]
        path.write_text(json.dumps(described))

    return do


def replace(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


WRONG_TYPES = [17, None, [], "text", {"a": [1]}, 1e999, True]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("safetensors", truncate),
        ("safetensors", flip),
        ("safetensors", replace(b"")),
        ("safetensors", os.unlink),
        ("safetensors", as_directory),
        ("json", truncate),
        ("json", replace(b"")),
        ("json", replace(b"\xff\xfe\x00")),
        ("json", replace(b"[" * 200_000)),
        ("json", replace(b'{"a":' * 200_000)),
        ("json", replace(b"9" * 10_000)),
        ("json", as_directory),
        *[("json", replace(json.dumps(value).encode())) for value in WRONG_TYPES],
        *[("json", change(**{key: value})) for key in ("sha256", "state", "state_sha256") for value in WRONG_TYPES],
        *[("json", change(round=value)) for value in [*WRONG_TYPES, 21, 10]],
        *[("json", drop(key)) for key in ("round", "sha256", "state", "state_sha256", "config")],
    ],
)
def test_the_one_before_is_used_and_the_damaged_one_named(
    saved: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    damage(saved / f"round-000020.{suffix}")
    found, damaged = checkpoint.load(saved, HASH)
    assert found is not None
    assert found.round == 10
    assert same(found.state, a_state(10))
    (line,) = damaged
    assert line.startswith("checkpoint round-000020 is damaged (")
    assert line.endswith("; trying the one before")
    assert len(line) < 500


def test_both_damaged_is_nothing_found(saved: Path) -> None:
    truncate(saved / "round-000020.json")
    flip(saved / "round-000010.safetensors")
    found, damaged = checkpoint.load(saved, HASH)
    assert found is None
    assert [line.split()[1] for line in damaged] == ["round-000020", "round-000010"]


def test_tensors_without_a_description_do_not_count(saved: Path) -> None:
    """What a kill between the two files leaves behind."""
    (saved / "round-000030.safetensors").write_bytes(b"half")
    found, damaged = checkpoint.load(saved, HASH)
    assert found is not None
    assert found.round == 20
    assert damaged == []


def test_strangers_names_do_not_count(saved: Path) -> None:
    (saved / "round-latest.json").write_text("{}")
    found, damaged = checkpoint.load(saved, HASH)
    assert found is not None
    assert found.round == 20
    assert len(damaged) == 1


def test_another_config_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="belong to another config; use another directory, or the same config"):
        checkpoint.load(saved, "another hash")


def test_a_full_disk_is_reported_and_the_checkpoints_stay(saved: Path) -> None:
    (saved / f".round-000030.safetensors.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"the disk is full: round-000030\.safetensors could not be written"):
        checkpoint.save(saved, Checkpoint(30, a_state(30)), HASH)
    found, damaged = checkpoint.load(saved, HASH)
    assert found is not None
    assert (found.round, damaged) == (20, [])


# ----------------------------------------------------------------------------------------------------- hostility


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def vouched(directory: Path, raw: bytes, text: str) -> None:
    """A checkpoint of round 20 whose checksums are right, whatever it holds."""
    (directory / "round-000020.safetensors").write_bytes(raw)
    described = {
        "round": 20,
        "config": HASH,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "state": text,
        "state_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (directory / "round-000020.json").write_text(json.dumps(described))


def header(described: Any, data: bytes = b"") -> bytes:
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = safetensors.torch.save({"state.global_vector": torch.zeros(3)})


def test_a_vouched_checkpoint_is_read(saved: Path) -> None:
    """The helper makes what load accepts, so that the refusals below mean something."""
    vouched(saved, GOOD, '{"global_vector": {"__tensor__": "state.global_vector"}}')
    found, damaged = checkpoint.load(saved, HASH)
    assert damaged == []
    assert found is not None
    assert torch.equal(found.state["global_vector"], torch.zeros(3))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("torch_file", [False, True])
def test_a_pickle_is_never_executed(saved: Path, tmp_path: Path, protocol: int, torch_file: bool) -> None:
    proof = tmp_path / "executed"
    if torch_file:
        torch.save({"state.global_vector": Bomb(proof)}, tmp_path / "model.pt")
        raw = (tmp_path / "model.pt").read_bytes()
    else:
        raw = pickle.dumps(Bomb(proof), protocol=protocol)
    vouched(saved, raw, '{"global_vector": {"__tensor__": "state.global_vector"}}')
    found, damaged = checkpoint.load(saved, HASH)
    assert not proof.exists()
    assert found is not None
    assert found.round == 10
    assert len(damaged) == 1


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (GOOD, "["),
        (GOOD, "[" * 100_000),
        (GOOD, "17"),
        (GOOD, '["list"]'),
        (GOOD, '{"global_vector": {"__tensor__": "state.other"}}'),
        (GOOD, '{"global_vector": {"__tensor__": ["state.global_vector"]}}'),
        (GOOD, '{"__tensor__": "state.global_vector"}'),
        (b"\xff" * 64, "{}"),
        (struct.pack("<Q", 2**63) + b"{}", "{}"),
        (header(b"[" * 100_000), "{}"),
        (header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "{}"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4), "{}"),
        (header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4), "{}"),
        (header({"x": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "{}"),
        (header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, b"\0" * 8), "{}"),
    ],
)
def test_hostile_files_are_damaged_files(saved: Path, raw: bytes, text: str) -> None:
    vouched(saved, raw, text)
    found, damaged = checkpoint.load(saved, HASH)
    assert found is not None
    assert found.round == 10
    assert damaged[0].startswith("checkpoint round-000020 is damaged (")
