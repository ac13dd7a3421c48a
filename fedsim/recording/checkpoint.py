"""Checkpoints: safetensors and JSON, enough to continue bit for bit; the last two are kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedsim.errors import InputError
from fedsim.federation.messages import join_state, split_state
from fedsim.recording.files import write_atomic, write_json

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``round``.

    state: the global vector, the last aggregate, the attack's and the defense stages' state.
    """

    round: int
    state: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint, config_hash: str) -> None:
    """Write ``round-NNNNNN.safetensors`` and ``.json`` (the JSON last: it makes the checkpoint valid)."""
    directory.mkdir(exist_ok=True)
    stem = _stem(checkpoint.round)
    tensors, text = split_state(checkpoint.state)
    # copies, since safetensors refuses tensors that share memory (views of the model, say)
    raw = safetensors.torch.save(
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    )
    write_atomic(directory / f"{stem}.safetensors", lambda path: path.write_bytes(raw))
    described = {
        "round": checkpoint.round,
        "config": config_hash,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "state": text,
        "state_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    write_json(directory / f"{stem}.json", described)
    for old in sorted(directory.glob("round-*.json"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load(directory: Path, config_hash: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and a line about each that is not.

    Raises
    ------
    InputError: a checkpoint is intact but belongs to another config.
    """
    damaged = []
    for path in sorted(directory.glob("round-*.json"), reverse=True):
        try:
            config, found = _read(path)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
            damaged.append(f"checkpoint {path.stem} is damaged ({error}); trying the one before")
            continue
        if config != config_hash:
            raise InputError("the checkpoints here belong to another config; use another directory, or the same config")
        return found, damaged
    return None, damaged


def _read(path: Path) -> tuple[str, Checkpoint]:
    """One checkpoint and the hash of its config; whatever is wrong with the files raises."""
    round = int(path.stem.removeprefix("round-"))
    described = json.loads(path.read_text(encoding="utf-8"))
    raw = path.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(raw).hexdigest() != described["sha256"]:
        raise ValueError("its checksum does not match")
    text = str(described["state"])
    if hashlib.sha256(text.encode()).hexdigest() != described["state_sha256"]:
        raise ValueError("the checksum of its state does not match")
    if described["round"] != round:
        raise ValueError("it is of another round")
    tensors: dict[str, Tensor] = safetensors.torch.load(raw)
    state = join_state(tensors, text)
    if not isinstance(state, dict):
        raise ValueError("its state is no mapping")
    return str(described["config"]), Checkpoint(round, state)


def _stem(round: int) -> str:
    return f"round-{round:06d}"
