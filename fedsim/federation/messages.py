"""What travels between server and client: one flat vector, and a few numbers.

The records follow Flower's names (``arrays``, ``config``, ``metrics`` with ``num-examples``), so that any Flower
strategy can aggregate the replies.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from torch import Tensor

MODEL = "model"
"""Key of the flat vector (D,) in the ``arrays`` record."""

_TENSOR = "__tensor__"


def identify(run_id: int = 1, node_id: int = 1) -> None:
    """Name this process to Flower: since 1.41 a Message can be built only where the task is known."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


class ResidentArray(Array):
    """A Flower array that keeps its ndarray: nothing is serialised until somebody asks for bytes.

    Between our own processes it travels as a buffer (zero-copy through Ray's object store); on a real wire
    Flower reads ``data`` as with any other array, and the other side gets a plain ``Array``.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        self.dtype = str(ndarray.dtype)
        self.shape = tuple(ndarray.shape)
        self.stype = "numpy.ndarray"
        self._ndarray = ndarray

    @property
    def data(self) -> bytes:  # type: ignore[override]
        buffer = io.BytesIO()
        np.save(buffer, self._ndarray, allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> NDArray[Any]:
        return self._ndarray

    def deflate(self) -> bytes:
        return Array(dtype=self.dtype, shape=self.shape, stype=self.stype, data=self.data).deflate()


def _record(tensors: dict[str, Tensor]) -> ArrayRecord:
    """Tensors as an ArrayRecord that keeps them as they are (its constructor would serialise them)."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = ResidentArray(tensor.detach().cpu().numpy())
    return record


def to_record(vector: Tensor) -> ArrayRecord:
    """The vector (D,) as an ArrayRecord; shares memory with a CPU tensor."""
    return _record({MODEL: vector})


def to_vector(record: ArrayRecord | MetricRecord | ConfigRecord) -> Tensor:
    """The vector of an ArrayRecord, without a copy; treat it as read-only.

    Raises
    ------
    ValueError: the record does not hold exactly one floating-point array named ``model``.
    """
    if not isinstance(record, ArrayRecord) or list(record) != [MODEL]:
        raise ValueError(f"expected one array named {MODEL!r}, got {list(record)}")
    try:
        array = record[MODEL].numpy()
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"the array cannot be read: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
        raise ValueError(f"the array holds {getattr(array, 'dtype', 'an archive')}, not float32 or float64 numbers")
    with warnings.catch_warnings():  # shared memory is read-only; nobody writes into it here
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def pack_state(state: dict[str, Any], name: str = "state") -> RecordDict:
    """A plugin's state (tensors, numbers, text, lists, nested) as records; see :func:`split_state`."""
    tensors, text = split_state(state)
    return RecordDict({f"{name}-arrays": _record(tensors), name: ConfigRecord({"json": text})})


def unpack_state(content: RecordDict, name: str = "state") -> dict[str, Any]:
    """The state of that name in a message, {} if it carries none.

    Raises
    ------
    ValueError: what is there cannot be read.
    """
    if name not in content.config_records:
        return {}
    try:
        arrays = content.array_records[f"{name}-arrays"]
        tensors = {key: torch.from_numpy(np.array(array.numpy())) for key, array in arrays.items()}
        state = join_state(tensors, str(content.config_records[name]["json"]))
    except (ValueError, LookupError, TypeError, EOFError, OSError, zipfile.BadZipFile, RecursionError) as error:
        raise ValueError(f"its {name} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"its {name} is no mapping")
    return state


def split_state(state: Any) -> tuple[dict[str, Tensor], str]:
    """Tensors by path, and the rest as JSON in which a tensor is ``{"__tensor__": path}``.

    Raises
    ------
    TypeError: the state holds something that is neither a tensor nor plain data, or a key that is not text.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = path if path not in tensors else f"{len(tensors)}:{path}"  # a key may hold a dot
            tensors[name] = value
            return {_TENSOR: name}
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or key == _TENSOR:
                    raise TypeError(f"plugin state may have keys of text only, not {key!r} (at {path})")
            return {key: walk(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(item, f"{path}.{i}") for i, item in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"plugin state may hold tensors and plain data, not {type(value).__name__} (at {path})")

    return tensors, json.dumps(walk(state, "state"))


def join_state(tensors: dict[str, Tensor], text: str) -> Any:
    """The inverse of :func:`split_state` (tuples come back as lists)."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {_TENSOR}:
                return tensors[value[_TENSOR]]
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return walk(json.loads(text))
