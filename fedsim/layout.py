"""The layout of a model: state dict ↔ one flat vector.

The vector holds the trainable parameters first, then the floating-point buffers (running statistics
travel with an update), each in the model's own order: ``vector[:trainable]`` is what training moves.
Tied weights are counted once. Integer buffers (BatchNorm's batch counters) are not part of it: averaging
them means nothing. They start anew whenever a model is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: its name, shape and place in the vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    trainable: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Layout:
    """Where every tensor of a model lies in its flat vector of length D."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of ``module``: parameters that require gradients, then the rest that floats."""
        tensors: list[tuple[str, Tensor, bool]] = []
        frozen: list[tuple[str, Tensor, bool]] = []
        for name, parameter in module.named_parameters():
            (tensors if parameter.requires_grad else frozen).append((name, parameter, parameter.requires_grad))
        persistent = set(module.state_dict(keep_vars=True))
        for name, buffer in module.named_buffers():
            if name in persistent and buffer.is_floating_point():
                frozen.append((name, buffer, False))
        entries, start = [], 0
        for name, tensor, trainable in tensors + frozen:
            entry = Entry(name, tuple(tensor.shape), start, trainable)
            entries.append(entry)
            start = entry.stop
        return cls(tuple(entries))

    @cached_property
    def size(self) -> int:
        """D, the length of the vector."""
        return self.entries[-1].stop if self.entries else 0

    @cached_property
    def trainable(self) -> int:
        """Length of the trainable part, ``vector[:trainable]``."""
        return sum(entry.size for entry in self.entries if entry.trainable)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Name → view into ``vector`` (D,) with the tensor's shape; differentiable."""
        pieces = torch.split(vector, [entry.size for entry in self.entries])
        return {e.name: piece.view(e.shape) for e, piece in zip(self.entries, pieces, strict=True)}

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """The vector (D,) of the named tensors (a state dict will do: extra names are ignored)."""
        return torch.cat([tensors[entry.name].detach().reshape(-1) for entry in self.entries])

    def slices(self) -> dict[str, slice]:
        """Name → slice of the vector."""
        return {entry.name: slice(entry.start, entry.stop) for entry in self.entries}


class FlatModel:
    """A module whose tensors are views into one vector: loading a model is one copy, a step one operation.

    Attributes
    ----------
    module: the network; forward passes go through it.
    vector: (D,) the model itself. Writing into it changes the module.
    gradient: (T,) where ``backward`` accumulates the gradient of the trainable part.
    """

    def __init__(self, module: nn.Module, *, device: torch.device | str = "cpu") -> None:
        self.module = module.to(device)
        self.layout = Layout.of(module)
        dtype = next(module.parameters()).dtype
        self.vector = torch.empty(self.layout.size, dtype=dtype, device=device)
        self.gradient = torch.zeros(self.layout.trainable, dtype=dtype, device=device)
        self._sgd: torch.optim.SGD | None = None
        tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for entry in self.layout.entries:
            tensor = tensors[entry.name]
            view = self.vector[entry.start : entry.stop].view(entry.shape)
            view.copy_(tensor.detach())
            tensor.data = view
            if entry.trainable:
                tensor.grad = self.gradient[entry.start : entry.stop].view(entry.shape)
        kept = {entry.name for entry in self.layout.entries}
        self._rest = [(buffer, buffer.clone()) for name, buffer in module.named_buffers() if name not in kept]

    @property
    def device(self) -> torch.device:
        return self.vector.device

    @property
    def weights(self) -> Tensor:
        """(T,) the trainable part of the vector, as a view."""
        return self.vector[: self.layout.trainable]

    def sgd(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> torch.optim.SGD:
        """A fresh SGD optimiser of the weights; there is one per model, made once (that costs more than a step)."""
        if self._sgd is None:
            parameter = self.weights.detach().requires_grad_()
            parameter.grad = self.gradient
            self._sgd = torch.optim.SGD([parameter], lr=lr)
        self._sgd.state.clear()
        self._sgd.param_groups[0].update(lr=lr, momentum=momentum, weight_decay=weight_decay)
        return self._sgd

    def load(self, vector: Tensor) -> None:
        """Take over ``vector`` (D,); whatever else the module holds (counters) is as it was at the beginning.

        Raises
        ------
        ValueError: the vector has another length than the model.
        """
        if vector.shape != self.vector.shape:
            raise ValueError(f"the model has {self.layout.size} entries, the vector {tuple(vector.shape)}")
        self.vector.copy_(vector)
        for buffer, initial in self._rest:
            buffer.copy_(initial)
