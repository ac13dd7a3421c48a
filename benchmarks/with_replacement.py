"""A partition for benchmarks: every client holds the same number of examples, drawn from all (they may overlap)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.batch import Examples
from fedsim.plugins import Parameters, parameter, register
from fedsim.streams import numpy_generator
from fedsim.tasks.partition import Partition


@dataclass(frozen=True)
class WithReplacementParameters(Parameters):
    examples: int = parameter(600, "examples per client", ge=1)


@register("with_replacement")
class WithReplacement(Partition):
    """Every client holds a draw, with replacement, of the same size."""

    Parameters = WithReplacementParameters

    def split(self, examples: Examples, clients: int, seed: int) -> list[Tensor]:
        rng = numpy_generator(seed, "partition")
        shape = (clients, self.parameters.examples)
        return list(torch.from_numpy(rng.integers(0, len(examples), shape)).sort(1).values)

    def partitioner(self, examples: Examples, clients: int, seed: int) -> Any:
        raise NotImplementedError("split is overridden")
