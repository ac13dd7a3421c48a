"""Named random streams: every random draw of a run comes from one of these.

A stream is named by (seed, purpose, round, client, …), so a result never depends on the order in
which clients happen to run or on the number of workers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the stream called ``name`` under ``seed`` (SHA-256 of the written-out name)."""
    text = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in name)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the stream called ``name``."""
    return torch.Generator(device=device).manual_seed(derive(seed, *name))


def numpy_generator(seed: int, *name: str | int) -> np.random.Generator:
    """A NumPy generator for the stream called ``name``."""
    return np.random.default_rng(derive(seed, *name))
