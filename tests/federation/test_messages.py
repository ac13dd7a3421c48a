"""What travels between server and client: arrays that stay where they are, and plugin state."""

from __future__ import annotations

import io
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.federation.messages import (
    MODEL,
    ResidentArray,
    identify,
    join_state,
    pack_state,
    split_state,
    to_record,
    to_vector,
    unpack_state,
)

VECTOR = torch.linspace(-3, 3, 11)


# ------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(0,), (7,), (2, 3), ()])
def test_resident_array_is_a_flower_array(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    array = ResidentArray(values)
    assert array.numpy() is values
    assert (array.dtype, array.shape, array.stype) == (str(values.dtype), shape, "numpy.ndarray")
    plain = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data)
    assert np.array_equal(plain.numpy(), values)
    assert array.data == Array(values).data
    assert np.array_equal(np.load(io.BytesIO(array.data), allow_pickle=False), values)


def test_resident_array_survives_pickling() -> None:
    array = ResidentArray(VECTOR.numpy())
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1, "the numbers travel as a buffer, not inside the pickle"
    assert len(text) < 1000
    again = pickle.loads(text, buffers=buffers)  # noqa: S301
    assert type(again) is ResidentArray
    assert np.array_equal(again.numpy(), VECTOR.numpy())
    assert (again.dtype, again.shape, again.stype) == (array.dtype, array.shape, array.stype)


def test_a_record_keeps_the_vector_where_it_is() -> None:
    record = to_record(VECTOR)
    assert list(record) == [MODEL]
    assert type(record[MODEL]) is ResidentArray
    assert to_vector(record).data_ptr() == VECTOR.data_ptr()
    travelled = pickle.loads(pickle.dumps(record))  # noqa: S301
    assert torch.equal(to_vector(travelled), VECTOR)


def test_a_record_leaves_the_graph_behind() -> None:
    assert not to_vector(to_record(VECTOR.clone().requires_grad_())).requires_grad


def test_read_only_memory_is_taken_without_a_warning() -> None:
    values = VECTOR.numpy().copy()
    values.flags.writeable = False
    record = ArrayRecord()
    record[MODEL] = ResidentArray(values)
    assert torch.equal(to_vector(record), VECTOR)


def test_over_a_real_wire_it_becomes_a_plain_array() -> None:
    """Flower's own deflate and inflate, of a whole message, as a SuperLink does it."""
    identify()
    content = RecordDict({"arrays": to_record(VECTOR), "config": ConfigRecord({"round": 3})})
    content = RecordDict({**content, **pack_state({"mask": torch.ones(2, dtype=torch.int64), "k": 1})})
    message = Message(content, 5, MessageType.TRAIN)
    contents = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    inflated = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(inflated, Message)
    arrays = inflated.content.array_records["arrays"]
    assert type(arrays[MODEL]) is Array
    assert torch.equal(to_vector(arrays), VECTOR)
    state = unpack_state(inflated.content)
    assert state["k"] == 1
    assert torch.equal(state["mask"], torch.ones(2, dtype=torch.int64))


def test_a_resident_array_has_the_object_id_of_its_plain_twin() -> None:
    assert ResidentArray(VECTOR.numpy()).object_id == Array(VECTOR.numpy()).object_id


def _raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(3,), stype=stype, data=data)


def _archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(3))
    return buffer.getvalue()


class Bomb:
    """Executing it on load would raise SystemExit."""

    def __reduce__(self) -> Any:
        return (SystemExit, (3,))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, r"one array named 'model', got \[\]"),
        ({"weights": Array(np.zeros(3))}, r"got \['weights'\]"),
        ({MODEL: Array(np.zeros(3)), "more": Array(np.zeros(3))}, r"got \['model', 'more'\]"),
        ({MODEL: Array(np.zeros(3, dtype=np.int64))}, "holds int64"),
        ({MODEL: Array(np.zeros(3, dtype=np.float16))}, "holds float16, not float32 or float64"),
        ({MODEL: Array(np.zeros(3, dtype=np.complex64))}, "holds complex64"),
        ({MODEL: Array(np.zeros(3, dtype=">f4"))}, "holds >f4"),
        ({MODEL: _raw(b"")}, "cannot be read"),
        ({MODEL: _raw(b"no array")}, "cannot be read"),
        ({MODEL: _raw(b"\x93NUMPY")}, "cannot be read"),
        ({MODEL: _raw(b"PK\x03\x04")}, "cannot be read"),
        ({MODEL: _raw(_archive())}, "holds an archive"),
        ({MODEL: _raw(pickle.dumps(Bomb()))}, "cannot be read"),
        ({MODEL: _raw(b"", stype="torch.Tensor")}, "cannot be read"),
    ],
)
def test_what_is_no_vector_is_refused(arrays: dict[str, Array], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        to_vector(ArrayRecord(arrays))


# -------------------------------------------------------------------------------------------------- state

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype), shapes, dtypes)
keys = st.text().filter(lambda key: key != "__tensor__")
states = st.dictionaries(
    keys,
    st.recursive(
        scalars | tensors,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=12,
    ),
    max_size=4,
)


def same(a: Any, b: Any) -> bool:
    """Equal in value and type; tensors also in dtype."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(states)
@settings(max_examples=60, deadline=None)
def test_state_survives_splitting_and_joining(state: dict[str, Any]) -> None:
    found, text = split_state(state)
    assert all(isinstance(tensor, Tensor) for tensor in found.values())
    assert same(join_state(found, text), state)


@given(states)
@settings(max_examples=25, deadline=None)
def test_state_survives_the_journey(state: dict[str, Any]) -> None:
    content = RecordDict({"arrays": to_record(VECTOR), **pack_state(state)})
    assert same(unpack_state(pickle.loads(pickle.dumps(content))), state)  # noqa: S301


def test_state_keeps_what_json_has_no_word_for() -> None:
    state = {"none": None, "inf": math.inf, "nan": math.nan, "big": 10**30, "tiny": 5e-324, "pair": (1, torch.ones(1))}
    found, text = split_state(state)
    back = join_state(found, text)
    assert back["inf"] == math.inf
    assert math.isnan(back["nan"])
    assert back["big"] == 10**30
    assert back["tiny"] == 5e-324
    assert back["pair"] == [1, torch.ones(1)], "a tuple comes back as a list"


def test_tensors_whose_paths_read_alike_are_kept_apart() -> None:
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    assert same(join_state(*split_state(state)), state)


def test_unpacked_state_is_a_copy() -> None:
    mine = torch.zeros(3)
    received = unpack_state(pack_state({"t": mine}))["t"]
    received += 1
    assert torch.equal(mine, torch.zeros(3))


def test_a_message_without_state_has_none() -> None:
    assert unpack_state(RecordDict({"arrays": to_record(VECTOR)})) == {}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"f": len}, "not builtin_function_or_method .at state.f."),
        ({"deep": [{"x": object()}]}, "not object .at state.deep.0.x."),
        ({"n": np.int64(3)}, "not int64"),
        ({"a": np.zeros(3)}, "not ndarray"),
        ({"s": {1, 2}}, "not set"),
        ({"b": b"bytes"}, "not bytes"),
        ({"clients": {3: 1.0}}, "keys of text only, not 3 .at state.clients."),
        ({"__tensor__": "state.x"}, "keys of text only, not '__tensor__'"),
    ],
)
def test_state_that_would_not_come_back_is_refused(state: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        split_state(state)


def test_the_text_is_json() -> None:
    _, text = split_state({"weights": [torch.ones(2), 1.5]})
    assert json.loads(text) == {"weights": [{"__tensor__": "state.weights.0"}, 1.5]}
